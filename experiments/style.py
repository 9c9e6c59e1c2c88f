"""How every figure looks: colour-blind-safe (Okabe and Ito's palette), told apart in print by marker and line too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PASS_LINE = "#555555"
RC: Any = {
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 160,
}


house = matplotlib.rc_context(RC)  # decorates what draws


def subplots(rows: int, columns: int, width: float, height: float, **options):
    """A figure of panels, and its axes as a 2-D array. Sizes in inches a panel."""
    figure = Figure(figsize=(width * columns, height * rows))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def look(series: int) -> dict[str, Any]:
    """Colour and marker of the n-th series."""
    round_trip = series // len(COLORS)  # the eighth series has the first one's colour and the second one's marker
    return {"color": COLORS[series % len(COLORS)], "marker": MARKERS[(series + round_trip) % len(MARKERS)]}


@house
def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write PNG and PDF."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("png", "pdf")]
    for path in paths:
        figure.savefig(path, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
    return paths
