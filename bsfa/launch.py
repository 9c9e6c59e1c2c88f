"""What the kernels of every GPU generation have in common on the host: the call's share of the argument, the launch.

A generation is a `Kernel`, one module each (`bsfa.launch_sm90`, `bsfa.launch_sm80`); `bsfa.cuda` picks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from bsfa import nvrtc
from bsfa.blocks import BLOCK_Q

MODES = ("all", "gate_max", "gate_lse", "maxima")  # `bsfa::Mode` of ``kernels/work.cuh``, but for lists
DTYPES = {torch.bfloat16: "bsfa::bf16", torch.float16: "bsfa::fp16"}
ORDERS = {"diagonal": 0, "sink": 1, "ascending": 2}


class TensorArgument(ctypes.Structure):
    """`bsfa::Tensor` of ``kernels/work.cuh``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
    )

    @classmethod
    def of(cls, x: Tensor) -> TensorArgument:
        """x is (B, S, H, D), or (S, H, D)."""
        strides = x.stride()
        return cls(x.data_ptr(), strides[0] if x.dim() == 4 else 0, *strides[-3:-1])


class Table(ctypes.Structure):
    """`bsfa::Table` of ``kernels/work.cuh``: fp32 (heads, query blocks)."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("head_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("rows", ctypes.c_int32),
    )

    def set(self, values: Tensor, by_position: bool) -> None:
        """Point at ``values``; ``by_position``: its columns are absolute positions, not this call's query blocks."""
        self.data = values.data_ptr()
        self.head_stride, self.row_stride = values.stride()
        self.rows = values.shape[1] if by_position else 0


