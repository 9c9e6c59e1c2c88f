"""The figures of several tasks: what a mean score, in % of dense attention's, is paid with."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import looks, style
from experiments.looks import Series

SCORE = "mean score, % of dense (95% interval)"


@style.house
def skipped(ours: pd.DataFrame, title: str) -> Figure:
    """Score against blocks skipped, a panel a length.

    Parameters
    ----------
    ours : DataFrame
        A row a method, strength and length; see `suites.trade`.
    """
    rows = ours.dropna(subset=["skip_ratio", "of_dense"])
    lengths = sorted(rows["length"].unique())
    figure, axes = style.panels(len(lengths), 4.2, 3.4, sharex=True, sharey=True)
    drawn = looks.by_method(_series(rows))
    for axis, length in zip(axes, lengths, strict=False):
        _lines(axis, rows, length, "skip_ratio", drawn)
        axis.set(title=_panel(rows, length), xlabel="blocks skipped, %")
    return _finished(figure, axes, title)


@style.house
def timed(ours: pd.DataFrame, theirs: pd.DataFrame, title: str) -> Figure:
    """Score against time to the first token, both in % of dense attention's in the same process.

    A panel a length, and a last one for what the paper reports of its own model and device; see `paper.curves`.
    """
    rows = ours.dropna(subset=["ttft_of_dense", "of_dense"])
    if rows.empty:
        title += ": no process ran a method and dense both, and the paper's curves stand alone"
    lengths = sorted(rows["length"].unique())
    figure, axes = style.panels(len(lengths) + (not theirs.empty), 4.2, 3.4, sharex=True, sharey=True)
    papers = {_paper_series(*key): line for key, line in theirs.groupby(["method", "length"], dropna=False)}
    drawn = looks.by_method([*_series(rows), *papers])
    for axis, length in zip(axes, lengths, strict=False):
        _lines(axis, rows, length, "ttft_of_dense", drawn)
        axis.set(title=_panel(rows, length))
    for series, line in papers.items():
        axes[-1].plot(100 * line["ttft_of_dense"], 100 * line["of_dense"], **drawn[series])
        axes[-1].set_title(f"the paper: {line['model'].iloc[0]}, {line['device'].iloc[0]}")
    for axis in axes:
        axis.axvline(100, **style.CUT)
        axis.set_xlabel("TTFT, % of dense")
    return _finished(figure, axes, title)


def _series(rows: pd.DataFrame) -> list[Series]:
    return list(zip(rows["method"], rows["calibration"], strict=True))


def _paper_series(method: str, length: float) -> Series:
    return method, "the paper" if pd.isna(length) else f"the paper, {length // 1024:g}K"


def _panel(rows: pd.DataFrame, length: int) -> str:
    tasks = rows.loc[rows["length"] == length, "of_tasks"].max()
    return f"{length} tokens" + (f", {tasks} tasks" if tasks > 1 else "")


def _lines(axis: Axes, rows: pd.DataFrame, length: int, x: str, drawn: dict[Series, dict[str, Any]]) -> None:
    """One line a method; a method keeps its look in every panel."""
    ours = _series(rows)
    for method, calibration in (series for series in drawn if series in ours):
        chosen = (rows["method"] == method) & (rows["calibration"] == calibration) & (rows["length"] == length)
        line = rows[chosen].sort_values(x)
        share = 100 * line["of_dense"]
        spread = [(share - 100 * line["of_dense_low"]).fillna(0), (100 * line["of_dense_high"] - share).fillna(0)]
        errors = [side.clip(lower=0) for side in spread]
        axis.errorbar(100 * line[x], share, yerr=errors, capsize=2, elinewidth=0.8, **drawn[method, calibration])
        for point in line[line["tasks"] < line["of_tasks"]].itertuples():  # over other tasks than its neighbours
            axis.annotate(
                f"{point.tasks} of {point.of_tasks} tasks",
                (100 * getattr(point, x), 100 * point.of_dense),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=7,
                color=drawn[method, calibration]["color"],
            )


def _finished(figure: Figure, axes: list[Axes], title: str) -> Figure:
    for axis in axes:
        axis.axhline(100, **style.HOLD)
        axis.tick_params(labelbottom=True)
    if not any(axis.get_legend_handles_labels()[0] for axis in axes):
        axes[0].text(0.5, 0.5, "no method to set against dense yet", ha="center", transform=axes[0].transAxes)
    return style.finish(figure, title, SCORE)
