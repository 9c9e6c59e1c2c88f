"""What `experiment=ttft` measures, before a model is loaded: the grid, its methods, its run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from bsfa.attention import pick_backend
from bsfa.errors import InputError
from experiments import checks, environment
from experiments.at_skip import AtSkip
from experiments.dense_kernels import DENSE_KERNELS
from experiments.methods import Variant, variants
from experiments.models import Loaded, ModelSource
from experiments.prefill import Prefill
from experiments.records import Run, Store
from experiments.tasks import text

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
    screens: Sequence[float] = ()

    def __post_init__(self) -> None:
        checks.counts("ttft.lengths", self.lengths)
        checks.count("ttft.repeats", self.repeats)
        checks.seed("ttft.seed", self.seed)
        checks.shares("ttft.skips", self.skips, least=0)
        checks.screens("ttft.screens", self.screens)
        if 1 in self.lengths:
            raise InputError(f"ttft.lengths={self.lengths}: one token is a decode step and no prompt; take 2 or more")
        checks.names("ttft.baselines", self.baselines, DENSE_KERNELS, least=0)
        checks.choice("ttft.prompt", self.prompt, PROMPTS)

    def gates(self) -> Iterator[tuple[float, float | None]]:
        """BSFA's gates that are set: a skip ratio each, without a screen and with each."""
        return itertools.product(self.skips, (None, *self.screens))

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
        if twice := checks.twice(self.labels()):
            named = ", ".join(sorted(twice))
            raise InputError(f"ttft measures a row a method and {named} would be two; leave one of them out")

    @classmethod
    def of(cls, cfg: DictConfig) -> Plan:
        prefill: Prefill = instantiate(cfg.prefill)
        source: ModelSource = instantiate(cfg.model)
        prompt = cfg.ttft.prompt or ("random" if source.init == "random" else "prose")
        grid: Grid = instantiate(cfg.ttft, prompt=prompt, _convert_="all")
        store = Store(Path(cfg.results))
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
        plan = cls(grid, prefill, source, store, planned, store.run("ttft", identity))
        if not plan.record.complete:
            plan.check_keys((variant.label, variant.fewest_keys) for variant in planned)
        return plan

    def check_keys(self, fewest: Iterable[tuple[str, int]]) -> None:
        """Refuse lengths that are too short for a method: labels, each with `Method.fewest_keys`.

        Raises
        ------
        InputError
        """
        self.prefill.check_keys(fewest, min(self.grid.lengths), "ttft.lengths")

    def labels(self) -> list[str]:
        """The rows of the table."""
        sets = [set_label(*gate) for gate in self.grid.gates()]
        return [*(variant.label for variant in self.planned), *sets, *self.grid.baselines]

    def ids(self) -> list[str]:
        """The samples."""
        return [sample_id(length, label) for length in self.grid.lengths for label in self.labels()]


def set_label(skip: float, screen: float | None) -> str:
    """Of BSFA's gate set to a skip ratio."""
    return f"{AtSkip.name} set to skip {skip:.0%}" + (f", screen {screen:g}" if screen else "")


def sample_id(length: int, label: str) -> str:
    """Of a length's cell."""
    return f"{length}/{label}"
