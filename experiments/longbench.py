"""LongBench, one run a task and method."""

from __future__ import annotations

import logging

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments import unavailable
from experiments.accuracy import Prompts
from experiments.prefill import Prefill
from experiments.sweep import Sweep
from experiments.tasks.longbench import Documents, LongBench
from experiments.tasks.longbench_data import SCORERS, Folder, Hub, Source

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """``python run.py experiment=longbench``: every task whose data is there; then an error that names the others."""
    settings: LongBench = instantiate(cfg.task)
    source: Source = Folder(cfg.data.root) if cfg.data.root else Hub()
    scorer = SCORERS[settings.scorer]()
    prefill: Prefill = instantiate(cfg.prefill)
    sweep = Sweep(cfg)

    def finish(task: str) -> None:
        data = source.read(task, settings.samples)
        log.info("%s: %d rows, answers of up to %d tokens", task, len(data.rows), data.max_new_tokens)
        documents = Documents(settings, data, scorer)
        parameters = {
            "tasks": [task],
            "lengths": list(settings.lengths),
            "samples": settings.samples,
            "protocol": documents.protocol,
        }
        sweep.finish(Prompts(documents, cfg.batch, prefill=prefill), OmegaConf.create(parameters))

    unavailable.each(settings.tasks, finish)
