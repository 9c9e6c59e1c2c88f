"""Any task of lm-eval with any method: lm-eval makes the prompts, asks, stops and scores; the records are ours.

lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) draws few-shot examples from one stream of random numbers
for a whole task, so a task is evaluated in one piece: what is not recorded in full is evaluated again.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

import bsfa
from bsfa.clock import clock_for
from bsfa.errors import InputError
from experiments import environment, lm_eval_tasks, standing, unavailable
from experiments.lm_eval_tasks import LmEvalTask, Settings
from experiments.records import Run
from experiments.statistics import mean_interval
from experiments.sweep import Bench, Lane, Place, Subject, Sweep, new_process
from experiments.unavailable import Unavailable

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """``python run.py experiment=lm_eval tasks=[...]``: every task there is; then an error that names the others."""
    settings: Settings = instantiate(cfg.lm_eval)
    if not isinstance(cfg.tasks, ListConfig):
        raise InputError(f"tasks={cfg.tasks} must be a list, such as tasks=[niah_single_1,ruler_vt]")
    index = lm_eval_tasks.index(cfg.tasks, settings)
    names = lm_eval_tasks.leaves(cfg.tasks, index)
    sweep = Sweep(cfg)
    plans = {name + (f" at {length}" if length else ""): (name, length) for name in names for length in settings.sizes}
    done: dict[str, list[Run]] = {}

    def finish(plan: str) -> None:
        name, length = plans[plan]
        samples = LmEvalTask(index[name], length, settings)
        parameters = {
            "tasks": [name],
            "lengths": [length] if length else [],
            "limit": settings.limit,
            "num_fewshot": settings.num_fewshot,
            "protocol": samples.protocol,
        }
        done.setdefault(samples.protocol, []).extend(sweep.finish(LmEval(samples), OmegaConf.create(parameters)))

    def show() -> None:
        for runs in done.values():
            standing.section(runs)

    unavailable.each(plans, finish, then=show)


class LmEval(Subject[LmEvalTask]):
    """One task, evaluated."""

    lengths_key: ClassVar[str] = "lm_eval.lengths"
    unit: ClassVar[str] = "answer"

    def shortest(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """As long as prompts are asked to be: lm-eval makes them when it asks."""
        return self.samples.length or sys.maxsize

    def bench(self, place: Place) -> Bench:
        return Evaluation(self.samples, place)

    def summarise(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        frame = pd.DataFrame(samples)
        low, high = mean_interval(frame["score"])
        numbers = {
            "n": len(frame),
            "score": float(frame["score"].mean()),
            "score_low": low,
            "score_high": high,
            "skip_ratio": float(frame["skip_ratio"].mean()),
        }
        return numbers | {"cells": [{"task": self.samples.task_name, "length": self.samples.length} | numbers]}

    def describe(self, summary: dict[str, Any]) -> str:
        return f"{self.samples.task_name}: score {summary['score']:.3f}, skip ratio {summary['skip_ratio']:.3f}"


class Evaluation(Bench):
    """lm-eval's loop around a loaded model."""

    def __init__(self, task: LmEvalTask, place: Place) -> None:
        self.task = task
        self.place = place
        self.clock = clock_for(place.device)
        self.process = new_process()

    def measure(self, lanes: Sequence[Lane], advance: Callable[[], Any]) -> None:
        for lane in lanes:
            if set(self.task.ids()) <= set(lane.writer.done):
                continue
            for record in self._evaluate(lane, advance):
                if record["id"] not in lane.writer.done:
                    lane.writer.append(record)

    def _evaluate(self, lane: Lane, advance: Callable[[], Any]) -> list[dict[str, Any]]:
        from experiments.lm_eval_model import WatchedLM  # lm-eval is imported where it is used: it may be absent

        settings, name = self.task.settings, self.task.task_name
        loaded = self.place.loaded
        environment.reset_peak_memory(self.place.device)
        with bsfa.apply(loaded.model, lane.method, backend=self.place.backend, clock=self.clock) as applied:
            watched = WatchedLM(loaded, applied, advance)
            found = lm_eval_tasks.imported("lm_eval").simple_evaluate(
                watched,
                tasks=[self.task.loaded],
                task_manager=lm_eval_tasks.imported("lm_eval.tasks").TaskManager(include_defaults=False),
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                apply_chat_template=settings.chat_template,
                bootstrap_iters=0,
            )
        if cut := watched.cut():
            log.info("%s: lm-eval cut the start off %d prompts that do not fit the model", name, cut)
        shared = {
            "clock": self.clock.name,
            "process": self.process,
            "peak_memory_bytes": environment.peak_memory(self.place.device),
            **self.place.record(lane),
        }
        return [
            {**self._record(number, answers), **watched.seen[number], **shared}
            for number, answers in _by_document(found["samples"][name])
        ]

    def _record(self, number: int, answers: list[dict[str, Any]]) -> dict[str, Any]:
        metrics = {
            f"{metric},{answer['filter']}": float(answer[metric])
            for answer in answers
            for metric in answer["metrics"]
            if isinstance(answer[metric], (bool, int, float, np.number))
        }
        if not metrics:
            raise Unavailable(f"{self.task.task_name} has no score a sample, only one of all of them together")
        first = next(iter(metrics))
        main = f"{self.task.length},{answers[0]['filter']}"  # RULER's: the others' score is -1
        prompt = str(answers[0]["arguments"][0][0])
        return {
            "id": self.task.id(number),
            "protocol": self.task.protocol,
            "task": self.task.task_name,
            "length": self.task.length,
            "prompt_hash": hashlib.sha256(prompt.encode()).hexdigest()[:16],
            "prediction": _prediction(answers[0]),
            "references": [str(answers[0]["target"])],
            "score": metrics.get(main, metrics[first]),
            "metrics": metrics,
        }


def _by_document(answers: list[dict[str, Any]]) -> list[tuple[int, list[dict[str, Any]]]]:
    """A document's entries, one a filter of lm-eval's, in its order."""
    found: dict[int, list[dict[str, Any]]] = {}
    for answer in answers:
        found.setdefault(answer["doc_id"], []).append(answer)
    return sorted(found.items())


def _prediction(answer: dict[str, Any]) -> Any:
    """The text, where one was written; else the likeliest continuation, or of a single one its log-likelihood."""
    responses = answer["filtered_resps"]
    if isinstance(responses[0], str):
        return responses[0]
    likelihoods = [float(np.atleast_1d(np.asarray(response, dtype=float))[0]) for response in responses]
    if len(likelihoods) == 1:
        return likelihoods[0]
    return str(answer["arguments"][int(np.argmax(likelihoods))][1])
