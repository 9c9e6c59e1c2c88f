"""A gate of our own: drop a block in which no entry is worth a given share of its row's attention.

The blocks are visited from the first one (the sink), over the diagonal band, to the others, latest first. With the two
that hold most of a row's attention seen at once, the log-sum-exp over what is kept so far is near its final value, and
``exp(score - log-sum-exp)`` bounds from above what the softmax will give an entry. A block where that stays under
``share`` in every row is dropped. Nothing is calibrated, and the bound belongs to the row, so that it carries from text
to text and from length to length, which a threshold on the score itself does not.

BLASST (arXiv 2512.12087) asks the same of the running maximum, from the first block to the last, with a cut that falls
with the number of keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from bsfa.gates import Gate, RelativeTo
from bsfa.methods.base import Attend, Method
from bsfa.methods.parameters import number
from bsfa.model import ModelInfo


@dataclass(frozen=True)
class RowShare(Method):
    """The gate at one strength.

    Parameters
    ----------
    share : float
        Above 0 and up to 1: the attention weight, relative to what the row has kept so far, that an entry of a block
        has to reach for the block to be kept.
    relative_to : {"lse", "max"}
        What a row has kept so far: its log-sum-exp, or its maximum alone, for comparison.
    """

    share: float
    relative_to: RelativeTo = "lse"

    name: ClassVar[str] = "row_share"
    packs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number("share", self.share, above=0, most=1)

    def bind(self, model: ModelInfo) -> Attend:
        gate = Gate(relative=math.log(self.share), relative_to=self.relative_to, order="sink", keep_first=True)
        return lambda call: call.attend(gate=gate)
