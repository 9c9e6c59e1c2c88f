"""LongBench, one run a task and method."""

from __future__ import annotations

import logging

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments import unavailable
from experiments.accuracy import Prompts
from experiments.plans import Planned
from experiments.sweep import Sweep, planned
from experiments.tasks.longbench import Documents, LongBench
from experiments.tasks.longbench_data import SCORERS, Folder, Hub, Source

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """``python run.py experiment=longbench``: every task whose data is there; then an error that names the others."""
    settings: LongBench = instantiate(cfg.task)
    sweep = Sweep(cfg)
    unavailable.each(settings.tasks, lambda task: sweep.finish(*_subject(cfg, task)))


def plan(cfg: DictConfig) -> list[Planned]:
    """What `run` would run of a folder's rows. Those on the hub are known once they are read, which a plan does not."""
    settings: LongBench = instantiate(cfg.task)
    if cfg.data.root:
        return [one for task in settings.tasks for one in planned(cfg, *_subject(cfg, task))]
    log.info(
        "longbench: %d tasks from the hub (or data.root=DIR), counted when they are read; at most %s rows of each",
        len(settings.tasks),
        "all" if settings.samples is None else settings.samples,
    )
    return []


def _subject(cfg: DictConfig, task: str) -> tuple[Prompts, DictConfig]:
    """One task's prompts, and what tells its runs from those of other settings."""
    settings: LongBench = instantiate(cfg.task)
    source: Source = Folder(cfg.data.root) if cfg.data.root else Hub()
    data = source.read(task, settings.samples)
    log.info("%s: %d rows, answers of up to %d tokens", task, len(data.rows), data.max_new_tokens)
    documents = Documents(settings, data, SCORERS[settings.scorer]())
    parameters = {
        "tasks": [task],
        "lengths": list(settings.lengths),
        "samples": settings.samples,
        "protocol": documents.protocol,
    }
    return Prompts(documents, cfg.batch, prefill=instantiate(cfg.prefill)), OmegaConf.create(parameters)
