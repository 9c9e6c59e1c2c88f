"""The launch of ``kernels/attention_sm80.cu``: plain pointers and strides, for compute capability 8.0 and up."""

from __future__ import annotations

import ctypes

from torch import Tensor

from bsfa.launch import Call, Cta, Kernel, TensorArgument, aligned


class Arguments(ctypes.Structure):
    """`bsfa::Arguments` of ``kernels/attention_sm80.cu``."""

    _fields_ = (("q", TensorArgument), ("k", TensorArgument), ("v", TensorArgument), ("call", Call))


def arguments(q: Tensor, k: Tensor, v: Tensor) -> Arguments:
    return Arguments(TensorArgument.of(q), TensorArgument.of(k), TensorArgument.of(v))


def cta(head_size: int) -> Cta:
    """Shared memory is `bsfa::Layout<D>`: Q, two blocks of K and one of V, and the rest."""
    return Cta(threads=128, query_blocks=1, shared_bytes=2 * head_size * (128 + 2 * 64 + 64) + 944)


SM80 = Kernel(
    name="sm80",
    source="attention_sm80.cu",
    serves=lambda major, minor: major >= 8,
    arch=lambda major, minor: f"sm_{major}{minor}",
    cta=cta,
    readable=aligned,  # it reads 16 bytes at a time
    arguments=arguments,
)
