"""Run a task's prompts through every method, taking turns in one process, and record each answer."""

from __future__ import annotations

import itertools
import logging
import sys
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import bsfa
from bsfa.attention import Backend, pick_backend
from bsfa.clock import Clock, clock_for
from bsfa.methods import Method
from bsfa.model import describe
from experiments import environment
from experiments.config import plain
from experiments.generation import generate
from experiments.methods import Variant, variants
from experiments.models import Loaded, ModelSource
from experiments.records import Run, Store, Writer
from experiments.statistics import summarise
from experiments.tasks.base import Sample, Task
from experiments.tracking import Tracker

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """``python run.py experiment=niah`` and its like: finish every run, taking it up where it stopped."""
    store = Store(Path(cfg.results))
    tracker: Tracker = instantiate(cfg.tracker)
    task: Task = instantiate(cfg.task)
    source: ModelSource = instantiate(cfg.model)
    planned = [
        (variant, store.run(task.name, _identity(cfg, task, source, variant)))
        for variant in variants(cfg, store, source)
    ]
    missing = [(variant, run) for variant, run in planned if not run.complete]
    log.info("%s on %s: %d runs, %d of them to do", task.name, source.label, len(planned), len(missing))
    if missing:
        _finish(cfg, task, source, tracker, missing)


def _identity(cfg: DictConfig, task: Task, source: ModelSource, variant: Variant) -> dict[str, Any]:
    parameters = {key: value for key, value in plain(cfg.task).items() if key != "_target_"}
    return {
        "task": {"name": task.name, "version": task.version, **parameters, "data": task.data()},
        "model": source.identity(),
        "method": variant.identity(),
        "backend": pick_backend(cfg.backend, torch.device(source.device)),
    }


def _finish(
    cfg: DictConfig, task: Task, source: ModelSource, tracker: Tracker, missing: list[tuple[Variant, Run]]
) -> None:
    loaded = source.load()
    loaded.check_length(task.longest(), "task.lengths")
    info = describe(loaded.model)
    next(task.make(loaded.tokenizer))  # no chat template, too short a length: known before calibration
    methods = [variant.build(loaded) for variant, _ in missing]
    for method in methods:
        method.bind(info)  # refuses a method of another model before any sample is run
    device = torch.device(source.device)
    with ExitStack() as locks:
        writers = [locks.enter_context(run.writing(environment.describe(device))) for _, run in missing]
        bench = Bench(loaded, task, cfg.backend, device)
        bench.measure([Lane(v, m, w) for (v, _), m, w in zip(missing, methods, writers, strict=True)])
        for (variant, run), writer in zip(missing, writers, strict=True):
            summary = summarise(writer.samples())
            writer.finish(summary)
            tracker.run(run, variant.label, summary)
            log.info(
                "%s: score %.3f, skip ratio %.3f -> %s",
                variant.label,
                summary["score"],
                summary["skip_ratio"],
                run.path,
            )


@dataclass(frozen=True)
class Lane:
    """One method and where its records go."""

    variant: Variant
    method: Method
    writer: Writer


class Bench:
    """A loaded model that answers a task's prompts with one method after another."""

    def __init__(self, loaded: Loaded, task: Task, backend: Backend, device: torch.device) -> None:
        self.loaded = loaded
        self.task = task
        self.backend = backend
        self.device = device
        self.clock: Clock = clock_for(device)
        self.place = {"backend": pick_backend(backend, device), "device": environment.device_name(device)}
        self.process = uuid.uuid4().hex[:8]  # times are compared within one process alone

    def measure(self, lanes: Sequence[Lane]) -> None:
        """Run every sample that a lane has not recorded."""
        todo = sum(name not in lane.writer.done for lane in lanes for name in self.task.ids())
        bar = tqdm(total=todo, desc=self.task.name, unit="answer", file=sys.stderr)
        cold = list(lanes)
        with bar, logging_redirect_tqdm():
            samples = self.task.make(self.loaded.tokenizer)
            for group, members in itertools.groupby(samples, key=lambda sample: sample.group):
                for sample in members:
                    for lane in lanes:
                        if sample.id in lane.writer.done:
                            continue
                        if lane in cold:
                            self._answer(sample, lane.method)
                            cold.remove(lane)
                        lane.writer.append(self._record(sample, lane))
                        bar.update()
                log.info("%s: done", group)

    def _record(self, sample: Sample, lane: Lane) -> dict[str, Any]:
        environment.reset_peak_memory(self.device)
        answer, applied = self._answer(sample, lane.method)
        return {
            "id": sample.id,
            "task": self.task.name,
            **sample.cell,
            "seed": sample.seed,
            "prompt_hash": sample.prompt_hash,
            "prompt_tokens": len(sample.tokens),
            "prediction": answer.text,
            "references": sample.references,
            "score": self.task.score(answer.text, sample.references),
            "skip_ratio": applied.skip_ratio(),
            "skip_ratio_by_layer": [round(ratio, 4) for ratio in applied.skip_ratio_by_layer()],
            "ttft_s": answer.ttft,
            "attention_s": applied.attention_seconds(),
            "clock": self.clock.name,
            "process": self.process,
            "peak_memory_bytes": environment.peak_memory(self.device),
            "method": lane.variant.label,
            "calibration": lane.variant.calibration(),
            **self.place,
        }

    def _answer(self, sample: Sample, method: Method):
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        with bsfa.apply(model, method, backend=self.backend, clock=self.clock) as applied:
            return generate(model, tokenizer, sample.tokens, self.task.max_new_tokens, self.clock), applied
