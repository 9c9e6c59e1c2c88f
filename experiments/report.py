"""Every table and figure, from the records alone."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig

from bsfa.errors import InputError
from experiments import figures, frontier, frontier_figures, longbench_tables, style, suite_figures, suites, ttft_report
from experiments.results import METHOD, Section, sections, table
from experiments.tables import markdown, write_table
from experiments.tracking import Tracker

log = logging.getLogger(__name__)

PAPER = (
    "The paper's BSFA, Llama-3.1-8B on an A100, needle at 64K: TTFT 80.4% of dense at 99.3% of dense accuracy; "
    "1.24x at >= 99% (arXiv 2512.07011). That model and that GPU were not run here."
)
REACH = "Percent of blocks skipped where a method's curve crosses the cut (nats a token), log-linear between strengths."
MEANS = (
    "Means over tasks, each with equal weight: over all that ran, and over those that dense attention is able to do, "
    "where it scores at least 50%. Intervals: bootstrap within tasks. TTFT: median of ratios over samples that one "
    "process ran through both."
)
WEAK_TASK = "† dense scores under 50% here: the cell says nothing of a method."
BESIDE = (
    "Accuracy and TTFT in % of dense attention's. Our rows are of the tasks that dense attention is able to do. The "
    "paper's are of all thirteen tasks, by its own prompts, on its own model and device, which were not run here."
)
LONGBENCH = (
    "Scores and intervals in points; means over the tasks that ran, each with equal weight. The paper's are of its own "
    "protocol, model and device, which were not run here. Our own scores' ROUGE-L and code similarity stand at another "
    "height than those of LongBench's scripts, task.scorer=lm_eval."
)
WEAK_SCORE = "† dense scores under 10% here: too little to lose."
POINTS = "KL from dense to the method in nats a token, with a 95% bootstrap interval over texts; means over texts."


def run(cfg: DictConfig) -> None:
    """``python run.py experiment=report``: write ``tables/`` and ``figures/`` and print the main tables.

    Raises
    ------
    InputError
        A results folder without a record.
    """
    root = Path(cfg.results)
    tracker: Tracker = instantiate(cfg.tracker)
    found = {name: read(root, name) for name, (read, _) in WRITERS.items()}
    if not any(found.values()) and not ttft_report.recorded(root):
        commands = " or ".join(f"`python run.py experiment={name}`" for name in (*WRITERS, "ttft"))
        raise InputError(f"{root.resolve()} holds no records; run {commands} first")
    tables: list[Path] = []
    drawn: list[Path] = []
    try:
        for name, several in found.items():
            for section in several:
                for paths, new in zip((tables, drawn), WRITERS[name][1](root, section), strict=True):
                    paths += new
    except OSError as error:
        raise InputError(f"cannot write the report below {root.resolve()}: {error}") from error
    tracker.report(tables, drawn)
    print(f"\ntables: {(root / 'tables').resolve()}\nfigures: {(root / 'figures').resolve()}")


def accuracy(root: Path, section: Section) -> tuple[list[Path], list[Path]]:
    """A prompted experiment: tables and figures; the main table is printed too."""
    main = table(section, ["haystack"])
    tables = [
        *write_table(root / "tables", section.name, section.title, main, readable(main), notes(main)),
        *_cells(root, section),
    ]
    drawn = [
        *style.save(figures.curve(section), root / "figures", f"{section.name}-curve"),
        *style.save(figures.heatmap(section), root / "figures", f"{section.name}-heatmap"),
    ]
    print(f"\n{section.title}\n{markdown(readable(main))}\n{notes(main)}")
    return tables, drawn


def _cells(root: Path, section: Section) -> list[Path]:
    rows = table(section, ["haystack", "length"])
    return write_table(root / "tables", f"{section.name}-cells", section.title, rows, readable(rows), notes(rows))


def fidelity(root: Path, section: Section) -> tuple[list[Path], list[Path]]:
    """Divergence from dense: the curves' points, what each method reaches, and its decisions by head."""
    rows = frontier.points(section)
    main = frontier.reach(rows)
    tables = [
        *write_table(root / "tables", section.name, section.title, main, main, REACH),
        *write_table(root / "tables", f"{section.name}-points", section.title, rows, rows.round(4), POINTS),
    ]
    drawn = [
        *style.save(frontier_figures.curves(rows, section.title), root / "figures", f"{section.name}-curve"),
        *style.save(
            frontier_figures.heatmap(section, "skip_ratio_by_head", "share of blocks skipped"),
            root / "figures",
            f"{section.name}-heads",
        ),
    ]
    print(f"\n{section.title}\n{markdown(main)}\n{REACH}")
    return tables, drawn