class Call(ctypes.Structure):
    """`bsfa::Call` of ``kernels/work.cuh``, field by field."""

    _fields_ = (
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("kept", ctypes.c_void_p),
        ("maxima", ctypes.c_void_p),
        ("threshold", Table),
        ("relative", Table),
        ("indices", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("claimed", ctypes.c_void_p),
        ("spans_q", ctypes.c_void_p),
        ("spans_k", ctypes.c_void_p),
        ("span_step_q", ctypes.c_int32),
        ("span_step_k", ctypes.c_int32),
        ("list_width", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        ("q_heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("q_length", ctypes.c_int32),
        ("k_length", ctypes.c_int32),
        ("q_rows", ctypes.c_int32),
        ("packed", ctypes.c_int32),
        ("causal", ctypes.c_int32),
        ("keep_diagonal", ctypes.c_int32),
        ("keep_first", ctypes.c_int32),
        ("order", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("abreast", ctypes.c_int32),
    )

    def ctas(self, query_blocks: int) -> int:
        """How many compute so many query blocks each, all over one K and V."""
        shared = self.q_heads // self.kv_heads * -(-self.q_length // BLOCK_Q)  # query blocks over one K and V
        return self.batch * self.kv_heads * -(-shared // query_blocks)

    def take_turns(self, device: int, row_bytes: int) -> None:
        """Let CTAs take turns over as many K and V as L2 holds, in even groups. ``row_bytes``: a key's and value's."""
        pairs = self.batch * self.kv_heads
        held = max(1, _properties(device).L2_cache_size // (row_bytes * max(1, self.k_length)))
        groups = max(1, -(-pairs // held))
        self.abreast = -(-pairs // groups)


@dataclass(frozen=True)
class Cta:
    """What one CTA of a launch is.

    Attributes
    ----------
    threads : int
    query_blocks : int
        That it computes, of heads that share K and V.
    shared_bytes : int
        Its dynamic shared memory.
    """

    threads: int
    query_blocks: int
    shared_bytes: int


@dataclass(frozen=True, eq=False)  # one of a kind, and cheap to look up by
class Kernel:
    """The kernel of one GPU generation.

    Attributes
    ----------
    name : str
        What callers ask for it by.
    source : str
        Its file in ``kernels/``.
    serves : (major, minor) -> bool
        Whether it runs at a compute capability.
    arch : (major, minor) -> str
        What to compile it for there.
    cta : head size -> Cta
        What a CTA is there.
    readable : (shape, strides, bytes an element) -> bool
        Whether it can read a tensor, given an address that is a multiple of 16; others are copied.
    arguments : (q, k, v) -> Structure
        Its argument with the tensors described and a `Call`, zeroed, as ``call``.
    of_lists : dict of str to str
        The modes that have one of their own where blocks are listed, with its name.
    screen : (arguments, q, relative) -> None, optional
        Launches a gate's screen, see `bsfa.launch_screen`.
    """

    name: str
    source: str
    serves: Callable[[int, int], bool]
    arch: Callable[[int, int], str]
    cta: Callable[[int], Cta]
    readable: Callable[[tuple[int, ...], tuple[int, ...], int], bool]
    arguments: Callable[[Tensor, Tensor, Tensor], Any]
    of_lists: dict[str, str] = field(default_factory=dict)
    screen: Callable[[Any, Tensor, bool], None] | None = None

    @property
    def modes(self) -> tuple[str, ...]:
        """All that it is compiled for."""
        return (*MODES, *self.of_lists.values())

    def prepare(self, x: Tensor) -> Tensor:
        """x itself where the kernel can read it, else a contiguous copy."""
        if x.data_ptr() % 16 == 0 and _readable(self, x.shape, x.stride(), x.element_size()):
            return x
        return x.clone(memory_format=torch.contiguous_format)

    def launch(self, arguments: Any, q: Tensor, mode: str) -> None:
        """Put the kernel on the current stream of q's device."""
        call, device = arguments.call, q.device.index
        with torch.cuda.device(device):
            kernel, cta = _load(self, device, q.dtype, q.shape[-1], mode)
            call.take_turns(device, 2 * q.shape[-1] * q.element_size())
            grid = call.ctas(cta.query_blocks)
            if call.claimed:  # every CTA claims work until there is none
                grid = min(grid, _properties(device).multi_processor_count)
            put(kernel, device, (grid, 1, 1), cta.threads, cta.shared_bytes, arguments)


def put(
    kernel: Any, device: int, grid: tuple[int, int, int], threads: int, shared_bytes: int, argument: ctypes.Structure
) -> None:
    """Put a loaded kernel of one argument on the current stream of ``device``, which is the current one.

    Raises
    ------
    RuntimeError
        The driver refused it.
    """
    driver, _ = nvrtc.bindings()
    stream = torch._C._cuda_getCurrentRawStream(device)  # no Stream object, which takes microseconds
    pointer = ctypes.c_void_p(ctypes.addressof(argument))
    (status,) = driver.cuLaunchKernel(kernel, *grid, threads, 1, 1, shared_bytes, stream, ctypes.addressof(pointer), 0)
    if status.value != 0:
        raise RuntimeError(f"launching a kernel on device {device} failed: {status.name}")


def instantiate(dtype: torch.dtype, head_size: int, mode: str) -> str:
    """The C++ name of one instantiation, in any kernel's source."""
    return f"bsfa::attention<{DTYPES[dtype]}, {head_size}, bsfa::Mode::{mode}>"


def aligned(shape: tuple[int, ...], strides: tuple[int, ...], element: int) -> bool:
    """Whether every row of the last axis is contiguous and starts at a multiple of 16 bytes."""
    outer = zip(shape[:-1], strides[:-1], strict=True)
    return strides[-1] == 1 and all(n == 1 or s * element % 16 == 0 for n, s in outer)


@lru_cache(maxsize=4096)
def _readable(kernel: Kernel, shape: tuple[int, ...], strides: tuple[int, ...], element: int) -> bool:
    return kernel.readable(shape, strides, element)


@cache
def _properties(device: int) -> Any:
    return torch.cuda.get_device_properties(device)


@cache
def _load(kernel: Kernel, device: int, dtype: torch.dtype, head_size: int, mode: str) -> tuple[Any, Cta]:
    """A loaded kernel and the CTA of its launch."""
    arch = kernel.arch(*torch.cuda.get_device_capability(device))
    cubin = nvrtc.compile_kernel(kernel.source, instantiate(dtype, head_size, mode), arch)
    cta = kernel.cta(head_size)
    return nvrtc.load_kernel(cubin, cta.shared_bytes), cta
