"""Dense attention from its authors' own packages: what a speed-up has to be held against.

`upstream_flash_attn` is FlashAttention-2 (flash-attn), `upstream_fa3` FlashAttention-3 for Hopper (fa3-fwd),
`upstream_flex` PyTorch's FlexAttention with a block mask, `upstream_cudnn` cuDNN through PyTorch's SDPA. A package
that is not installed, or a GPU that is not there, is one clear line when the method is bound to a model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bsfa.attention import Attended, SkipStats
from bsfa.blocks import BlockGrid
from bsfa.errors import InputError
from bsfa.methods.base import Attend, Call, Method
from bsfa.methods.sdpa import sdpa
from bsfa.model import ModelInfo


@dataclass(frozen=True)
class Upstream(Method):
    """A dense kernel of others: every visible block is kept."""

    def bind(self, model: ModelInfo) -> Attend:
        kernel = self.load(model)

        def attend(call: Call) -> Attended:
            total = torch.full((call.q.shape[0], call.q.shape[2]), call.grid.total(), device=call.q.device)
            return Attended(kernel(call), None, SkipStats(total, total))

        return attend

    @abstractmethod
    def load(self, model: ModelInfo) -> Callable[[Call], torch.Tensor]:
        """The kernel: a call -> its output (B, Sq, Hq, D).

        Raises
        ------
        InputError
            It cannot run here.
        """


def package(method: str, module: str, install: str) -> Any:
    """A module of someone else's package.

    Raises
    ------
    InputError
        It is not installed, or does not load.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(f"method={method} needs the module {module} ({error}): pip install {install}") from error


@dataclass(frozen=True)
class FlashAttn2(Upstream):
    """https://github.com/Dao-AILab/flash-attention, ``flash_attn.flash_attn_func``: fp16 and bf16."""

    name: ClassVar[str] = "upstream_flash_attn"

    def load(self, model: ModelInfo) -> Callable[[Call], torch.Tensor]:
        return flash(package(self.name, "flash_attn", "flash-attn").flash_attn_func)


@dataclass(frozen=True)
class FlashAttn3(Upstream):
    """https://pypi.org/project/fa3-fwd, ``fa3_fwd_interface.flash_attn_func``: Hopper."""

    name: ClassVar[str] = "upstream_fa3"

    def load(self, model: ModelInfo) -> Callable[[Call], torch.Tensor]:
        return flash(package(self.name, "fa3_fwd_interface", "fa3-fwd").flash_attn_func)


def flash(function: Callable[..., torch.Tensor]) -> Callable[[Call], torch.Tensor]:
    """What FlashAttention-2 and 3 name alike."""
    return lambda call: function(
        call.q,
        call.k,
        call.v,
        softmax_scale=call.softmax_scale,
        causal=True,
        window_size=call.window_size,
        softcap=call.softcap,
    )


@dataclass(frozen=True)
class Flex(Upstream):
    """``torch.nn.attention.flex_attention``, compiled, with the causal (and sliding) mask as a block mask."""

    name: ClassVar[str] = "upstream_flex"

    def load(self, model: ModelInfo) -> Callable[[Call], torch.Tensor]:
        compiled = torch.compile(flex_attention)

        def kernel(call: Call) -> torch.Tensor:
            if call.softcap:
                raise NotImplementedError(f"method={self.name} runs no softcap; use method=dense for this model")
            q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
            mask = flex_mask(call.grid, call.q.device)
            grouped = call.q.shape[2] != call.k.shape[2]
            out = compiled(q, k, v, block_mask=mask, scale=call.softmax_scale, enable_gqa=grouped)
            return out.transpose(1, 2)

        return kernel


@lru_cache(maxsize=8)  # every layer of a prefill asks for the same
def flex_mask(grid: BlockGrid, device: torch.device) -> BlockMask:
    """What a call sees, for FlexAttention."""
    left = grid.window_size[0] if grid.window_size[0] >= 0 else grid.seqlen_k

    def seen(batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        position = row + grid.offset
        return (key <= position) & (key >= position - left)

    return create_block_mask(seen, None, None, grid.seqlen_q, grid.seqlen_k, device=str(device))


@dataclass(frozen=True)
class Cudnn(Upstream):
    """PyTorch's SDPA with cuDNN as its only backend."""

    name: ClassVar[str] = "upstream_cudnn"

    def load(self, model: ModelInfo) -> Callable[[Call], torch.Tensor]:
        if any(device.type != "cuda" for device in model.devices):
            raise InputError(f"method={self.name} runs on a CUDA GPU alone; use method=sdpa here")

        def kernel(call: Call) -> torch.Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return sdpa(call).out

        return kernel
