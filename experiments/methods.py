"""From the ``method`` config to the methods to compare.

``method=NAME`` is one method; ``method=compare`` is a group of them under ``members``. A method's ``knob`` names the
parameter that sets its strength; given a list there, the method is run once for each value. A method with a
``calibrated`` entry, a rule of `experiments.rules`, is calibrated once for each data set in ``calibration.data``. A
``name`` tells a method apart from itself with other settings, in labels and tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, ListConfig, OmegaConf

from bsfa.errors import InputError
from bsfa.methods import Method
from experiments import checks
from experiments.calibrate import CalibratedFile, GivenFile, calibrations, rule_of
from experiments.config import members, plain
from experiments.models import Loaded, ModelSource
from experiments.records import Store
from experiments.unavailable import reason

ABOUT = ("_target_", "knob", "calibrated", "name")  # entries of a method's config that are no parameters of its class


@dataclass(frozen=True)
class Variant:
    """One method at one strength, not yet built.

    Attributes
    ----------
    config : DictConfig
        The method's own config, its knob a single value.
    source : CalibratedFile or GivenFile, optional
        What a calibrated method reads.

    Raises
    ------
    InputError
        A parameter that the method has not, or refuses; of a calibrated one the latter is found with its table.
    """

    config: DictConfig
    source: CalibratedFile | GivenFile | None = None

    def __post_init__(self) -> None:
        checks.text("method.name", self.name)
        known = list(signature(self.kind).parameters)
        if unknown := [key for key in self._parameters() if key not in known]:
            raise InputError(f"method {self.name} has no {', '.join(unknown)}; it has {', '.join(known)}")
        if not self.source:
            self._make({})

    @property
    def kind(self) -> type[Method]:
        try:
            return get_class(self.config._target_)
        except Exception as error:  # whatever a module of the user's can raise
            raise InputError(f"method._target_={self.config._target_} is no method's class: {reason(error)}") from error

    @property
    def name(self) -> str:
        return self.config.get("name") or self.kind.name

    @property
    def strength(self) -> str:
        """``k=8``, or nothing for a method without a knob."""
        return f"{self.config.knob}={self.config[self.config.knob]}" if self.config.knob else ""

    @property
    def label(self) -> str:
        """What stands in logs: ``bsfa k=8 (prose)``."""
        data = self.calibration().get("data")
        return " ".join(part for part in (self.name, self.strength, f"({data})" if data else "") if part)

    def identity(self) -> dict[str, Any]:
        """What tells this variant's records from others."""
        return {
            "name": self.name,
            "version": self.kind.version,
            "strength": self.strength,
            "parameters": {key: _by_content(value) for key, value in self._parameters().items()},
            "calibration": self.calibration(),
        }

    def calibration(self) -> dict[str, Any]:
        """What the method was calibrated on; empty where it was not."""
        return self.source.calibration() if self.source else {}

    @property
    def calibrated_on(self) -> str:
        """What a plan says of it, such as ``prose, 16 texts of 4,096 tokens``; empty where it was not."""
        return self.source.calibrated_on if self.source else ""

    @property
    def serves_chunks(self) -> bool:
        """Whether the method will serve a prefill in chunks."""
        return self.kind.chunks if self.source else self._make({}).serves_chunks

    @property
    def fewest_keys(self) -> int:
        """Of the method; 1 as long as what that depends on is to be calibrated."""
        if self.kind.any_length:
            return 1
        if not self.source:
            return self._make({}).fewest_keys
        table = self.source.made()
        return 1 if table is None else self._with(table).fewest_keys

    def build(self, loaded: Loaded) -> Method:
        """The method, calibrated first where its table is missing."""
        return self._with(self.source.load(loaded)) if self.source else self._make({})

    def _with(self, table: Any) -> Method:
        return self._make({rule_of(self.config).entry: table})

    def _make(self, table: dict[str, Any]) -> Method:
        make: Callable[..., Method] = self.kind
        return make(**self._parameters(), **table)

    def _parameters(self) -> dict[str, Any]:
        """All but the table."""
        others = {*ABOUT, rule_of(self.config).entry} if "calibrated" in self.config else ABOUT
        return {key: value for key, value in plain(self.config).items() if key not in others}


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
        A k that is not calibrated, a threshold file that cannot be read, two methods that their records would not tell
        apart.
    """
    found = [
        Variant(single, file)
        for member in members(cfg)
        for single in _strengths(member)
        for file in _sources(single, cfg, store, source)
    ]
    identities = [variant.identity() for variant in found]
    if twice := sorted({one.label for one, own in zip(found, identities, strict=True) if identities.count(own) > 1}):
        raise InputError(f"method: {', '.join(twice)} is there twice; leave one out, or tell it apart by its name")
    return found


def calibrations_of(chosen: Iterable[Variant]) -> str:
    """What a plan says of the calibrations of several variants."""
    return "; ".join(dict.fromkeys(variant.calibrated_on for variant in chosen if variant.source))


def _strengths(member: DictConfig) -> Iterator[DictConfig]:
    if member.knob and member.knob not in member:
        raise InputError(f"method.knob={member.knob} is none of the method's parameters")
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
) -> Iterator[CalibratedFile | GivenFile | None]:
    if "calibrated" not in single:
        yield None
        return
    by = rule_of(single)
    if single[by.entry]:
        yield GivenFile(*by.given(Path(single[by.entry]), single))
        return
    for texts in calibrations(cfg):
        by.check(texts, single)
        yield CalibratedFile.of(store, by, texts, source)
