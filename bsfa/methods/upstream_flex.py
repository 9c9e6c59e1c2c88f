"""PyTorch's FlexAttention, compiled, with the causal (and sliding) mask as a block mask: a dense upstream baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bsfa.blocks import BlockGrid, BlockLists
from bsfa.methods.base import Call
from bsfa.methods.upstream import Kernel, Upstream
from bsfa.selection import full, visible

BLOCK = 128  # keys; FlexAttention's default block is 128 x 128
UNBOUNDED = 2**31 - 1  # keys: no window, in int32


@dataclass(frozen=True)
class Flex(Upstream):
    """``torch.nn.attention.flex_attention.flex_attention``."""

    name: ClassVar[str] = "upstream_flex"

    def load(self, devices: Sequence[torch.device]) -> Kernel:
        compiled = torch.compile(flex_attention)

        def kernel(call: Call) -> torch.Tensor:
            if call.softcap:
                raise NotImplementedError(f"method={self.name} runs no softcap; use method=dense for this model")
            q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
            mask = flex_mask(call.grid, call.q.device)
            grouped = call.q.shape[2] != call.k.shape[2]
            out = compiled(q, k, v, block_mask=mask, scale=call.softmax_scale, enable_gqa=grouped)
            return out.transpose(1, 2)

        return kernel


@lru_cache(maxsize=8)  # every layer of a prefill asks for the same
def flex_mask(grid: BlockGrid, device: torch.device) -> BlockMask:
    """What a call sees, for FlexAttention: from the geometry, where `create_block_mask` would take Sq * Sk entries."""
    blocks = replace(grid, block_k=BLOCK)
    whole = full(blocks, device)
    partial = visible(blocks, device) & ~whole
    masked, plain = (BlockLists.from_mask(mask[None, None]) for mask in (partial, whole))
    # Constants for whole prompts: a kernel compiled for several lengths then takes neither as an argument.
    offset, left = grid.offset, grid.window_size[0] if grid.window_size[0] >= 0 else UNBOUNDED

    def seen(batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        position = row + offset
        return (key <= position) & (key >= position - left)

    return BlockMask.from_kv_blocks(
        masked.counts,
        masked.indices,
        plain.counts,
        plain.indices,
        BLOCK_SIZE=(blocks.block_q, blocks.block_k),
        mask_mod=seen,
        seq_lengths=(grid.seqlen_q, grid.seqlen_k),
    )
