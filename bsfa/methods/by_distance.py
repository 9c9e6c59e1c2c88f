"""Share cuts by a query block's distance from the end of the prompt: what two methods have in common."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from bsfa.attention import Attended
from bsfa.distance import classes, n_blocks, share_gate
from bsfa.gates import Gate
from bsfa.methods.base import Attend, Call
from bsfa.model import ModelInfo

LENGTHS = 32  # prompt lengths, in query blocks, whose gates are kept


def attend_by_distance(cuts: torch.Tensor, edges: Sequence[int], model: ModelInfo) -> Attend:
    """`share_gate` with relative cuts fp32 (n_layers, heads of the whole model, classes).

    The gates of all layers are built at the first call of a length; other calls look them up.
    """

    @lru_cache(maxsize=LENGTHS)
    def gates(n: int) -> list[Gate]:
        by_block = cuts[:, model.heads, classes(n, edges)]
        return [share_gate(table).to(device) for table, device in zip(by_block, model.devices, strict=True)]

    def attend(call: Call) -> Attended:
        return call.attend(gate=gates(n_blocks(call.grid))[call.layer])

    return attend
