"""MInference (arXiv 2407.02490): a pattern a head, found offline, filled in for each prompt.

* vertical-slash: the attention of the prompt's last 64 queries, summed by key and by distance; the ``vertical`` best
  keys (the first 30 forced) and the ``slash`` best distances (the nearest 100 forced) are kept;
* block-sparse: mean-pooled queries and keys of 64 x 64 blocks; a query block keeps its 100 best;
* A-shape: the first ``vertical`` keys and the nearest ``slash`` distances.

The authors' kernel gathers single columns. Ours visits whole blocks: one of 128 x 64 is kept where either of its
halves has a selected block, key or distance, so that it covers what was selected, and its skip ratio, counted on our
grid, is a lower bound of theirs. Many scattered verticals cost a block each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.nn.functional import pad

from bsfa.blocks import BlockGrid, BlockLists
from bsfa.methods.base import Attend, Call, Method
from bsfa.methods.parameters import number
from bsfa.model import ModelInfo
from bsfa.patterns import A_SHAPE, BLOCK_SPARSE, VERTICAL_SLASH, Pattern, Patterns
from bsfa.selection import (
    block_lists,
    diagonal_sums,
    highest,
    last_attention,
    mean_pool,
    refuse_chunks,
    scores,
    sum_pool,
    vertical_slash,
    visible,
)

BLOCK = 64
LAST_QUERIES = 64
FORCED_KEYS, FORCED_DISTANCES = 30, 100
TOP_BLOCKS = 100
PUBLISHED = Pattern(VERTICAL_SLASH, 1000, 6096)  # the package's pattern of a head that its file does not name


@dataclass(frozen=True)
class MInference(Method):
    """MInference at one strength.

    Parameters
    ----------
    ratio : float
        Multiplies every size of every pattern but the forced ones, above 0; ``minference_ratio`` in the authors'
        package. 1 is the published strength, meant for 128K tokens: 6096 slashes leave nothing out of a short prompt,
        which wants about its length over 128K.
    patterns : str, optional
        A file of `bsfa.rivals.search_patterns`, or one of the authors'. Without, every head is vertical-slash with
        1000 and 6096, the package's default.
    """

    ratio: float = 1.0
    patterns: str | None = None

    name: ClassVar[str] = "minference"
    chunks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        number("ratio", self.ratio, above=0, most=math.inf)

    def bind(self, model: ModelInfo) -> Attend:
        published = Patterns(((PUBLISHED,) * model.n_heads,) * model.n_layers)
        patterns = Patterns.load(self.patterns) if self.patterns else published
        patterns.check(model)
        layers = [
            HeadPatterns.of(layer[model.heads], self.ratio, device)
            for layer, device in zip(patterns.layers, model.devices, strict=True)
        ]
        return lambda call: call.attend(blocks=layers[call.layer].select(call))


@dataclass(frozen=True, eq=False)
class HeadPatterns:
    """The patterns of one layer's heads, on its device.

    Attributes
    ----------
    vertical, slash : int64 (Hq, 1)
        Sizes.
    a_shape : bool (Hq, 1)
    block_sparse : bool (Hq, 1, 1), or None where no head is
    top_blocks : int
    """

    vertical: torch.Tensor
    slash: torch.Tensor
    a_shape: torch.Tensor
    block_sparse: torch.Tensor | None
    top_blocks: int

    @classmethod
    def of(cls, heads: Sequence[Pattern], ratio: float, device: torch.device) -> HeadPatterns:
        def column(values: list) -> torch.Tensor:
            return torch.tensor(values, device=device)[:, None]

        block_sparse = [head.kind == BLOCK_SPARSE for head in heads]
        return cls(
            vertical=column([max(FORCED_KEYS, int(head.vertical * ratio)) for head in heads]),
            slash=column([max(FORCED_DISTANCES, int(head.slash * ratio)) for head in heads]),
            a_shape=column([head.kind == A_SHAPE for head in heads]),
            block_sparse=column(block_sparse)[..., None] if any(block_sparse) else None,
            top_blocks=max(1, int(TOP_BLOCKS * ratio)),
        )

    def select(self, call: Call) -> BlockLists:
        """The blocks of one call.

        Raises
        ------
        NotImplementedError
            A chunk of a prefill.
        """
        refuse_chunks(call, MInference.name, "fills in its patterns by the last queries of a prompt")
        native = replace(call.grid, block_q=BLOCK, block_k=BLOCK)
        keep = self.vertical_slash(call, native)
        if self.block_sparse is not None:
            keep = torch.where(self.block_sparse, self.best_blocks(call, native), keep)
        return block_lists(keep, native, call.grid)

    def vertical_slash(self, call: Call, native: BlockGrid) -> torch.Tensor:
        """Blocks with a selected key or distance: bool (B, Hq, n, n)."""
        attention = last_attention(call, min(LAST_QUERIES, call.q.shape[1]))
        by_key, by_distance = attention.sum(2), diagonal_sums(attention).flip(-1)
        nearest = -torch.arange(by_key.shape[-1], device=by_key.device, dtype=torch.float32)
        by_key, by_distance = (torch.where(self.a_shape, nearest, x) for x in (by_key, by_distance))
        by_key[..., :FORCED_KEYS] = torch.inf
        by_distance[..., :FORCED_DISTANCES] = torch.inf
        keys, distances = highest(by_key, self.vertical), highest(by_distance, self.slash)
        # Blocks g apart hold the distances from 64 g - 63 to 64 g + 63.
        reach = pad(distances, (BLOCK - 1, native.n_k * BLOCK - distances.shape[-1])).unfold(-1, 2 * BLOCK - 1, BLOCK)
        return vertical_slash(sum_pool(keys, BLOCK) > 0, reach.any(-1))

    def best_blocks(self, call: Call, native: BlockGrid) -> torch.Tensor:
        """A query block's best blocks by pooled scores: bool (B, Hq, n, n)."""
        dots = scores(mean_pool(call.q, BLOCK), mean_pool(call.k, BLOCK), 1.0)
        return highest(dots.masked_fill_(~visible(native, dots.device), -torch.inf), self.top_blocks)
