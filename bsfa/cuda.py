"""The CUDA backend: `kernels/` behind torch custom ops.

Three calls: `attend` (dense, gated or by index lists), `attend_varlen` (packed sequences), `block_maxima` (for
calibration). All of them run on the current stream of the tensors' device, never wait for the GPU, and may be traced
by ``torch.compile`` or captured in a CUDA graph (after a first call, which compiles and loads the kernel).
"""

from __future__ import annotations

import ctypes
import math
import struct
from functools import cache, lru_cache

import torch
from torch import Tensor

from bsfa import nvrtc
from bsfa.blocks import BLOCK_K, BLOCK_Q, BlockLists
from bsfa.errors import InputError
from bsfa.gates import ResolvedGate

HEAD_SIZES = (64, 128)
DTYPES = {torch.bfloat16: "bsfa::bf16", torch.float16: "bsfa::fp16"}
ORDERS = {"diagonal": 0, "sink": 1, "ascending": 2}
MODES = ("all", "gate_max", "gate_lse", "maxima")
THREADS = 384
PANEL = 64  # columns of a 128-byte-swizzled panel


class Arguments(ctypes.Structure):
    """`bsfa::Arguments` of ``kernels/attention_sm90a.cu``, field by field."""

    _fields_ = (
        ("q", ctypes.c_uint64 * 16),
        ("k_step", ctypes.c_uint64 * 16),
        ("k_block", ctypes.c_uint64 * 16),
        ("v", ctypes.c_uint64 * 16),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("kept", ctypes.c_void_p),
        ("maxima", ctypes.c_void_p),
        ("threshold", ctypes.c_void_p),
        ("relative", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("cu_q", ctypes.c_void_p),
        ("cu_k", ctypes.c_void_p),
        ("threshold_head_stride", ctypes.c_int64),
        ("threshold_row_stride", ctypes.c_int64),
        ("threshold_rows", ctypes.c_int32),
        ("list_width", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        ("q_heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("q_length", ctypes.c_int32),
        ("k_length", ctypes.c_int32),
        ("total_q", ctypes.c_int32),
        ("causal", ctypes.c_int32),
        ("keep_diagonal", ctypes.c_int32),
        ("keep_first", ctypes.c_int32),
        ("order", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("padding", ctypes.c_int32 * 11),  # to the struct's alignment of 64
    )


def check(q: Tensor) -> None:
    """One clear error where this backend cannot serve a tensor like ``q``.

    Raises
    ------
    InputError
        Not on a CUDA device, an unsupported GPU, head size or dtype, or NVRTC or cuda-bindings missing.
    """
    if q.device.type != "cuda":
        raise InputError(f"backend 'cuda' needs tensors on a CUDA device, got {q.device}; move them or use 'reference'")
    _arch(q.device)
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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Block-sparse attention.

    Parameters
    ----------
    q : bf16 or fp16 (B, Sq, Hq, D)
    k, v : (B, Sk, Hkv, D)
        Any strides over the last axis' contiguous one, in multiples of 16 bytes; others are copied.
    gate : ResolvedGate, optional
        With one threshold a head and query block of this call, fp32 (Hq, n_q).
    block_lists : BlockLists, optional
        Visit these blocks instead of every visible one, without a gate.

    Returns
    -------
    out : (B, Sq, Hq, D), contiguous
    lse : fp32 (B, Hq, Sq), or None
    kept : int64 (B, Hq), the blocks kept, or None
    """
    lengths = (None, None, q.shape[1], k.shape[1])
    return _attend(q, k, v, lengths, gate, block_lists, softmax_scale, causal, return_lse, return_stats)


def attend_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    gate: ResolvedGate | None = None,
    block_lists: BlockLists | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`attend` over packed sequences.

    Parameters
    ----------
    q : (total_q, Hq, D)
    k, v : (total_k, Hkv, D)
    cu_seqlens_q, cu_seqlens_k : int32 (B + 1,)
    gate : ResolvedGate, optional
        Its ``threshold`` is the whole table, fp32 (Hq, n): each sequence reads it by absolute position, clamped to
        the last column.
    block_lists : BlockLists, optional
        (B, Hq, ceil(max_seqlen_q / 128), width).

    Returns
    -------
    out : (total_q, Hq, D), contiguous
    lse : fp32 (Hq, total_q), or None
    kept : int64 (B, Hq), or None
    """
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _attend(q, k, v, lengths, gate, block_lists, softmax_scale, causal, return_lse, return_stats)


def block_maxima(q: Tensor, k: Tensor, *, softmax_scale: float, causal: bool) -> Tensor:
    """The largest visible scaled score of every block: fp32 (B, Hq, n_q, n_k), -inf where nothing is visible.

    Parameters
    ----------
    q : bf16 or fp16 (B, Sq, Hq, D)
    k : (B, Sk, Hkv, D)
    """
    return torch.ops.bsfa.block_maxima(q, k, softmax_scale, causal)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[Tensor | None, Tensor | None, int, int],
    gate: ResolvedGate | None,
    block_lists: BlockLists | None,
    softmax_scale: float,
    causal: bool,
    return_lse: bool,
    return_stats: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The op, with None for what was not asked for. ``lengths``: cumulative ones where packed, and the longest."""
    out, lse, kept = torch.ops.bsfa.attention(
        q,
        k,
        v,
        *lengths,
        *_gate_arguments(gate),
        block_lists.indices if block_lists else None,
        block_lists.counts if block_lists else None,
        softmax_scale,
        causal,
        return_lse,
        return_stats,
    )
    return out, lse if return_lse else None, kept if return_stats else None


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
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, kept = _outputs(q, cu_seqlens_q, return_lse, return_stats)
    if out.numel() == 0:
        return out, lse, kept
    if k.numel() == 0:
        return out.zero_(), lse.fill_(-math.inf), kept
    q, k, v = _tileable(q), _tileable(k), _tileable(v)
    a = _arguments(q, k, v, softmax_scale, causal, max_seqlen_q, max_seqlen_k)
    a.out = out.data_ptr()
    a.lse = lse.data_ptr() if return_lse else None
    a.kept = kept.data_ptr() if return_stats else None
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        cu_seqlens_q, cu_seqlens_k = _int32(cu_seqlens_q), _int32(cu_seqlens_k)
        a.cu_q, a.cu_k = cu_seqlens_q.data_ptr(), cu_seqlens_k.data_ptr()
        a.batch, a.total_q = cu_seqlens_q.shape[0] - 1, q.shape[0]
    mode = "all"
    if threshold is not None:
        mode = "gate_lse" if relative_to_lse else "gate_max"
        a.threshold = threshold.data_ptr()
        a.threshold_head_stride, a.threshold_row_stride = threshold.stride()
        a.threshold_rows = threshold.shape[1] if cu_seqlens_q is not None else 0
        a.relative = relative.data_ptr() if relative is not None else None
        a.order, a.keep_diagonal, a.keep_first = order, keep_diagonal, keep_first
    if indices is not None and counts is not None:
        indices, counts = _int32(indices), _int32(counts)
        a.indices, a.counts, a.list_width = indices.data_ptr(), counts.data_ptr(), indices.shape[-1]
    _launch(a, q, mode)
    return out, lse, kept


def _attention_fake(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options):
    return _outputs(q, cu_seqlens_q, *options[-2:])


def _block_maxima(q: Tensor, k: Tensor, softmax_scale: float, causal: bool) -> Tensor:
    maxima = _maxima_output(q, k).fill_(-math.inf)
    if q.numel() and k.numel():
        q, k = _tileable(q), _tileable(k)
        a = _arguments(q, k, k, softmax_scale, causal, q.shape[1], k.shape[1])
        a.maxima = maxima.data_ptr()
        _launch(a, q, "maxima")
    return maxima


def _block_maxima_fake(q, k, softmax_scale, causal):
    return _maxima_output(q, k)


# Registered by hand: what torch.library.custom_op wraps around a call costs more than the launch.
_LIBRARY = torch.library.Library("bsfa", "DEF")
for _name, _run, _fake in (
    ("attention", _attention, _attention_fake),
    ("block_maxima", _block_maxima, _block_maxima_fake),
):
    _LIBRARY.define(_name + torch.library.infer_schema(_run, mutates_args=()))
    _LIBRARY.impl(_name, _run, "CUDA")
    torch.library.register_fake(f"bsfa::{_name}", _fake, lib=_LIBRARY)


def _outputs(
    q: Tensor, cu_seqlens_q: Tensor | None, return_lse: bool, return_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, kept; the last two empty where nobody asked."""
    heads = q.shape[-2]
    batch: int
    lse_shape: tuple[int, ...]
    if cu_seqlens_q is None:
        batch, lse_shape = q.shape[0], (q.shape[0], heads, q.shape[1])
    else:
        batch, lse_shape = cu_seqlens_q.shape[0] - 1, (heads, q.shape[0])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(lse_shape if return_lse else (0,), dtype=torch.float32, device=q.device)
    kept = torch.zeros((batch, heads) if return_stats else (0,), dtype=torch.int64, device=q.device)
    return out, lse, kept


def _maxima_output(q: Tensor, k: Tensor) -> Tensor:
    shape = (q.shape[0], q.shape[2], -(-q.shape[1] // BLOCK_Q), -(-k.shape[1] // BLOCK_K))
    return torch.empty(shape, dtype=torch.float32, device=q.device)


# ---- the launch ------------------------------------------------------------------------------------------------


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, q_length: int, k_length: int
) -> Arguments:
    a = Arguments()
    maps = _tensor_maps(_view(q), _view(k), _view(v))
    ctypes.memmove(ctypes.addressof(a), maps, len(maps))  # q, k_step, k_block, v come first
    a.batch, a.q_heads, a.kv_heads = q.shape[0], q.shape[-2], k.shape[-2]
    a.q_length, a.k_length = q_length, k_length
    a.causal, a.scale = causal, softmax_scale
    return a


def _launch(a: Arguments, q: Tensor, mode: str) -> None:
    driver, _ = nvrtc.bindings()
    with torch.cuda.device(q.device):
        kernel, shared_bytes = _kernel(q.device, q.dtype, q.shape[-1], mode)
        pointer = ctypes.c_void_p(ctypes.addressof(a))
        grid = a.batch * a.q_heads * -(-a.q_length // BLOCK_Q)
        stream = torch.cuda.current_stream(q.device).cuda_stream
        (status,) = driver.cuLaunchKernel(
            kernel, grid, 1, 1, THREADS, 1, 1, shared_bytes, stream, ctypes.addressof(pointer), 0
        )
    if status.value != 0:
        raise RuntimeError(f"launching the attention kernel failed: {status.name}")


@cache
def _kernel(device: torch.device, dtype: torch.dtype, head_size: int, mode: str):
    """A loaded kernel and the dynamic shared memory of its launch."""
    shared_bytes = _shared_bytes(head_size)
    instantiation = instantiate(dtype, head_size, mode)
    return nvrtc.load_kernel(
        nvrtc.compile_kernel("attention_sm90a.cu", instantiation, _arch(device)), shared_bytes
    ), shared_bytes


def instantiate(dtype: torch.dtype, head_size: int, mode: str) -> str:
    """The C++ name of one kernel."""
    return f"bsfa::attention<{DTYPES[dtype]}, {head_size}, bsfa::Mode::{mode}>"


def _shared_bytes(head_size: int) -> int:
    """`bsfa::Layout<D>`: Q, four steps of K, four blocks of V, a KiB for the rest, and one to align the start."""
    return 2 * head_size * (128 + 4 * 128 + 4 * 64) + 1024 + 1024


@cache
def _arch(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        name = torch.cuda.get_device_name(device)
        raise InputError(f"backend 'cuda' serves compute capability 9.0, {name} has {major}.{minor}; use 'reference'")
    return "sm_90a"


def _int32(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()


def _tileable(x: Tensor) -> Tensor:
    """x itself where the copy engine can read it, else a contiguous copy."""
    return x if x.data_ptr() % 16 == 0 and _tiles(x.shape, x.stride(), x.element_size()) else x.contiguous()


@lru_cache(maxsize=4096)
def _tiles(shape: tuple[int, ...], strides: tuple[int, ...], element: int) -> bool:
    outer = zip(shape[:-1], strides[:-1], strict=True)
    return strides[-1] == 1 and all(n == 1 or (s > 0 and s * element % 16 == 0) for n, s in outer)


View = tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]


def _view(x: Tensor) -> View:
    """Pointer, dtype, shape and strides: all that a tensor map depends on."""
    return x.data_ptr(), x.dtype, x.shape, x.stride()


@lru_cache(maxsize=4096)
def _tensor_maps(q: View, k: View, v: View) -> bytes:
    """The four maps at the head of `Arguments`. A pure function, so that a pointer seen before costs a look-up."""
    panels = q[2][-1] // PANEL
    boxes = ((q, BLOCK_Q, panels), (k, 2 * BLOCK_K, panels), (k, BLOCK_K, 1), (v, BLOCK_K, panels))
    return b"".join(_tensor_map(*box) for box in boxes)


def _tensor_map(view: View, rows: int, panels: int) -> bytes:
    """A tensor map over (B, S, H, D) or (S, H, D): axes of 64 columns, rows, panels, heads, batch; 128-byte swizzle."""
    pointer, dtype, shape, strides = view
    batch, batch_stride = (shape[0], strides[0]) if len(shape) == 4 else (1, 0)
    (length, heads, size), (row_stride, head_stride, _) = shape[-3:], strides[-3:]
    sizes = (PANEL, length, size // PANEL, heads, batch)
    # The stride of an axis of one element is never used; any valid one will do.
    byte_strides = [
        stride * dtype.itemsize if n > 1 else 16
        for n, stride in zip(sizes[1:], (row_stride, PANEL, head_stride, batch_stride), strict=True)
    ]
    driver, _ = nvrtc.bindings()
    types = driver.CUtensorMapDataType
    element = {
        torch.bfloat16: types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.float16: types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    }
    status, tensor_map = driver.cuTensorMapEncodeTiled(
        element[dtype],
        len(sizes),
        pointer,
        [driver.cuuint64_t(n) for n in sizes],
        [driver.cuuint64_t(n) for n in byte_strides],
        [driver.cuuint32_t(n) for n in (PANEL, rows, panels, 1, 1)],
        [driver.cuuint32_t(1)] * len(sizes),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status.value != 0:
        raise RuntimeError(
            f"encoding a tensor map failed: {status.name}; sizes {sizes}, strides in bytes {byte_strides}"
        )
    return struct.pack("16Q", *(int(word) for word in tensor_map.opaque))
