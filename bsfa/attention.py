"""The internal entry: a block iterator (all visible blocks, or index lists) x a gate (none, or the rule).

Everything public comes down to `attend`: `flash_attn_func`, the methods, the transformers adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from bsfa import blockwise, cuda
from bsfa.blocks import BlockGrid, BlockLists
from bsfa.errors import InputError
from bsfa.gates import Gate
from bsfa.packing import Packing

Backend = Literal["auto", "reference", "cuda"]
BACKENDS: tuple[str, ...] = get_args(Backend)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SkipStats:
    """Blocks kept and blocks with at least one visible entry: int64 (B, Hq) each."""

    kept: torch.Tensor
    total: torch.Tensor

    @property
    def skip_ratio(self) -> float:
        """1 - kept / total over batch and heads; 0 where there was no block at all. Waits for a GPU."""
        total = int(self.total.sum())
        return 1.0 - int(self.kept.sum()) / total if total else 0.0


@dataclass(frozen=True)
class Attended:
    """What one call returns: ``out`` (B, Sq, Hq, D), ``lse`` fp32 (B, Hq, Sq) and ``counted`` where asked for."""

    out: torch.Tensor
    lse: torch.Tensor | None
    counted: SkipStats | None

    @property
    def stats(self) -> SkipStats:
        """``counted``, of a call that was asked to count."""
        assert self.counted is not None
        return self.counted

    @classmethod
    def dense(cls, out: torch.Tensor, grid: BlockGrid) -> Attended:
        """What a kernel gave that skips nothing and counts nothing."""
        total = torch.full((out.shape[0], out.shape[2]), grid.total(), device=out.device)
        return cls(out, None, SkipStats(total, total))

    @classmethod
    def joined(cls, parts: Sequence[Attended], q: torch.Tensor, packing: Packing) -> Attended:
        """Calls of one sequence each as one over q, see `attend_varlen`."""
        out = packing.joined([part.out[0] for part in parts], q.new_zeros(q.shape))
        lse = None
        if lses := [part.lse[0].T[..., None] for part in parts if part.lse is not None]:
            nothing = q.new_full((*q.shape[:-1], 1), -math.inf, dtype=torch.float32)
            lse = packing.joined(lses, nothing)[..., 0].transpose(-1, -2).contiguous()
        kept, total = torch.cat([part.stats.kept for part in parts]), torch.cat([part.stats.total for part in parts])
        return cls(out, lse, SkipStats(kept, total))


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    gate: Gate | None = None,
    blocks: BlockLists | None = None,
    return_lse: bool = False,
    count: bool = True,
    backend: Backend = "auto",
) -> Attended:
    """Block-sparse attention through a backend.

    Parameters
    ----------
    q : (B, Sq, Hq, D)
    k, v : (B, Sk, Hkv, D), Hq a multiple of Hkv
    gate : Gate, optional
        The rule over the visited blocks.
    blocks : BlockLists, optional
        Visit these instead of every visible block; goes without a gate.
    count : bool
        Count the blocks kept. On the CUDA backend that is two small kernels more beside a large one.

    Raises
    ------
    InputError
        Shapes, types or devices that do not go together, named.
    NotImplementedError
        The backend cannot serve them; on backward, for there is none.
    """
    check_qkv(q, k, v)
    scale = check_scale(q, softmax_scale)
    engine = pick_backend(backend, q.device)
    grid = BlockGrid(q.shape[1], k.shape[1], causal, window_size)
    if blocks is not None:
        _check_blocks(blocks, q, grid, gate)
    _check_screen(gate, softcap)
    if engine == "cuda":
        _check_cuda(q, window_size, softcap, gate)
    resolved = gate.resolve(grid, q.shape[2], q.device) if gate is not None else None
    with torch.no_grad():
        if engine == "cuda":
            out, lse, kept = cuda.attend(
                q,
                k,
                v,
                softmax_scale=scale,
                causal=causal,
                gate=resolved,
                block_lists=blocks,
                return_lse=return_lse,
                return_stats=count,
            )
        else:
            out, lse, kept = blockwise.attention(
                q,
                k,
                v,
                grid,
                softmax_scale=scale,
                softcap=softcap,
                gate=resolved,
                blocks=blocks,
                return_lse=return_lse,
            )
    counted = SkipStats(kept, torch.full_like(kept, grid.total())) if kept is not None else None
    return Attended(_forward_only(out, q, k, v), lse, counted)


def block_maxima(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    backend: Backend = "auto",
) -> torch.Tensor:
    """The largest visible scaled score of every block, what calibration looks at.

    Parameters
    ----------
    q : (B, Sq, Hq, D)
    k : (B, Sk, Hkv, D)

    Returns
    -------
    fp32 (B, Hq, n_q, n_k), -inf where nothing is visible.

    Raises
    ------
    InputError
        As in `attend`.
    """
    check_qkv(q, k, k)
    scale = check_scale(q, softmax_scale)
    grid = BlockGrid(q.shape[1], k.shape[1], causal, window_size)
    with torch.no_grad():
        if pick_backend(backend, q.device) == "reference":
            return blockwise.block_maxima(q, k, grid, softmax_scale=scale, softcap=softcap)
        _check_cuda(q, window_size, softcap)
        return cuda.block_maxima(q, k, softmax_scale=scale, causal=causal)


def attend_and_maxima(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention, and `block_maxima` of the same scores.

    Returns
    -------
    out : (B, Sq, Hq, D), dtype of q
    maxima : fp32 (B, Hq, n_q, n_k)

    Raises
    ------
    InputError
        As in `attend`.
    """
    if pick_backend(backend, q.device) == "cuda":  # which has a kernel for each
        options: dict[str, Any] = {"causal": causal, "softmax_scale": softmax_scale, "backend": backend}
        options |= {"window_size": window_size, "softcap": softcap}
        return attend(q, k, v, **options).out, block_maxima(q, k, **options)
    check_qkv(q, k, v)
    scale = check_scale(q, softmax_scale)
    grid = BlockGrid(q.shape[1], k.shape[1], causal, window_size)
    with torch.no_grad():
        return blockwise.attention_and_maxima(q, k, v, grid, softmax_scale=scale, softcap=softcap)


