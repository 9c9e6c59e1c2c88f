"""What a reader of a figure needs whatever it holds: panels of a size, words that are whole, methods told apart."""

from __future__ import annotations

import itertools

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import looks, style
from experiments.frontier_figures import curves

METHODS = [
    *(("bsfa", texts) for texts in ("prose", "noise", "mixed")),
    *((name, "mixed") for name in ("fisher_share", "fisher_share_0.14", "fisher_share_heads")),
    *((name, "") for name in ("row_share", "late_share", "sink_max", "blasst", "streaming_llm", "minference")),
    *((name, "") for name in ("flexprefill", "xattention", "flashprefill", "spargeattn", "spargeattn_topk", "sdpa")),
]
TITLE = "fidelity at 4096 tokens of a model with a long name, bfloat16, a device with a name that is longer still"


@style.house
def frontier(methods: int, cells: int) -> Figure:
    """The curves of so many methods on so many cells."""
    rows = [
        {"method": method, "calibration": texts, "source": "prose", "length": 1024 * (1 + cell), "skip_ratio": skip}
        | {"kl": skip / 10, "kl_low": skip / 12, "kl_high": skip / 8}
        for (method, texts), cell, skip in itertools.product(METHODS[:methods], range(cells), (0.3, 0.6))
    ]
    figure = curves(pd.DataFrame(rows), TITLE)
    FigureCanvasAgg(figure).draw()
    return figure


def heights(figure: Figure) -> list[float]:
    """Inches of each panel's axes."""
    return [axis.get_position().height * figure.get_figheight() for axis in figure.axes]


@pytest.mark.parametrize("cells", [1, 2, 4])
def test_panels_keep_their_height_whatever_the_legend_holds(cells):
    few, many = heights(frontier(2, cells)), heights(frontier(len(METHODS), cells))
    assert many == pytest.approx(few, abs=0.1)
    assert min(many) > 2.5


@pytest.mark.parametrize(("methods", "cells"), [(2, 1), (18, 1), (18, 4)])
def test_no_word_is_cut_off(methods, cells):
    figure = frontier(methods, cells)
    title, ylabel = figure.texts
    assert title.get_text().replace("\n", " ") == TITLE
    for part in (title, ylabel, *figure.legends, *figure.axes):
        box = part.get_tightbbox()
        assert (box.min >= -1).all(), part
        assert (box.max <= figure.bbox.max + 1).all(), part


def test_four_cells_stand_two_a_row():
    positions = [axis.get_position() for axis in frontier(2, 4).axes]
    assert len({round(box.x0, 2) for box in positions}) == len({round(box.y0, 2) for box in positions}) == 2


def test_eighteen_methods_are_told_apart():
    drawn = looks.by_method(METHODS)
    assert len(drawn) == 18
    assert len({(look["color"], look["marker"]) for look in drawn.values()}) == 18
    assert len({(look["marker"], "markerfacecolor" in look) for look in drawn.values()}) == 18  # in grey too


def test_a_line_tells_whose_method_it_is():
    drawn = {method: look for (method, _), look in looks.by_method(METHODS).items()}
    ours = {"bsfa", "fisher_share", "fisher_share_0.14", "fisher_share_heads", "row_share", "late_share", "sink_max"}
    assert {method for method, look in drawn.items() if look["linestyle"] == "-"} == ours
    heaviest = max(look["linewidth"] for look in drawn.values())
    assert {method for method, look in drawn.items() if look["linewidth"] == heaviest} == {"bsfa"}


@pytest.mark.parametrize(
    ("low", "high", "shown"), [(2.5, 18, ["3", "4", "6", "10"]), (1e-3, 1, ["0.001", "0.01", "0.1", "1"])]
)
def test_a_logarithmic_axis_has_plain_numbers(low, high, shown):
    _, [axis] = style.panels(1, 4, 3)
    axis.set(yscale="log", ylim=(low, high))
    style.plain_log(axis.yaxis)
    ticks = [tick for tick in axis.get_yticks() if low <= tick <= high]
    assert axis.yaxis.get_major_formatter().format_ticks(ticks) == shown
