"""Every table and figure, from the records alone."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig

from bsfa.errors import InputError
from experiments import figures, style
from experiments.results import Section, sections, table
from experiments.tracking import Tracker

log = logging.getLogger(__name__)

PAPER = (
    "The paper's BSFA, Llama-3.1-8B on an A100, needle at 64K: TTFT 80.4% of dense at 99.3% of dense accuracy; "
    "1.24x at >= 99% (arXiv 2512.07011). That model and that GPU were not run here."
)


def run(cfg: DictConfig) -> None:
    """``python run.py experiment=report``: write ``tables/`` and ``figures/`` and print the main table.

    Raises
    ------
    InputError
        A results folder without a record.
    """
    root = Path(cfg.results)
    tracker: Tracker = instantiate(cfg.tracker)
    found = sections(root, "niah")
    if not found:
        raise InputError(f"{root.resolve()} holds no records of niah; run `python run.py experiment=niah` first")
    try:
        tables, drawn = _write(root, found)
    except OSError as error:
        raise InputError(f"cannot write the report below {root.resolve()}: {error}") from error
    tracker.report(tables, drawn)
    print(f"\ntables: {(root / 'tables').resolve()}\nfigures: {(root / 'figures').resolve()}")


def _write(root: Path, found: list[Section]) -> tuple[list[Path], list[Path]]:
    """Every section's tables and figures; the main tables are printed too."""
    tables: list[Path] = []
    drawn: list[Path] = []
    for section in found:
        main = table(section, ["haystack"])
        tables += write_table(root / "tables", section, main)
        tables += write_table(root / "tables", section, table(section, ["haystack", "length"]), "-cells")
        drawn += style.save(figures.curve(section), root / "figures", f"{section.name}-curve")
        drawn += style.save(figures.heatmap(section), root / "figures", f"{section.name}-heatmap")
        print(f"\n{section.title}\n{readable(main).to_markdown(index=False, disable_numparse=True)}\n{notes(main)}")
    return tables, drawn


def write_table(folder: Path, section: Section, rows: pd.DataFrame, suffix: str = "") -> list[Path]:
    """One table as Markdown, CSV (every number) and LaTeX."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{section.name}{suffix}.{kind}" for kind in ("md", "csv", "tex")}
    shown = readable(rows)
    body = shown.to_markdown(index=False, disable_numparse=True)
    paths["md"].write_text(f"**{section.title}**\n\n{body}\n\n{notes(rows)}\n", encoding="utf-8")
    rows.assign(section=section.title).to_csv(paths["csv"], index=False)
    paths["tex"].write_text(shown.to_latex(index=False, escape=True, caption=section.title), encoding="utf-8")
    return list(paths.values())


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
