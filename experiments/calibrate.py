"""Calibration as an experiment: texts -> a threshold file in the results folder, made once."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from filelock import FileLock
from hydra.utils import instantiate
from omegaconf import DictConfig
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

import bsfa
from bsfa.errors import InputError
from bsfa.thresholds import Thresholds
from experiments import checks
from experiments.models import Loaded, ModelSource
from experiments.records import Store
from experiments.tasks import text

log = logging.getLogger(__name__)
MIXED = "mixed"


@dataclass(frozen=True)
class Calibration:
    """Which texts, how long, and which ks.

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
        checks.count("calibration.samples", self.samples)
        checks.counts("calibration.k_values", self.k_values)
        if self.data not in (*text.HAYSTACKS, MIXED) and not Path(self.data).is_file():
            known = ", ".join((*text.HAYSTACKS, MIXED))
            raise InputError(f"calibration.data={self.data} is none of {known}, nor a text file")

    def check(self, k: int) -> None:
        """Refuse a k that will not be calibrated.

        Raises
        ------
        InputError
        """
        if k not in self.k_values:
            known = ", ".join(map(str, self.k_values))
            raise InputError(f"k={k} is not calibrated; calibration.k_values holds {known}")

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
class ThresholdFile:
    """The place of a calibration's thresholds in a store."""

    calibration: Calibration
    identity: dict[str, Any]
    path: Path

    @classmethod
    def of(cls, store: Store, calibration: Calibration, source: ModelSource) -> ThresholdFile:
        identity = {"calibration": calibration.identity(), "model": source.identity()}
        run = store.run("calibrate", identity)
        return cls(calibration, identity, run.path / "thresholds.safetensors")

    @property
    def digest(self) -> str:
        return self.path.parent.name

    def load_or_make(self, loaded: Loaded) -> Thresholds:
        """Read the file, or calibrate and write it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.parent / ".lock"):
            if not self.path.is_file():
                log.info("calibrating on %s -> %s", self.calibration.data, self.path)
                loaded.check_length(self.calibration.length, "calibration.length")
                self._save(
                    bsfa.calibrate(
                        loaded.model,
                        self.calibration.batches(loaded.tokenizer),
                        list(self.calibration.k_values),
                        data=str(self.calibration.data),
                    )
                )
        return Thresholds.load(self.path)

    def _save(self, thresholds: Thresholds) -> None:
        try:
            thresholds.save(self.path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write {self.path.resolve()}: {error}") from error


def calibrations(cfg: DictConfig) -> list[Calibration]:
    """One calibration for each name in ``calibration.data``."""
    names = [cfg.calibration.data] if isinstance(cfg.calibration.data, str) else list(cfg.calibration.data)
    return [instantiate(cfg.calibration, data=name) for name in dict.fromkeys(names)]


def run(cfg: DictConfig) -> None:
    """``python run.py experiment=calibrate``: write the threshold files and say where they are."""
    store = Store(Path(cfg.results))
    source: ModelSource = instantiate(cfg.model)
    files = [ThresholdFile.of(store, calibration, source) for calibration in calibrations(cfg)]
    missing = [file for file in files if not file.path.is_file()]
    if missing:
        loaded = source.load()
        for file in missing:
            file.load_or_make(loaded)
    for file in files:
        log.info("thresholds calibrated on %s: %s", file.calibration.data, file.path)
