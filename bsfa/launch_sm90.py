"""The launch of ``kernels/attention_sm90a.cu``: tensor maps for Hopper's copy engine."""

from __future__ import annotations

import ctypes
import struct
from functools import lru_cache

import torch
from torch import Tensor

from bsfa import launch_screen, nvrtc
from bsfa.blocks import BLOCK_K, BLOCK_Q
from bsfa.launch import Call, Cta, Kernel, aligned

PANEL = 64  # columns of a 128-byte-swizzled panel


class Arguments(ctypes.Structure):
    """`bsfa::Arguments` of ``kernels/attention_sm90a.cu``, whose fields after the maps are those of `Call`."""

    _fields_ = (
        ("q", ctypes.c_uint64 * 16),
        ("k", ctypes.c_uint64 * 16),
        ("v", ctypes.c_uint64 * 16),
        ("call", Call),
        ("padding", ctypes.c_int32 * 4),  # to the struct's alignment of 64
    )


def arguments(q: Tensor, k: Tensor, v: Tensor) -> Arguments:
    a = Arguments()
    maps = _tensor_maps(_view(q), _view(k), _view(v))
    ctypes.memmove(ctypes.addressof(a), maps, len(maps))  # q, k, v come first
    return a


def cta(head_size: int) -> Cta:
    """A query block for each of `bsfa::consumers`. Shared memory is `bsfa::Layout<D>`: Q and two blocks of V for each,
    six blocks of K, and 1 KiB for the rest."""
    consumers = 3 if head_size == 64 else 2
    rows = consumers * (128 + 2 * 64) + 6 * 64
    return Cta(threads=128 * (1 + consumers), query_blocks=consumers, shared_bytes=2 * head_size * rows + 1024)


def readable(shape: tuple[int, ...], strides: tuple[int, ...], element: int) -> bool:
    """What a tensor map can describe."""
    return aligned(shape, strides, element) and all(n == 1 or s > 0 for n, s in zip(shape, strides, strict=True))


View = tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]


def _view(x: Tensor) -> View:
    """Pointer, dtype, shape and strides: all that a tensor map depends on."""
    return x.data_ptr(), x.dtype, x.shape, x.stride()


@lru_cache(maxsize=4096)
def _tensor_maps(q: View, k: View, v: View) -> bytes:
    """The maps at the head of `Arguments`. A pure function, so that a pointer seen before costs a look-up."""
    return b"".join(_tensor_map(*box) for box in ((q, BLOCK_Q), (k, BLOCK_K), (v, BLOCK_K)))


def _tensor_map(view: View, rows: int) -> bytes:
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
        [driver.cuuint32_t(n) for n in (PANEL, rows, size // PANEL, 1, 1)],
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


SM90A = Kernel(
    name="sm90a",
    source="attention_sm90a.cu",
    serves=lambda major, minor: major == 9,
    arch=lambda major, minor: "sm_90a",
    cta=cta,
    readable=readable,
    arguments=arguments,
    of_lists={"all": "lists", "gate_max": "lists_max"},
    screen=launch_screen.launch,
)
