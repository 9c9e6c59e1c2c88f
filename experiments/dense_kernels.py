"""The dense kernels of others that ours are timed against: those that run here, and why not the rest."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bsfa.errors import InputError
from bsfa.methods import Call, Method, Sdpa
from bsfa.methods.upstream import Cudnn, FlashAttn2, FlashAttn3, TorchFlash, Upstream
from bsfa.methods.upstream_flex import Flex
from bsfa.model import ModelInfo
from experiments import environment
from experiments.prefill import Prefill
from experiments.unavailable import reason

log = logging.getLogger(__name__)

Kernel = Callable[[], Any]

DENSE_KERNELS: dict[str, type[Method]] = {
    kind.name: kind for kind in (TorchFlash, Cudnn, FlashAttn3, FlashAttn2, Flex, Sdpa)
}
"""In a model's prefill."""

BASELINES: dict[str, type[Upstream]] = {"fa3": FlashAttn3, "cudnn": Cudnn, "fa2": TorchFlash, "flex": Flex}
"""In `experiment=kernel`, by its own names."""


def usable(
    names: Sequence[str], model: ModelInfo, dtype: torch.dtype, prefill: Prefill, longest: int
) -> tuple[dict[str, Method], dict[str, str]]:
    """Those of `DENSE_KERNELS` that run here, and those that do not, with the reason: a package that is missing, chunks
    that it cannot read, a dtype or head size that it is not built for.

    Parameters
    ----------
    dtype : torch.dtype
        The model's.
    longest : int
        Tokens of the longest prompt.
    """
    probe = _probe(model, dtype)
    found: dict[str, Method] = {}
    left_out: dict[str, str] = {}
    for name in names:
        method = DENSE_KERNELS[name]()
        try:
            attend = method.bind(model)
            prefill.check([method], longest)
            attend(probe)
            environment.wait(probe.q.device)
        except (InputError, RuntimeError) as error:  # what a kernel refuses it says in its own way
            left_out[name] = reason(error)
            log.warning("%s is left out: %s", name, left_out[name])
        else:
            found[name] = method
    return found, left_out


def _probe(model: ModelInfo, dtype: torch.dtype) -> Call:
    """A short prompt of zeros, as the model's first layer would call."""

    def zeros(heads: int) -> Tensor:
        return torch.zeros(1, 128, heads // model.tp_size, model.head_dim, dtype=dtype, device=model.devices[0])

    return Call(0, zeros(model.n_heads), zeros(model.n_kv_heads), zeros(model.n_kv_heads))


def that_run(names: Sequence[str], q: Tensor, k: Tensor, v: Tensor) -> tuple[dict[str, Kernel], dict[str, str]]:
    """Those of `BASELINES` as one causal call, each run once, and of those that do not run here the reason: a package
    that is missing, a GPU that it is not for, no memory left.

    Parameters
    ----------
    q, k, v : bf16 or fp16 (B, S, Hq, D), (B, S, Hkv, D) twice
    """
    call = Call(0, q, k, v)
    kernels: dict[str, Kernel] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            kernel = partial(BASELINES[name]().load([q.device]), call)
            kernel()
            environment.wait(q.device)
            kernels[name] = kernel
        except (InputError, ImportError, RuntimeError) as error:
            failed[name] = reason(error)  # the error itself would hold its frames, and with them their memory
            log.warning("baseline %s does not run here: %s", name, failed[name])
        gc.collect()
        environment.release_memory(q.device)
    return kernels, failed
