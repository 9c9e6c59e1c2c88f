"""PyTorch's own scaled_dot_product_attention: dense, the library's kernels, an upstream baseline for time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import scaled_dot_product_attention

from bsfa.attention import Attended
from bsfa.blocks import BlockGrid
from bsfa.methods.base import Attend, Call, Method
from bsfa.model import ModelInfo


@dataclass(frozen=True)
class Sdpa(Method):
    """Whatever kernel PyTorch picks for the device and the shape."""

    name: ClassVar[str] = "sdpa"

    def bind(self, model: ModelInfo) -> Attend:
        return sdpa


def sdpa(call: Call) -> Attended:
    """Exact causal attention of one call; raises as `kernel` does."""
    return Attended.dense(kernel(call), call.grid)


def kernel(call: Call) -> torch.Tensor:
    """A call's output (B, Sq, Hq, D).

    Raises
    ------
    NotImplementedError
        A logit soft cap, which SDPA has not.
    """
    if call.softcap:
        raise NotImplementedError("PyTorch's SDPA has no softcap; use method=dense for this model")
    grid = call.grid
    square = grid.offset == 0 and call.window_size == (-1, -1)
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    out = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if square else dense_mask(grid, call.q.device),
        is_causal=square,
        scale=call.softmax_scale,
        enable_gqa=call.q.shape[2] != call.k.shape[2],
    )
    return out.transpose(1, 2)


def dense_mask(grid: BlockGrid, device: torch.device) -> torch.Tensor:
    """Every entry a call sees: bool (Sq, Sk)."""
    rows = [grid.entry_mask(i, range(grid.n_k), device) for i in range(grid.n_q)]
    return torch.cat(rows)[:, : grid.seqlen_k]