def attend_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    gate: Gate | None = None,
    return_lse: bool = False,
    count: bool = True,
    backend: Backend = "auto",
) -> Attended:
    """`attend` over sequences of several lengths, the rest as there.

    On the CUDA backend one launch serves all sequences, and spans that lie on the GPU are not read, for that would wait
    for it: as in flash-attn, they have to be right.

    Parameters
    ----------
    q : (total_q, Hq, D), or padded (B, Sq, Hq, D)
    k, v : (total_k, Hkv, D), or (B, Sk, Hkv, D)

    Returns
    -------
    Attended with ``out`` as q, ``lse`` fp32 (Hq, total_q) or (B, Hq, Sq), statistics (B, Hq). Padding queries have 0
    and -inf.

    Raises
    ------
    InputError
        As in `attend`; packed sequences that do not lie one after the other, see `Packing.check`.
    """
    packed = q.dim() == 3
    check_qkv(*(x[None] if packed else x for x in (q, k, v)))
    scale = check_scale(q, softmax_scale)
    if pick_backend(backend, q.device) == "reference":
        parts = [
            attend(
                *alone,
                causal=causal,
                softmax_scale=scale,
                window_size=window_size,
                softcap=softcap,
                gate=gate,
                return_lse=return_lse,
                backend="reference",
            )
            for alone in packing.alone(q, k, v)
        ]
        return Attended.joined(parts, q, packing)
    _check_screen(gate, softcap)
    _check_cuda(q, window_size, softcap, gate)
    if packed and packing.queries.device.type == packing.keys.device.type == "cpu":
        packing.check(len(q), len(k))
    here = packing.to(q.device)
    with torch.no_grad():
        out, lse, kept = cuda.attend_varlen(
            q,
            k,
            v,
            here.queries,
            here.keys,
            packing.max_seqlen_q,
            packing.max_seqlen_k,
            softmax_scale=scale,
            causal=causal,
            gate=gate.resolve_table(q.shape[-2], q.device) if gate is not None else None,
            return_lse=return_lse,
            return_stats=count,
        )
    if not packed:  # by the one that all layers share: it has read its spans once, on whatever device
        packing.fill_outside(out, 0.0)
        if lse is not None:
            packing.fill_outside(lse.transpose(1, 2), -math.inf)
    counted = SkipStats(kept, here.total(causal)[:, None].expand_as(kept)) if kept is not None else None
    return Attended(_forward_only(out, q, k, v), lse, counted)


