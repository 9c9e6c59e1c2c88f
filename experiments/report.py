"""Every table and figure, and one page of them all, from the records alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig

from bsfa.errors import InputError
from experiments import (
    equal_kl_report,
    figures,
    frontier,
    frontier_figures,
    frontier_needles,
    kernel_report,
    longbench_tables,
    notes,
    page,
    paper,
    readable,
    results,
    standing,
    suite_figures,
    suites,
    ttft_report,
)
from experiments.chapters import Chapter, Drawing, Table
from experiments.results import METHOD, Section
from experiments.standing import Standing
from experiments.tracking import Tracker
from experiments.unavailable import Unavailable


def run(cfg: DictConfig) -> None:
    """``python run.py experiment=report``: make it, whether or not one stands.

    Raises
    ------
    InputError
        As `make`.
    """
    make(cfg, standing.of_store(cfg))


def make(cfg: DictConfig, report: Standing) -> None:
    """Write ``tables/``, ``figures/`` and ``report.html``; print the main tables.

    Raises
    ------
    Unavailable
        A results folder without a record.
    InputError
        One that cannot be written.
    """
    root = report.root
    tracker: Tracker = instantiate(cfg.tracker)
    found = {name: chapters(name, root) for name in CHAPTERS}
    if not any(found.values()):
        commands = " or ".join(f"`python run.py experiment={name}`" for name in CHAPTERS)
        raise Unavailable(f"{root.resolve()} holds no records; run {commands} first")
    tables: list[Path] = []
    drawn: list[Path] = []
    said: list[str] = []
    try:
        report.forget()
        for chapter in (chapter for several in found.values() for chapter in several):
            for paths, new in zip((tables, drawn), chapter.write(root), strict=True):
                paths += new
            said.append(chapter.main())
            print(said[-1])
        made = page.write(root, found)
        tracker.report(tables, drawn, made)
        report.keep([*tables, *drawn, made], "\n".join(said))
    except OSError as error:
        raise InputError(f"cannot write the report below {root.resolve()}: {error}") from error
    print(standing.places(root))


def chapters(experiment: str, root: Path, only: str | None = None) -> list[Chapter]:
    """All of an experiment, or the one that a run with an id is in."""
    return CHAPTERS[experiment](root, only)


def needles(section: Section) -> Chapter:
    """Needles in haystacks: by haystack, by length too, and the paper's curves beside ours."""
    main, cells = (results.table(section, by) for by in (["haystack"], ["haystack", "length"]))
    points = suites.trade(suites.means(section))
    return Chapter(
        section.title,
        _facts(section, "answers"),
        [
            Table(section.name, "By haystack", main, readable.table(main), notes.needles(main)),
            Table(
                f"{section.name}-cells", "By haystack and length", cells, readable.table(cells), notes.needles(cells)
            ),
            _beside_the_paper(section, points),
        ],
        [
            Drawing(
                f"{section.name}-curve", "Needles found against blocks skipped, by haystack", figures.curve(section)
            ),
            Drawing(f"{section.name}-heatmap", "Needles found by length and depth", figures.heatmap(section)),
            _over_time(section, points, paper.curves(section.task)),
        ],
    )


def fidelities(root: Path, only: str | None = None) -> list[Chapter]:
    """Divergence from dense, with the needles that were found by the same methods."""
    found = results.sections(root, "fidelity", only=only)
    needles = results.sections(root, "niah") if found else []
    return [fidelity(section, needles) for section in found]


def fidelity(section: Section, needles: Sequence[Section]) -> Chapter:
    """Divergence from dense: the curves' points, what each method reaches, and its decisions by head."""
    rows = frontier_needles.beside(frontier.points(section), section, needles)
    main = frontier.reach(rows)
    curves = frontier_figures.curves(rows, section.title)
    heads = frontier_figures.heatmap(section, "skip_ratio_by_head", "share of blocks skipped")
    drawn = {
        f"{section.name}-curve": ("KL to dense against blocks skipped", curves),
        f"{section.name}-heads": ("Blocks skipped by layer and head", heads),
    }
    return Chapter(
        section.title,
        _facts(section, "texts"),
        [
            Table(section.name, "Blocks skipped at a divergence", main, main, notes.REACH),
            Table(f"{section.name}-points", "Every point", rows, readable.divergences(rows), notes.POINTS),
        ],
        [Drawing(name, what, figure) for name, (what, figure) in drawn.items() if figure],
    )


