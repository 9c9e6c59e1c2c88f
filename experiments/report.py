"""Every table and figure, from the records alone."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig

from bsfa.errors import InputError
from experiments import figures, frontier, frontier_figures, style, ttft_report
from experiments.results import Section, sections, table
from experiments.tables import markdown, write_table
from experiments.tracking import Tracker

log = logging.getLogger(__name__)

PAPER = (
    "The paper's BSFA, Llama-3.1-8B on an A100, needle at 64K: TTFT 80.4% of dense at 99.3% of dense accuracy; "
    "1.24x at >= 99% (arXiv 2512.07011). That model and that GPU were not run here."
)
REACH = "Percent of blocks skipped where a method's curve crosses the cut (nats a token), log-linear between strengths."
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
    found = {name: sections(root, name) for name in WRITERS}
    if not any(found.values()) and not ttft_report.recorded(root):
        commands = " or ".join(f"`python run.py experiment={name}`" for name in (*WRITERS, "ttft"))
        raise InputError(f"{root.resolve()} holds no records; run {commands} first")
    tables: list[Path] = []
    drawn: list[Path] = []
    try:
        for name, several in found.items():
            for section in several:
                for paths, new in zip((tables, drawn), WRITERS[name](root, section), strict=True):
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


WRITERS = {"niah": accuracy, "fidelity": fidelity}


def readable(rows: pd.DataFrame) -> pd.DataFrame:
    """A table for people: intervals in brackets, weak cells marked."""
    cells = [key for key in ("haystack", "length") if key in rows]
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
    shown["TTFT s [quartiles]"] = [
        f"{m:.3g} [{a:.3g}, {b:.3g}]"
        for m, a, b in zip(rows["ttft_median_s"], rows["ttft_q25_s"], rows["ttft_q75_s"], strict=True)
    ]
    for name in ("dense", "sdpa"):
        shown[f"TTFT, {name} / this"] = ["" if pd.isna(x) else f"{x:.2f}" for x in rows[f"speedup_over_{name}"]]
    return shown


def notes(rows: pd.DataFrame) -> str:
    """What stands under a table."""
    marked = (
        "† dense scores under 90% here: too little to lose to tell methods apart. " if rows["weak_dense"].any() else ""
    )
    return f"{marked}TTFT ratios are medians over samples that one process ran through both. {PAPER}"
