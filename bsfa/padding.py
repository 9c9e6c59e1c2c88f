"""Padded and packed batches: the real tokens alone, in one call where a method can, else a sequence a call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bsfa.attention import Attended
from bsfa.methods.base import Attend, Call, PackedCall
from bsfa.packing import Packing


@dataclass(frozen=True, eq=False)
class Padding:
    """Where the real tokens of a padded batch are: found once a forward pass, for all of its layers.

    Attributes
    ----------
    written : int
        Keys written so far; slots of the cache past them are not.
    queries, keys : (rows, columns) of the real ones in (B, Sq) and (B, Sk), sequence after sequence
    packing : Packing, or None where all written keys are real
    """

    written: int
    queries: tuple[torch.Tensor, ...]
    keys: tuple[torch.Tensor, ...]
    packing: Packing | None

    @classmethod
    def of(cls, mask: torch.Tensor, n_queries: int) -> Padding:
        """From a bool mask (B, keys written), False at padding; its last columns are the queries. Waits for a GPU."""
        written = mask.shape[1]
        real = mask[:, written - n_queries :]
        lengths = torch.stack([real.sum(1), mask.sum(1)])
        longest_q, longest_k = lengths.amax(1).tolist()
        if int(lengths[1].sum()) == mask.numel():
            return cls(written, (), (), None)
        bounds = torch.nn.functional.pad(lengths.cumsum(1), (1, 0)).int()
        packing = Packing(bounds[0], bounds[1], longest_q, longest_k)
        return cls(written, real.nonzero(as_tuple=True), mask.nonzero(as_tuple=True), packing)

    def attend(self, attend: Attend, packs: bool, call: Call) -> Attended:
        """The call over the real tokens alone. Padding queries give 0."""
        if self.packing is None:
            return attend(replace(call, k=call.k[:, : self.written], v=call.v[:, : self.written]))
        packed = call.packed(call.q[self.queries], call.k[self.keys], call.v[self.keys], self.packing)
        attended = attend_packed(attend, packs, packed)
        out = torch.zeros(call.q.shape, dtype=call.q.dtype, device=call.q.device)
        out[self.queries] = attended.out
        return Attended(out, None, attended.stats)


def attend_packed(attend: Attend, packs: bool, call: PackedCall) -> Attended:
    """At once where the method packs, else one sequence after the other."""
    return attend(call) if packs else Attended.joined([attend(alone) for alone in call.alone()])
