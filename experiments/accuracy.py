"""Run a task's prompts through every method and record each answer."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from hydra.utils import instantiate
from omegaconf import DictConfig

import bsfa
from bsfa.clock import Clock, clock_for
from bsfa.methods import Method
from experiments import environment
from experiments.generation import generate
from experiments.statistics import summarise
from experiments.sweep import Bench, Lane, Place, Subject, new_process, sweep
from experiments.tasks.base import Sample, Task

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """``python run.py experiment=niah`` and its like."""
    sweep(cfg, Prompts(instantiate(cfg.task)), cfg.task)


class Prompts(Subject[Task]):
    """A task's prompts, answered."""

    lengths_key: ClassVar[str] = "task.lengths"
    unit: ClassVar[str] = "answer"

    def bench(self, place: Place) -> Bench:
        return Answers(self.samples, place)

    def summarise(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return summarise(samples)

    def describe(self, summary: dict[str, Any]) -> str:
        return f"score {summary['score']:.3f}, skip ratio {summary['skip_ratio']:.3f}"


class Answers(Bench):
    """A loaded model that answers a task's prompts."""

    def __init__(self, task: Task, place: Place) -> None:
        self.task = task
        self.place = place
        self.clock: Clock = clock_for(place.device)
        self.process = new_process()

    def measure(self, lanes: Sequence[Lane], advance: Callable[[], Any]) -> None:
        cold = list(lanes)
        samples = self.task.make(self.place.loaded.tokenizer)
        for group, members in itertools.groupby(samples, key=lambda sample: sample.group):
            for sample in members:
                for lane in lanes:
                    if sample.id in lane.writer.done:
                        continue
                    if lane in cold:
                        self._answer(sample, lane.method)
                        cold.remove(lane)
                    lane.writer.append(self._record(sample, lane))
                    advance()
            log.info("%s: done", group)

    def _record(self, sample: Sample, lane: Lane) -> dict[str, Any]:
        environment.reset_peak_memory(self.place.device)
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
            "peak_memory_bytes": environment.peak_memory(self.place.device),
            **self.place.record(lane),
        }

    def _answer(self, sample: Sample, method: Method):
        model, tokenizer = self.place.loaded.model, self.place.loaded.tokenizer
        with bsfa.apply(model, method, backend=self.place.backend, clock=self.clock) as applied:
            return generate(model, tokenizer, sample.tokens, self.task.max_new_tokens, self.clock), applied
