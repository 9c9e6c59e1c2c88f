"""LongBench, one run a task and method."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments import standing, unavailable
from experiments.accuracy import Prompts
from experiments.plans import Planned
from experiments.records import Run
from experiments.sweep import Sweep, planned
from experiments.tasks.longbench import Documents, LongBench
from experiments.tasks.longbench_data import SCORERS, Folder, Hub, Source
from experiments.unavailable import Unavailable

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """``python run.py experiment=longbench``: every task whose data is there; then an error that names the others."""
    settings: LongBench = instantiate(cfg.task)
    sweep, subject = Sweep(cfg), _subjects(cfg, settings)
    done: list[Run] = []
    unavailable.each(
        settings.tasks,
        lambda task: done.extend(sweep.finish(*subject(task))),
        then=lambda: standing.section(done),
    )


def plan(cfg: DictConfig) -> list[Planned]:
    """What `run` would run of a folder's rows. Those on the hub are known once they are read, which a plan does not."""
    settings: LongBench = instantiate(cfg.task)
    found: list[Planned] = []
    if cfg.data.root:
        subject = _subjects(cfg, settings)
        with suppress(Unavailable):  # a line each in the log; `run` does the other tasks, and then ends with these
            unavailable.each(settings.tasks, lambda task: found.extend(planned(cfg, *subject(task))))
    else:
        log.info(
            "longbench: %d tasks from the hub (or data.root=DIR), counted when they are read; at most %s rows of each",
            len(settings.tasks),
            "all" if settings.samples is None else settings.samples,
        )
    return found


def _subjects(cfg: DictConfig, settings: LongBench) -> Callable[[str], tuple[Prompts, DictConfig]]:
    """From a task's name to its prompts, and what tells its runs from those of other settings."""
    source: Source = Folder(cfg.data.root) if cfg.data.root else Hub()
    scorer, prefill = SCORERS[settings.scorer](), instantiate(cfg.prefill)

    def subject(task: str) -> tuple[Prompts, DictConfig]:
        data = source.read(task, settings.samples)
        log.info("%s: %d rows, answers of up to %d tokens", task, len(data.rows), data.max_new_tokens)
        documents = Documents(settings, data, scorer)
        parameters = {
            "tasks": [task],
            "lengths": list(settings.lengths),
            "samples": settings.samples,
            "protocol": documents.protocol,
        }
        return Prompts(documents, cfg.batch, prefill=prefill), OmegaConf.create(parameters)

    return subject
