"""What a method is calibrated to, a class each: named by the method's config under ``calibrated``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel

import bsfa
from bsfa import Cuts, Thresholds
from bsfa.errors import InputError
from bsfa.provenance import Provenance

if TYPE_CHECKING:
    from experiments.calibrate import Calibration


class Table(Protocol):
    """What a calibration makes."""

    @property
    def provenance(self) -> Provenance: ...

    def digest(self) -> str: ...

    def save(self, path: Path) -> None: ...


class Rule(ABC):
    """From texts to a table, and the table's file.

    ``entry`` is the method's parameter that takes the table; in a config it holds a file of the user's, or null for one
    that the harness makes. ``file`` is that one's name.
    """

    entry: ClassVar[str]
    file: ClassVar[str]

    @abstractmethod
    def check(self, calibration: Calibration, method: DictConfig) -> None:
        """Refuse a strength that will not be calibrated.

        Raises
        ------
        InputError
        """

    @abstractmethod
    def identity(self, calibration: Calibration) -> dict[str, Any]:
        """What tells a calibration by this rule from others."""

    @abstractmethod
    def make(self, model: PreTrainedModel, texts: list[torch.Tensor], calibration: Calibration) -> Table: ...

    @abstractmethod
    def load(self, path: Path | str) -> Table:
        """Read a table's file.

        Raises
        ------
        InputError
            It is none.
        """

    def given(self, path: str, method: DictConfig) -> Table:
        """Read a user's file for a method.

        Raises
        ------
        InputError
            It is none, or not for the method's strength.
        """
        return self.load(path)


@dataclass(frozen=True)
class ThresholdRule(Rule):
    """BSFA's thresholds."""

    entry: ClassVar[str] = "thresholds"
    file: ClassVar[str] = "thresholds.safetensors"

    def check(self, calibration: Calibration, method: DictConfig) -> None:
        if method.k not in calibration.k_values:
            known = ", ".join(map(str, calibration.k_values))
            raise InputError(f"k={method.k} is not calibrated; calibration.k_values holds {known}")

    def identity(self, calibration: Calibration) -> dict[str, Any]:
        return calibration.identity()

    def make(self, model: PreTrainedModel, texts: list[torch.Tensor], calibration: Calibration) -> Table:
        return bsfa.calibrate(model, texts, list(calibration.k_values), data=calibration.data)

    def load(self, path: Path | str) -> Thresholds:
        return Thresholds.load(path)

    def given(self, path: str, method: DictConfig) -> Table:
        table = self.load(path)
        table.select(method.k)
        return table


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

    version: ClassVar[int] = 1
    entry: ClassVar[str] = "cuts"
    file: ClassVar[str] = "cuts.safetensors"

    def check(self, calibration: Calibration, method: DictConfig) -> None:
        """Every budget is served."""

    def identity(self, calibration: Calibration) -> dict[str, Any]:
        texts = {key: value for key, value in calibration.identity().items() if key != "k_values"}
        return texts | {
            "rule": {"name": self.entry, "version": self.version, "tail": self.tail, "samples": self.samples}
        }

    def make(self, model: PreTrainedModel, texts: list[torch.Tensor], calibration: Calibration) -> Table:
        return bsfa.calibrate_cuts(model, texts, tail=self.tail, samples=self.samples, data=calibration.data)

    def load(self, path: Path | str) -> Cuts:
        return Cuts.load(path)
