"""Dense attention from its authors' own packages: what a speed-up has to be held against.

`upstream_flash_attn` is FlashAttention-2 (flash-attn), `upstream_torch_flash` the same as PyTorch has it built in,
`upstream_fa3` FlashAttention-3 for Hopper (fa3-fwd), `upstream_cudnn` cuDNN through PyTorch's SDPA;
`bsfa.methods.upstream_flex` is FlexAttention. A package that is not installed, or a GPU that is not there, is one clear
line when the method is bound to a model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bsfa.attention import Attended, SkipStats
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


def package(method: str, install: str, *modules: str) -> Any:
    """The first of some modules of someone else's package that is there.

    Raises
    ------
    InputError
        None of them is installed, or loads.
    """
    missing = None
    for module in modules:
        try:
            return import_module(module)
        except ImportError as error:
            missing = missing or error
    needed = " or ".join(modules)
    raise InputError(f"method={method} needs the module {needed} ({missing}): pip install {install}") from missing


@dataclass(frozen=True)
class FlashAttn2(Upstream):
    """https://github.com/Dao-AILab/flash-attention, ``flash_attn.flash_attn_func``: fp16 and bf16."""

    name: ClassVar[str] = "upstream_flash_attn"

    def load(self, model: ModelInfo) -> Callable[[Call], torch.Tensor]:
        return flash(package(self.name, "flash-attn", "flash_attn").flash_attn_func)


@dataclass(frozen=True)
class FlashAttn3(Upstream):
    """FlashAttention-3 for Hopper: https://pypi.org/project/fa3-fwd, ``fa3_fwd_interface.flash_attn_func``, or the
    authors' own build, ``flash_attn_interface.flash_attn_func``."""

    name: ClassVar[str] = "upstream_fa3"

    def load(self, model: ModelInfo) -> Callable[[Call], torch.Tensor]:
        modules = ("fa3_fwd_interface", "flash_attn_interface")
        return flash(package(self.name, "fa3-fwd", *modules).flash_attn_func)


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
class Sdp(Upstream):
    """PyTorch's SDPA with one of its backends alone."""

    backend: ClassVar[SDPBackend]
    chunks: ClassVar[bool] = False  # it aligns its causal mask with the first key; any other takes a mask in memory

    def load(self, model: ModelInfo) -> Callable[[Call], torch.Tensor]:
        if any(device.type != "cuda" for device in model.devices):
            raise InputError(f"method={self.name} runs on a CUDA GPU alone; use method=sdpa here")

        def kernel(call: Call) -> torch.Tensor:
            with sdpa_kernel(self.backend):
                return sdpa(call).out

        return kernel


@dataclass(frozen=True)
class Cudnn(Sdp):
    """cuDNN's attention."""

    name: ClassVar[str] = "upstream_cudnn"
    backend: ClassVar[SDPBackend] = SDPBackend.CUDNN_ATTENTION


@dataclass(frozen=True)
class TorchFlash(Sdp):
    """FlashAttention-2 as PyTorch has it built in: what most users run, and what the paper compares with."""

    name: ClassVar[str] = "upstream_torch_flash"
    backend: ClassVar[SDPBackend] = SDPBackend.FLASH_ATTENTION
