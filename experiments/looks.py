"""How a method is drawn: who made it by line, weight and marker, in print too; which one it is by colour and marker.

BSFA is black, heavy and solid; this project's other gates are solid and filled; all else is dashed and hollow. Colours
are Paul Tol's "muted" scheme, which the colour-blind tell apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

COLORS = ("#332288", "#CC6677", "#117733", "#AA4499", "#999933", "#44AA99", "#882255", "#88CCEE", "#DDCC77")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h")
GATES = (
    "fisher_share",
    "row_share",
    "late_share",
    "sink_max",
)  # and what is named after one, such as fisher_share_0.14
BSFA: dict[str, Any] = {"linestyle": "-", "linewidth": 2.2, "markersize": 6.5}
GATE: dict[str, Any] = {"linestyle": "-", "linewidth": 1.2, "markersize": 5}
OTHER: dict[str, Any] = {"linestyle": "--", "linewidth": 1.2, "markersize": 5, "markerfacecolor": "white"}

Series = tuple[str, str]


def by_method(series: Iterable[Series]) -> dict[Series, dict[str, Any]]:
    """What matplotlib draws each series with, its label too: BSFA first, then our gates, then all else.

    Parameters
    ----------
    series : iterable of (str, str)
        A method, and what tells its lines apart, such as the texts it was calibrated on, or nothing.
    """
    found = list(dict.fromkeys(series))
    bsfa = [one for one in found if one[0].startswith("bsfa")]
    gates = [one for one in found if one[0].startswith(GATES)]
    others = [one for one in found if one not in bsfa and one not in gates]
    colored = (
        *((one, "black", BSFA) for one in bsfa),
        *((one, COLORS[number % len(COLORS)], GATE) for number, one in enumerate(gates)),
        *((one, COLORS[number % len(COLORS)], OTHER) for number, one in enumerate(others)),
    )
    return {
        one: {"color": color, "marker": MARKERS[number % len(MARKERS)], "label": label(*one), **kind}
        for number, (one, color, kind) in enumerate(colored)  # markers go on where the last kind's ended
    }


def label(method: str, detail: str) -> str:
    """``bsfa (prose)``, or ``dense``."""
    return f"{method} ({detail})" if detail else method


def numbered(number: int) -> dict[str, Any]:
    """The n-th of a figure's lines that are not methods, such as lengths."""
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], **GATE}
