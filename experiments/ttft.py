"""Time to the first token of a whole model: every method and the dense kernels of others, in turns in one process.

The prompt is read as generation reads it, into a cache (dynamic, or static where it is read in chunks), up to the first
token's choice; only attention differs. A length at which a method runs out of memory costs that one cell, which says
what was asked for.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from bsfa.attention import Backend
from experiments import environment, standing, ttft_report
from experiments.methods import calibrations_of
from experiments.plans import Planned
from experiments.records import Run
from experiments.tracking import Tracker
from experiments.ttft_plan import Plan
from experiments.ttft_session import Session

log = logging.getLogger(__name__)


def plan(cfg: DictConfig) -> list[Planned]:
    """What `run` would run."""
    found = Plan.of(cfg)
    methods, calibrated = ", ".join(found.labels()), calibrations_of(found.planned)
    return [Planned(methods, "", calibrated, found.grid.lengths, found.ids(), found.grid.repeats + 1, found.record)]


def run(cfg: DictConfig) -> None:
    """``python run.py experiment=ttft``: measure, record, write the tables and figures.

    Of torchrun's processes the first one does; the others take part in what is measured.
    """
    tracker: Tracker = instantiate(cfg.tracker)
    found = Plan.of(cfg)
    found.source.check_device()
    if found.source.processes > 1 and environment.rank():
        _take_part(found, cfg.backend)
        return
    record = found.record
    if record.complete:
        _say_left_out(record)
    else:
        _finish(found, cfg.backend)
    print(standing.chapter(record, ttft_report.chapters))
    tracker.runs([(record, "ttft")])


def _finish(found: Plan, backend: Backend) -> None:
    """Measure every cell that is missing."""
    with found.record.writing(environment.describe(found.source.torch_device)) as writer:
        for sample in found.record.lost():
            if sample["id"] not in writer.done:
                writer.append(sample)
        session = Session.open(found, backend, set(writer.done))
        bar = tqdm(total=session.count(), desc="ttft", unit="cell", file=sys.stderr)
        with bar, logging_redirect_tqdm():
            for sample in session.samples():
                writer.append(sample)
                bar.update()
                log.info("%s: %s", sample["id"], _line(sample))
        rows = ttft_report.tabulate(writer.samples())
        writer.finish({"left_out": session.left_out, "cells": json.loads(rows.to_json(orient="records"))})


def _take_part(found: Plan, backend: Backend) -> None:
    """All that the first process does but keep a record of it. Both read what is missing before they meet to load the
    model, and the first writes afterwards: it is the same for both."""
    if not found.record.complete:
        for _ in Session.open(found, backend, found.record.done()).samples():
            pass


def _say_left_out(record: Run) -> None:
    summary = record.path / "summary.json"
    for name, reason in ttft_report.left_out(summary).items():
        log.warning("%s was left out: %s; remove %s to try it again", name, reason, summary)


def _line(sample: dict[str, Any]) -> str:
    if "out_of_memory" in sample:
        return sample["out_of_memory"]
    attention = f"{sample['attention_share']:.0%} of it attention"
    return f"{sample['ttft_s']:.3f} s, {attention}, {sample['skip_ratio']:.1%} skipped"
