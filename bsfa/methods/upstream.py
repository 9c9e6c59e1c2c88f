"""Dense attention from its authors' own packages: what a speed-up has to be held against, and how each is called.

`upstream_flash_attn` is FlashAttention-2 (flash-attn), `upstream_torch_flash` the same as PyTorch has it built in,
`upstream_fa3` FlashAttention-3 for Hopper (fa3-fwd), `upstream_cudnn` cuDNN through PyTorch's SDPA;
`bsfa.methods.upstream_flex` is FlexAttention. A package that is not installed, or a GPU that is not there, is one clear
line when the method is bound to a model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bsfa.attention import Attended
from bsfa.errors import InputError
from bsfa.methods import sdpa
from bsfa.methods.base import Attend, Call, Method
from bsfa.model import ModelInfo

Kernel = Callable[[Call], torch.Tensor]


@dataclass(frozen=True)
class Upstream(Method):
    """A dense kernel of others: every visible block is kept."""

    def bind(self, model: ModelInfo) -> Attend:
        try:
            kernel = self.load(model.devices)
        except InputError as error:
            raise InputError(f"method={self.name} {error}") from error
        return lambda call: Attended.dense(kernel(call), call.grid)

    @abstractmethod
    def load(self, devices: Sequence[torch.device]) -> Kernel:
        """The kernel: a call -> its output (B, Sq, Hq, D).

        Raises
        ------
        InputError
            It cannot run on these devices; the message goes on from its name.
        """


@dataclass(frozen=True)
class Flash(Upstream):
    """``flash_attn_func``, which FlashAttention-2 and 3 name alike, of the first of some modules that is there.

    ``install`` is the package that has the first.
    """

    install: ClassVar[str]
    modules: ClassVar[tuple[str, ...]]

    def load(self, devices: Sequence[torch.device]) -> Kernel:
        function = self._package().flash_attn_func
        return lambda call: function(
            call.q,
            call.k,
            call.v,
            softmax_scale=call.softmax_scale,
            causal=True,
            window_size=call.window_size,
            softcap=call.softcap,
        )

    def _package(self) -> Any:
        missing = None
        for module in self.modules:
            try:
                return import_module(module)
            except ImportError as error:
                missing = missing or error
        needed = " or ".join(self.modules)
        raise InputError(f"needs the module {needed} ({missing}): pip install {self.install}") from missing


@dataclass(frozen=True)
class FlashAttn2(Flash):
    """https://github.com/Dao-AILab/flash-attention: fp16 and bf16."""

    name: ClassVar[str] = "upstream_flash_attn"
    install: ClassVar[str] = "flash-attn"
    modules: ClassVar[tuple[str, ...]] = ("flash_attn",)


@dataclass(frozen=True)
class FlashAttn3(Flash):
    """FlashAttention-3 for Hopper: https://pypi.org/project/fa3-fwd, or the authors' own build."""

    name: ClassVar[str] = "upstream_fa3"
    install: ClassVar[str] = "fa3-fwd"
    modules: ClassVar[tuple[str, ...]] = ("fa3_fwd_interface", "flash_attn_interface")


@dataclass(frozen=True)
class Sdp(Upstream):
    """PyTorch's SDPA with one of its backends alone."""

    backend: ClassVar[SDPBackend]
    chunks: ClassVar[bool] = False  # it aligns its causal mask with the first key; any other takes a mask in memory

    def load(self, devices: Sequence[torch.device]) -> Kernel:
        if any(device.type != "cuda" for device in devices):
            raise InputError("runs on a CUDA GPU alone; use method=sdpa here")

        def kernel(call: Call) -> torch.Tensor:
            with sdpa_kernel(self.backend):
                return sdpa.kernel(call)

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
