"""What attention takes where methods are as near to dense attention: one benchmark of every method at equal KL.

How near is `experiment=fidelity`'s to say, with the same settings in the same store; `equal_kl_choice` has the rule.
The chosen strengths and dense attention then take turns in one process on those same texts, several in a batch so that
they fill a GPU. Selection is part of the time.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from bsfa.attention import Backend
from bsfa.errors import InputError
from bsfa.methods import Dense
from bsfa.model import describe
from experiments import checks, dense_kernels, environment, equal_kl_report, fidelity, overrides, standing
from experiments.equal_kl_choice import choose, points
from experiments.methods import Variant, calibrations_of
from experiments.models import Loaded
from experiments.plans import Planned
from experiments.prefill import Prefill
from experiments.records import Run, read_samples
from experiments.streams import Stream, Streams
from experiments.sweep import Sweep
from experiments.turns import Contender, Turns
from experiments.unavailable import Unavailable

log = logging.getLogger(__name__)


class NoDivergence(Unavailable):
    """What the choice of strengths rests on is not in the store; the message says which command makes it."""


@dataclass(frozen=True)
class Grid:
    """What to measure; see ``conf/experiment/equal_kl.yaml``.

    Raises
    ------
    InputError
        A value that cannot be measured.
    """

    bounds: Sequence[float]
    batch: int
    baselines: Sequence[str]
    repeats: int

    def __post_init__(self) -> None:
        checks.amounts("equal_kl.bounds", self.bounds)  # nats a token
        checks.count("equal_kl.batch", self.batch)
        checks.count("equal_kl.repeats", self.repeats)
        checks.names("equal_kl.baselines", self.baselines, dense_kernels.DENSE_KERNELS, least=0)

    def together(self, samples: int) -> int:
        """Texts in a batch, of so many of a cell.

        Raises
        ------
        InputError
            Batches of two sizes, whose times would be no measure of the same thing.
        """
        size = min(self.batch, samples)
        if samples % size:
            raise InputError(f"equal_kl.batch={self.batch} must divide streams.samples={samples}, or be more")
        return size


@dataclass(frozen=True)
class Plan:
    """One configuration's run, once every divergence it rests on is known.

    Attributes
    ----------
    chosen : DataFrame
        As `equal_kl_choice.choose` gives it.
    """

    grid: Grid
    streams: Streams
    sweep: Sweep
    chosen: pd.DataFrame
    record: Run

    @classmethod
    def of(cls, cfg: DictConfig) -> Plan:
        grid: Grid = instantiate(cfg.equal_kl, _convert_="all")
        subject, settings = fidelity.subject(cfg)
        grid.together(subject.samples.samples)
        sweep = Sweep(cfg)
        runs = [(variant, run) for variant, run in sweep.planned(subject, settings) if variant.config.knob]
        _check(runs)
        chosen = choose(points(runs), grid.bounds)
        device = sweep.source.torch_device
        identity = {
            "equal_kl": dataclasses.asdict(grid),
            **{key: runs[0][1].config[key] for key in ("task", "model", "backend")},
            "chosen": json.loads(chosen.to_json(orient="records", double_precision=15)),
            "device": environment.device_name(device),
        }
        return cls(grid, subject.samples, sweep, chosen, sweep.store.run("equal_kl", identity))

    @property
    def size(self) -> int:
        """Texts in a batch."""
        return self.grid.together(self.streams.samples)

    def ids(self) -> list[str]:
        """The batches, each by its first text."""
        return self.streams.ids()[:: self.size]

    def labels(self) -> list[str]:
        """The strengths that are timed in some cell."""
        return list(dict.fromkeys(self.chosen.loc[self.chosen["within"], "label"]))

    def timed(self) -> list[Variant]:
        """The variants of `labels`."""
        wanted = self.labels()
        return [variant for variant in self.sweep.variants if variant.label in wanted]

    def contenders(self) -> int:
        """At least how many take turns in a cell: dense attention, and the strengths of the cell that has fewest."""
        cells = self.chosen[["source", "length"]].drop_duplicates().itertuples(index=False)
        return 1 + min(len(self.of_cell(source, length)) for source, length in cells)

    def of_cell(self, source: str, length: int) -> set[str]:
        """The strengths that are timed in one."""
        rows = self.chosen
        return set(rows.loc[rows["within"] & (rows["source"] == source) & (rows["length"] == length), "label"])


def _check(runs: Sequence[tuple[Variant, Run]]) -> None:
    """Refuse methods whose divergence is not known, or that a table could not tell apart.

    Raises
    ------
    InputError
    NoDivergence
    """
    if not runs:
        raise InputError("equal_kl times methods that have a strength, and method= names none; take method=frontier")
    if twice := checks.twice(variant.label for variant, _ in runs):
        named = ", ".join(sorted(twice))
        raise InputError(f"equal_kl measures a row a method and {named} would be two; give one a name")
    if missing := [variant.label for variant, run in runs if not run.complete]:
        raise NoDivergence(
            f"the store lacks the divergence of {len(missing)} of {len(runs)} strengths, the first {missing[0]}: "
            f"run `{_fidelity()}` first"
        )


def _fidelity() -> str:
    """The command whose records are wanted."""
    asked = {line: one for line, one in overrides.asked().items() if one.key_or_group != "experiment"}
    return shlex.join(["python", "run.py", "experiment=fidelity", *overrides.those_of("fidelity", asked)])


def plan(cfg: DictConfig) -> list[Planned]:
    """What `run` would run; nothing as long as the divergences that it rests on are not known."""
    try:
        found = Plan.of(cfg)
    except NoDivergence as error:
        log.info("equal_kl: not planned yet: %s", error)
        return []
    methods, calibrated = ", ".join(found.labels()), calibrations_of(found.timed())
    readings = found.contenders() * found.size * (found.grid.repeats + 1)
    return [Planned(methods, "", calibrated, found.streams.lengths, found.ids(), readings, found.record)]


def run(cfg: DictConfig) -> None:
    """``python run.py experiment=equal_kl``: choose, measure, record, write the tables and the figure."""
    found = Plan.of(cfg)
    found.sweep.source.check_device()
    record = found.record
    log.info("equal_kl: %d strengths to time, %s", len(found.labels()), ", ".join(found.labels()))
    if record.complete:
        for name in equal_kl_report.left_out(read_samples(record.path / "samples.jsonl")):
            log.warning("%s was left out; remove %s to measure again, with it", name, record.path)
    else:
        _finish(found, cfg.backend)
    print(standing.chapter(record, equal_kl_report.chapters))
    found.sweep.tracker.runs([(record, "equal_kl")])


def _finish(found: Plan, backend: Backend) -> None:
    """Measure every batch that is missing."""
    device = found.sweep.source.torch_device
    with found.record.writing(environment.describe(device)) as writer:
        missing = set(found.ids()) - set(writer.done)
        loaded = found.sweep.loaded
        loaded.check_length(found.streams.longest(), fidelity.Fidelity.lengths_key)
        contenders, left_out = _contenders(found, loaded)
        turns = Turns(loaded, device, backend, Prefill(), found.grid.repeats)
        bar = tqdm(total=len(missing), desc="equal_kl", unit="batch", file=sys.stderr)
        with bar, logging_redirect_tqdm():
            texts = found.streams.make(loaded.tokenizer)
            while batch := list(itertools.islice(texts, found.size)):
                if batch[0].id in missing:
                    writer.append(_measure(found, turns, batch, contenders) | {"left_out": left_out})
                    bar.update()
        rows = equal_kl_report.tabulate(found.record.config, writer.samples())
        summary = {
            "left_out": equal_kl_report.left_out(writer.samples()),
            "cells": json.loads(rows.to_json(orient="records")),
        }
        writer.finish(summary)


def _contenders(found: Plan, loaded: Loaded) -> tuple[dict[str, Contender], dict[str, str]]:
    """All that runs here, by its label, dense attention first; and the baselines that do not, with the reason."""
    info = describe(loaded.model)
    baselines, longest = found.grid.baselines, found.streams.longest()
    dense, left_out = dense_kernels.usable(baselines, info, loaded.model.dtype, Prefill(), longest)
    sparse = {variant.label: variant.build(loaded) for variant in found.timed()}
    for method in sparse.values():
        method.bind(info)  # refuses a method of another model
    methods = {Dense.name: Dense(), **dense, **sparse}
    return {label: Contender.of(label, method) for label, method in methods.items()}, left_out


def _measure(found: Plan, turns: Turns, batch: Sequence[Stream], contenders: Mapping[str, Contender]) -> dict[str, Any]:
    """One batch's record: all that take turns in its cell, so that all times that are compared stand in one line."""
    source, length = batch[0].source, batch[0].length
    idle = set(found.labels()) - found.of_cell(source, length)
    tokens = torch.tensor([text.tokens for text in batch], device=turns.device)
    taken = [contender for label, contender in contenders.items() if label not in idle]
    record = {
        "id": batch[0].id,
        "task": "equal_kl",
        "source": source,
        "length": length,
        "texts": [text.id for text in batch],
        "tokens_hash": [text.tokens_hash for text in batch],
        **turns.record(),
        "turns": list(turns.measure(tokens, taken)),
    }
    log.info("%s: %d methods took turns on %d texts", batch[0].id, len(taken), len(batch))
    return record
