"""The CUDA backend: `kernels/` behind torch custom ops.

Three calls: `attend` (dense, gated or by index lists), `attend_varlen` (packed or padded sequences), `block_maxima`
(for calibration); a gate's screen, where it has one, runs before the first two. All of them run on the current stream
of the tensors' device, never wait for the GPU, and may be traced by ``torch.compile`` or captured in a CUDA graph
(after a first call, which compiles and loads the kernel).

`KERNELS` lists the kernels, the better ones first; a call takes the first that serves its device, or the one it names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bsfa import launch_screen, nvrtc
from bsfa.blocks import BLOCK_K, BLOCK_Q, BlockLists
from bsfa.errors import InputError
from bsfa.gates import ResolvedGate
from bsfa.launch import DTYPES, ORDERS, Kernel
from bsfa.launch_sm80 import SM80
from bsfa.launch_sm90 import SM90A

KERNELS = {kernel.name: kernel for kernel in (SM90A, SM80)}
HEAD_SIZES = (64, 128)


def check(q: Tensor, kernel: str | None = None, screen: bool = False) -> None:
    """One clear error where this backend, or one kernel of it, cannot serve a tensor like ``q``, or a gate's screen.

    Raises
    ------
    InputError
        Not on a CUDA device, an unsupported GPU, head size or dtype, or NVRTC or cuda-bindings missing.
    """
    if q.device.type != "cuda":
        raise InputError(f"backend 'cuda' needs tensors on a CUDA device, got {q.device}; move them or use 'reference'")
    (_pick_screen if screen else _pick)(q.device, kernel)
    if q.dtype not in DTYPES:
        raise InputError(f"backend 'cuda' serves bfloat16 and float16, got {q.dtype}; cast or use 'reference'")
    if q.shape[-1] not in HEAD_SIZES:
        sizes = " and ".join(map(str, HEAD_SIZES))
        raise InputError(f"backend 'cuda' serves head sizes {sizes}, got {q.shape[-1]}; use 'reference'")
    nvrtc.bindings()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    gate: ResolvedGate | None = None,
    block_lists: BlockLists | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Block-sparse attention.

    Parameters
    ----------
    q : bf16 or fp16 (B, Sq, Hq, D)
    k, v : (B, Sk, Hkv, D)
        Any strides over the last axis' contiguous one, in multiples of 16 bytes; others are copied.
    gate : ResolvedGate, optional
        With one threshold (and relative cut) a head and query block of this call, fp32 (Hq, n_q). One with a
        ``screen`` makes block lists of its own.
    block_lists : BlockLists, optional
        Visit these blocks instead of every visible one, without a gate.
    kernel : str, optional
        One of `KERNELS` by name, for tests and benchmarks; by default the best for the device.

    Returns
    -------
    out : (B, Sq, Hq, D), contiguous
    lse : fp32 (B, Hq, Sq), or None
    kept : int64 (B, Hq), the blocks kept, or None
    """
    where = (None, None, q.shape[1], k.shape[1])
    return _attend(q, k, v, where, gate, block_lists, softmax_scale, causal, return_lse, return_stats, kernel)


