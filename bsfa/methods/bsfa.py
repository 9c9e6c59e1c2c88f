"""BSFA (arXiv 2512.07011): keep a block whose largest exact score reaches its calibrated threshold.

The threshold belongs to a layer, a head and a query-block position; it was calibrated so that about ``k`` blocks
beside the diagonal band are kept a query block. The diagonal band always is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from bsfa.gates import Gate
from bsfa.methods.base import Attend, Method
from bsfa.methods.parameters import number
from bsfa.model import ModelInfo
from bsfa.thresholds import Thresholds


@dataclass(frozen=True)
class Bsfa(Method):
    """BSFA at one strength.

    Parameters
    ----------
    thresholds : Thresholds
        From `bsfa.calibrate` or `Thresholds.load`.
    k : int
        Blocks a query block is to keep beside its diagonal; one of the table's. The paper's: 16 to 128.
    screen : float, optional
        Of `Gate`: with 1 the same blocks are kept and found faster, with less nearly the same.

    Raises
    ------
    InputError
        A screen that is no number above 0.
    """

    thresholds: Thresholds
    k: int
    screen: float | None = None

    name: ClassVar[str] = "bsfa"
    packs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.screen is not None:
            number("screen", self.screen, above=0, most=math.inf)

    def bind(self, model: ModelInfo) -> Attend:
        self.thresholds.check(model)
        table = self.thresholds.shard(model.tp_rank, model.tp_size).select(self.k)
        gates = [
            Gate(threshold=rows, screen=self.screen).to(device)
            for rows, device in zip(table, model.devices, strict=True)
        ]
        return lambda call: call.attend(gate=gates[call.layer])
