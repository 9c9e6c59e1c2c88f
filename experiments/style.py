"""How every figure looks: its panels keep their size whatever stands around them."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

HOLD: dict[str, Any] = {"color": "#555555", "linewidth": 1.2}  # a line to hold, such as dense attention's
CUT: dict[str, Any] = {"color": "#555555", "linewidth": 0.8, "linestyle": ":"}
HEAT = "cividis"  # the same in grey
SMALL = 8  # points: what stands around the panels
LINE = 1.5 * SMALL / 72  # inches, a line of text
LETTER = 0.58 * SMALL / 72  # inches, about
CAPTION = 27  # letters above a panel that is 2.3 inches wide with what stands around it
RC: Any = {
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": SMALL,
    "legend.handlelength": 3,  # a dash and a marker
    "savefig.dpi": 160,
}


house = matplotlib.rc_context(RC)  # decorates what draws


def panels(count: int, width: float, height: float, columns: int = 2, **options) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, at most ``columns`` a row. Sizes in inches a panel, with its labels."""
    columns = min(columns, max(1, count))
    rows = math.ceil(max(1, count) / columns)
    figure = Figure(figsize=(width * columns, height * rows))
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    used, unused = axes[: max(1, count)], axes[max(1, count) :]
    for axis in unused:
        axis.set_axis_off()
    for axis in used[-columns:]:  # the lowest of its column, where the x axis is shared
        axis.tick_params(labelbottom=True)
    return figure, used


def finish(figure: Figure, title: str, ylabel: str = "") -> Figure:
    """The title above, one legend of all panels below; the figure grows by what they take.

    ``ylabel`` is of all panels, and stands beside their middle.
    """
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(title, int(width / LETTER))
    figure.suptitle("\n".join(lines), fontsize=SMALL)
    entries = {
        label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    taken = _legend(figure, entries, width) if entries else 0.0
    whole = height + taken + LINE * len(lines)
    figure.set_size_inches(width, whole)
    figure.supylabel(textwrap.fill(ylabel, int(height / LETTER)), y=(taken + height / 2) / whole, fontsize=SMALL + 1)
    return figure


def caption(axis: Axes, *lines: str) -> None:
    """A title above a panel of a heatmap, in lines that leave its neighbours theirs."""
    axis.set_title("\n".join(textwrap.fill(line, CAPTION) for line in lines), fontsize=SMALL)


def scale(figure: Figure, axes: list[Axes], highest: float, label: str) -> None:
    """What the colours of all panels mean, from 0 to the highest, beside them."""
    shades = ScalarMappable(Normalize(0, highest), HEAT)
    figure.colorbar(shades, ax=axes, label=label, fraction=0.04, aspect=40)


def _legend(figure: Figure, entries: dict[str, Any], width: float) -> float:
    """Below the panels, in as many columns as fit. Returns its height in inches."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    columns = len(entries)
    while True:
        rows = math.ceil(len(entries) / columns)
        columns = math.ceil(len(entries) / rows)  # no column stays empty
        legend = figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns)
        box = legend.get_window_extent(renderer)
        if columns == 1 or box.width <= width * figure.dpi:
            return box.height / figure.dpi
        legend.remove()
        columns -= 1


def plain_log(axis: Axis) -> None:
    """A logarithmic axis with numbers as people write them: decades, and 1, 2, 3, 4, 6 of each where it spans few.

    Call it when all is drawn.
    """
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 3.0, 4.0, 6.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


@house
def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write PNG and PDF."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("png", "pdf")]
    for path in paths:
        figure.savefig(path, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
    return paths