def attend_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans_q: Tensor,
    spans_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    gate: ResolvedGate | None = None,
    block_lists: BlockLists | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`attend` over sequences of several lengths.

    Parameters
    ----------
    q : (total_q, Hq, D), all sequences in it, or (B, Sq, Hq, D), one in each
    k, v : (total_k, Hkv, D), or (B, Sk, Hkv, D)
    spans_q, spans_k : int32 (B, 2)
        A sequence's first row and its end.
    gate : ResolvedGate, optional
        Its ``threshold`` and ``relative`` are whole tables, fp32 (Hq, n): each sequence reads them by absolute
        position, clamped to the last column.
    block_lists : BlockLists, optional
        (B, Hq, ceil(max_seqlen_q / 128), width).

    Returns
    -------
    out : as q, contiguous; rows outside of the spans are not written
    lse : fp32 (Hq, total_q), or (B, Hq, Sq), or None
    kept : int64 (B, Hq), or None
    """
    where = (spans_q, spans_k, max_seqlen_q, max_seqlen_k)
    return _attend(q, k, v, where, gate, block_lists, softmax_scale, causal, return_lse, return_stats, kernel)


def block_maxima(q: Tensor, k: Tensor, *, softmax_scale: float, causal: bool, kernel: str | None = None) -> Tensor:
    """The largest visible scaled score of every block: fp32 (B, Hq, n_q, n_k), -inf where nothing is visible.

    Parameters
    ----------
    q : bf16 or fp16 (B, Sq, Hq, D)
    k : (B, Sk, Hkv, D)
    """
    return torch.ops.bsfa.block_maxima.default(q, k, softmax_scale, causal, kernel)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: tuple[Tensor | None, Tensor | None, int, int],
    gate: ResolvedGate | None,
    block_lists: BlockLists | None,
    softmax_scale: float,
    causal: bool,
    return_lse: bool,
    return_stats: bool,
    kernel: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The ops, with None for what was not asked for. ``where``: the spans, if any, and the longest sequences."""
    if gate is not None and block_lists is not None:
        raise InputError("a call takes a gate or block lists, not both")
    if gate is not None and gate.screen is not None:
        threshold, relative, order, _, keep_diagonal, keep_first = _gate_arguments(gate)
        cuts = (threshold, relative, order, keep_diagonal, keep_first, gate.screen)
        block_lists = BlockLists(*torch.ops.bsfa.screen.default(q, k, *where, *cuts, softmax_scale, causal, kernel))
    out, *extras = torch.ops.bsfa.attention.default(
        q,
        k,
        v,
        *where,
        *_gate_arguments(gate),
        block_lists.indices if block_lists else None,
        block_lists.counts if block_lists else None,
        softmax_scale,
        causal,
        return_lse,
        return_stats,
        kernel,
    )
    lse = extras.pop(0) if return_lse else None
    return out, lse, extras.pop(0) if return_stats else None


def _gate_arguments(gate: ResolvedGate | None) -> tuple[Tensor | None, Tensor | None, int, bool, bool, bool]:
    if gate is None:
        return None, None, 0, False, False, False
    lse = gate.relative is not None and gate.relative_to == "lse"
    return gate.threshold, gate.relative, ORDERS[gate.order], lse, gate.keep_diagonal, gate.keep_first


# ---- the ops ---------------------------------------------------------------------------------------------------


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans_q: Tensor | None,
    spans_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    threshold: Tensor | None,
    relative: Tensor | None,
    order: int,
    relative_to_lse: bool,
    keep_diagonal: bool,
    keep_first: bool,
    indices: Tensor | None,
    counts: Tensor | None,
    softmax_scale: float,
    causal: bool,
    return_lse: bool,
    return_stats: bool,
    kernel: str | None,
) -> list[Tensor]:
    """out, and those of lse and kept that were asked for: a tensor nobody looks at costs microseconds too."""
    outputs = _outputs(q, spans_q, return_lse, return_stats)
    out, lse, kept = outputs[0], outputs[1] if return_lse else None, outputs[-1] if return_stats else None
    if out.numel() == 0:
        return outputs
    if k.numel() == 0 or (indices is not None and indices.shape[-1] == 0):  # there is nothing to attend to
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
        return outputs
    picked = _pick(q.device, kernel)
    q, k, v = picked.prepare(q), picked.prepare(k), picked.prepare(v)
    arguments = picked.arguments(q, k, v)
    a = _describe(arguments, q, k, softmax_scale, causal, max_seqlen_q, max_seqlen_k)
    a.out = out.data_ptr()
    a.lse = lse.data_ptr() if lse is not None else None
    a.kept = kept.data_ptr() if kept is not None else None
    spans = _spans(a, spans_q, spans_k)  # which the kernel reads: not to be freed before it is launched
    mode = "all"
    if threshold is not None:
        mode = "gate_lse" if relative_to_lse else "gate_max"
        _cuts(a, threshold, relative, by_position=bool(spans))
        a.order, a.keep_diagonal, a.keep_first = order, keep_diagonal, keep_first
    if indices is not None and counts is not None:
        indices, counts = _int32(indices), _int32(counts)
        a.indices, a.counts, a.list_width = indices.data_ptr(), counts.data_ptr(), indices.shape[-1]
        if mode in picked.of_lists:
            mode = picked.of_lists[mode]
            claimed = q.new_zeros(1, dtype=torch.int32)  # which lives until the kernel is launched, as the spans
            a.claimed = claimed.data_ptr()
    picked.launch(arguments, q, mode)
    return outputs


