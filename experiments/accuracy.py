"""Run a task's prompts through every method and record each answer."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hydra.utils import instantiate
from omegaconf import DictConfig

import bsfa
from bsfa.clock import Clock, clock_for
from experiments import checks, environment
from experiments.generation import check_batch, decode, prefill
from experiments.plans import Planned
from experiments.prefill import Prefill
from experiments.statistics import summarise
from experiments.sweep import Bench, Lane, Place, Subject, new_process, planned, sweep
from experiments.tasks.base import Sample, Task

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """``python run.py experiment=niah`` and its like."""
    sweep(cfg, _prompts(cfg), cfg.task)


def plan(cfg: DictConfig) -> list[Planned]:
    """What `run` would run."""
    return planned(cfg, _prompts(cfg), cfg.task)


def _prompts(cfg: DictConfig) -> Prompts:
    return Prompts(instantiate(cfg.task), cfg.batch, prefill=instantiate(cfg.prefill))


@dataclass(frozen=True)
class Prompts(Subject[Task]):
    """A task's prompts, answered, ``batch`` answers at a time."""

    batch: int

    lengths_key: ClassVar[str] = "task.lengths"
    unit: ClassVar[str] = "answer"

    def __post_init__(self) -> None:
        checks.count("batch", self.batch)

    def bench(self, place: Place) -> Bench:
        return Answers(self.samples, place, self.batch, self.prefill)

    def summarise(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return summarise(samples)

    def describe(self, summary: dict[str, Any]) -> str:
        return f"score {summary['score']:.3f}, skip ratio {summary['skip_ratio']:.3f}"


class Answers(Bench):
    """A loaded model that answers a task's prompts."""

    def __init__(self, task: Task, place: Place, batch: int, how: Prefill) -> None:
        check_batch(place.loaded.model, batch)
        self.task = task
        self.place = place
        self.batch = batch
        self.how = how
        self.clock: Clock = clock_for(place.device)
        self.process = new_process()

    def measure(self, lanes: Sequence[Lane], advance: Callable[[], Any]) -> None:
        cold = list(lanes)
        samples = self.task.make(self.place.loaded.tokenizer)
        for group, members in itertools.groupby(samples, key=lambda sample: sample.group):
            while together := list(itertools.islice(members, self.batch)):
                for lane in lanes:
                    missing = [sample for sample in together if sample.id not in lane.writer.done]
                    if missing and lane in cold:
                        self._records(missing[:1], lane)
                        cold.remove(lane)
                    for record in self._records(missing, lane):
                        lane.writer.append(record)
                        advance()
            log.info("%s: done", group)

    def _records(self, samples: Sequence[Sample], lane: Lane) -> list[dict[str, Any]]:
        """Read each prompt on its own, then decode the answers together."""
        if not samples:
            return []
        model, tokenizer = self.place.loaded.model, self.place.loaded.tokenizer
        environment.reset_peak_memory(self.place.device)
        prompts, seen = [], []
        for sample in samples:
            with self._applied(lane) as applied:
                prompts.append(prefill(model, sample.tokens, self.how, self.clock))
            seen.append(applied)
        with self._applied(lane):
            answers = decode(model, tokenizer, prompts, max(sample.max_new_tokens for sample in samples))
        shared = {
            "clock": self.clock.name,
            "process": self.process,
            "batch": len(samples),
            "peak_memory_bytes": environment.peak_memory(self.place.device),
            **self.place.record(lane),
        }
        return [
            {
                "id": sample.id,
                "task": self.task.name,
                **sample.cell,
                "seed": sample.seed,
                "prompt_hash": sample.prompt_hash,
                "prompt_tokens": len(sample.tokens),
                "prediction": answer,
                "references": sample.references,
                "score": sample.score(answer),
                "skip_ratio": applied.skip_ratio(),
                "skip_ratio_by_layer": [round(ratio, 4) for ratio in applied.skip_ratio_by_layer()],
                "ttft_s": prompt.ttft(),
                "attention_s": applied.attention_seconds(),
                **shared,
            }
            for sample, answer, prompt, applied in zip(samples, answers, prompts, seen, strict=True)
        ]

    def _applied(self, lane: Lane):
        return bsfa.apply(self.place.loaded.model, lane.method, backend=self.place.backend, clock=self.clock)
