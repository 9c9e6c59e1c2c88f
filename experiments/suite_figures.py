"""The figures of several tasks: what a mean score, in % of dense attention's, is paid with."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import style

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
    figure, axes = style.subplots(1, max(1, len(lengths)), 3.4, 3.2, sharey=True)
    for axis, length in zip(axes[0], lengths, strict=False):
        _lines(axis, rows, length, "skip_ratio")
        axis.set(title=_panel(rows, length), xlabel="blocks skipped, %")
    return _finished(figure, axes, title)


@style.house
def timed(ours: pd.DataFrame, theirs: pd.DataFrame, title: str) -> Figure:
    """Score against time to the first token, both in % of dense attention's in the same process.

    A panel a length, and a last one for what the paper reports of its own model and device; see `paper.curves`.
    """
    rows = ours.dropna(subset=["ttft_of_dense", "of_dense"])
    lengths = sorted(rows["length"].unique())
    panels = len(lengths) + (not theirs.empty)
    figure, axes = style.subplots(1, max(1, panels), 3.4, 3.2, sharey=True)
    for axis, length in zip(axes[0], lengths, strict=False):
        _lines(axis, rows, length, "ttft_of_dense")
        axis.set(title=_panel(rows, length))
    if not theirs.empty:
        _paper(axes[0][-1], theirs)
    for axis in axes[0]:
        axis.set_xlabel("TTFT, % of dense")
        axis.axvline(100, color=style.PASS_LINE, linestyle=":", linewidth=0.8)
    return _finished(figure, axes, title)


def _panel(rows: pd.DataFrame, length: int) -> str:
    tasks = rows.loc[rows["length"] == length, "tasks"].max()
    return f"{length} tokens, {tasks} tasks"


def _lines(axis: Axes, rows: pd.DataFrame, length: int, x: str) -> None:
    """One line a method; a method keeps its look in every panel."""
    series = dict.fromkeys(zip(rows["method"], rows["calibration"], strict=True))
    for number, (method, calibration) in enumerate(series):
        chosen = (rows["method"] == method) & (rows["calibration"] == calibration) & (rows["length"] == length)
        line = rows[chosen].sort_values(x)
        share = 100 * line["of_dense"]
        spread = [(share - 100 * line["of_dense_low"]).fillna(0), (100 * line["of_dense_high"] - share).fillna(0)]
        axis.errorbar(
            100 * line[x],
            share,
            yerr=[side.clip(lower=0) for side in spread],
            label=f"{method}, calibrated on {calibration}" if calibration else method,
            capsize=2,
            linewidth=1.2,
            markersize=5,
            **style.look(number),
        )
    axis.axhline(100, color=style.PASS_LINE, linestyle="--", linewidth=1)


def _paper(axis: Axes, points: pd.DataFrame) -> None:
    for number, ((method, length), line) in enumerate(points.groupby(["method", "length"], dropna=False)):
        axis.plot(
            100 * line["ttft_of_dense"],
            100 * line["of_dense"],
            label=method if pd.isna(length) else f"{method}, {length // 1024:g}K",
            linestyle="--",
            linewidth=1.0,
            markersize=4,
            markerfacecolor="none",
            **style.look(number),
        )
    axis.axhline(100, color=style.PASS_LINE, linestyle="--", linewidth=1)
    axis.set_title(f"the paper: {points['model'].iloc[0]}, {points['device'].iloc[0]}")
    axis.legend(fontsize=7, loc="lower right")


def _finished(figure: Figure, axes, title: str) -> Figure:
    axes[0][0].set_ylabel(SCORE)
    handles, labels = axes[0][0].get_legend_handles_labels()
    if not handles:
        axes[0][0].text(0.5, 0.5, "no method to set against dense yet", ha="center", transform=axes[0][0].transAxes)
    if handles and not axes[0][0].get_legend():
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(title, fontsize=8)
    return figure