def _attention_fake(q, k, v, spans_q, spans_k, max_seqlen_q, max_seqlen_k, *options):
    return _outputs(q, spans_q, *options[-3:-1])


def _screen(
    q: Tensor,
    k: Tensor,
    spans_q: Tensor | None,
    spans_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    threshold: Tensor,
    relative: Tensor | None,
    order: int,
    keep_diagonal: bool,
    keep_first: bool,
    screen: float,
    softmax_scale: float,
    causal: bool,
    kernel: str | None,
) -> list[Tensor]:
    """`BlockLists` of the blocks on which a gate has to decide by exact scores: indices and counts."""
    lists = _screen_outputs(q, spans_q, max_seqlen_q, max_seqlen_k)
    if not (q.numel() and k.numel() and lists[0].numel()):
        lists[1].zero_()
        return lists
    picked, launch = _pick_screen(q.device, kernel)
    q, k = picked.prepare(q), picked.prepare(k)
    arguments = launch_screen.arguments(q, k, screen, *lists)
    a = _describe(arguments, q, k, softmax_scale, causal, max_seqlen_q, max_seqlen_k)
    spans = _spans(a, spans_q, spans_k)
    _cuts(a, threshold, relative, by_position=bool(spans))
    a.order, a.keep_diagonal, a.keep_first = order, keep_diagonal, keep_first
    launch(arguments, q, relative is not None)
    return lists


def _screen_fake(q, k, spans_q, spans_k, max_seqlen_q, max_seqlen_k, *options):
    return _screen_outputs(q, spans_q, max_seqlen_q, max_seqlen_k)


def _block_maxima(q: Tensor, k: Tensor, softmax_scale: float, causal: bool, kernel: str | None) -> Tensor:
    maxima = _maxima_output(q, k).fill_(-math.inf)
    if q.numel() and k.numel():
        picked = _pick(q.device, kernel)
        q, k = picked.prepare(q), picked.prepare(k)
        arguments = picked.arguments(q, k, k)
        a = _describe(arguments, q, k, softmax_scale, causal, q.shape[1], k.shape[1])
        a.maxima = maxima.data_ptr()
        picked.launch(arguments, q, "maxima")
    return maxima


def _block_maxima_fake(q, k, softmax_scale, causal, kernel):
    return _maxima_output(q, k)


# Registered by hand: what torch.library.custom_op wraps around a call costs more than the launch.
_LIBRARY = torch.library.Library("bsfa", "DEF")
for _name, _run, _fake in (
    ("attention", _attention, _attention_fake),
    ("screen", _screen, _screen_fake),
    ("block_maxima", _block_maxima, _block_maxima_fake),
):
    _LIBRARY.define(_name + torch.library.infer_schema(_run, mutates_args=()))
    _LIBRARY.impl(_name, _run, "CUDA")
    torch.library.register_fake(f"bsfa::{_name}", _fake, lib=_LIBRARY)


