"""The launch of ``kernels/screen_sm90a.cu``: keys rounded to 8-bit integers, then lists of the blocks to decide on."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bsfa import nvrtc
from bsfa.blocks import BLOCK_K
from bsfa.launch import DTYPES, Call, TensorArgument, put

SOURCE, ARCH = "screen_sm90a.cu", "sm_90a"
CONSUMERS, STAGES = 2, 6
ROUNDING_BYTES = 16  # of a key block's `bsfa::Rounding`


class Arguments(ctypes.Structure):
    """`bsfa::Arguments` of ``kernels/screen_sm90a.cu``."""

    _fields_ = (
        ("q", TensorArgument),
        ("k", TensorArgument),
        ("records", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("pairs", ctypes.c_int32),
        ("margin", ctypes.c_float),
        ("call", Call),
    )


def arguments(q: Tensor, k: Tensor, margin: float, indices: Tensor, counts: Tensor) -> Arguments:
    a = Arguments(q=TensorArgument.of(q), k=TensorArgument.of(k), margin=margin)
    a.indices, a.counts, a.call.list_width = indices.data_ptr(), counts.data_ptr(), indices.shape[-1]
    return a


def launch(a: Arguments, q: Tensor, relative: bool) -> None:
    """Put both kernels on the current stream of q's device. ``relative``: the gate has a cut against running maxima."""
    call, device, size = a.call, q.device, q.shape[-1]
    a.pairs = -(-call.k_length // (2 * BLOCK_K))
    record = 2 * (BLOCK_K * size + ROUNDING_BYTES)
    call.take_turns(device.index, size)  # a byte a column, no values
    records = torch.empty(call.batch * call.kv_heads * a.pairs * record, dtype=torch.int8, device=device)
    a.records = records.data_ptr()
    shared_bytes = STAGES * (2 * BLOCK_K * size + 1024) + 1024  # the records; the rest
    with torch.cuda.device(device):
        rounding = _load(device.index, instantiate(q.dtype, size), 0)
        put(rounding, device.index, (2 * a.pairs, call.kv_heads, call.batch), 128, 0, a)
        screen = _load(device.index, instantiate(q.dtype, size, relative), shared_bytes)
        put(screen, device.index, (call.ctas(CONSUMERS), 1, 1), 128 * (1 + CONSUMERS), shared_bytes, a)


def instantiate(dtype: torch.dtype, size: int, relative: bool | None = None) -> str:
    """The C++ name of a gate's screen, with cuts against running maxima or without; None: of the rounding of keys."""
    if relative is None:
        return f"bsfa::quantize<{DTYPES[dtype]}, {size}>"
    return f"bsfa::screen<{DTYPES[dtype]}, {size}, {str(relative).lower()}>"


@cache
def _load(device: int, instantiation: str, shared_bytes: int) -> Any:
    """A kernel loaded on a device, the current one."""
    return nvrtc.load_kernel(nvrtc.compile_kernel(SOURCE, instantiation, ARCH), shared_bytes)
