"""Every variant of a method over one subject's samples, taking turns in one process: plan, take up, record."""

from __future__ import annotations

import logging
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedTokenizerBase

from bsfa.attention import Backend, pick_backend
from bsfa.errors import InputError
from bsfa.methods import Method
from bsfa.model import describe
from experiments import environment, standing
from experiments.config import plain
from experiments.launchers import in_sweep
from experiments.methods import Variant, variants
from experiments.models import Loaded, ModelSource
from experiments.plans import Planned
from experiments.prefill import Prefill
from experiments.records import Busy, Run, Store, Writer
from experiments.tracking import Tracker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lane:
    """One method and where its records go."""

    variant: Variant
    method: Method
    writer: Writer


@dataclass(frozen=True)
class Place:
    """A loaded model and where its attention runs."""

    loaded: Loaded
    backend: Backend
    device: torch.device

    def record(self, lane: Lane) -> dict[str, Any]:
        """What every sample says of where it comes from."""
        return {
            "method": lane.variant.label,
            "calibration": lane.variant.calibration(),
            "backend": pick_backend(self.backend, self.device),
            "device": environment.device_name(self.device),
        }


class Bench(ABC):
    """Measures one subject's samples with one method after another."""

    @abstractmethod
    def measure(self, lanes: Sequence[Lane], advance: Callable[[], Any]) -> None:
        """Record every sample that a lane has not recorded, and call ``advance`` after each."""


class Samples(Protocol):
    """Where samples come from. ``name`` and ``version`` are part of a record's identity."""

    name: ClassVar[str]
    version: ClassVar[int]

    def ids(self) -> list[str]:
        """The ids of all samples; needs no tokenizer."""

    def longest(self) -> int:
        """Tokens of the longest sample."""

    def data(self) -> dict[str, str]:
        """Digests of the text that the samples are made of."""

    def make(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Any]:
        """Make the samples, in the order of `ids`."""


S = TypeVar("S", bound=Samples)


