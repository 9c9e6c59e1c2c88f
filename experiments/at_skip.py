"""BSFA's gate set to a wanted skip ratio on the very text that it is timed on.

A speed needs the blocks that are skipped to be skipped, not their right choice: with random weights there is nothing to
calibrate for. The cut of a layer, a head and a run of query blocks is the quantile of that run's block maxima under
which the wanted share of its visible blocks falls. What is measured with it says nothing about accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

import bsfa
from bsfa.attention import Attended, Backend
from bsfa.gates import Gate
from bsfa.methods import Call, Method
from bsfa.methods.base import Attend
from bsfa.model import ModelInfo
from bsfa.selection import band, visible

RUN = 64  # query blocks that share a cut: as many block maxima stand in memory at once


@dataclass(frozen=True, eq=False)
class AtSkip(Method):
    """The gate, set.

    Parameters
    ----------
    cuts : dict of int to fp32 (Hq, n_q)
        By layer; in units of ``softmax_scale * q.k``.
    screen : float, optional
        Of the gate.
    """

    cuts: dict[int, torch.Tensor]
    screen: float | None = None

    name: ClassVar[str] = "bsfa"
    packs: ClassVar[bool] = True

    def bind(self, model: ModelInfo) -> Attend:
        gates = {layer: Gate(threshold=cuts, screen=self.screen) for layer, cuts in self.cuts.items()}
        return lambda call: call.attend(gate=gates[call.layer])

    @classmethod
    def set(
        cls, model, read: Callable[[], object], skip: float, backend: Backend, screen: float | None = None
    ) -> AtSkip:
        """The gate for what ``read`` reads through the model, one prompt without padding, in one piece or in chunks.

        Each layer is gated as it is set, so that the next one sees what it will see when it is timed.
        """
        setting = _Setting(skip)
        with bsfa.apply(model, setting, backend=backend):
            read()
        return cls(setting.cuts, screen)


@dataclass(frozen=True, eq=False)
class _Setting(Method):
    skip: float
    cuts: dict[int, torch.Tensor] = field(default_factory=dict)

    name: ClassVar[str] = "setting"

    def bind(self, model: ModelInfo) -> Attend:
        return self._attend

    def _attend(self, call: Call) -> Attended:
        own = quantiles(call, self.skip)
        before = self.cuts.get(call.layer, own[:, :0])
        self.cuts[call.layer] = torch.cat([before, own], dim=1)
        return call.attend(gate=Gate(threshold=self.cuts[call.layer]))


def quantiles(call: Call, skip: float) -> torch.Tensor:
    """The cuts of one call of one prompt: fp32 (Hq, n_q). A share of all visible blocks, the diagonal ones, which are
    always kept, among them; +inf where no share of the others is enough."""
    cuts = []
    for part, maxima in call.block_maxima(RUN):
        maxima = maxima[0]
        free = visible(part, maxima.device) & ~band(part, maxima.device)
        count = sum(len(part.visible(i)) - len(part.band(i)) for i in range(part.n_q))
        rank = round(skip * part.total())
        if rank < count:
            cut = maxima.masked_fill_(~free, torch.inf).flatten(1).kthvalue(rank + 1).values
        else:
            cut = maxima.new_full((len(maxima),), torch.inf)
        cuts.append((cut if skip else cut.fill_(-torch.inf))[:, None].expand(-1, part.n_q))
    return torch.cat(cuts, dim=1)