class _ForwardOnly(torch.autograd.Function):
    """Ties an output to its inputs so that a backward pass says why there is none."""

    @staticmethod
    def forward(ctx, out, *inputs):
        return out.view_as(out)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("bsfa attention is forward only: train with the model's own attention")


def _forward_only(out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _ForwardOnly.apply(out, *inputs)
    return out


def pick_backend(backend: str, device: torch.device) -> str:
    """``reference`` or ``cuda``: what a backend's name comes to on a device.

    Raises
    ------
    InputError
        An unknown backend, or ``cuda`` on a device that is none.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    if backend == "cuda" and device.type != "cuda":
        raise InputError(f"backend 'cuda' needs tensors on a CUDA device, got {device}; move them or use 'reference'")
    if backend == "auto":
        return "cuda" if device.type == "cuda" else "reference"
    return backend


def _check_screen(gate: Gate | None, softcap: float) -> None:
    if softcap and gate is not None and gate.screen is not None:
        raise InputError(f"a gate's screen knows no soft cap (screen={gate.screen}, softcap={softcap}); leave one out")


def _check_cuda(q: torch.Tensor, window_size: tuple[int, int], softcap: float, gate: Gate | None = None) -> None:
    """What `bsfa.cuda` would refuse."""
    cuda.check(q, screen=gate is not None and gate.screen is not None)
    if tuple(window_size) != (-1, -1) or softcap:
        raise NotImplementedError(
            f"the CUDA kernels have neither sliding windows nor soft caps (window_size={tuple(window_size)}, "
            f"softcap={softcap}); use backend='reference'"
        )


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """One clear error for tensors that do not go together.

    Raises
    ------
    InputError
    """
    if not q.dim() == k.dim() == v.dim() == 4:
        raise InputError(f"q, k, v must be (batch, seqlen, heads, head size), got {_shapes(q, k, v)}")
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(f"q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them first")
    if q.dtype not in DTYPES:
        raise InputError(f"dtype {q.dtype} is not supported; use one of {', '.join(map(str, DTYPES))}")
    if not q.device == k.device == v.device:
        raise InputError(f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}; move them first")
    if k.shape != v.shape or q.shape[0] != k.shape[0]:
        raise InputError(f"k and v must have one shape and q's batch size, got {_shapes(q, k, v)}")
    if q.shape[3] != k.shape[3]:
        raise InputError(f"q, k, v must have one head size, got {_shapes(q, k, v)}")
    if k.shape[2] == 0 or q.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise InputError(f"query heads must be a multiple of KV heads, got {q.shape[2]} and {k.shape[2]}")


def _shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def check_scale(q: torch.Tensor, softmax_scale: float | None) -> float:
    """The scale to use, 1/sqrt(D) by default.

    Raises
    ------
    InputError
        A scale that is not positive and finite: a block's maximum would not be its largest score.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if not (scale > 0 and math.isfinite(scale)):
        raise InputError(f"softmax_scale must be positive and finite, got {softmax_scale}")
    return scale


def _check_blocks(blocks: BlockLists, q: torch.Tensor, grid: BlockGrid, gate: Gate | None) -> None:
    if gate is not None:
        raise InputError("a call takes a gate or block lists, not both")
    expected = (q.shape[0], q.shape[2], grid.n_q)
    if tuple(blocks.counts.shape) != expected or tuple(blocks.indices.shape[:3]) != expected:
        raise InputError(
            f"block lists must be (B, Hq, n_q) = {expected}, got counts {tuple(blocks.counts.shape)}, "
            f"indices {tuple(blocks.indices.shape)}"
        )
