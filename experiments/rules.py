"""What a method is calibrated to, a class each: named by the method's config under ``calibrated``."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from omegaconf import DictConfig

import bsfa
from bsfa import Cuts, Thresholds
from bsfa.errors import InputError
from bsfa.methods.blasst import BlasstFit
from bsfa.methods.fisher_share import check_strength
from bsfa.patterns import Patterns
from experiments import checks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from experiments.calibrate import Calibration

FILE = "file"  # stands for the data of a user's file that does not name them
SEARCHED_LENGTH = 30_000  # tokens at which the sizes of MInference's candidates cost about the same


class Table(Protocol):
    """What a calibration makes."""

    def save(self, path: Path) -> None: ...


class Rule(ABC):
    """From texts to a table, and the table's file.

    ``entry`` is the method's parameter that takes the table; in a config it holds a file of the user's, or null for one
    that the harness makes. ``file`` is that one's name. ``version`` is part of a record's identity.
    """

    entry: ClassVar[str]
    file: ClassVar[str]
    version: ClassVar[int] = 1

    def identity(self, calibration: Calibration) -> dict[str, Any]:
        """What tells a calibration by this rule from others."""
        texts = {key: value for key, value in calibration.identity().items() if key != "k_values"}
        return texts | {"rule": {"name": self.entry, "version": self.version, **vars(self)}}

    def check_texts(self, calibration: Calibration) -> None:  # noqa: B027  most rules take any text
        """Refuse texts that are not for the rule.

        Raises
        ------
        InputError
        """

    @abstractmethod
    def check(self, calibration: Calibration, method: DictConfig) -> None:
        """Refuse texts that are not for the rule, or a strength that they will not be calibrated for.

        Raises
        ------
        InputError
        """

    @abstractmethod
    def make(self, model: PreTrainedModel, texts: list[torch.Tensor], calibration: Calibration, partial: Path) -> Table:
        """Calibrate; the folder ``partial`` keeps what single texts gave, for a call that goes on with it."""

    @abstractmethod
    def load(self, path: Path) -> Any:
        """What the method takes, from a table's file.

        Raises
        ------
        InputError
            It is none.
        """

    def given(self, path: Path, method: DictConfig) -> tuple[Any, dict[str, Any], str]:
        """What the method takes, from a user's file, and what a record and a plan say of it.

        Raises
        ------
        InputError
            It is none, or not for the method's strength.
        """
        table = self.load(path)
        return table, {"data": FILE, "digest": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}, FILE


@dataclass(frozen=True)
class ThresholdRule(Rule):
    """BSFA's thresholds."""

    entry: ClassVar[str] = "thresholds"
    file: ClassVar[str] = "thresholds.safetensors"

    def identity(self, calibration: Calibration) -> dict[str, Any]:
        return calibration.identity()

    def check(self, calibration: Calibration, method: DictConfig) -> None:
        if method.k not in calibration.k_values:
            known = ", ".join(map(str, calibration.k_values))
            raise InputError(f"k={method.k} is not calibrated; calibration.k_values holds {known}")

    def make(self, model: PreTrainedModel, texts: list[torch.Tensor], calibration: Calibration, partial: Path) -> Table:
        ks = list(calibration.k_values)
        return bsfa.calibrate(model, texts, ks, data=calibration.data, partial=partial)

    def load(self, path: Path) -> Thresholds:
        return Thresholds.load(path)

    def given(self, path: Path, method: DictConfig) -> tuple[Any, dict[str, Any], str]:
        table = self.load(path)
        table.select(method.k)
        return table, *_origin(table)


@dataclass(frozen=True)
class CutsRule(Rule):
    """The cuts of fisher_share.

    Parameters
    ----------
    tail, samples : int
        As in `bsfa.calibrate_cuts`.
    """

    tail: int = 192
    samples: int = 8

    entry: ClassVar[str] = "cuts"
    version: ClassVar[int] = 2
    file: ClassVar[str] = "cuts.safetensors"

    def __post_init__(self) -> None:
        checks.count("method.calibrated.tail", self.tail)
        checks.count("method.calibrated.samples", self.samples)

    def check(self, calibration: Calibration, method: DictConfig) -> None:
        self._check_strength(method)
        self.check_texts(calibration)

    def check_texts(self, calibration: Calibration) -> None:
        if calibration.length < self.tail:
            raise InputError(
                f"calibration.length={calibration.length} is under the {self.tail} tokens that fisher_share looks at; "
                f"take longer texts, or method.calibrated.tail={calibration.length}"
            )

    def make(self, model: PreTrainedModel, texts: list[torch.Tensor], calibration: Calibration, partial: Path) -> Table:
        data = calibration.data
        return bsfa.calibrate_cuts(model, texts, tail=self.tail, samples=self.samples, data=data, partial=partial)

    def load(self, path: Path) -> Cuts:
        return Cuts.load(path)

    def given(self, path: Path, method: DictConfig) -> tuple[Any, dict[str, Any], str]:
        self._check_strength(method)
        table = self.load(path)
        return table, *_origin(table)

    def _check_strength(self, method: DictConfig) -> None:
        check_strength(method.kl, method.shared, method.get("most"), method.get("coupling", 0))


@dataclass(frozen=True)
class BlasstRule(Rule):
    """BLASST's two scalars."""

    entry: ClassVar[str] = "fit"
    file: ClassVar[str] = "blasst.json"

    def check(self, calibration: Calibration, method: DictConfig) -> None:
        """Any text and any share will do."""

    def make(self, model: PreTrainedModel, texts: list[torch.Tensor], calibration: Calibration, partial: Path) -> Table:
        from bsfa.rivals import fit_blasst  # brings transformers' models, which take seconds to import

        return fit_blasst(model, texts, partial=partial)

    def load(self, path: Path) -> BlasstFit:
        return BlasstFit.load(path)


@dataclass(frozen=True)
class PatternRule(Rule):
    """MInference's pattern a head, from candidates of sizes in proportion to the texts' length."""

    entry: ClassVar[str] = "patterns"
    file: ClassVar[str] = "patterns.json"

    def check(self, calibration: Calibration, method: DictConfig) -> None:
        """Any text and any ratio will do."""

    def make(self, model: PreTrainedModel, texts: list[torch.Tensor], calibration: Calibration, partial: Path) -> Table:
        from bsfa.rivals import search_patterns

        return search_patterns(model, texts, ratio=calibration.length / SEARCHED_LENGTH, partial=partial)

    def load(self, path: Path) -> str:
        Patterns.load(path)
        return str(path)


def _origin(table: Thresholds | Cuts) -> tuple[dict[str, Any], str]:
    origin = table.provenance
    data = origin.data or FILE
    record = {"data": data, "data_hash": origin.data_hash, "digest": table.digest()}
    return record, texts(data, origin.samples, origin.sequence_length) if origin.samples else data


def texts(data: str, samples: int, length: int) -> str:
    """What a plan says of them, such as ``prose, 16 texts of 4,096 tokens``."""
    return f"{data}, {samples} text{'s' * (samples > 1)} of {length:,} tokens"
