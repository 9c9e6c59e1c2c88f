"""The dense attention of others that `experiment=kernel` times the gated kernel against."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from experiments import environment
from experiments.unavailable import reason

log = logging.getLogger(__name__)

Kernel = Callable[[], Any]


def that_run(names: Sequence[str], q: Tensor, k: Tensor, v: Tensor) -> tuple[dict[str, Kernel], dict[str, str]]:
    """Dense causal attention by name, each run once, and of those that do not run here the reason: a package that is
    missing, a GPU that it is not for, no memory left.

    Parameters
    ----------
    names : sequence of str
        Of `BASELINES`.
    q, k, v : bf16 or fp16 (B, S, Hq, D), (B, S, Hkv, D) twice
    """
    kernels: dict[str, Kernel] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            kernel = BASELINES[name](q, k, v)
            kernel()
            environment.wait(q.device)
            kernels[name] = kernel
        except (ImportError, RuntimeError) as error:
            failed[name] = reason(error)  # the error itself would hold its frames, and with them their memory
            log.warning("baseline %s does not run here: %s", name, failed[name])
        gc.collect()
        environment.release_memory(q.device)
    return kernels, failed


def _fa3(q: Tensor, k: Tensor, v: Tensor) -> Kernel:
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError:
        from flash_attn_interface import flash_attn_func
    return lambda: flash_attn_func(q, k, v, causal=True)


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Kernel:
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return call


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Kernel:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return row >= column

    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    mask = create_block_mask(causal, None, None, q.shape[1], k.shape[1], device=str(q.device))
    compiled = torch.compile(flex_attention)
    return lambda: compiled(query, key, value, block_mask=mask, enable_gqa=True)


BASELINES: dict[str, Callable[[Tensor, Tensor, Tensor], Kernel]] = {
    "fa3": _fa3,
    "cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "fa2": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "flex": _flex,
}
