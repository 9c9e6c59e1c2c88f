"""`row_share` with a gentler share for the last query blocks: a gate of our own, not calibrated.

The last query blocks make the next tokens, so that what they lose counts in full; what an earlier one loses counts as
far as later layers attend to it. The last two of a prompt, the one that asks among them, drop a block at a fraction of
the share of the others.

A prefill in chunks: each chunk's end counts as the prompt's, for the chunk does not know whether another one follows.
That errs on the side of what is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bsfa.methods.base import Attend, Method
from bsfa.methods.by_distance import attend_by_distance
from bsfa.methods.parameters import number
from bsfa.model import ModelInfo

LAST = 2  # query blocks


@dataclass(frozen=True)
class LateShare(Method):
    """The gate at one strength.

    Parameters
    ----------
    share : float
        As in `RowShare`, for all query blocks but the last two.
    late : float
        Above 0 and up to 1: times ``share`` for those two. The default is our choice; 1 is `RowShare`.
    """

    share: float
    late: float = 0.05

    name: ClassVar[str] = "late_share"

    def __post_init__(self) -> None:
        number("share", self.share, above=0, most=1)
        number("late", self.late, above=0, most=1)

    def bind(self, model: ModelInfo) -> Attend:
        cuts = torch.tensor([self.share * self.late, self.share]).log()
        return attend_by_distance(cuts.expand(model.n_layers, model.n_heads, -1), (LAST,), model)
