"""FlashPrefill (arXiv 2603.06199): blocks within a factor of the best one, by queries against mean keys.

Keys are averaged over blocks of 128. A block's score is the sum over its queries of exp(q . mean key), over those
queries alone that come after the whole block; a query block keeps the blocks that score at least ``alpha`` times its
best. There is nothing to sort. The first blocks, a local window, and every block of the last query blocks are kept
besides.

Scores are compared as logarithms, where the authors' normalisation drops out and nothing overflows, and queries past
the end of the prompt are left out of the sums. A selected block of 128 keys is two of our 64, and the skip ratio is
counted on ours. Scores take Sq * Sk / 128 products, a run of query blocks in memory at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.nn.functional import pad

from bsfa.attention import check_scale
from bsfa.blocks import BlockGrid, BlockLists
from bsfa.methods.base import Call
from bsfa.methods.parameters import number, whole
from bsfa.methods.selecting import Selecting
from bsfa.selection import block_lists, mean_pool, query_chunks, refuse_chunks, scores

BLOCK = 128


@dataclass(frozen=True)
class FlashPrefill(Selecting):
    """FlashPrefill at one strength; the blocks below are of 128 tokens.

    Parameters
    ----------
    alpha : float
        Share of the best block's score that a block has to reach, above 0 and up to 1. The authors' settings for
        language models run from 0.08 to 0.18, about 0.12.
    sink_blocks : int
        Key blocks kept at the start; the authors' 2.
    window_blocks : int
        Key blocks kept up to and with the diagonal one, at least 1; the authors' 4.
    last_full_blocks : int
        Query blocks at the end of the prompt that keep all; the authors' 2. A chunk of a prefill does not know whether
        it is the last one, so chunks need 0.
    """

    alpha: float = 0.12
    sink_blocks: int = 2
    window_blocks: int = 4
    last_full_blocks: int = 2

    name: ClassVar[str] = "flashprefill"

    def __post_init__(self) -> None:
        number("alpha", self.alpha, above=0, most=1)
        whole("sink_blocks", self.sink_blocks, 0)
        whole("window_blocks", self.window_blocks, 1)
        whole("last_full_blocks", self.last_full_blocks, 0)

    @property
    def serves_chunks(self) -> bool:
        return self.last_full_blocks == 0

    def select(self, call: Call) -> BlockLists:
        if self.last_full_blocks:
            refuse_chunks(call, self.name, "keeps all of a prompt's last query blocks (last_full_blocks=0 lets it go)")
        native = replace(call.grid, block_k=BLOCK)
        mass = self.log_mass(call, native)
        keep = ~(mass < mass.amax(-1, keepdim=True) + math.log(self.alpha))
        query = torch.arange(native.n_q, device=mass.device)[:, None]
        key = torch.arange(native.n_k, device=mass.device)[None, :]
        diagonal = (native.offset + query * native.block_q) // BLOCK  # of the first row
        keep |= (key < self.sink_blocks) | (key > diagonal - self.window_blocks)
        keep |= query >= native.n_q - self.last_full_blocks
        return block_lists(keep, native, call.grid)

    def log_mass(self, call: Call, native: BlockGrid) -> torch.Tensor:
        """Log of a block's score: fp32 (B, Hq, n_q, n_k), -inf where no query comes after the whole block."""
        keys = mean_pool(call.k, BLOCK).to(call.k.dtype)
        entries = call.q.shape[0] * call.q.shape[2] * native.block_q * native.n_k
        parts = [self._log_mass(call, native, keys, blocks) for blocks in query_chunks(native, entries)]
        return torch.cat(parts, dim=2)

    def _log_mass(self, call: Call, native: BlockGrid, keys: torch.Tensor, blocks: range) -> torch.Tensor:
        rows = slice(native.rows(blocks[0]).start, native.rows(blocks[-1]).stop)
        n = rows.stop - rows.start
        keys = keys[:, : max(0, (native.offset + rows.stop) // BLOCK)]  # the blocks that end before the last row
        position = native.offset + rows.start + torch.arange(n, device=keys.device)[:, None]
        last = BLOCK - 1 + BLOCK * torch.arange(keys.shape[1], device=keys.device)[None, :]
        seen = last <= position
        if native.window_size[0] >= 0:
            seen &= last >= position - native.window_size[0]
        dots = scores(call.q[:, rows], keys, check_scale(call.q, call.softmax_scale)).masked_fill_(~seen, -torch.inf)
        dots = pad(dots, (0, native.n_k - keys.shape[1], 0, len(blocks) * native.block_q - n), value=-torch.inf)
        return dots.unflatten(2, (len(blocks), native.block_q)).logsumexp(3)