def suite(root: Path, section: Section) -> tuple[list[Path], list[Path]]:
    """Several tasks: means over them, every cell, the scores side by side, and the paper's curves beside ours."""
    rows, cells, scores = suites.means(section), suites.cells(section), suites.scores(section)
    beside = suites.beside_the_paper(section)
    main, by_cell = readable_means(rows), readable(cells)
    by_task = scores.assign(**{task: scores[task].map(_percent) for task in scores.columns[len(METHOD) + 1 :]})
    tables = [
        *write_table(root / "tables", section.name, section.title, rows, main, MEANS),
        *write_table(root / "tables", f"{section.name}-cells", section.title, cells, by_cell, WEAK_TASK),
        *write_table(root / "tables", f"{section.name}-tasks", section.title, scores, by_task, "Mean scores, %."),
        *write_table(root / "tables", f"{section.name}-paper", section.title, beside, readable_points(beside), BESIDE),
    ]
    drawn = [
        *style.save(suite_figures.skipped(section), root / "figures", f"{section.name}-skipped"),
        *style.save(suite_figures.timed(section), root / "figures", f"{section.name}-ttft"),
    ]
    print(f"\n{section.title}\n{markdown(main)}\n{MEANS}")
    return tables, drawn


def longbench(root: Path, section: Section) -> tuple[list[Path], list[Path]]:
    """LongBench: its table beside the paper's, and every task."""
    beside, cells = longbench_tables.beside_the_paper(section), longbench_tables.cells(section)
    missing = ", ".join(longbench_tables.not_run(section))
    below = f"{LONGBENCH} Not run: {missing}." if missing else LONGBENCH
    main = readable_beside(beside)
    tables = [
        *write_table(root / "tables", section.name, section.title, beside, main, below),
        *write_table(root / "tables", f"{section.name}-tasks", section.title, cells, readable(cells), WEAK_SCORE),
    ]
    print(f"\n{section.title}\n{markdown(main)}\n{below}")
    return tables, []


def lm_eval(root: Path, section: Section) -> tuple[list[Path], list[Path]]:
    """lm-eval's tasks: every task and length."""
    rows = longbench_tables.lm_eval_cells(section)
    shown = readable_scores(rows)
    print(f"\n{section.title}\n{markdown(shown)}\n{WEAK_SCORE}")
    return write_table(root / "tables", section.name, section.title, rows, shown, WEAK_SCORE), []


WRITERS = {
    "niah": (sections, accuracy),
    "fidelity": (sections, fidelity),
    "ruler": (suites.sections, suite),
    "reasoning": (suites.sections, suite),
    "longbench": (longbench_tables.sections, longbench),
    "lm_eval": (longbench_tables.lm_eval_sections, lm_eval),
}


def readable(rows: pd.DataFrame) -> pd.DataFrame:
    """A table for people: intervals in brackets, weak cells marked."""
    shown = readable_scores(rows)
    shown["TTFT s [quartiles]"] = [
        f"{m:.3g} [{a:.3g}, {b:.3g}]"
        for m, a, b in zip(rows["ttft_median_s"], rows["ttft_q25_s"], rows["ttft_q75_s"], strict=True)
    ]
    for name in ("dense", "sdpa"):
        shown[f"TTFT, {name} / this"] = ["" if pd.isna(x) else f"{x:.2f}" for x in rows[f"speedup_over_{name}"]]
    return shown


