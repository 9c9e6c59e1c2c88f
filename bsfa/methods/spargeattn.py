"""SpargeAttn (arXiv 2502.18137): blocks ranked by mean queries against mean keys, where a mean can stand for a block.

Keys are first freed of their mean over the prompt. A block of 128 queries or 64 keys whose tokens point different
ways (mean cosine between them not above ``similarity``) has no telling mean: all of its row or column is kept. The
others go by the softmax over pooled scores: `SpargeAttn` keeps a query block's largest ones while they sum up to at
most ``cdf``, `SpargeAttnTopK` a fixed share of the prompt's key blocks.

Two things differ from the authors' package. The diagonal band is kept besides: theirs forces nothing, and a query
block left with the last of its key blocks alone would have rows that see nothing. And their second test, which skips
PV where a tile's maximum lies ``pvthreshd`` under the running one, is not run: our kernels visit a list or apply a
gate, not both; at the packages' default of 50 (in log2 units) it skips next to nothing. Their kernels also quantise Q
and K to 8 bits, ours do not. Their newest entry points ignore ``is_causal`` in the kernel; ours are causal.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from bsfa.attention import check_scale
from bsfa.blocks import BLOCK_K, BLOCK_Q, BlockLists
from bsfa.methods.base import Call
from bsfa.methods.parameters import number
from bsfa.methods.selecting import Selecting
from bsfa.selection import band, mean_pool, refuse_chunks, scores, select, visible


def cosine(x: torch.Tensor, size: int) -> torch.Tensor:
    """Mean cosine between the tokens of a block, each with itself among them: (B, S, H, D) -> fp32 (B, H, n)."""
    return mean_pool(normalize(x.float(), dim=-1), size).square().sum(-1).transpose(1, 2)


@dataclass(frozen=True)
class PooledScores(Selecting):
    """What the two rules share: all but which of a query block's ranked masses to keep."""

    similarity: float

    chunks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        number("similarity", self.similarity, least=-1, most=1)

    def select(self, call: Call) -> BlockLists:
        refuse_chunks(call, self.name, "takes the mean of all keys of a prompt")
        grid, device = call.grid, call.q.device
        k = call.k - call.k.mean(1, keepdim=True)
        means = scores(mean_pool(call.q, BLOCK_Q), mean_pool(k, BLOCK_K), check_scale(call.q, call.softmax_scale))
        odd_q = ~(cosine(call.q, BLOCK_Q) > self.similarity)[..., None]
        odd_k = ~(cosine(k, BLOCK_K) > self.similarity).repeat_interleave(call.q.shape[2] // k.shape[2], 1)[:, :, None]
        seen = visible(grid, device)
        unranked = odd_k | ~seen
        mass = means.masked_fill(unranked, -torch.inf).softmax(-1).masked_fill(unranked, 0)
        keep = select(mass, self.rule) | odd_q | odd_k | band(grid, device)
        return BlockLists.from_mask(keep & seen)

    @abstractmethod
    def rule(self, ordered: torch.Tensor) -> torch.Tensor:
        """Which masses of a query block (..., n_k), largest first, to keep: bool of the same shape."""


@dataclass(frozen=True)
class SpargeAttn(PooledScores):
    """SpargeAttn by cumulated mass, the paper's rule.

    Parameters
    ----------
    similarity : float
        Mean cosine above which a block goes by its mean, from -1 to 1; the package's 0.6 for this rule.
    cdf : float
        Mass within which a query block's best blocks are kept, from 0 to 1; the package's 0.98. The best one always is.
    """

    similarity: float = 0.6
    cdf: float = 0.98

    name: ClassVar[str] = "spargeattn"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("cdf", self.cdf, least=0, most=1)

    def rule(self, ordered: torch.Tensor) -> torch.Tensor:
        ranks = torch.arange(ordered.shape[-1], device=ordered.device)
        return ~(ordered.cumsum(-1) > self.cdf) | (ranks == 0)


@dataclass(frozen=True)
class SpargeAttnTopK(PooledScores):
    """SpargeAttn by count, what the authors' README recommends.

    Parameters
    ----------
    similarity : float
        As in `SpargeAttn`; the package's -0.1 for this rule.
    share : float
        Share of the prompt's key blocks that a query block keeps, from 0 to 1; the README's 0.5. Future blocks count,
        as they do there: a query block that sees fewer keeps all it sees. At least one is kept.
    """

    similarity: float = -0.1
    share: float = 0.5

    name: ClassVar[str] = "spargeattn_topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("share", self.share, least=0, most=1)

    def rule(self, ordered: torch.Tensor) -> torch.Tensor:
        ranks = torch.arange(ordered.shape[-1], device=ordered.device)
        return (ranks < max(1, int(self.share * len(ranks)))).expand_as(ordered)
