"""Kernel speed: block-gated attention against the best dense attention on this GPU, in one process.

Every cell draws fresh inputs, sets one threshold a cell so that the asked share of blocks falls below it, and times the
gated kernel and every dense baseline in turns. A speed-up is a ratio inside one cell and names both sides.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from bsfa import cuda
from bsfa.blocks import BLOCK_K, BLOCK_Q, BlockGrid
from bsfa.errors import InputError
from bsfa.gates import ResolvedGate
from experiments import checks, dense_kernels, environment, kernel_report, standing
from experiments.dense_kernels import BASELINES, Kernel
from experiments.plans import Planned
from experiments.records import Run, Store
from experiments.statistics import quartiles
from experiments.tracking import Tracker
from experiments.unavailable import Unavailable

log = logging.getLogger(__name__)

DEVICE = "cuda"
PATTERNS = ("random", "structured")
INNER = 4  # timed calls a turn, after one that is not
HEAD_START = 3_000_000  # cycles, some two milliseconds: the host puts a turn's calls in line meanwhile


@dataclass(frozen=True)
class Shape:
    """One cell's inputs: batch 1, causal."""

    length: int
    head_size: int
    q_heads: int
    kv_heads: int
    pattern: str


@dataclass(frozen=True)
class Grid:
    """What to measure; see ``conf/experiment/kernel.yaml``.

    Raises
    ------
    InputError
        A value that cannot be measured.
    """

    lengths: Sequence[int]
    skips: Sequence[float]
    head_sizes: Sequence[int]
    heads: Sequence[Sequence[int]]
    patterns: Sequence[str]
    baselines: Sequence[str]
    dtype: str
    repeats: int
    seed: int
    kernel: str | None
    screens: Sequence[float] = ()

    def __post_init__(self) -> None:
        checks.counts("kernel.lengths", self.lengths)
        checks.count("kernel.repeats", self.repeats)
        checks.seed("kernel.seed", self.seed)
        checks.shares("kernel.skips", self.skips, least=1)
        checks.names("kernel.patterns", self.patterns, PATTERNS)
        checks.names("kernel.baselines", self.baselines, BASELINES, least=0)
        checks.names("kernel.head_sizes", self.head_sizes, cuda.HEAD_SIZES)
        checks.choice("kernel.dtype", self.dtype, ("bfloat16", "float16"))
        checks.choice("kernel.kernel", self.kernel, (None, *cuda.KERNELS))
        checks.screens("kernel.screens", self.screens)
        if not (self.heads and all(_are_heads(pair) for pair in self.heads)):
            raise InputError(f"kernel.heads={self.heads} must be pairs of query and KV heads, such as [[32,8]]")

    def shapes(self) -> Iterator[Shape]:
        for (q, kv), size, length, pattern in itertools.product(
            self.heads, self.head_sizes, self.lengths, self.patterns
        ):
            yield Shape(length, size, q, kv, pattern)


def _are_heads(pair: Any) -> bool:
    if not (isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(n, int) and n > 0 for n in pair)):
        return False
    query, kv = pair
    return query % kv == 0


def run(cfg: DictConfig) -> None:
    """``python run.py experiment=kernel``: measure, record, write the table and the figure.

    Raises
    ------
    Unavailable
        No CUDA device.
    InputError
        One that the kernels do not serve.
    """
    grid: Grid = instantiate(cfg.kernel, _convert_="all")
    tracker: Tracker = instantiate(cfg.tracker)
    if not torch.cuda.is_available():
        raise Unavailable("experiment=kernel times GPU kernels and there is no CUDA GPU here")
    store = Store(Path(cfg.results))
    record = _record(store, grid)
    if not record.complete:
        _finish(record, grid, torch.device(DEVICE))
    print(standing.chapter(record, kernel_report.chapters, beside="*"))
    tracker.runs([(record, "kernel")])


def _finish(record: Run, grid: Grid, device: torch.device) -> None:
    """Measure every cell that is missing."""
    with record.writing(environment.describe(device)) as writer:
        for shape in grid.shapes():
            missing = [skip for skip in grid.skips if _name(shape, skip) not in writer.done]
            if missing:
                for sample in measure(shape, missing, grid, device):
                    writer.append(sample)
                    log.info("%s: %.2f ms, %s", sample["id"], sample["ms"], _best(sample))
        rows = kernel_report.tabulate(writer.samples())
        writer.finish({"samples": len(rows), "cells": json.loads(rows.to_json(orient="records"))})


def plan(cfg: DictConfig) -> list[Planned]:
    """What `run` would run."""
    grid: Grid = instantiate(cfg.kernel, _convert_="all")
    ids = [_name(shape, skip) for shape in grid.shapes() for skip in grid.skips]
    return [Planned("bsfa", "", "", grid.lengths, ids, 0, _record(Store(Path(cfg.results)), grid))]


def _record(store: Store, grid: Grid) -> Run:
    device = environment.device_name(torch.device(DEVICE))
    return store.run("kernel", {"kernel": dataclasses.asdict(grid), "device": device})


