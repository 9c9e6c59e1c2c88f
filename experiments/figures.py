"""The figures of a prompted experiment."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import looks, style
from experiments.results import METHOD, SKIP_NOTHING, Section, table

DEPTHS = 10  # labels that fit beside a panel


@style.house
def curve(section: Section) -> Figure:
    """Accuracy against skip ratio with 95% intervals, a panel a haystack, dense as the line to hold."""
    rows = table(section, ["haystack"])
    sparse = rows[~rows["method"].isin(SKIP_NOTHING)]
    haystacks = sorted(rows["haystack"].unique())
    drawn = looks.by_method(zip(sparse["method"], sparse["calibration"], strict=True))
    figure, axes = style.panels(len(haystacks), 4.6, 3.6, sharex=True, sharey=True)
    for axis, haystack in zip(axes, haystacks, strict=True):
        panel = rows[rows["haystack"] == haystack]
        for (method, calibration), look in drawn.items():
            line = panel[(panel["method"] == method) & (panel["calibration"] == calibration)].sort_values("skip_ratio")
            score = 100 * line["score"]
            spread = [score - 100 * line["score_low"], 100 * line["score_high"] - score]
            axis.errorbar(100 * line["skip_ratio"], score, yerr=spread, capsize=2, elinewidth=0.8, **look)
        for dense in panel.loc[panel["method"] == "dense", ["score", "score_low", "score_high"]].to_numpy():
            _hold(axis, *dense)
        axis.set(title=haystack, xlabel="blocks skipped, %", ylim=(_floor(rows["score_low"]), 102))
    return style.finish(figure, section.title, "needles found, % (95% interval)")


def _hold(axis: Axes, score: float, low: float, high: float) -> None:
    axis.axhline(100 * score, label="dense, the line to hold", **style.HOLD)
    axis.axhspan(100 * low, 100 * high, color=style.HOLD["color"], alpha=0.1, linewidth=0)


def _floor(lowest: pd.Series) -> float:
    """Where the axis starts: under all that is seen, in tens of percent."""
    return min(90.0, 10.0 * math.floor(10 * lowest.min()) - 2)


@style.house
def heatmap(section: Section) -> Figure:
    """Accuracy by length and depth, a panel a method."""
    names = table(section, [])[METHOD].itertuples(index=False)
    samples = section.samples.set_index(METHOD).sort_index()
    panels = [(name, samples.loc[[tuple(name)]]) for name in names]
    figure, axes = style.panels(len(panels), 2.4, 2.4, columns=4, sharex=True, sharey=True)
    for axis, (name, panel) in zip(axes, panels, strict=True):
        grid = panel.pivot_table(index="depth", columns="length", values="score", aggfunc="mean")
        axis.imshow(100 * grid, vmin=0, vmax=100, cmap=style.HEAT, aspect="auto")
        axis.set_xticks(range(grid.shape[1]), [f"{length / 1024:g}K" for length in grid.columns])
        labelled = range(0, len(grid), -(-len(grid) // DEPTHS))
        axis.set_yticks(labelled, [f"{grid.index[row]:g}" for row in labelled])
        axis.grid(False)
        style.caption(axis, looks.label(name.method, name.calibration), name.strength)
    figure.supxlabel("prompt length, tokens", fontsize=9)
    style.scale(figure, axes, 100, "needles found, %")
    return style.finish(figure, section.title, "needle depth, %")
