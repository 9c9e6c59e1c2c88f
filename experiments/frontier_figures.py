"""The figures of `experiment=fidelity`."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments import style
from experiments.frontier import CELL, CUTS, by_head
from experiments.results import Section

LOWEST = 1e-4  # nats a token: under it a method is dense, and a logarithmic axis goes nowhere


@style.house
def curves(rows: pd.DataFrame, title: str) -> Figure:
    """KL to dense against skip ratio with 95% bands, a panel a text source and length."""
    rows = rows[(rows["method"] != "dense") & (rows["kl"] >= LOWEST)]
    cells = list(rows.groupby(CELL))
    series = list(dict.fromkeys(zip(rows["method"], rows["calibration"], strict=True)))
    figure, axes = style.subplots(1, len(cells), 4.0, 3.6, sharey=True)
    for axis, ((source, length), panel) in zip(axes[0], cells, strict=True):
        for number, (method, calibration) in enumerate(series):
            line = panel[(panel["method"] == method) & (panel["calibration"] == calibration)]
            skip = 100 * line["skip_ratio"]
            label = f"{method}, calibrated on {calibration}" if calibration else method
            look = style.look(number)
            axis.plot(skip, line["kl"], label=label, linewidth=1.2, markersize=4, **look)
            axis.fill_between(skip, line["kl_low"], line["kl_high"], color=look["color"], alpha=0.12, linewidth=0)
        for cut in CUTS:
            axis.axhline(cut, color=style.PASS_LINE, linestyle=":", linewidth=0.8)
        axis.set(title=f"{source}, {length} tokens", xlabel="blocks skipped, %", yscale="log", ylim=(LOWEST, None))
    axes[0][0].set_ylabel("KL to dense, nats a token (95% band)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title, fontsize=8)
    return figure


@style.house
def heatmap(section: Section, column: str, label: str) -> Figure:
    """A number by layer and head, a panel a method at its typical strength."""
    tables = by_head(section, column)
    tables = tables[tables[column].map(lambda table: np.size(table) > 0)]
    columns = min(5, len(tables))
    figure, axes = style.subplots(-(-len(tables) // columns), columns, 1.9, 2.4, sharex=True, sharey=True)
    image = None
    for axis, row in zip(axes.flat, tables.to_dict("records"), strict=False):
        image = axis.imshow(row[column], vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axis.grid(False)
        data = f" ({row['calibration']})" if row["calibration"] else ""
        axis.set_title(f"{row['method']}{data}\n{row['strength']}, KL {row['kl']:.2g}", fontsize=7)
    for axis in axes.flat[len(tables) :]:
        axis.set_axis_off()
    figure.supxlabel("head", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    figure.colorbar(image, ax=axes, label=label)
    figure.suptitle(section.title, fontsize=8)
    return figure
