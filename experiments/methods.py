"""From the ``method`` config to the methods to compare.

``method=NAME`` is one method; ``method=compare`` is a group of them under ``members``. A method's ``knob`` names the
parameter that sets its strength; given a list there, the method is run once for each value. A method with a
``thresholds`` entry is calibrated, once for each data set in ``calibration.data``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, ListConfig, OmegaConf

from bsfa.errors import InputError
from bsfa.methods import Method
from bsfa.thresholds import Thresholds
from experiments.calibrate import ThresholdFile, calibrations
from experiments.config import plain
from experiments.models import Loaded, ModelSource
from experiments.records import Store


@dataclass(frozen=True)
class Variant:
    """One method at one strength, not yet built.

    Attributes
    ----------
    config : DictConfig
        The method's own config, its knob a single value.
    source : ThresholdFile or Thresholds, optional
        What a calibrated method reads.
    """

    config: DictConfig
    source: ThresholdFile | Thresholds | None = None

    @property
    def kind(self) -> type[Method]:
        return get_class(self.config._target_)

    @property
    def strength(self) -> str:
        """``k=8``, or nothing for a method without a knob."""
        return f"{self.config.knob}={self.config[self.config.knob]}" if self.config.knob else ""

    @property
    def label(self) -> str:
        """What stands in logs: ``bsfa k=8 (prose)``."""
        data = self.calibration().get("data")
        return " ".join(part for part in (self.kind.name, self.strength, f"({data})" if data else "") if part)

    def identity(self) -> dict[str, Any]:
        """What tells this variant's records from others."""
        return {
            "name": self.kind.name,
            "version": self.kind.version,
            "strength": self.strength,
            "parameters": {key: _by_content(value) for key, value in self._parameters().items()},
            "calibration": self.calibration(),
        }

    def calibration(self) -> dict[str, Any]:
        """What the method was calibrated on; empty where it was not."""
        match self.source:
            case ThresholdFile() as file:
                return {"id": file.digest, **file.identity["calibration"]}
            case Thresholds(provenance=origin) as table:
                return {"data": origin.data or "file", "data_hash": origin.data_hash, "digest": table.digest()}
            case _:
                return {}

    def build(self, loaded: Loaded) -> Method:
        """The method, calibrated first where its thresholds are missing."""
        make: Callable[..., Method] = self.kind
        match self.source:
            case ThresholdFile() as file:
                return make(thresholds=file.load_or_make(loaded), **self._parameters())
            case Thresholds() as table:
                return make(thresholds=table, **self._parameters())
            case _:
                return make(**self._parameters())

    def _parameters(self) -> dict[str, Any]:
        return {
            key: value for key, value in plain(self.config).items() if key not in ("_target_", "knob", "thresholds")
        }


def _by_content(value: Any) -> Any:
    """A parameter as a record has it: a file, such as MInference's patterns, by what it holds and not by its path."""
    if isinstance(value, str) and (path := Path(value)).is_file():
        return f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    return value


def variants(cfg: DictConfig, store: Store, source: ModelSource) -> list[Variant]:
    """Every variant that ``method`` asks for.

    Raises
    ------
    InputError
        A k that is not calibrated, a threshold file that cannot be read.
    """
    members = cfg.method.members.values() if "members" in cfg.method else [cfg.method]
    return [
        Variant(single, threshold_source)
        for member in members
        for single in _strengths(member)
        for threshold_source in _sources(single, cfg, store, source)
    ]


def _strengths(member: DictConfig) -> Iterator[DictConfig]:
    values = member[member.knob] if member.knob else None
    if not isinstance(values, ListConfig):
        yield OmegaConf.create(plain(member))
        return
    if not values:
        raise InputError(f"method.{member.knob}=[] names no strength; give one, or a list such as [4,8]")
    for value in dict.fromkeys(values):
        yield OmegaConf.create(plain(member) | {member.knob: value})


def _sources(
    single: DictConfig, cfg: DictConfig, store: Store, source: ModelSource
) -> Iterator[ThresholdFile | Thresholds | None]:
    if "thresholds" not in single:
        yield None
    elif single.thresholds:
        table = Thresholds.load(single.thresholds)
        table.select(single.k)
        yield table
    else:
        for calibration in calibrations(cfg):
            calibration.check(single.k)
            yield ThresholdFile.of(store, calibration, source)
