"""BLASST (arXiv 2512.12087), also "skip softmax": drop a block that no row would notice against its running maximum.

While the keys are visited from the first to the last, a row's weight of a block is at most ``exp(block's row maximum
- running row maximum)``; where that is under ``lambda = factor / keys`` for every row, softmax, the load of V and PV
are skipped. The first block always runs, the diagonal is not protected, and one factor serves all layers and heads.

The authors' kernel decides tiles of 64 queries by 128 keys, ours blocks of 128 by 64; the rule is the same. In a
prefill in chunks ``keys`` are those of the call, as in the authors' kernels, so that an early chunk skips more than
it would have in one piece.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bsfa.attention import Attended
from bsfa.errors import InputError
from bsfa.gates import Gate
from bsfa.methods.base import Attend, Call, Method
from bsfa.methods.parameters import number
from bsfa.model import ModelInfo
from bsfa.whole import whole


@dataclass(frozen=True)
class Blasst(Method):
    """BLASST at one strength.

    Parameters
    ----------
    factor : float
        ``lambda`` times the number of keys. There is no default: it belongs to a model, and `bsfa.rivals.fit_blasst`
        finds it for a wanted share of skipped blocks, as the authors' calibration does.
    """

    factor: float

    name: ClassVar[str] = "blasst"
    any_length: ClassVar[bool] = False

    def __post_init__(self) -> None:
        number("factor", self.factor, above=0, most=math.inf)

    @property
    def fewest_keys(self) -> int:
        return math.ceil(self.factor)

    def bind(self, model: ModelInfo) -> Attend:
        return self.attend

    def attend(self, call: Call) -> Attended:
        """One call.

        Raises
        ------
        InputError
            Fewer keys than the factor: with lambda above 1 a block would be skipped although it holds the maximum.
        """
        keys = call.k.shape[1]
        if keys < self.fewest_keys:
            raise InputError(
                f"method=blasst: factor={self.factor} over {keys} keys is lambda={self.factor / keys:.3g}, above 1; "
                f"take a factor of at most {keys}, fitted at such lengths"
            )
        relative = math.log(self.factor / keys)
        return call.attend(gate=Gate(relative=relative, order="ascending", keep_diagonal=False, keep_first=True))


@dataclass(frozen=True)
class BlasstFit:
    """``factor = a * exp(b * skip ratio)``, what `bsfa.rivals.fit_blasst` fits."""

    a: float
    b: float

    def factor(self, skip_ratio: float) -> float:
        """The factor that skips this share of the blocks on texts like the calibration's."""
        return self.a * math.exp(self.b * skip_ratio)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, whole or not at all."""
        with whole(Path(path)) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BlasstFit:
        """Read a file of `save`.

        Raises
        ------
        InputError
            No such file, or one that holds something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(float(content["a"]), float(content["b"]))
        except OSError as error:
            raise InputError(f"cannot read BLASST's fit {path}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} is no fit of BLASST's, which holds two numbers a and b") from error


@dataclass(frozen=True)
class FittedBlasst(Method):
    """BLASST at the factor that a fit has for a wanted share of skipped blocks.

    Parameters
    ----------
    fit : BlasstFit
    skip : float
        Above 0 and up to 1: on texts like the fit's, and of their length.
    """

    fit: BlasstFit
    skip: float

    name: ClassVar[str] = "blasst_fitted"
    any_length: ClassVar[bool] = False

    def __post_init__(self) -> None:
        number("skip", self.skip, above=0, most=1)

    @property
    def fewest_keys(self) -> int:
        return self._fitted().fewest_keys

    def bind(self, model: ModelInfo) -> Attend:
        return self._fitted().bind(model)

    def _fitted(self) -> Blasst:
        return Blasst(self.fit.factor(self.skip))