def _outputs(q: Tensor, spans_q: Tensor | None, return_lse: bool, return_stats: bool) -> list[Tensor]:
    *planes, rows, heads, _ = q.shape
    outputs = [q.new_empty(q.shape)]
    if return_lse:
        outputs.append(q.new_empty((*planes, heads, rows), dtype=torch.float32))
    if return_stats:
        batch = q.shape[0] if spans_q is None else spans_q.shape[0]
        outputs.append(q.new_zeros((batch, heads), dtype=torch.int64))
    return outputs


def _screen_outputs(q: Tensor, spans_q: Tensor | None, q_length: int, k_length: int) -> list[Tensor]:
    rows = q.shape[0] if spans_q is None else spans_q.shape[0], q.shape[-2], -(-q_length // BLOCK_Q)
    return [
        torch.empty((*rows, -(-k_length // BLOCK_K)), dtype=torch.int32, device=q.device),
        torch.empty(rows, dtype=torch.int32, device=q.device),
    ]


def _maxima_output(q: Tensor, k: Tensor) -> Tensor:
    shape = (q.shape[0], q.shape[2], -(-q.shape[1] // BLOCK_Q), -(-k.shape[1] // BLOCK_K))
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _describe(
    arguments: Any, q: Tensor, k: Tensor, softmax_scale: float, causal: bool, q_length: int, k_length: int
) -> Any:
    """The `Call` of a kernel's argument, with what every call says."""
    a = arguments.call
    a.batch, a.q_heads, a.kv_heads = q.shape[0], q.shape[-2], k.shape[-2]
    a.q_length, a.k_length = q_length, k_length
    a.q_rows, a.packed = q.shape[-3], q.dim() == 3
    a.causal, a.scale = causal, softmax_scale
    return a


def _spans(a: Any, spans_q: Tensor | None, spans_k: Tensor | None) -> tuple[Tensor, ...]:
    """Point at the spans, if there are any. What is returned has to live until the kernel is launched."""
    if spans_q is None or spans_k is None:
        return ()
    spans_q, spans_k = spans_q.to(torch.int32), spans_k.to(torch.int32)  # cumulative lengths: overlapping pairs
    a.spans_q, a.spans_k = spans_q.data_ptr(), spans_k.data_ptr()
    a.span_step_q, a.span_step_k = spans_q.stride(0), spans_k.stride(0)
    a.batch = spans_q.shape[0]
    return spans_q, spans_k


def _cuts(a: Any, threshold: Tensor, relative: Tensor | None, by_position: bool) -> None:
    a.threshold.set(threshold, by_position)
    if relative is not None:
        a.relative.set(relative, by_position)


def _int32(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()


@cache
def _pick(device: torch.device, name: str | None) -> Kernel:
    """The kernel for a device: the named one, or the first that serves it.

    Raises
    ------
    InputError
        No such kernel, or none for the device.
    """
    if name is not None and name not in KERNELS:
        raise InputError(f"kernel {name!r} is none of {', '.join(KERNELS)}")
    capability = torch.cuda.get_device_capability(device)
    for kernel in KERNELS.values():
        if name in (None, kernel.name) and kernel.serves(*capability):
            return kernel
    asked = f"kernel {name!r} does not serve" if name else "backend 'cuda' needs compute capability 8.0 or newer, not"
    major, minor = capability
    raise InputError(f"{asked} {torch.cuda.get_device_name(device)} ({major}.{minor}); use 'reference'")


def _pick_screen(device: torch.device, name: str | None) -> tuple[Kernel, Callable[[Any, Tensor, bool], None]]:
    """`_pick`, and the launch of its screen.

    Raises
    ------
    InputError
        As there; it has none.
    """
    picked = _pick(device, name)
    if picked.screen is None:
        raise InputError(
            f"a gate's screen runs on compute capability 9.0 alone, not on {torch.cuda.get_device_name(device)} with "
            f"kernel {picked.name}; leave screen out, or use 'reference'"
        )
    return picked, picked.screen
