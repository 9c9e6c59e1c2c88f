"""Calibration as an experiment: texts -> a file in the results folder for every method that wants one, made once."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from filelock import FileLock
from hydra.utils import instantiate
from omegaconf import DictConfig
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from bsfa.errors import InputError
from experiments import checks, rules
from experiments.config import members
from experiments.models import Loaded, ModelSource
from experiments.records import Store
from experiments.rules import Rule, Table
from experiments.tasks import text

log = logging.getLogger(__name__)
MIXED = "mixed"


@dataclass(frozen=True)
class Calibration:
    """Which texts, how long, and BSFA's ks.

    Parameters
    ----------
    data : str
        ``prose``, ``noise``, ``mixed`` (half of each), or a UTF-8 text file.
    length : int
        Tokens a text.
    samples : int
        Texts; the paper takes 16.
    k_values : sequence of int
        The strengths to calibrate.
    seed : int
        Of the order of sentences.
    """

    data: str
    length: int
    samples: int
    k_values: Sequence[int]
    seed: int = 0

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        checks.count("calibration.length", self.length)
        if self.length == 1:
            raise InputError("calibration.length=1: one token is a decode step and no prompt; take 2 or more")
        checks.count("calibration.samples", self.samples)
        checks.seed("calibration.seed", self.seed)
        checks.counts("calibration.k_values", self.k_values)
        if self.data not in (*text.HAYSTACKS, MIXED) and not Path(self.data).is_file():
            known = ", ".join((*text.HAYSTACKS, MIXED))
            raise InputError(f"calibration.data={self.data} is none of {known}, nor a text file")

    def identity(self) -> dict[str, Any]:
        """What tells these texts and this rule from others."""
        name = self.data if self.data in (*text.HAYSTACKS, MIXED) else Path(self.data).name
        fields = dataclasses.asdict(self) | {"data": name, "k_values": list(self.k_values)}
        source = "\n".join(s for part in range(self.samples) for s in self._sentences(part))
        return fields | {"version": self.version, "data_hash": hashlib.sha256(source.encode()).hexdigest()[:16]}

    def batches(self, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
        """The texts: int64 (1, length) each."""
        return [
            torch.tensor([text.running(tokenizer, self._sentences(part), self.length, self.seed + part)])
            for part in range(self.samples)
        ]

    def _sentences(self, part: int) -> Sequence[str]:
        if self.data == MIXED:
            return text.sentences(text.HAYSTACKS[part % 2], "calibrate")
        if self.data in text.HAYSTACKS:
            return text.sentences(self.data, "calibrate")
        try:
            lines = [line.strip() for line in Path(self.data).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"calibration.data={self.data} cannot be read as UTF-8 text: {error}") from error
        if not lines:
            raise InputError(f"calibration.data={self.data} holds no text")
        return lines


@dataclass(frozen=True)
class CalibratedFile:
    """The place of a calibration's table in a store."""

    rule: Rule
    texts: Calibration
    identity: dict[str, Any]
    path: Path

    @classmethod
    def of(cls, store: Store, rule: Rule, texts: Calibration, source: ModelSource) -> CalibratedFile:
        identity = {"calibration": rule.identity(texts), "model": source.identity()}
        return cls(rule, texts, identity, store.run("calibrate", identity).path / rule.file)

    def calibration(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"id": self.path.parent.name, **self.identity["calibration"]}

    @property
    def calibrated_on(self) -> str:
        """What a plan says of it."""
        return rules.texts(self.identity["calibration"]["data"], self.texts.samples, self.texts.length)

    def load(self, loaded: Loaded) -> Any:
        """What the method takes from the file, after calibrating and writing it where it is missing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.parent / ".lock"):
            if not self.path.is_file():
                log.info("calibrating on %s -> %s", self.calibrated_on, self.path)
                loaded.check_length(self.texts.length, "calibration.length")
                partial = self.path.parent / "texts"
                self._save(self.rule.make(loaded.model, self.texts.batches(loaded.tokenizer), self.texts, partial))
                shutil.rmtree(partial, ignore_errors=True)
        return self._read()

    def made(self) -> Any:
        """What the method takes from the file; None where it is missing."""
        return self._read() if self.path.is_file() else None

    def _read(self) -> Any:
        try:
            return self.rule.load(self.path)
        except InputError as error:
            raise InputError(f"{error}: remove {self.path}, and the same command does") from error

    def _save(self, table: Table) -> None:
        try:
            table.save(self.path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write {self.path.resolve()}: {error}") from error


@dataclass(frozen=True)
class GivenFile:
    """What a file of the user's holds."""

    table: Any
    origin: dict[str, Any]
    calibrated_on: str

    def calibration(self) -> dict[str, Any]:
        """What a record says of it."""
        return self.origin

    def load(self, loaded: Loaded) -> Any:
        return self.table

    def made(self) -> Any:
        return self.table


def calibrations(cfg: DictConfig) -> list[Calibration]:
    """One calibration for each name in ``calibration.data``.

    Raises
    ------
    InputError
        No name, or a calibration that makes no sense.
    """
    data = cfg.calibration.data
    names = [data] if isinstance(data, str) else data
    if not (isinstance(names, Sequence) and names and all(isinstance(name, str) for name in names)):
        raise InputError(
            f"calibration.data={data} names no texts; give prose, noise, mixed, a text file or a list of these"
        )
    return [instantiate(cfg.calibration, data=name) for name in dict.fromkeys(names)]


def rule_of(method: DictConfig) -> Rule:
    """The rule that a method is calibrated by.

    Raises
    ------
    InputError
        There is none, or it makes no sense.
    """
    if not method.calibrated:
        raise InputError("method.calibrated=null: a calibrated method has a rule; give it a file of its own instead")
    return instantiate(method.calibrated)


def _rules(cfg: DictConfig) -> Iterator[Rule]:
    """Of the methods that are calibrated, but for those that a file is given for."""
    for member in members(cfg):
        if "calibrated" in member:
            found = rule_of(member)
            if not member[found.entry]:
                yield found


def run(cfg: DictConfig) -> None:
    """``python run.py experiment=calibrate``: write the files of the methods that want one, and say where they are.

    Raises
    ------
    InputError
        No method is calibrated, or one not on such texts.
    """
    store = Store(Path(cfg.results))
    source: ModelSource = instantiate(cfg.model)
    asked = list(_rules(cfg))
    if not asked:
        raise InputError(
            "no method of `method=` is calibrated, or its file is given; take bsfa, fisher_share or a group with one"
        )
    for rule, texts in itertools.product(asked, calibrations(cfg)):
        rule.check_texts(texts)
    found = [CalibratedFile.of(store, rule, texts, source) for rule in asked for texts in calibrations(cfg)]
    files = list({file.path: file for file in found}.values())
    missing = [file for file in files if not file.path.is_file()]
    if missing:
        loaded = source.load()
        for file in missing:
            file.load(loaded)
    for file in files:
        log.info("%s calibrated on %s: %s", file.rule.entry, file.calibrated_on, file.path)
