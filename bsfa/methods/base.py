"""What a method is: a rule that, bound to a model, attends one prefill call after another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch

from bsfa.attention import Attended, Backend, attend, attend_and_maxima, attend_varlen, block_maxima
from bsfa.blocks import BlockGrid, BlockLists
from bsfa.gates import Gate
from bsfa.model import ModelInfo
from bsfa.packing import Packing


@dataclass(frozen=True)
class Call:
    """One causal prefill call of one layer: q (B, Sq, Hq, D), k and v (B, Sk, Hkv, D), bottom-right aligned."""

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    softmax_scale: float | None = None
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    backend: Backend = "auto"
    return_lse: bool = False

    @property
    def grid(self) -> BlockGrid:
        return BlockGrid(self.q.shape[1], self.k.shape[1], causal=True, window_size=self.window_size)

    def attend(self, *, gate: Gate | None = None, blocks: BlockLists | None = None) -> Attended:
        """Through the shared kernels: every visible block under a gate, or the listed ones."""
        return attend(self.q, self.k, self.v, gate=gate, blocks=blocks, return_lse=self.return_lse, **self._options)

    def block_maxima(self, run: int) -> Iterator[tuple[BlockGrid, torch.Tensor]]:
        """`bsfa.attention.block_maxima` of ``run`` query blocks after ``run``, so that no more stand in memory at once.

        Yields
        ------
        The blocks of a run with the keys that it sees, and fp32 (B, Hq, blocks of the run, n_k) of them.
        """
        for part in self._runs(run):
            yield part.grid, block_maxima(part.q, part.k, **part._options)

    def attend_and_maxima(self, run: int) -> Iterator[tuple[BlockGrid, torch.Tensor, torch.Tensor]]:
        """`block_maxima` of a run, and its rows' dense attention (B, rows, Hq, D) between the grid and the maxima."""
        for part in self._runs(run):
            yield part.grid, *attend_and_maxima(part.q, part.k, part.v, **part._options)

    def _runs(self, run: int) -> Iterator[Call]:
        """The call in pieces of ``run`` query blocks, each with the keys that it sees."""
        grid = self.grid
        for first in range(0, grid.n_q, run):
            rows = slice(grid.rows(first).start, grid.rows(min(first + run, grid.n_q) - 1).stop)
            keys = slice(grid.offset + rows.stop)
            yield replace(self, q=self.q[:, rows], k=self.k[:, keys], v=self.v[:, keys])

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "causal": True,
            "softmax_scale": self.softmax_scale,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "backend": self.backend,
        }

    def packed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing) -> PackedCall:
        """The call over sequences of several lengths, see `PackedCall`."""
        options = {f.name: getattr(self, f.name) for f in fields(Call)}
        return PackedCall(**options | {"q": q, "k": k, "v": v}, packing=packing)


@dataclass(frozen=True, kw_only=True)
class PackedCall(Call):
    """A `Call` over sequences of several lengths: packed, q (total_q, Hq, D), k and v (total_k, Hkv, D), or padded.

    Only what a method that ``packs`` asks of a call works on it.
    """

    packing: Packing

    def attend(self, *, gate: Gate | None = None, blocks: BlockLists | None = None) -> Attended:
        """All sequences in one call.

        Raises
        ------
        NotImplementedError
            Block lists.
        """
        if blocks is not None:
            raise NotImplementedError("block lists are for one sequence a call, not for a packed or padded batch")
        return attend_varlen(
            self.q, self.k, self.v, self.packing, gate=gate, return_lse=self.return_lse, **self._options
        )

    def alone(self) -> Iterator[Call]:
        """One `Call` a sequence. Reads the spans, which waits for a GPU that holds them."""
        options = {f.name: getattr(self, f.name) for f in fields(Call)}
        for q, k, v in self.packing.alone(self.q, self.k, self.v):
            yield Call(**options | {"q": q, "k": k, "v": v})


Attend = Callable[[Call], Attended]


class Method(ABC):
    """An attention method for prefill.

    ``name`` stands in tables. ``version`` is part of a record's identity: raise it when the blocks that the method
    keeps change. ``chunks``: whether it can be for a prefill in chunks, each over the keys of all chunks so far.
    ``any_length``: whether it is for prompts of any length, whatever its parameters. A method that ``packs`` asks
    nothing of a call but ``layer`` and ``attend(gate=...)``, so that the sequences of a padded or packed batch can go
    through it at once, in a `PackedCall`.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    chunks: ClassVar[bool] = True
    any_length: ClassVar[bool] = True
    packs: ClassVar[bool] = False

    @property
    def serves_chunks(self) -> bool:
        """Whether it serves a prefill in chunks with the parameters that it has."""
        return self.chunks

    @property
    def fewest_keys(self) -> int:
        """A call of fewer keys it refuses, with the parameters that it has."""
        return 1

    @abstractmethod
    def bind(self, model: ModelInfo) -> Attend:
        """Check the method against a model, move what it needs to the layers' devices, and return its attention.

        Raises
        ------
        InputError
            The method was calibrated for another model.
        """
