"""Where the sequences of a packed batch lie, known on the device: nothing but `Packing.spans` waits for a GPU."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch

from bsfa.blocks import BLOCK_K, BLOCK_Q
from bsfa.errors import InputError


@dataclass(frozen=True, eq=False)
class Packing:
    """Sequences one after the other, as flash-attn's varlen calls have them.

    Parameters
    ----------
    cu_seqlens_q, cu_seqlens_k : int32 or int64 (B + 1,)
        Cumulative sequence lengths, from 0 to the total.
    max_seqlen_q, max_seqlen_k : int
        The longest sequence's.

    Raises
    ------
    InputError
        Shapes or dtypes that are not these. What the tensors hold is not read.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    def __post_init__(self) -> None:
        for name, cumulative in (("cu_seqlens_q", self.cu_seqlens_q), ("cu_seqlens_k", self.cu_seqlens_k)):
            if cumulative.dim() != 1 or len(cumulative) < 2 or cumulative.dtype not in (torch.int32, torch.int64):
                raise InputError(
                    f"{name} must be int32 (B + 1,), from 0 to the total, "
                    f"got {cumulative.dtype} {tuple(cumulative.shape)}"
                )
        if len(self.cu_seqlens_q) != len(self.cu_seqlens_k):
            raise InputError(
                f"cu_seqlens_q is for {len(self.cu_seqlens_q) - 1} sequences, "
                f"cu_seqlens_k for {len(self.cu_seqlens_k) - 1}"
            )

    def to(self, device: torch.device) -> Packing:
        if self.cu_seqlens_q.device == device == self.cu_seqlens_k.device:
            return self
        queries, keys = (x.to(device, non_blocking=True) for x in (self.cu_seqlens_q, self.cu_seqlens_k))
        return Packing(queries, keys, self.max_seqlen_q, self.max_seqlen_k)

    def spans(self, total_q: int, total_k: int) -> list[tuple[slice, slice]]:
        """Rows of every sequence in q and in k. Reads the lengths, which waits once for a GPU that holds them.

        Raises
        ------
        InputError
            Cumulative lengths that do not run from 0 to the total, or a longest sequence that is not the longest.
        """
        queries, keys = self._bounds
        return list(
            zip(
                _spans("cu_seqlens_q", queries, total_q, self.max_seqlen_q),
                _spans("cu_seqlens_k", keys, total_k, self.max_seqlen_k),
                strict=True,
            )
        )

    def total(self, causal: bool) -> torch.Tensor:
        """Blocks of each sequence with at least one visible entry: int64 (B,), see `BlockGrid.total`."""
        return self._causal_total if causal else self._full_total

    @cached_property
    def _bounds(self) -> tuple[list[int], list[int]]:
        return self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()

    @cached_property
    def _full_total(self) -> torch.Tensor:
        blocks_q, blocks_k = (-(-n // b) for n, b in zip(self._lengths(), (BLOCK_Q, BLOCK_K), strict=True))
        return blocks_q * blocks_k

    @cached_property
    def _causal_total(self) -> torch.Tensor:
        queries, keys = (n[:, None] for n in self._lengths())
        first = torch.arange(0, self.max_seqlen_q, BLOCK_Q, device=queries.device)
        seen = (keys - queries + (first + BLOCK_Q).minimum(queries)).clamp_min(0)  # by a query block's last row
        return ((seen + BLOCK_K - 1) // BLOCK_K * (first < queries)).sum(1)

    def _lengths(self) -> tuple[torch.Tensor, torch.Tensor]:
        queries, keys = (x.long().diff() for x in (self.cu_seqlens_q, self.cu_seqlens_k))
        return queries, keys


def _spans(name: str, bounds: list[int], total: int, longest: int) -> list[slice]:
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != total or min(lengths) < 0:
        raise InputError(f"{name} must rise from 0 to {total}, got {bounds}")
    if max(lengths) > longest:
        raise InputError(f"{name} holds a sequence of {max(lengths)}, longer than the stated {longest}")
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]
