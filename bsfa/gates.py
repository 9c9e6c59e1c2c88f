"""Gate: the rule that decides on a block.

A block is kept when it overlaps the diagonal band and ``keep_diagonal``, or it is the first key block and
``keep_first``, or any visible scaled score ``s`` in it satisfies

    s >= max(threshold[head, query block], r[row] + relative[head, query block])

with ``r[row]`` the row's running maximum (or running log-sum-exp) of scaled scores over the blocks kept so far, in
the order of visit, -inf before the first. The comparison is made as ``not (s < bar)`` and a NaN in the bar's
relative part is ignored, so a NaN score keeps its block and bad input shows in the output.

BSFA (arXiv 2512.07011) is ``Gate(threshold=table)``; BLASST (arXiv 2512.12087) is
``Gate(relative=log(factor / seqlen_k), order="ascending", keep_diagonal=False, keep_first=True)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from bsfa.blocks import ORDERS, BlockGrid, Order
from bsfa.errors import InputError

RelativeTo = Literal["max", "lse"]
RELATIVE_TO: tuple[str, ...] = get_args(RelativeTo)


@dataclass(frozen=True, eq=False)
class Gate:
    """A block gate. Build it once, outside the loop: that reads its tensors, and waits for a GPU they are on.

    Parameters
    ----------
    threshold : float or tensor (Hq,) or (Hq, n_blocks)
        Absolute cut, in units of ``softmax_scale * q.k``. The second axis is the query block's absolute position;
        positions past its end read the last entry.
    relative : float or tensor (Hq,) or (Hq, n_blocks)
        Cut against the row's running statistic, same units and axes; usually negative. -inf switches the test off.
    relative_to : {"max", "lse"}
        Running maximum or running log-sum-exp.
    order : {"diagonal", "sink", "ascending"}
        Order of visit, see `BlockGrid.visit`. It matters to the relative part alone.
    keep_diagonal : bool
        Keep the diagonal band whatever its scores.
    keep_first : bool
        Keep the first key block whatever its scores.
    screen : float, optional
        Find by 8-bit scores the blocks that need no exact ones, see `bsfa.screen`, and decide on the others. The share,
        above 0, of the largest error of rounding by which a block has to be under its bar: with 1 nothing is decided
        otherwise, with 0.25 hardly anything is, and fewer blocks are left to decide on. Faster where much is skipped.
        For thresholds and running maxima; on CUDA for compute capability 9.0. There a call takes 4 bytes of memory a
        block, visible or not, of every query head, and D bytes a key of every KV head, in a batch as if all its
        sequences were as long as the longest; and all keys are rounded anew, in every chunk of a prefill.

    Raises
    ------
    InputError
        A NaN, a shape that is neither a scalar nor one of the above, an unknown order or statistic; a screen that is
        not above 0, or of a gate against the running log-sum-exp.
    """

    threshold: float | torch.Tensor = -math.inf
    relative: float | torch.Tensor = -math.inf
    relative_to: RelativeTo = "max"
    order: Order = "diagonal"
    keep_diagonal: bool = True
    keep_first: bool = False
    screen: float | None = None

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise InputError(f"gate order {self.order!r} is none of {', '.join(ORDERS)}")
        if self.relative_to not in RELATIVE_TO:
            raise InputError(f"gate relative_to {self.relative_to!r} is none of {', '.join(RELATIVE_TO)}")
        _check_numbers("threshold", self.threshold)
        _check_numbers("relative", self.relative)
        if self.screen is not None:
            if not (isinstance(self.screen, (int, float)) and 0 < self.screen < math.inf):
                raise InputError(f"gate screen must be a number above 0, or None, got {self.screen!r}")
            if self.is_relative and self.relative_to == "lse":
                raise InputError("a gate with relative_to='lse' has no screen; leave screen out")

    @classmethod
    def of(cls, gate: Gate | float | torch.Tensor | None) -> Gate | None:
        """A gate from what `flash_attn_func` accepts: a bare number or tensor is an absolute threshold."""
        if gate is None or isinstance(gate, Gate):
            return gate
        return cls(threshold=gate)

    def to(self, device: torch.device) -> Gate:
        """The gate with its tables on a device. Built on the CPU and moved, a gate never waits for a GPU."""
        moved = copy(self)  # which does not look for NaN again
        for name in ("threshold", "relative"):
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                object.__setattr__(moved, name, value.to(device, torch.float32, non_blocking=True))
        return moved

    def resolve(self, grid: BlockGrid, n_heads: int, device: torch.device) -> ResolvedGate:
        """The gate of one call: its cuts picked by absolute position and broadcast to (Hq, n_q) fp32.

        Raises
        ------
        InputError
            The gate was made for another number of heads.
        """
        return self._resolved(grid.pick, n_heads, device)

    def resolve_table(self, n_heads: int, device: torch.device) -> ResolvedGate:
        """The gate of a call over packed sequences: whole tables, fp32 (Hq, n_blocks), which each of them reads by
        absolute position, clamped to the last column.

        Raises
        ------
        InputError
            The gate was made for another number of heads.
        """
        return self._resolved(lambda table: table, n_heads, device)

    def _resolved(
        self, read: Callable[[torch.Tensor], torch.Tensor], n_heads: int, device: torch.device
    ) -> ResolvedGate:
        threshold = read(_table("threshold", self.threshold, n_heads, device))
        relative = read(_table("relative", self.relative, n_heads, device)) if self.is_relative else None
        return ResolvedGate(
            threshold, relative, self.relative_to, self.order, self.keep_diagonal, self.keep_first, self.screen
        )

    @property
    def is_relative(self) -> bool:
        return not (isinstance(self.relative, (int, float)) and self.relative == -math.inf)


@dataclass(frozen=True, eq=False)
class ResolvedGate:
    """A gate on one call's grid.

    Attributes
    ----------
    threshold : fp32 (Hq, n_q); for packed sequences the whole table, (Hq, n_blocks)
    relative : the same, or None where the gate is absolute alone
    """

    threshold: torch.Tensor
    relative: torch.Tensor | None
    relative_to: RelativeTo
    order: Order
    keep_diagonal: bool
    keep_first: bool
    screen: float | None = None

    def protects(self, grid: BlockGrid, i: int) -> set[int]:
        """Key blocks that query block ``i`` keeps whatever their scores."""
        kept = set(grid.band(i)) if self.keep_diagonal else set()
        if self.keep_first and 0 in grid.visible(i):
            kept.add(0)
        return kept


def _check_numbers(name: str, value: float | torch.Tensor) -> None:
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point() or value.dim() > 2 or value.numel() == 0:
            raise InputError(
                f"gate {name} must be a float or a floating-point tensor (Hq,) or (Hq, n_blocks), "
                f"got {value.dtype} {tuple(value.shape)}"
            )
        has_nan = bool(torch.isnan(value).any())
    elif isinstance(value, (int, float)):
        has_nan = math.isnan(value)
    else:
        raise InputError(f"gate {name} must be a float or a tensor, got {type(value).__name__}")
    if has_nan:
        raise InputError(f"gate {name} holds NaN; use -inf to keep every block")


def _table(name: str, value: float | torch.Tensor, n_heads: int, device: torch.device) -> torch.Tensor:
    """fp32 (Hq, n_blocks) on the device, one column where all blocks are alike; with no wait for the device."""
    if not isinstance(value, torch.Tensor):
        return torch.full((1, 1), value, device=device, dtype=torch.float32).expand(n_heads, 1)
    if value.dim() and value.shape[0] != n_heads:
        raise InputError(f"gate {name} is for {value.shape[0]} heads, the call has {n_heads}")
    value = value.to(device, torch.float32)
    return value if value.dim() == 2 else value.reshape(-1, 1).expand(n_heads, 1)
