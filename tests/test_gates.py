from __future__ import annotations

import math

import pytest
import torch

from bsfa import Gate, InputError
from bsfa.blocks import BlockGrid


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": math.nan}, "threshold holds NaN"),
        ({"threshold": torch.tensor([0.0, math.nan])}, "threshold holds NaN"),
        ({"relative": math.nan}, "relative holds NaN"),
        ({"relative": torch.zeros(2, 2, 2)}, r"relative must be .* \(2, 2, 2\)"),
        ({"threshold": torch.zeros(2, 2, 2)}, r"\(2, 2, 2\)"),
        ({"threshold": torch.zeros(2, dtype=torch.int64)}, "int64"),
        ({"threshold": "0.5"}, "got str"),
        ({"order": "random"}, "'random' is none of diagonal, sink, ascending"),
        ({"relative_to": "mean"}, "'mean' is none of max, lse"),
    ],
)
def test_bad_gates_are_refused_by_name(options, message):
    with pytest.raises(InputError, match=message):
        Gate(**options)


def test_a_gate_for_other_heads_is_refused():
    grid = BlockGrid(128, 128, causal=True)
    with pytest.raises(InputError, match="threshold is for 3 heads, the call has 4"):
        Gate(threshold=torch.zeros(3, 5)).resolve(grid, 4, torch.device("cpu"))


def test_relative_cuts_are_read_by_absolute_position_as_thresholds_are():
    cuts = torch.tensor([[-1.0, -2.0, -3.0]])
    chunk = BlockGrid(256, 512, causal=True)  # the third and fourth query block of a prefill
    assert Gate(relative=cuts).resolve(chunk, 1, torch.device("cpu")).relative.tolist() == [[-3.0, -3.0]]


def test_a_gate_moves_to_a_device_with_its_tables():
    gate = Gate(threshold=torch.tensor([0.5, 1.5]), relative=-2.0, order="sink")
    moved = gate.to(torch.device("meta"))
    assert (moved.threshold.device.type, moved.threshold.shape, moved.relative) == ("meta", (2,), -2.0)
    assert (moved.order, gate.threshold.device.type) == ("sink", "cpu")


@pytest.mark.parametrize("threshold", [1.5, torch.tensor(1.5), torch.full((4,), 1.5), torch.full((4, 3), 1.5)])
def test_every_form_of_threshold_broadcasts_to_heads_and_query_blocks(threshold):
    resolved = Gate(threshold=threshold).resolve(BlockGrid(300, 300, causal=True), 4, torch.device("cpu"))
    assert torch.equal(resolved.threshold, torch.full((4, 3), 1.5))
    assert resolved.relative is None
