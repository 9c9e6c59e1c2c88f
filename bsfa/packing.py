"""Where the sequences of a batch lie, on the device: `total` alone does not wait for a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from bsfa.blocks import BLOCK_K, BLOCK_Q
from bsfa.errors import InputError


@dataclass(frozen=True, eq=False)
class Packing:
    """A span of rows a sequence: packed, in q (total_q, Hq, D) that holds them all; padded, in its own (Sq, Hq, D).

    Parameters
    ----------
    queries, keys : int32 or int64 (B, 2)
        A sequence's first row and its end.
    max_seqlen_q, max_seqlen_k : int
        The longest sequence's.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    @classmethod
    def cumulative(
        cls, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int
    ) -> Packing:
        """Sequences one after the other, as flash-attn's varlen calls have them.

        Parameters
        ----------
        cu_seqlens_q, cu_seqlens_k : int32 or int64 (B + 1,)
            Cumulative sequence lengths, from 0 to the total.

        Raises
        ------
        InputError
            Shapes or dtypes that are not these. What the tensors hold is not read.
        """
        for name, cumulative in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if cumulative.dim() != 1 or len(cumulative) < 2 or cumulative.dtype not in (torch.int32, torch.int64):
                raise InputError(
                    f"{name} must be int32 (B + 1,), from 0 to the total, "
                    f"got {cumulative.dtype} {tuple(cumulative.shape)}"
                )
        if len(cu_seqlens_q) != len(cu_seqlens_k):
            raise InputError(
                f"cu_seqlens_q is for {len(cu_seqlens_q) - 1} sequences, cu_seqlens_k for {len(cu_seqlens_k) - 1}"
            )
        return cls(cu_seqlens_q.unfold(0, 2, 1), cu_seqlens_k.unfold(0, 2, 1), max_seqlen_q, max_seqlen_k)

    def to(self, device: torch.device) -> Packing:
        if self.queries.device == device == self.keys.device:
            return self
        queries, keys = (x.to(device, non_blocking=True) for x in (self.queries, self.keys))
        return Packing(queries, keys, self.max_seqlen_q, self.max_seqlen_k)

    def check(self, total_q: int, total_k: int) -> None:
        """That packed sequences lie one after the other. Reads the spans, which waits once for a GPU that holds them.

        Raises
        ------
        InputError
            Cumulative lengths that do not run from 0 to the total, or a longest sequence that is not the longest.
        """
        queries, keys = self._bounds
        _check("cu_seqlens_q", queries, total_q, self.max_seqlen_q)
        _check("cu_seqlens_k", keys, total_k, self.max_seqlen_k)

    def alone(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """q (1, its queries, Hq, D) and k, v (1, its keys, Hkv, D) of each sequence; see `check`."""
        if q.dim() == 3:
            self.check(len(q), len(k))
        queries, keys = self._bounds
        for own_q, own_k, own_v in zip(_rows(q, queries), _rows(k, keys), _rows(v, keys), strict=True):
            yield own_q[None], own_k[None], own_v[None]

    def joined(self, parts: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """x, shaped as q is, with (its queries, ...) of each sequence put in its place. Reads the spans, as `check`."""
        queries, _ = self._bounds
        for own, part in zip(_rows(x, queries), parts, strict=True):
            own.copy_(part)
        return x

    def fill_outside(self, x: torch.Tensor, value: float) -> None:
        """Of what is shaped as a padded q is, the rows that are no sequence's. Reads the spans, as `check`."""
        queries, _ = self._bounds
        for plane, (start, end) in zip(x, queries, strict=True):
            plane[:start].fill_(value)
            plane[end:].fill_(value)

    def total(self, causal: bool) -> torch.Tensor:
        """Blocks of each sequence with at least one visible entry: int64 (B,), see `BlockGrid.total`."""
        return self._causal_total if causal else self._full_total

    @cached_property
    def _bounds(self) -> tuple[list[list[int]], list[list[int]]]:
        return self.queries.tolist(), self.keys.tolist()

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
        queries, keys = (x.long().diff()[:, 0] for x in (self.queries, self.keys))
        return queries, keys


def _rows(x: torch.Tensor, spans: list[list[int]]) -> Iterator[torch.Tensor]:
    planes = [x] * len(spans) if x.dim() == 3 else x
    return (plane[start:end] for plane, (start, end) in zip(planes, spans, strict=True))


def _check(name: str, spans: list[list[int]], total: int, longest: int) -> None:
    bounds = [spans[0][0], *(end for _, end in spans)]
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != total or min(lengths) < 0:
        raise InputError(f"{name} must rise from 0 to {total}, got {bounds}")
    if max(lengths) > longest:
        raise InputError(f"{name} holds a sequence of {max(lengths)}, longer than the stated {longest}")