def suite(section: Section) -> Chapter:
    """Several tasks: means over them, every cell, the scores side by side, and the paper's curves beside ours."""
    rows, cells, scores = suites.means(section), suites.cells(section), suites.scores(section)
    points = suites.trade(rows)
    by_task = scores.assign(**{task: scores[task].map(readable.percent) for task in scores.columns[len(METHOD) + 1 :]})
    return Chapter(
        section.title,
        _facts(section, "answers"),
        [
            Table(section.name, "Means over tasks", rows, readable.means(rows), notes.means(rows)),
            Table(f"{section.name}-cells", "Every task and length", cells, readable.table(cells), notes.WEAK_TASK),
            Table(f"{section.name}-tasks", "Tasks side by side", scores, by_task, "Mean scores, %."),
            _beside_the_paper(section, points),
        ],
        _trades(section, points, paper.curves(section.task)),
    )


def longbench(section: Section) -> Chapter:
    """LongBench: its table beside the paper's, every task, and scores against what is skipped and how long it takes."""
    rows, cells = longbench_tables.means(section), longbench_tables.cells(section)
    beside = longbench_tables.beside_the_paper(section, rows)
    missing = ", ".join(longbench_tables.not_run(section))
    below = f"{notes.LONGBENCH} Not run: {missing}." if missing else notes.LONGBENCH
    return Chapter(
        section.title,
        _facts(section, "answers"),
        [
            Table(section.name, "Beside the paper's", beside, readable.beside(beside), below),
            Table(f"{section.name}-tasks", "Every task and length", cells, readable.table(cells), notes.WEAK_SCORE),
        ],
        _trades(section, longbench_tables.trade(rows), longbench_tables.paper_points()),
    )


def lm_eval(section: Section) -> Chapter:
    """lm-eval's tasks: every task and length."""
    rows = longbench_tables.lm_eval_cells(section)
    shown = readable.scores(rows)
    return Chapter(
        section.title,
        _facts(section, "answers"),
        [Table(section.name, "Every task and length", rows, shown, notes.WEAK_SCORE)],
    )


def _trades(section: Section, ours: pd.DataFrame, theirs: pd.DataFrame) -> list[Drawing]:
    """Score against blocks skipped and against time."""
    return [
        Drawing(
            f"{section.name}-skipped",
            "Score in % of dense attention's against blocks skipped",
            suite_figures.skipped(ours, section.title),
        ),
        _over_time(section, ours, theirs),
    ]


def _over_time(section: Section, ours: pd.DataFrame, theirs: pd.DataFrame) -> Drawing:
    return Drawing(
        f"{section.name}-ttft",
        "Score against TTFT, both in % of dense attention's",
        suite_figures.timed(ours, theirs, section.title),
    )


def _beside_the_paper(section: Section, points: pd.DataFrame) -> Table:
    rows = suites.beside_the_paper(section, points)
    return Table(f"{section.name}-paper", "Beside the paper's", rows, readable.points(rows), notes.BESIDE)


def _facts(section: Section, unit: str) -> dict[str, str]:
    samples = section.samples
    several = samples.groupby(METHOD, dropna=False)["id"].nunique()
    least, most = several.min(), several.max()
    return {
        "model": section.model,
        "device": section.device,
        "methods": ", ".join(samples["method"].unique()),
        "n": f"{least if least == most else f'{least} to {most}'} {unit} a method and strength",
        "intervals": notes.INTERVALS,
    }


def _sections(read: Callable[..., list[Section]], name: str, write: Callable[[Section], Chapter]):
    """From a results folder to the chapters of an experiment that has sections."""
    return lambda root, only: [write(section) for section in read(root, name, only=only)]


CHAPTERS: dict[str, Callable[[Path, str | None], list[Chapter]]] = {
    "niah": _sections(results.sections, "niah", needles),
    "ruler": _sections(suites.sections, "ruler", suite),
    "reasoning": _sections(suites.sections, "reasoning", suite),
    "longbench": _sections(longbench_tables.sections, "longbench", longbench),
    "lm_eval": _sections(longbench_tables.lm_eval_sections, "lm_eval", lm_eval),
    "fidelity": fidelities,
    "equal_kl": equal_kl_report.chapters,
    "kernel": kernel_report.chapters,
    "ttft": ttft_report.chapters,
}
