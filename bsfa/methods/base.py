"""What a method is: a rule that, bound to a model, attends one prefill call after another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from bsfa.attention import Attended, Backend, attend
from bsfa.blocks import BlockGrid, BlockLists
from bsfa.gates import Gate
from bsfa.model import ModelInfo


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
        return attend(
            self.q,
            self.k,
            self.v,
            causal=True,
            softmax_scale=self.softmax_scale,
            window_size=self.window_size,
            softcap=self.softcap,
            gate=gate,
            blocks=blocks,
            return_lse=self.return_lse,
            backend=self.backend,
        )


Attend = Callable[[Call], Attended]


class Method(ABC):
    """An attention method for prefill.

    ``name`` stands in tables. ``version`` is part of a record's identity: raise it when the blocks that the method
    keeps change.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1

    @abstractmethod
    def bind(self, model: ModelInfo) -> Attend:
        """Check the method against a model, move what it needs to the layers' devices, and return its attention.

        Raises
        ------
        InputError
            The method was calibrated for another model.
        """
