"""Any task of lm-eval with any method: lm-eval makes the prompts, asks, stops and scores; the records are ours.

lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) draws few-shot examples from one stream of random numbers
for a whole task, so a task is evaluated in one piece: what is not recorded in full is evaluated again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

import bsfa
from bsfa.clock import clock_for
from bsfa.errors import InputError
from experiments import checks, environment, unavailable
from experiments.statistics import mean_interval
from experiments.sweep import Bench, Lane, Place, Subject, Sweep, new_process
from experiments.tasks import folder
from experiments.unavailable import Unavailable

log = logging.getLogger(__name__)

INSTALL = "pip install 'lm_eval[hf]' (with [ruler] and [longbench] for those tasks)"


def run(cfg: DictConfig) -> None:
    """``python run.py experiment=lm_eval tasks=[...]``: every task there is; then an error that names the others."""
    settings: Settings = instantiate(cfg.lm_eval)
    index = _index(list(cfg.tasks), settings)
    names = leaves(list(cfg.tasks), index)
    sweep = Sweep(cfg)
    plans = {name + (f" at {length}" if length else ""): (name, length) for name in names for length in settings.sizes}

    def finish(plan: str) -> None:
        name, length = plans[plan]
        samples = Documents(index[name], length, settings)
        parameters = {
            "tasks": [name],
            "lengths": [length] if length else [],
            "limit": settings.limit,
            "num_fewshot": settings.num_fewshot,
            "protocol": samples.protocol,
        }
        sweep.finish(LmEval(samples), OmegaConf.create(parameters))

    unavailable.each(plans, finish)


@dataclass(frozen=True)
class Settings:
    """How lm-eval is to run its tasks.

    Parameters
    ----------
    lengths : sequence of int, optional
        lm-eval's ``max_seq_lengths``, for tasks that make prompts of a given size, such as RULER's: tokens, each a run
        of its own. None for all others.
    limit : int, optional
        The first samples of each task; None: all.
    num_fewshot : int, optional
        None: what the task says.
    chat_template : bool
        Through the model's chat template.
    include_path : str, optional
        A folder of more tasks.
    """

    lengths: Sequence[int] | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: bool = False
    include_path: str | None = None

    def __post_init__(self) -> None:
        if self.lengths is not None:
            checks.counts("lm_eval.lengths", self.lengths)
        if self.limit is not None:
            checks.count("lm_eval.limit", self.limit)
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise InputError(f"lm_eval.include_path={self.include_path} is no folder")

    @property
    def sizes(self) -> list[int | None]:
        return list(self.lengths) if self.lengths else [None]


def _index(names: Sequence[str], settings: Settings) -> dict[str, Any]:
    """lm-eval's tasks, groups and tags by name: all, or the user's own where they are all that is asked for."""
    manager = _lm_eval("lm_eval.tasks").TaskManager
    own = manager(include_defaults=False, include_path=settings.include_path).task_index
    if names and all(name in own and own[name].kind.name == "TASK" for name in names):
        return own  # to read all of lm-eval's takes some seconds
    return manager(include_path=settings.include_path).task_index


def _lm_eval(module: str) -> Any:
    try:
        found = import_module(module)
    except ImportError as error:
        raise InputError(f"experiment=lm_eval needs {error.name}: {INSTALL}") from error
    for name in ("lm_eval", "huggingface_hub"):  # their warnings are of options not used here, and of each retry
        logging.getLogger(name).setLevel(logging.ERROR)
    return found


def leaves(names: Sequence[str], index: dict[str, Any]) -> list[str]:
    """The tasks that names of tasks, groups and tags stand for, each once.

    Raises
    ------
    InputError
        No name, an unknown one, a group that changes its tasks and so is more than their names.
    """
    if not names:
        raise InputError("tasks=[] names no task; give some of lm-eval's, such as tasks=[niah_single_1,ruler_vt]")
    found: dict[str, None] = {}
    for name in names:
        if name not in index:
            raise InputError(f"tasks: lm-eval {version('lm_eval')} has no task {name}; `lm-eval ls tasks` lists them")
        entry = index[name]
        match entry.kind.name:
            case "TAG":
                found |= dict.fromkeys(leaves(sorted(entry.tags), index))
            case "GROUP":
                members = entry.cfg["task"]
                if not all(isinstance(member, str) for member in members):
                    raise InputError(f"tasks: lm-eval's group {name} changes its tasks' settings; name tasks instead")
                found |= dict.fromkeys(leaves(members, index))
            case _:
                found[name] = None
    return list(found)


class Documents:
    """One of lm-eval's tasks, loaded when its samples are first asked for: making prompts may want the tokenizer."""

    name: ClassVar[str] = "lm_eval"
    version: ClassVar[int] = 1

    def __init__(self, entry: Any, length: int | None, settings: Settings) -> None:
        self.entry = entry
        self.task_name: str = entry.name
        self.length = length
        self.settings = settings
        self.task: Any = None

    def data(self) -> dict[str, str]:
        text = json.dumps(self.entry.cfg, sort_keys=True, default=str)
        for place in (str(Path(_lm_eval("lm_eval").__file__).parent), self.settings.include_path):
            text = text.replace(place or "\0", "")  # functions are named with the folder they are in
        return {"definition": folder.digest([text])}

    @property
    def protocol(self) -> str:
        """Whose prompts and scores these are, as records and tables name it."""
        shots = "" if self.settings.num_fewshot is None else f", {self.settings.num_fewshot} shots"
        return f"official, lm_eval {version('lm_eval')}{shots}{', chat' if self.settings.chat_template else ''}"

    def longest(self) -> int:
        return self.length or 1

    def ids(self) -> list[str]:
        """Known once `make` has been called."""
        count = len(self.task.eval_docs)
        return [self.id(n) for n in range(min(count, self.settings.limit or count))]

    def id(self, n: int) -> str:
        return "-".join(str(part) for part in (self.task_name, self.length, n) if part is not None)

    def make(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Any]:
        """lm-eval's documents.

        Raises
        ------
        Unavailable
            The task cannot be loaded: its data, a package or the network is missing.
        """
        if self.task is None:
            self.task = self._load(tokenizer)
        yield from self.task.eval_docs

    def _load(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        tasks, defaults = _lm_eval("lm_eval.tasks"), _lm_eval("lm_eval.defaults")
        random.seed(defaults.DEFAULT_RANDOM_SEED)  # as lm-eval does before it loads: some tasks draw their prompts
        np.random.seed(defaults.DEFAULT_OTHER_SEED)
        with tempfile.TemporaryDirectory() as place:
            tokenizer.save_pretrained(place)  # RULER's tasks read one by name
            metadata = {"tokenizer": place} | ({"max_seq_lengths": [self.length]} if self.length else {})
            home = self.entry.yaml_path.parent  # to look there alone takes a moment, everywhere some seconds
            manager = tasks.TaskManager(include_defaults=False, include_path=home, metadata=metadata)
            try:
                return manager.load([self.task_name])["tasks"][self.task_name]
            except Exception as error:  # whatever a hub, its client and a task's own code can raise
                raise Unavailable(f"lm-eval cannot load it: {unavailable.reason(error)}") from error


class LmEval(Subject[Documents]):
    """One task, evaluated."""

    lengths_key: ClassVar[str] = "lm_eval.lengths"
    unit: ClassVar[str] = "answer"

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

    def __init__(self, documents: Documents, place: Place) -> None:
        self.documents = documents
        self.place = place
        self.clock = clock_for(place.device)
        self.process = new_process()

    def measure(self, lanes: Sequence[Lane], advance: Callable[[], Any]) -> None:
        for lane in lanes:
            if set(self.documents.ids()) <= set(lane.writer.done):
                continue
            for record in self._evaluate(lane, advance):
                if record["id"] not in lane.writer.done:
                    lane.writer.append(record)

    def _evaluate(self, lane: Lane, advance: Callable[[], Any]) -> list[dict[str, Any]]:
        from experiments.lm_eval_model import Watched  # lm-eval is imported where it is used: it may be absent

        settings, name = self.documents.settings, self.documents.task_name
        loaded = self.place.loaded
        environment.reset_peak_memory(self.place.device)
        with bsfa.apply(loaded.model, lane.method, backend=self.place.backend, clock=self.clock) as applied:
            watched = Watched(loaded, applied, advance)
            found = _lm_eval("lm_eval").simple_evaluate(
                watched,
                tasks=[self.documents.task],
                task_manager=_lm_eval("lm_eval.tasks").TaskManager(include_defaults=False),
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
            raise Unavailable(f"{self.documents.task_name} has no score a sample, only one of all of them together")
        first = next(iter(metrics))
        main = f"{self.documents.length},{answers[0]['filter']}"  # RULER's: the others' score is -1
        prompt = str(answers[0]["arguments"][0][0])
        return {
            "id": self.documents.id(number),
            "protocol": self.documents.protocol,
            "task": self.documents.task_name,
            "length": self.documents.length,
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
