"""Time to the first token of a whole model: every method and the dense kernels of others, in turns in one process.

The prompt is read as generation reads it, through a dynamic cache, up to the first token's choice; only attention
differs. A length at which a method runs out of memory costs that one cell, which says what was asked for.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from bsfa.attention import Backend, pick_backend
from bsfa.errors import InputError
from bsfa.methods import Method, Sdpa
from bsfa.methods.upstream import Cudnn, FlashAttn2, FlashAttn3, TorchFlash
from bsfa.methods.upstream_flex import Flex
from bsfa.model import describe
from experiments import checks, environment, ttft_report
from experiments.at_skip import AtSkip
from experiments.methods import Variant, variants
from experiments.models import Loaded, ModelSource
from experiments.plans import Planned
from experiments.prefill import Prefill
from experiments.records import Run, Store
from experiments.tasks import text
from experiments.tracking import Tracker
from experiments.ttft_turns import Contender, Turns, sample_id

log = logging.getLogger(__name__)

BASELINES: dict[str, type[Method]] = {
    kind.name: kind for kind in (TorchFlash, Cudnn, FlashAttn3, FlashAttn2, Flex, Sdpa)
}
PROMPTS = ("random", "prose")


@dataclass(frozen=True)
class Grid:
    """What to measure; see ``conf/experiment/ttft.yaml``.

    Raises
    ------
    InputError
        A value that cannot be measured.
    """

    lengths: Sequence[int]
    skips: Sequence[float]
    baselines: Sequence[str]
    prompt: str
    repeats: int
    seed: int

    def __post_init__(self) -> None:
        checks.counts("ttft.lengths", self.lengths)
        checks.count("ttft.repeats", self.repeats)
        checks.seed("ttft.seed", self.seed)
        checks.shares("ttft.skips", self.skips, least=0)
        if unknown := [name for name in self.baselines if name not in BASELINES]:
            raise InputError(f"ttft.baselines: {unknown} is none of {', '.join(BASELINES)}")
        if self.prompt not in PROMPTS:
            raise InputError(f"ttft.prompt={self.prompt} is none of {', '.join(PROMPTS)}")

    def tokens(self, loaded: Loaded, length: int) -> torch.Tensor:
        """A prompt, int64 (1, length)."""
        if self.prompt == "random":
            vocabulary = loaded.model.config.get_text_config(decoder=True).vocab_size
            generator = torch.Generator().manual_seed(self.seed)
            return torch.randint(vocabulary, (1, length), generator=generator)
        return torch.tensor([text.running(loaded.tokenizer, text.prose("evaluate"), length, self.seed)])


@dataclass(frozen=True)
class Plan:
    """One configuration's run, before the model is loaded.

    Raises
    ------
    InputError
        Two rows of one name, such as shares of ``skips`` that are the same in per cent.
    """

    grid: Grid
    prefill: Prefill
    source: ModelSource
    store: Store
    planned: Sequence[Variant]
    record: Run

    def __post_init__(self) -> None:
        labels = self.labels()
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise InputError(f"ttft measures a row a method and {', '.join(twice)} would be two; leave one of them out")

    @classmethod
    def of(cls, cfg: DictConfig) -> Plan:
        prefill: Prefill = instantiate(cfg.prefill)
        source: ModelSource = instantiate(cfg.model)
        prompt = cfg.ttft.prompt or ("random" if source.init == "random" else "prose")
        grid: Grid = instantiate(cfg.ttft, prompt=prompt, _convert_="all")
        store = Store(environment.own_folder(Path(cfg.results)))
        planned = variants(cfg, store, source)
        prefill.check(planned, max(grid.lengths))
        own = [variant.label for variant in planned]
        grid = dataclasses.replace(grid, baselines=[name for name in grid.baselines if name not in own])
        identity = {
            "ttft": dataclasses.asdict(grid),
            "model": source.identity(),
            "methods": [variant.identity() for variant in planned],
            "backend": pick_backend(cfg.backend, source.torch_device),
            "device": environment.device_name(source.torch_device),
            **({"processes": source.processes} if source.processes > 1 else {}),
            **prefill.identity(),
        }
        return cls(grid, prefill, source, store, planned, store.run("ttft", identity))

    def labels(self) -> list[str]:
        """The rows of the table."""
        sets = [_set_label(skip) for skip in self.grid.skips]
        return [*(variant.label for variant in self.planned), *sets, *self.grid.baselines]

    def ids(self) -> list[str]:
        """The samples."""
        return [sample_id(length, label) for length in self.grid.lengths for label in self.labels()]


def plan(cfg: DictConfig) -> list[Planned]:
    """What `run` would run."""
    found = Plan.of(cfg)
    methods, readings = ", ".join(found.labels()), found.grid.repeats + 1
    return [Planned(methods, "", "", found.grid.lengths, found.ids(), readings, found.record)]


def run(cfg: DictConfig) -> None:
    """``python run.py experiment=ttft``: measure, record, write the tables and figures."""
    tracker: Tracker = instantiate(cfg.tracker)
    found = Plan.of(cfg)
    found.source.check_device()
    grid, prefill, record, device = found.grid, found.prefill, found.record, found.source.torch_device
    with record.writing(environment.describe(device)) as writer:
        if record.complete:
            _say_left_out(record)
        else:
            missing = set(found.ids()) - set(writer.done)
            loaded = found.source.load()
            loaded.check_length(max(grid.lengths), "ttft.lengths")
            contenders, left_out = _contenders(found.planned, grid, prefill, loaded, cfg.backend)
            cells = {n: [one for one in contenders if sample_id(n, one.label) in missing] for n in grid.lengths}
            turns = Turns(loaded, device, cfg.backend, prefill, grid.repeats)
            bar = tqdm(total=sum(map(len, cells.values())), desc="ttft", unit="cell", file=sys.stderr)
            with bar, logging_redirect_tqdm():
                for length, rest in cells.items():
                    for sample in turns.measure(grid.tokens(loaded, length).to(device), rest):
                        writer.append({"prompt": grid.prompt, **sample})
                        bar.update()
                        log.info("%s: %s", sample["id"], _line(sample))
            rows = ttft_report.tabulate(writer.samples())
            writer.finish({"left_out": left_out, "cells": json.loads(rows.to_json(orient="records"))})
    [chapter] = ttft_report.chapters(found.store.root, only=record.id)
    chapter.write(found.store.root)
    print(chapter.main())
    tracker.run(record, "ttft")


def _say_left_out(record: Run) -> None:
    summary = record.path / "summary.json"
    for name, reason in ttft_report.left_out(summary).items():
        log.warning("%s was left out: %s; remove %s to try it again", name, reason, summary)


def _contenders(
    planned: Sequence[Variant], grid: Grid, prefill: Prefill, loaded: Loaded, backend: Backend
) -> tuple[list[Contender], dict[str, str]]:
    """Everything that runs here, and the baselines that do not, with the reason."""
    info, longest = describe(loaded.model), max(grid.lengths)
    contenders, left_out = [], {}
    for variant in planned:
        method = variant.build(loaded)
        method.bind(info)  # refuses a method of another model
        contenders.append(Contender(variant.label, _always(method)))
    for skip in grid.skips:
        contenders.append(Contender(_set_label(skip), _set(loaded, skip, backend)))
    for name in grid.baselines:
        method = BASELINES[name]()
        try:
            method.bind(info)
            prefill.check([method], longest)
        except InputError as error:
            left_out[name] = str(error)
            log.warning("%s is left out: %s", name, error)
        else:
            contenders.append(Contender(name, _always(method)))
    return contenders, left_out


def _always(method: Method) -> Callable[[Callable[[], Any]], Method]:
    return lambda read: method


def _set(loaded: Loaded, skip: float, backend: Backend) -> Callable[[Callable[[], Any]], Method]:
    return lambda read: AtSkip.set(loaded.model, read, skip, backend)


def _set_label(skip: float) -> str:
    return f"{AtSkip.name} set to skip {skip:.0%}"


def _line(sample: dict[str, Any]) -> str:
    if "out_of_memory" in sample:
        return sample["out_of_memory"]
    attention = f"{sample['attention_share']:.0%} of it attention"
    return f"{sample['ttft_s']:.3f} s, {attention}, {sample['skip_ratio']:.1%} skipped"
