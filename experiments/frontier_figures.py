"""The figures of `experiment=fidelity`."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import looks, style
from experiments.frontier import CELL, CUTS, by_head
from experiments.results import Section

LOWEST = 1e-4  # nats a token: under it a method is dense, and a logarithmic axis goes nowhere


@style.house
def curves(rows: pd.DataFrame, title: str) -> Figure | None:
    """KL to dense against skip ratio with 95% bands, a panel a text source and length; None where all is dense."""
    rows = rows[(rows["method"] != "dense") & (rows["kl"] >= LOWEST)]
    if rows.empty:
        return None
    cells = list(rows.groupby(CELL))
    figure, axes = style.panels(len(cells), 4.6, 3.6, sharex=True, sharey=True)
    drawn = looks.by_method(zip(rows["method"], rows["calibration"], strict=True))
    for axis, ((source, length), panel) in zip(axes, cells, strict=False):
        for (method, calibration), look in drawn.items():
            line = panel[(panel["method"] == method) & (panel["calibration"] == calibration)]
            skip = 100 * line["skip_ratio"]
            axis.plot(skip, line["kl"], **look)
            axis.fill_between(skip, line["kl_low"], line["kl_high"], color=look["color"], alpha=0.12, linewidth=0)
        for cut in CUTS:
            axis.axhline(cut, **style.CUT)
        axis.set(title=f"{source}, {length} tokens", xlabel="blocks skipped, %", yscale="log")
        axis.tick_params(labelbottom=True)
    axes[0].set_ylim(bottom=LOWEST)
    style.plain_log(axes[0].yaxis)
    return style.finish(figure, title, "KL to dense, nats a token (95% band)")


@style.house
def heatmap(section: Section, column: str, label: str) -> Figure | None:
    """A number by layer and head, a panel a method at its typical strength; None where no method has it."""
    tables = by_head(section, column)
    tables = tables[[np.size(table) > 0 for table in tables[column]]]
    if tables.empty:
        return None
    figure, axes = style.panels(len(tables), 2.3, 2.4, columns=4, sharex=True, sharey=True)
    for axis, row in zip(axes, tables.to_dict("records"), strict=True):
        axis.imshow(row[column], vmin=0, vmax=1, cmap=style.HEAT, aspect="auto")
        axis.grid(False)
        name = looks.label(row["method"], row["calibration"])
        style.caption(axis, name, f"{row['strength']}, KL {row['kl']:.2g}")
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel("head", fontsize=9)
    style.scale(figure, axes, 1, label)
    return style.finish(figure, section.title, "layer")
