"""Padded and packed batches: the real tokens alone, in one call where a method can, else a sequence a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch

from bsfa.attention import Attended
from bsfa.methods.base import Attend, Call, PackedCall
from bsfa.packing import Packing


class Padding(ABC):
    """Where the real tokens of a padded batch are: found once a forward pass, for all of its layers."""

    @staticmethod
    def of(mask: torch.Tensor, n_queries: int) -> Padding:
        """From a bool mask (B, keys written), False at padding; its last columns are the queries. Waits for a GPU."""
        written = mask.shape[1]
        first, keys = mask.int().argmax(1), mask.sum(1)
        queries = mask[:, written - n_queries :].sum(1)
        last = written - mask.flip(1).int().argmax(1)
        longest_q, longest_k, real, in_a_row = torch.stack(
            [queries.max(), keys.max(), keys.sum(), ((last - first == keys) | (keys == 0)).all()]
        ).tolist()
        if real == mask.numel():
            return _Nowhere(written)
        if in_a_row:
            start = (first - (written - n_queries)).clamp_min(0)
            return _Around(Packing(_spans(start, queries), _spans(first, keys), longest_q, longest_k))
        return _Within(
            mask[:, written - n_queries :].nonzero(as_tuple=True),
            mask.nonzero(as_tuple=True),
            Packing(_spans(_before(queries), queries), _spans(_before(keys), keys), longest_q, longest_k),
        )

    @abstractmethod
    def attend(self, attend: Attend, packs: bool, call: Call) -> Attended:
        """The call over the real tokens alone. Padding queries give 0."""


@dataclass(frozen=True)
class _Nowhere(Padding):
    """All of the keys written so far are real; slots of the cache past them are not written."""

    written: int

    def attend(self, attend: Attend, packs: bool, call: Call) -> Attended:
        return attend(replace(call, k=call.k[:, : self.written], v=call.v[:, : self.written]))


@dataclass(frozen=True, eq=False)
class _Around(Padding):
    """Before and after the real tokens, which are read where they are."""

    packing: Packing

    def attend(self, attend: Attend, packs: bool, call: Call) -> Attended:
        return attend_packed(attend, packs, call.packed(call.q, call.k, call.v, self.packing))


@dataclass(frozen=True, eq=False)
class _Within(Padding):
    """Between real tokens, which are copied together.

    Attributes
    ----------
    queries, keys : (rows, columns) of the real ones in (B, Sq) and (B, Sk), sequence after sequence
    """

    queries: tuple[torch.Tensor, ...]
    keys: tuple[torch.Tensor, ...]
    packing: Packing

    def attend(self, attend: Attend, packs: bool, call: Call) -> Attended:
        packed = call.packed(call.q[self.queries], call.k[self.keys], call.v[self.keys], self.packing)
        attended = attend_packed(attend, packs, packed)
        out = torch.zeros(call.q.shape, dtype=call.q.dtype, device=call.q.device)
        out[self.queries] = attended.out
        return Attended(out, None, attended.stats)


def _spans(first: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return torch.stack([first, first + lengths], 1).int()


def _before(lengths: torch.Tensor) -> torch.Tensor:
    """How long all sequences before each one are."""
    return lengths.cumsum(0) - lengths


def attend_packed(attend: Attend, packs: bool, call: PackedCall) -> Attended:
    """At once where the method packs, else one sequence after the other."""
    if packs:
        return attend(call)
    return Attended.joined([attend(alone) for alone in call.alone()], call.q, call.packing)