def readable_scores(rows: pd.DataFrame) -> pd.DataFrame:
    """The same without times."""
    cells = [key for key in ("task", "haystack", "length") if key in rows]
    shown = rows[[*cells, "method", "strength", "calibration", "n"]].copy()
    weak = rows["weak_dense"].map({True: " †", False: ""})
    shown["accuracy % [95%]"] = [
        f"{100 * s:.1f} [{100 * low:.0f}, {100 * high:.0f}]{mark}"
        for s, low, high, mark in zip(rows["score"], rows["score_low"], rows["score_high"], weak, strict=True)
    ]
    shown["vs dense, points [95%]"] = [
        "" if pd.isna(d) else f"{100 * d:+.1f} [{100 * low:+.0f}, {100 * high:+.0f}]"
        for d, low, high in zip(rows["difference"], rows["difference_low"], rows["difference_high"], strict=True)
    ]
    shown["skip ratio %"] = [f"{100 * ratio:.1f}" for ratio in rows["skip_ratio"]]
    return shown


def readable_means(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over tasks, for people."""
    shown = rows[["length", "method", "strength", "calibration", "n"]].copy()
    shown.insert(1, "tasks", [f"{scope} ({tasks})" for scope, tasks in zip(rows["scope"], rows["tasks"], strict=True)])
    shown["mean % [95%]"] = _intervals(rows, "score", ".1f")
    shown["vs dense, points [95%]"] = _intervals(rows, "difference", "+.1f")
    shown["% of dense [95%]"] = _intervals(rows, "of_dense", ".1f")
    shown["skip ratio %"] = rows["skip_ratio"].map(_percent)
    shown["TTFT % of dense"] = rows["ttft_of_dense"].map(_percent)
    return shown


def readable_points(rows: pd.DataFrame) -> pd.DataFrame:
    """Points of accuracy against time, for people."""
    shown = rows[["source", "model", "device", "length", "method", "strength", "calibration"]].fillna("")
    shown["n"] = rows["n"].map(lambda n: "" if pd.isna(n) else f"{n:.0f}")
    shown["skip ratio %"] = rows["skip_ratio"].map(_percent)
    shown["TTFT % of dense"] = rows["ttft_of_dense"].map(_percent)
    shown["accuracy % of dense [95%]"] = _intervals(rows, "of_dense", ".1f")
    return shown


def readable_beside(rows: pd.DataFrame) -> pd.DataFrame:
    """LongBench's means beside the paper's, for people."""
    shown = rows[["source", "model", "device", "protocol", "method", "strength", "calibration"]].copy()
    for name in ("length", "tasks", "n"):
        shown[name] = rows[name].map(lambda n: "" if pd.isna(n) else f"{n:.0f}")
    shown["mean score [95%]"] = [
        f"{100 * score:.2f}" + ("" if pd.isna(low) else f" [{100 * low:.1f}, {100 * high:.1f}]")
        for score, low, high in zip(rows["score"], rows["score_low"], rows["score_high"], strict=True)
    ]
    shown["skip ratio %"] = rows["skip_ratio"].map(_percent)
    shown["TTFT, dense / this"] = rows["speedup"].map(lambda x: "" if pd.isna(x) else f"{x:.2f}")
    return shown


def _percent(share: float) -> str:
    return "" if pd.isna(share) else f"{100 * share:.1f}"


def _intervals(rows: pd.DataFrame, name: str, form: str) -> list[str]:
    """Percentages with their intervals, where there are any."""
    whole = form.replace(".1f", ".0f")
    columns = (100 * rows[name], 100 * rows[f"{name}_low"], 100 * rows[f"{name}_high"])
    return [
        "" if pd.isna(x) else f"{x:{form}}" + ("" if pd.isna(low) else f" [{low:{whole}}, {high:{whole}}]")
        for x, low, high in zip(*columns, strict=True)
    ]


def notes(rows: pd.DataFrame) -> str:
    """What stands under a table."""
    marked = (
        "† dense scores under 90% here: too little to lose to tell methods apart. " if rows["weak_dense"].any() else ""
    )
    return f"{marked}TTFT ratios are medians over samples that one process ran through both. {PAPER}"
