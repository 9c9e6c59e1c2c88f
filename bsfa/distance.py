"""Cuts by a query block's distance from the end of the prompt.

The last query blocks make the next tokens; what an earlier one loses reaches them through later layers' keys and values
alone, a part of it at a time. So it is worth a cut of its own. Distance 0 is the block of the last query.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from bsfa.blocks import BLOCK_Q, BlockGrid
from bsfa.gates import Gate


def share_gate(relative: float | torch.Tensor) -> Gate:
    """Keep a block where some entry is worth ``exp(relative)`` of what its row has kept so far, the sink seen first."""
    return Gate(relative=relative, relative_to="lse", order="sink", keep_first=True)


def n_blocks(grid: BlockGrid) -> int:
    """Query blocks up to the end of a call, those of earlier chunks among them."""
    return grid.offset // grid.block_q + grid.n_q


def classes(n: int, edges: Sequence[int]) -> torch.Tensor:
    """The distance class of each of ``n`` query blocks, first block first: int64 (n,).

    Class c holds the distances from ``edges[c - 1]`` (0 for the first) up to but without ``edges[c]``.
    """
    distance = torch.arange(n - 1, -1, -1)
    return torch.bucketize(distance, torch.tensor(edges, dtype=torch.int64), right=True)


def class_rows(seqlen: int, edges: Sequence[int]) -> list[slice]:
    """The rows of each class in a prompt in one piece; empty slices for the classes that it is too short for."""
    n = -(-seqlen // BLOCK_Q)
    bounds = [n, *(max(0, n - edge) for edge in edges), 0]
    return [slice(BLOCK_Q * first, min(BLOCK_Q * stop, seqlen)) for stop, first in itertools.pairwise(bounds)]
