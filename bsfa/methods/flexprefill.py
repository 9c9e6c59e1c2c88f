"""FlexPrefill (ICLR 2025, arXiv 2502.20766): a pattern a head, chosen by the last 128 queries of the prompt.

Their true attention is set against its estimate from pooled keys. Where the two are close (square root of the
Jensen-Shannon divergence under ``tau``) the head is query-aware: of all pairs of pooled query and key blocks, those
of the largest attention that together hold ``gamma`` of it are kept. Otherwise the head keeps verticals (key blocks)
and slashes (diagonals of blocks): as many, ranked by mass, as the tokens that hold ``gamma`` of the last queries'
attention would fill. A query-aware head keeps ``min_budget`` of each besides. The first vertical and the main
diagonal always stay.

Blocks are of 128 x 128, so that a selected one is two of our 64-key blocks, and the skip ratio is counted on ours. A
block without attention adds nothing to the divergence (the authors' code gives NaN there and takes the head as
vertical-slash).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from bsfa.attention import check_scale
from bsfa.blocks import BlockGrid, BlockLists
from bsfa.methods.base import Call
from bsfa.methods.parameters import number, whole
from bsfa.methods.selecting import Selecting
from bsfa.selection import (
    block_lists,
    diagonal_sums,
    highest,
    last_attention,
    mean_pool,
    refuse_chunks,
    scores,
    select,
    sum_pool,
    vertical_slash,
    visible,
)

BLOCK = 128


@dataclass(frozen=True)
class FlexPrefill(Selecting):
    """FlexPrefill at one strength.

    Parameters
    ----------
    gamma : float
        Share of attention to cover, above 0 and up to 1; the paper's 0.9 and 0.95.
    tau : float
        Divergence under which a head is query-aware, from 0 (none) to 1; the paper's 0.1.
    min_budget : int
        Tokens that verticals, and slashes, hold at the least; the paper's 1024. A prompt up to that is dense.
    """

    gamma: float = 0.95
    tau: float = 0.1
    min_budget: int = 1024

    name: ClassVar[str] = "flexprefill"
    chunks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        number("gamma", self.gamma, above=0, most=1)
        number("tau", self.tau, least=0, most=1)
        whole("min_budget", self.min_budget, 1)

    def select(self, call: Call) -> BlockLists:
        refuse_chunks(call, self.name, "chooses a head's pattern by the last queries of a prompt")
        native = replace(call.grid, block_k=BLOCK)
        last = last_attention(call, min(BLOCK, call.q.shape[1]))
        vertical, slash = last.mean(2), diagonal_sums(last) / last.shape[2]
        keys = mean_pool(call.k, BLOCK)
        aware = divergence(sum_pool(vertical, BLOCK), self.guess(call, keys)) < self.tau
        keep = self.vertical_slash(vertical, slash, aware)
        keep |= aware[..., None, None] & self.query_aware(call, native, keys)
        return block_lists(keep, native, call.grid)

    def guess(self, call: Call, keys: torch.Tensor) -> torch.Tensor:
        """The last queries' attention as their mean sees the mean keys (B, n, Hkv, D): fp32 (B, Hq, n)."""
        n = min(BLOCK, call.q.shape[1])
        query = call.q[:, -n:].mean(1, keepdim=True, dtype=torch.float32)
        grid = BlockGrid(n, call.k.shape[1], True, call.window_size, block_q=n, block_k=BLOCK)
        dots = scores(query, keys, check_scale(call.q, call.softmax_scale))[:, :, 0]
        return dots.masked_fill(~visible(grid, keys.device)[0], -torch.inf).softmax(-1)

    def vertical_slash(self, vertical: torch.Tensor, slash: torch.Tensor, aware: torch.Tensor) -> torch.Tensor:
        """Verticals and slashes from their mass by token (B, Hq, Sk): bool (B, Hq, n, n)."""
        first, main = sum_pool(vertical, BLOCK), sum_pool(slash, BLOCK)
        first[..., 0] = torch.inf
        main[..., -1] = torch.inf
        columns, diagonals = (
            highest(blocks, self.count(tokens, aware)) for blocks, tokens in ((first, vertical), (main, slash))
        )
        return vertical_slash(columns, diagonals.flip(-1))

    def count(self, tokens: torch.Tensor, aware: torch.Tensor) -> torch.Tensor:
        """Blocks to keep of a mass by token (B, Hq, Sk): int64 (B, Hq, 1)."""
        least = -(-self.min_budget // BLOCK)
        covering = (~(tokens.sort(dim=-1, descending=True).values.cumsum(-1) > self.gamma)).sum(-1) + 1
        return (covering // BLOCK + 1).clamp(min=least).masked_fill(aware, least)[..., None]

    def query_aware(self, call: Call, native: BlockGrid, keys: torch.Tensor) -> torch.Tensor:
        """Blocks of the largest pooled attention, over all query blocks together: bool (B, Hq, n, n)."""
        dots = scores(mean_pool(call.q, BLOCK), keys, check_scale(call.q, call.softmax_scale))
        mass = dots.masked_fill_(~visible(native, dots.device), -torch.inf).softmax(-1)
        cover = select(mass.flatten(2), lambda ordered: ~(ordered.cumsum(-1) > self.gamma * native.n_q))
        return cover.unflatten(2, mass.shape[2:])


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Square root of the Jensen-Shannon divergence along the last axis, in nats."""
    entropy = torch.special.entr
    inside = (entropy(p) + entropy(q)).sum(-1) / 2
    return (entropy((p + q) / 2).sum(-1) - inside).clamp(min=0).sqrt()