def measure(shape: Shape, skips: Sequence[float], grid: Grid, device: torch.device) -> Iterator[dict[str, Any]]:
    """One sample a skip ratio: milliseconds of the gated kernel, alone and behind a screen, and of every baseline that
    runs here, and why others do not."""
    q, k, v = draw(shape, grid, device)
    scale = shape.head_size**-0.5
    blocks = BlockGrid(shape.length, shape.length, causal=True)
    maxima = cuda.block_maxima(q, k, softmax_scale=scale, causal=True, kernel=grid.kernel)
    baselines, failed = dense_kernels.that_run(grid.baselines, q, k, v)
    screens, no_screen = grid.screens, ""
    try:
        if screens:
            cuda.check(q, grid.kernel, screen=True)
    except InputError as error:
        screens, no_screen = (), str(error)
    for skip in skips:
        cut = threshold(maxima, skip)
        gate = ResolvedGate(
            torch.full((shape.q_heads, blocks.n_q), cut, device=device), None, "max", "diagonal", True, False
        )

        def attend(gate: ResolvedGate, stats: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
            return cuda.attend(
                q, k, v, softmax_scale=scale, causal=True, gate=gate, return_stats=stats, kernel=grid.kernel
            )

        def kept(gate: ResolvedGate) -> int:
            counted = attend(gate, stats=True)[2]
            assert counted is not None
            return int(counted.sum())

        screened = {f"screen {share:g}": dataclasses.replace(gate, screen=share) for share in screens}
        gated = {name: partial(attend, one) for name, one in {"bsfa": gate, **screened}.items()}
        times = in_turns({**gated, **baselines}, grid.repeats)
        low, middle, high = times.pop("bsfa")
        keeps = kept(gate)
        yield {
            "id": _name(shape, skip),
            **dataclasses.asdict(shape),
            "dtype": grid.dtype,
            "skip_asked": skip,
            "skip_ratio": 1 - keeps / (shape.q_heads * blocks.total()),
            "ms": middle,
            "ms_q25": low,
            "ms_q75": high,
            "screened": {name: {"ms": times.pop(name)[1], "lost": keeps - kept(one)} for name, one in screened.items()},
            "no_screen": no_screen,
            "baseline_ms": {name: time[1] for name, time in times.items()},
            "baselines_failed": failed,
        }


def draw(shape: Shape, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh q, k, v. In the structured pattern some key blocks of some KV heads score high for every query, so that
    kept blocks cluster by head and by column, as real ones do."""
    generator = torch.Generator(device).manual_seed(grid.seed)
    dtype = getattr(torch, grid.dtype)

    def normal(heads: int) -> Tensor:
        return torch.randn(1, shape.length, heads, shape.head_size, device=device, generator=generator).to(dtype)

    q, k, v = normal(shape.q_heads), normal(shape.kv_heads), normal(shape.kv_heads)
    if shape.pattern == "structured":
        blocks = -(-shape.length // BLOCK_K)
        gain = torch.randn(1, blocks, shape.kv_heads, 1, device=device, generator=generator).mul(0.15)
        gain += torch.randn(1, 1, shape.kv_heads, 1, device=device, generator=generator).mul(0.1)
        k = k * gain.exp().repeat_interleave(BLOCK_K, 1)[:, : shape.length].to(dtype)
    return q, k, v


def threshold(maxima: Tensor, skip: float) -> float:
    """A cut under which the asked share of all visible blocks falls; the diagonal ones, always kept, count too."""
    if skip == 0:
        return -torch.inf
    n_q, n_k = maxima.shape[-2:]
    rows, columns = torch.arange(n_q, device=maxima.device), torch.arange(n_k, device=maxima.device)
    off_diagonal = maxima[..., columns[None, :] < rows[:, None] * (BLOCK_Q // BLOCK_K)]
    visible = off_diagonal.numel() + maxima[..., 0, 0].numel() * n_q * (BLOCK_Q // BLOCK_K)
    rank = round(skip * visible)
    if rank >= off_diagonal.numel():
        return torch.inf
    return float(off_diagonal.flatten().sort().values[rank])


def in_turns(kernels: dict[str, Kernel], repeats: int) -> dict[str, tuple[float, float, float]]:
    """Milliseconds a call, CUDA events: quartiles over turns. A turn runs every kernel, each after one call of its own,
    so that none is timed on what the one before left of caches and clocks, nor on how fast the host launches."""
    for kernel in kernels.values():
        kernel()
    turns: dict[str, list[float]] = {name: [] for name in kernels}
    for _ in range(repeats):
        for name, kernel in kernels.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START)
            kernel()
            start.record()
            for _ in range(INNER):
                kernel()
            stop.record()
            stop.synchronize()
            turns[name].append(start.elapsed_time(stop) / INNER)
    return {name: quartiles(times) for name, times in turns.items()}


def _name(shape: Shape, skip: float) -> str:
    heads = f"{shape.q_heads}x{shape.kv_heads}"
    return f"{shape.length}-d{shape.head_size}-h{heads}-{shape.pattern}-{skip:g}"


def _best(sample: dict[str, Any]) -> str:
    times = sample["baseline_ms"]
    if not times:
        return "no baseline"
    name = min(times, key=times.__getitem__)
    return f"{times[name] / sample['ms']:.2f} x {name}, the best of {', '.join(times)}"
