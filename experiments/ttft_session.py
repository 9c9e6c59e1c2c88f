"""A loaded model and what there is to measure with it: everything that runs here, cell by cell."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from bsfa.attention import Backend
from bsfa.errors import InputError
from bsfa.methods import Method
from bsfa.model import describe
from experiments import dense_kernels, environment
from experiments.at_skip import AtSkip
from experiments.models import Loaded
from experiments.ttft_plan import Plan, sample_id, set_label
from experiments.turns import Contender, Turns


@dataclass(frozen=True)
class Session:
    """The cells that are missing, by length, and a loaded model to measure them with.

    Attributes
    ----------
    left_out : dict of str to str
        Baselines that do not run here, with the reason.
    """

    plan: Plan
    loaded: Loaded
    cells: dict[int, list[Contender]]
    left_out: dict[str, str]
    turns: Turns

    @classmethod
    def open(cls, plan: Plan, backend: Backend, done: Collection[str]) -> Session:
        grid, source = plan.grid, plan.source
        missing = set(plan.ids()) - set(done)
        loaded = source.load()
        loaded.check_length(max(grid.lengths), "ttft.lengths")
        contenders, left_out = _contenders(plan, loaded, backend)
        cells = {n: [one for one in contenders if sample_id(n, one.label) in missing] for n in grid.lengths}
        turns = Turns(loaded, source.torch_device, backend, plan.prefill, grid.repeats)
        return cls(plan, loaded, cells, left_out, turns)

    def count(self) -> int:
        return sum(map(len, self.cells.values()))

    def samples(self) -> Iterator[dict[str, Any]]:
        """One a cell.

        Raises
        ------
        InputError
            This process of several ran out of memory: the others wait for it in the middle of a layer, and can neither
            be told nor go on. Where it ends, torchrun ends them; the next command goes on without the cell.
        """
        lost = self.plan.record.lost()
        try:
            yield from self._samples()
        except RuntimeError:
            if self.plan.record.lost() == lost:
                raise
            sys.exit(2)  # of a layer that lost another process, which has said why

    def _samples(self) -> Iterator[dict[str, Any]]:
        grid, processes = self.plan.grid, self.plan.source.processes
        for length, contenders in self.cells.items():
            tokens = grid.tokens(self.loaded, length).to(self.turns.device)
            for measured in self.turns.measure(tokens, contenders):
                cell = {"id": sample_id(length, measured["method"]), "task": "ttft", "prompt": grid.prompt}
                sample = cell | {"length": length} | self.turns.record() | measured
                if "out_of_memory" in sample and processes > 1:
                    self.plan.record.lose(sample)
                    raise InputError(
                        f"{sample['id']}: process {environment.rank()} of {processes} is out of memory "
                        f"({sample['out_of_memory']}), and all end. The cell is recorded as lost: the same command "
                        "goes on with the others"
                    )
                yield sample


def _contenders(plan: Plan, loaded: Loaded, backend: Backend) -> tuple[list[Contender], dict[str, str]]:
    """Everything that runs here, and the baselines that do not, with the reason."""
    info, grid = describe(loaded.model), plan.grid
    methods = {variant.label: variant.build(loaded) for variant in plan.planned}
    for method in methods.values():
        method.bind(info)  # refuses a method of another model
    plan.check_keys((label, method.fewest_keys) for label, method in methods.items())
    contenders = [Contender.of(label, method) for label, method in methods.items()]
    for skip, screen in grid.gates():
        contenders.append(Contender(set_label(skip, screen), _set(loaded, skip, backend, screen)))
    dtype, longest = loaded.model.dtype, max(grid.lengths)
    dense, left_out = dense_kernels.usable(grid.baselines, info, dtype, plan.prefill, longest)
    return [*contenders, *(Contender.of(name, method) for name, method in dense.items())], left_out


def _set(loaded: Loaded, skip: float, backend: Backend, screen: float | None) -> Callable[[Callable[[], Any]], Method]:
    return lambda read: AtSkip.set(loaded.model, read, skip, backend, screen)