@dataclass(frozen=True)
class Subject(ABC, Generic[S]):
    """What is measured on samples, how their prompts are read, and what is said of it."""

    samples: S
    prefill: Prefill = field(default_factory=Prefill, kw_only=True)

    lengths_key: ClassVar[str]  # the setting that `Samples.longest` comes from, for an error
    unit: ClassVar[str]  # of the progress bar

    def shortest(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Tokens of the shortest prompt, all of which are made to know it."""
        return min(len(sample.tokens) for sample in self.samples.make(tokenizer))

    @abstractmethod
    def bench(self, place: Place) -> Bench: ...

    @abstractmethod
    def summarise(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One complete run in numbers."""

    @abstractmethod
    def describe(self, summary: dict[str, Any]) -> str:
        """A summary as a log line has it."""


def sweep(cfg: DictConfig, subject: Subject, parameters: DictConfig) -> None:
    """Finish every run of one subject, taking it up where it stopped, and print what they say; see `Sweep.finish`."""
    standing.section(Sweep(cfg).finish(subject, parameters))


def planned(cfg: DictConfig, subject: Subject, parameters: DictConfig) -> list[Planned]:
    """The runs that `sweep` would finish."""
    ids = subject.samples.ids()
    return [
        Planned(variant.name, variant.strength, variant.calibrated_on, list(parameters.lengths), ids, 1, run)
        for variant, run in Sweep(cfg).planned(subject, parameters)
    ]


class Sweep:
    """The methods of one command, for one subject after another; the model is loaded once, if anything is missing."""

    def __init__(self, cfg: DictConfig) -> None:
        self.backend: Backend = cfg.backend
        self.store = Store(Path(cfg.results))
        self.tracker: Tracker = instantiate(cfg.tracker)
        self.source: ModelSource = instantiate(cfg.model)
        if self.source.processes > 1:
            raise InputError(
                "model.device=tp is for experiment=ttft; answers are recorded by one process: model.device=auto"
            )
        self.variants = variants(cfg, self.store, self.source)

    @cached_property
    def loaded(self) -> Loaded:
        return self.source.load()

    def finish(self, subject: Subject, parameters: DictConfig) -> list[Run]:
        """Finish every run of a subject, taking it up where it stopped, and show the tracker what it has not seen.

        Returns
        -------
        Those that are complete: one may be left to another process.
        """
        name, runs = subject.samples.name, self.planned(subject, parameters)
        missing = [(variant, run) for variant, run in runs if not run.complete]
        log.info("%s on %s: %d runs, %d of them to do", name, self.source.label, len(runs), len(missing))
        if missing:
            self._measure(subject, missing)
        complete = [(run, variant.label) for variant, run in runs if run.complete]
        self.tracker.runs(complete)
        return [run for run, _ in complete]

    def planned(self, subject: Subject, parameters: DictConfig) -> list[tuple[Variant, Run]]:
        """Every variant's run of a subject.

        Parameters
        ----------
        parameters : DictConfig
            The subject's own settings, part of a run's identity.

        Raises
        ------
        InputError
            A method that does not read prompts as the subject's are read, or none as short as theirs.
        """
        subject.prefill.check(self.variants, subject.samples.longest())
        name = subject.samples.name
        shared = {
            "task": {
                "name": name,
                "version": subject.samples.version,
                **{key: value for key, value in plain(parameters).items() if key != "_target_"},
                "data": subject.samples.data(),
            },
            "model": self.source.identity(),
            "backend": pick_backend(self.backend, self.source.torch_device),
            **subject.prefill.identity(),
        }
        runs = [(v, self.store.run(name, shared | {"method": v.identity()})) for v in self.variants]
        fewest = [(variant.label, variant.fewest_keys) for variant, run in runs if not run.complete]
        subject.prefill.check_keys(fewest, min(parameters.lengths, default=sys.maxsize), subject.lengths_key)
        return runs

    def _measure(self, subject: Subject, missing: list[tuple[Variant, Run]]) -> None:
        loaded = self.loaded
        loaded.check_length(subject.samples.longest(), subject.lengths_key)
        next(subject.samples.make(loaded.tokenizer))  # what cannot be made is known before calibration
        methods = self._build([variant for variant, _ in missing], subject)
        device = self.source.torch_device
        with ExitStack() as locks:
            lanes = [
                Lane(variant, method, writer)
                for (variant, run), method in zip(missing, methods, strict=True)
                if (writer := _taken(run, environment.describe(device), locks)) is not None
            ]
            todo = sum(name not in lane.writer.done for lane in lanes for name in subject.samples.ids())
            bar = tqdm(total=todo, desc=subject.samples.name, unit=subject.unit, file=sys.stderr)
            with bar, logging_redirect_tqdm():
                subject.bench(Place(loaded, self.backend, device)).measure(lanes, bar.update)
            for lane in lanes:
                summary = subject.summarise(lane.writer.samples())
                lane.writer.finish(summary)
                log.info("%s: %s -> %s", lane.variant.label, subject.describe(summary), lane.writer.run.path)

    def _build(self, planned: Sequence[Variant], subject: Subject) -> list[Method]:
        """The methods, all of them refused or none before a sample is run; what waits for calibration comes last."""
        info = describe(self.loaded.model)
        any_length = all(variant.kind.any_length for variant in planned)
        shortest = sys.maxsize if any_length else subject.shortest(self.loaded.tokenizer)
        methods: dict[int, Method] = {}
        for calibrated in (False, True):
            turn = {n: v.build(self.loaded) for n, v in enumerate(planned) if (v.source is not None) == calibrated}
            for method in turn.values():
                method.bind(info)  # refuses a method of another model
            fewest = [(planned[n].label, method.fewest_keys) for n, method in turn.items()]
            subject.prefill.check_keys(fewest, shortest, subject.lengths_key)
            methods |= turn
        return [methods[n] for n in range(len(planned))]


def _taken(run: Run, described: dict[str, Any], locks: ExitStack) -> Writer | None:
    """A run's writer; None where another job of the same sweep has the run: it will finish it."""
    try:
        return locks.enter_context(run.writing(described))
    except Busy:
        if not in_sweep():
            raise
        log.warning("%s is left to the process that is writing it", run.path)
        return None


def new_process() -> str:
    """A name for this process: times are compared within one alone."""
    return uuid.uuid4().hex[:8]
