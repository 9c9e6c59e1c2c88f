"""StreamingLLM (arXiv 2309.17453) as a block pattern: the first blocks as sinks, and a local window.

The method evicts all but the first tokens and the most recent ones from the cache; here a prefill query block sees
the blocks which hold those keys, whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from bsfa.blocks import BlockGrid, BlockLists
from bsfa.methods.base import Attend, Method
from bsfa.methods.parameters import whole
from bsfa.model import ModelInfo


@dataclass(frozen=True)
class StreamingLLM(Method):
    """Sinks and a local window.

    Parameters
    ----------
    local_blocks : int
        Key blocks kept before the diagonal band; 16 of 64 keys are the 1,024 recent tokens of the paper's
        Llama-2 setting (cache 4 + 1020).
    sink_blocks : int
        Key blocks kept at the start; one covers the paper's 4 sink tokens.
    """

    local_blocks: int = 16
    sink_blocks: int = 1

    name: ClassVar[str] = "streaming_llm"

    def __post_init__(self) -> None:
        whole("local_blocks", self.local_blocks, 0)
        whole("sink_blocks", self.sink_blocks, 0)

    def bind(self, model: ModelInfo) -> Attend:
        @lru_cache(maxsize=8)  # every layer of a prefill asks for the same lists
        def lists(grid: BlockGrid, batch: int, heads: int, device: torch.device) -> BlockLists:
            return BlockLists.shared([self.keep(grid, i) for i in range(grid.n_q)], batch, heads, device)

        return lambda call: call.attend(blocks=lists(call.grid, len(call.q), call.q.shape[2], call.q.device))

    def keep(self, grid: BlockGrid, i: int) -> list[int]:
        """Key blocks of query block ``i``, ascending."""
        local = grid.band(i).start - self.local_blocks
        return [j for j in grid.visible(i) if j < self.sink_blocks or j >= local]
