"""A gate's screen: which blocks need no exact scores, found from 8-bit ones. Plain PyTorch, as the kernel does it.

A key block's entries are rounded to multiples of one number, so that they are integers of at most 127; so are those of
a query row. With q = q' + dq and k = k' + dk, q' and k' as rounded,

    |q . k - q' . k'| <= (|q'| + |dq|) |dk| + |dq| |k'|

(Cauchy-Schwarz). A block whose largest rounded score is under every row's bar by more than this holds no score that
reaches a bar: the gate would skip it. All others are listed, and the gate decides on them by exact scores. A gate may
ask for less than the whole of the bound, ``Gate(screen=0.25)``: rounding errors cancel and hardly ever come near it.

A row's running maximum is taken over scores less the bound, so that it is never above the exact one.

All this is of products summed in 32 bits: on a GPU, products in TF32 are off by more than the bound allows for.
"""

from __future__ import annotations

import torch

from bsfa.blocks import BlockGrid
from bsfa.gates import ResolvedGate

LARGEST = 127.0
ROUNDING_ERROR = 1e-5  # of the exact scores' own 32-bit sums, relative to the product of the norms


def listed(
    queries: torch.Tensor, keys: torch.Tensor, grid: BlockGrid, i: int, gate: ResolvedGate, scale: float, heads: slice
) -> torch.Tensor:
    """The visible blocks of query block ``i`` on which the gate has to decide by exact scores.

    Parameters
    ----------
    queries : fp32 (G, rows, D)
        Of the query block, for the heads of one KV group.
    keys : fp32 (visible, block_k, D)
        The visible blocks.
    gate : ResolvedGate
        With a ``screen``.
    scale : float
        Of the softmax.
    heads : slice
        The group's heads, of all.

    Returns
    -------
    bool (G, visible). Blocks of which some row does not see every entry are listed always, as those are that the gate
    protects.
    """
    assert gate.screen is not None
    visible, full = grid.visible(i), grid.full(i)
    rows, row_scale = _rounded(queries, dim=-1)
    columns, block_scale = _rounded(keys, dim=(-2, -1))
    rounded = columns * block_scale
    length = rounded.norm(dim=-1).amax(-1)
    error = (keys - rounded).norm(dim=-1).amax(-1)
    error = error + ROUNDING_ERROR * (length + error)
    near = rows * row_scale
    lost = (queries - near).norm(dim=-1, keepdim=True)
    moved = gate.screen * ((near.norm(dim=-1, keepdim=True) + lost) * error + lost * length)
    integers = (rows.flatten(0, 1) @ columns.flatten(0, 1).T).unflatten(-1, keys.shape[:2]).amax(-1)
    scores = integers.unflatten(0, rows.shape[:2]) * row_scale * block_scale[:, 0, 0]  # (G, rows, visible)
    bar = gate.threshold[heads, i, None] / scale
    may = torch.ones(len(queries), len(visible), dtype=torch.bool, device=queries.device)
    most = torch.full_like(scores[..., 0], -torch.inf)
    protected = gate.protects(grid, i)
    for j in grid.visit(i, gate.order):
        c = j - visible.start
        low = scores[..., c] - moved[..., c]
        if j not in full:
            most = torch.where(low.isnan(), low, most)  # a bad key may be one that the row sees
            continue
        least = bar
        if gate.relative is not None:  # against a maximum that is NaN there is no bar, as in the gate
            relative = gate.relative[heads, i, None] / scale
            least = torch.fmax(bar, torch.where(relative <= 0, most + relative, -torch.inf))
            most = torch.maximum(most, low)
        may[:, c] = (~(scores[..., c] + moved[..., c] < least)).any(-1) | (j in protected)
    return may


def _rounded(x: torch.Tensor, dim: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers and the number they are multiples of, one for all along ``dim``."""
    scale = x.abs().amax(dim, keepdim=True) / LARGEST
    return (x / scale).nan_to_num(0.0).round().clamp(-LARGEST, LARGEST), scale
