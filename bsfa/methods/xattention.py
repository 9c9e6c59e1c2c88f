"""XAttention (arXiv 2503.16428): blocks ranked by sums along strided antidiagonals.

Every ``stride`` queries, last first, and every ``stride`` keys, first first, are laid end to end; one product of two
such vectors adds up ``stride`` scores along an antidiagonal. A softmax over these (scale 1 / (sqrt(D) * stride)),
summed over blocks of 128 x 128, is a block's mass. A query block keeps the fewest blocks that hold ``threshold`` of
its mass, counted after the first key block and the diagonal one, which it always keeps.

A selected block of 128 keys is two of our 64, and the skip ratio is counted on ours. A prefill in chunks of whole
blocks selects as one in one piece. Scores take (Sq / stride) * (Sk / stride) products, a run of query blocks in
memory at once. The authors' package takes its fast path only where the GPU's name holds "100", and one optional
threshold a head, which is not here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.nn.functional import pad

from bsfa.attention import check_scale
from bsfa.blocks import BlockGrid, BlockLists
from bsfa.errors import InputError
from bsfa.methods.base import Call
from bsfa.methods.parameters import number, whole
from bsfa.methods.selecting import Selecting
from bsfa.selection import band, block_lists, query_chunks, scores, select, visible

BLOCK = 128


@dataclass(frozen=True)
class XAttention(Selecting):
    """XAttention at one strength.

    Parameters
    ----------
    threshold : float
        Share of the mass to keep, above 0 and up to 1; the paper runs 0.8 to 0.9.
    stride : int
        Entries of an antidiagonal, a divisor of 128; the paper's Llama results take 8 and 16.
    """

    threshold: float = 0.9
    stride: int = 8

    name: ClassVar[str] = "xattention"

    def __post_init__(self) -> None:
        number("threshold", self.threshold, above=0, most=1)
        whole("stride", self.stride, 1)
        if BLOCK % self.stride:
            raise InputError(f"stride={self.stride} must divide {BLOCK}, such as 8 or 16")

    def select(self, call: Call) -> BlockLists:
        native = replace(call.grid, block_k=BLOCK)
        mass = self.mass(call, native)
        forced = band(native, mass.device)
        forced[:, :1] = visible(native, mass.device)[:, :1]
        needed = self.threshold * mass.sum(-1, keepdim=True) - (mass * forced).sum(-1, keepdim=True)
        others = mass.masked_fill(forced, 0)
        keep = select(others, lambda ordered: ~(ordered.cumsum(-1) - ordered >= needed)) | forced
        return block_lists(keep, native, call.grid)

    def mass(self, call: Call, native: BlockGrid) -> torch.Tensor:
        """The estimated attention of every block: fp64 (B, Hq, n_q, n_k), 0 where nothing is visible."""
        keys = self._groups(call.k).transpose(2, 3).flatten(3)
        entries = call.q.shape[0] * call.q.shape[2] * (BLOCK // self.stride) * keys.shape[1]
        parts = [self._mass(call, native, keys, blocks) for blocks in query_chunks(native, entries)]
        return torch.cat(parts, dim=2)

    def _mass(self, call: Call, native: BlockGrid, keys: torch.Tensor, blocks: range) -> torch.Tensor:
        rows = slice(native.rows(blocks[0]).start, native.rows(blocks[-1]).stop)
        keys = keys[:, : max(0, -(-(native.offset + rows.stop) // self.stride))]  # those after it are hidden
        queries = self._groups(call.q[:, rows]).flip(2).transpose(2, 3).flatten(3)
        n = queries.shape[1]
        position = native.offset + rows.start + self.stride * torch.arange(n, device=keys.device)[:, None]
        key = self.stride * torch.arange(keys.shape[1], device=keys.device)[None, :]
        seen = key < position + self.stride
        if native.window_size[0] >= 0:
            seen &= key + self.stride > position - native.window_size[0]
        scale = check_scale(call.q, call.softmax_scale) / self.stride
        weights = scores(queries, keys, scale).masked_fill_(~seen, -torch.inf).softmax(-1)
        weights = weights.masked_fill_(~seen.any(-1, keepdim=True), 0)
        a_block = BLOCK // self.stride
        weights = pad(weights, (0, native.n_k * a_block - keys.shape[1], 0, len(blocks) * a_block - n))
        sums = weights.unflatten(-1, (native.n_k, a_block)).sum(-1).unflatten(2, (len(blocks), a_block))
        return sums.sum(3, dtype=torch.float64)

    def _groups(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, H, D) -> (B, n, stride, H, D), the last group filled up with zeros."""
        n = -(-x.shape[1] // self.stride)
        return pad(x, (0, 0, 0, 0, 0, n * self.stride - x.shape[1])).unflatten(1, (n, self.stride))
