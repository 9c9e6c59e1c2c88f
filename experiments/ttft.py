"""Time to the first token of a whole model: every method and the dense kernels of others, in turns in one process.

The prompt is read as generation reads it, through a dynamic cache, up to the first token's choice; only attention
differs. A length at which a method runs out of memory costs that one cell, which says what was asked for.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import DynamicCache

import bsfa
from bsfa.attention import Backend, pick_backend
from bsfa.clock import clock_for
from bsfa.errors import InputError
from bsfa.methods import Method, Sdpa
from bsfa.methods.upstream import Cudnn, FlashAttn2, FlashAttn3, TorchFlash
from bsfa.methods.upstream_flex import Flex
from bsfa.model import describe
from experiments import checks, environment, ttft_report
from experiments.at_skip import AtSkip
from experiments.methods import Variant, variants
from experiments.models import Loaded, ModelSource
from experiments.prefill import Prefill
from experiments.records import Store
from experiments.statistics import quartiles
from experiments.sweep import new_process
from experiments.tasks import text
from experiments.tracking import Tracker

log = logging.getLogger(__name__)

BASELINES: dict[str, type[Method]] = {
    kind.name: kind for kind in (TorchFlash, Cudnn, FlashAttn3, FlashAttn2, Flex, Sdpa)
}
PROMPTS = ("random", "prose")

T = TypeVar("T")


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
        if not all(isinstance(skip, (int, float)) and 0 <= skip < 1 for skip in self.skips):
            raise InputError(f"ttft.skips={list(self.skips)} must be shares from 0 to below 1, such as [0.5,0.8]")
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
class Lane:
    """One row of the table: a method, or how to set one on a prompt, which is given as what reads it."""

    label: str
    make: Callable[[Callable[[], Any]], Method]


@dataclass(frozen=True)
class Reading:
    """One prompt read once: seconds, and bytes in memory at the most."""

    ttft: float
    attention: float
    skip_ratio: float
    peak_memory: int


@dataclass(frozen=True)
class OutOfMemory:
    """What the allocator said."""

    said: str


def run(cfg: DictConfig) -> None:
    """``python run.py experiment=ttft``: measure, record, write the tables and figures."""
    prefill: Prefill = instantiate(cfg.prefill)
    tracker: Tracker = instantiate(cfg.tracker)
    source: ModelSource = instantiate(cfg.model)
    prompt = cfg.ttft.prompt or ("random" if source.init == "random" else "prose")
    grid: Grid = instantiate(cfg.ttft, prompt=prompt, _convert_="all")
    store = Store(environment.own_folder(Path(cfg.results)))
    planned = variants(cfg, store, source)
    device = source.torch_device
    described = environment.describe(device)
    identity = {
        "ttft": dataclasses.asdict(grid),
        "model": source.identity(),
        "methods": [variant.identity() for variant in planned],
        "backend": pick_backend(cfg.backend, device),
        "device": described["device"],
        **({"processes": source.processes} if source.processes > 1 else {}),
        **prefill.identity(),
    }
    labels = [variant.label for variant in planned] + [_set_label(skip) for skip in grid.skips] + list(grid.baselines)
    record = store.run("ttft", identity)
    with record.writing(described) as writer:
        wanted = {_id(length, label) for length in grid.lengths for label in labels}
        if missing := wanted - set(writer.done):
            loaded = source.load()
            loaded.check_length(max(grid.lengths), "ttft.lengths")
            lanes, left_out = _lanes(planned, grid, prefill, loaded, cfg.backend)
            cells = {length: [x for x in lanes if _id(length, x.label) in missing] for length in grid.lengths}
            place = Place(loaded, device, cfg.backend, prefill, grid.repeats)
            bar = tqdm(total=sum(map(len, cells.values())), desc="ttft", unit="cell", file=sys.stderr)
            with bar, logging_redirect_tqdm():
                for length, rest in cells.items():
                    for sample in place.measure(grid.tokens(loaded, length).to(device), rest):
                        writer.append({"prompt": grid.prompt, **sample})
                        bar.update()
                        log.info("%s: %s", sample["id"], _line(sample))
            rows = ttft_report.tabulate(writer.samples())
            summary = {"left_out": left_out, "cells": json.loads(rows.to_json(orient="records"))}
            writer.finish(summary)
            tracker.run(record, "ttft", summary)
    tables, _ = ttft_report.write(store.root, only=record.id)
    print(tables[0].read_text(encoding="utf-8"))


def _lanes(
    planned: Sequence[Variant], grid: Grid, prefill: Prefill, loaded: Loaded, backend: Backend
) -> tuple[list[Lane], dict[str, str]]:
    """Everything that runs here, and the baselines that do not, with the reason."""
    info, longest = describe(loaded.model), max(grid.lengths)
    lanes, left_out = [], {}
    for variant in planned:
        method = variant.build(loaded)
        method.bind(info)  # refuses a method of another model
        prefill.check([method], longest)
        lanes.append(Lane(variant.label, _always(method)))
    for skip in grid.skips:
        lanes.append(Lane(_set_label(skip), _set(loaded, skip, backend)))
    for name in grid.baselines:
        method = BASELINES[name]()
        try:
            method.bind(info)
            prefill.check([method], longest)
        except InputError as error:
            left_out[name] = str(error)
            log.warning("%s is left out: %s", name, error)
        else:
            lanes.append(Lane(name, _always(method)))
    return lanes, left_out


def _always(method: Method) -> Callable[[Callable[[], Any]], Method]:
    return lambda read: method


def _set(loaded: Loaded, skip: float, backend: Backend) -> Callable[[Callable[[], Any]], Method]:
    return lambda read: AtSkip.set(loaded.model, read, skip, backend)


class Place:
    """A loaded model on its device, and the clock there."""

    def __init__(self, loaded: Loaded, device: torch.device, backend: Backend, prefill: Prefill, repeats: int) -> None:
        self.loaded, self.backend, self.prefill, self.repeats = loaded, backend, prefill, repeats
        self.device = device
        self.clock = clock_for(self.device)
        self.process = new_process()

    def measure(self, tokens: torch.Tensor, lanes: Sequence[Lane]) -> Iterator[dict[str, Any]]:
        """One sample a lane. Each reads the prompt once without a clock; then they take turns."""
        lost: dict[str, OutOfMemory] = {}
        ready: dict[str, tuple[Method, int | None]] = {}
        for lane in lanes:
            match self._attempt(partial(self._warm, tokens, lane)):
                case OutOfMemory() as out:
                    lost[lane.label] = out
                case warm:
                    ready[lane.label] = warm
        readings: dict[str, list[Reading]] = {label: [] for label in ready}
        for _ in range(self.repeats):
            for label, (method, _) in ready.items():
                if label in lost:
                    continue
                match self._attempt(partial(self._read, tokens, method)):
                    case OutOfMemory() as out:
                        lost[label] = out
                    case Reading() as reading:
                        readings[label].append(reading)
        for lane in lanes:
            shared = {
                "id": _id(tokens.shape[1], lane.label),
                "task": "ttft",
                "length": tokens.shape[1],
                "method": lane.label,
                "process": self.process,
                "clock": self.clock.name,
                "backend": pick_backend(self.backend, self.device),
                "device": environment.device_name(self.device),
            }
            if lane.label in lost:
                yield shared | {"out_of_memory": lost[lane.label].said}
            else:
                yield shared | {"driver_memory_bytes": ready[lane.label][1]} | _numbers(readings[lane.label])

    def _warm(self, tokens: torch.Tensor, lane: Lane) -> tuple[Method, int | None]:
        """The lane's method, once over the prompt, and what the driver then has in use on the device: the allocator
        gives nothing back by itself, so that is the most it held."""
        method = lane.make(lambda: self._fill(tokens))
        environment.release_memory(self.device)
        self._read(tokens, method)
        return method, environment.driver_memory(self.device)

    def _read(self, tokens: torch.Tensor, method: Method) -> Reading:
        environment.reset_peak_memory(self.device)
        with bsfa.apply(self.loaded.model, method, backend=self.backend, clock=self.clock) as applied:
            environment.wait(self.device)
            with self.clock.span() as seconds:
                self._fill(tokens).argmax(-1)
            return Reading(
                seconds(),
                applied.attention_seconds(),
                environment.mean_over_processes(applied.skip_ratio(), self.device),
                environment.peak_memory(self.device),
            )

    def _attempt(self, action: Callable[[], T]) -> T | OutOfMemory:
        """What an action gives, or what the allocator said; then all that the action held is free again."""
        try:
            return action()
        except torch.OutOfMemoryError as error:
            said = str(error).splitlines()[0]
        gc.collect()
        environment.release_memory(self.device)
        return OutOfMemory(said)

    def _fill(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.prefill.read(self.loaded.model, tokens, DynamicCache(config=self.loaded.model.config))


def _numbers(readings: Sequence[Reading]) -> dict[str, Any]:
    low, middle, high = quartiles([reading.ttft for reading in readings])
    _, attention, _ = quartiles([reading.attention for reading in readings])
    return {
        "ttft_s": middle,
        "ttft_q25_s": low,
        "ttft_q75_s": high,
        "turns_s": [reading.ttft for reading in readings],
        "attention_s": attention,
        "attention_share": attention / middle,
        "skip_ratio": readings[-1].skip_ratio,
        "peak_memory_bytes": max(reading.peak_memory for reading in readings),
    }


def _set_label(skip: float) -> str:
    return f"{AtSkip.name} set to skip {skip:.0%}"


def _id(length: int, label: str) -> str:
    return f"{length}/{label}"


def _line(sample: dict[str, Any]) -> str:
    if "out_of_memory" in sample:
        return sample["out_of_memory"]
    attention = f"{sample['attention_share']:.0%} of it attention"
    return f"{sample['ttft_s']:.3f} s, {attention}, {sample['skip_ratio']:.1%} skipped"
