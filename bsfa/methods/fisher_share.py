"""A gate of our own, calibrated: `row_share` with the share that each head can bear where it matters.

A block is dropped where no entry is worth a share of what its row has kept so far, the first block and the diagonal
band seen first, as in `row_share`. The share belongs to a layer, a head and the query block's distance from the end of
the prompt. What a cut costs the tokens after the prompt is measured once on texts, as a Fisher estimate of the KL
divergence (`bsfa.fisher`); a strength is then a budget of KL, spent where it saves the most blocks (`bsfa.cuts`).

The knob is the budget and not a skip ratio: a skip ratio that is mild at 32K tokens is harsh at 1K and for another
model, a loss in nats is what it is anywhere. The cuts serve any length, with the farthest class for all that is
farther; the estimate is for the calibration's.

The distributions of tokens within the prompt are not guarded: in the last layer, what its early queries read changes no
token that is generated. To score a prompt's own tokens, such as for perplexity, take `row_share`.

A prefill in chunks: each chunk's end counts as the prompt's, for the chunk does not know whether another one follows.
That errs on the side of what is kept, and skips less than one piece does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from bsfa.cuts import Cuts, check_shared
from bsfa.methods.base import Attend, Method
from bsfa.methods.by_distance import attend_by_distance
from bsfa.methods.parameters import number
from bsfa.model import ModelInfo


@dataclass(frozen=True)
class FisherShare(Method):
    """The gate at one strength.

    Parameters
    ----------
    cuts : Cuts
        From `bsfa.calibrate_cuts` or `Cuts.load`.
    kl : float
        Nats a token above 0: the loss to spend, by the calibration's estimate on its own texts. On others more is
        lost: ``experiment=fidelity`` measures it.
    shared : sequence of {"layers", "heads", "positions"}
        Axes along which all have one cut: what the others bring is measured with these.
    most : float, optional
        A share: an entry worth more of its row keeps its block, whatever the budget. The estimate is of second
        order, around distributions that are sure of themselves too: there it takes a loss that turns them over for a
        small one, as where an answer is copied from one place.
    coupling : float
        From 0 to 1: how much is believed of what the errors of heads do together, as the texts show it. 0 adds their
        losses up as if they were independent, see `bsfa.descent`.
    """

    cuts: Cuts
    kl: float
    shared: Sequence[str] = ()
    most: float | None = None
    coupling: float = 0.0

    name: ClassVar[str] = "fisher_share"

    def __post_init__(self) -> None:
        check_strength(self.kl, self.shared, self.most, self.coupling)

    def bind(self, model: ModelInfo) -> Attend:
        self.cuts.check(model)
        return attend_by_distance(self._relative, self.cuts.edges, model)

    @cached_property
    def _relative(self) -> torch.Tensor:
        most = math.inf if self.most is None else self.most
        return self.cuts.select(self.kl, self.shared, most, self.coupling)


def check_strength(kl: float, shared: Sequence[str], most: float | None = None, coupling: float = 0.0) -> None:
    """Refuse what `FisherShare` would, before there are cuts.

    Raises
    ------
    InputError
    """
    number("kl", kl, above=0, most=math.inf)
    check_shared(shared)
    if most is not None:
        number("most", most, above=0, most=math.inf)
    number("coupling", coupling, least=0, most=1)
