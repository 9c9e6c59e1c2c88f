"""The dense attention of others that `experiment=kernel` times the gated kernel against."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

log = logging.getLogger(__name__)

BASELINES = ("fa3", "cudnn", "fa2", "flex")

Kernel = Callable[[], Any]


def baseline(name: str, q: Tensor, k: Tensor, v: Tensor) -> Kernel | None:
    """A call of a dense causal attention, or None (and a line in the log) where it does not run here.

    Parameters
    ----------
    name : str
        One of `BASELINES`.
    q, k, v : bf16 or fp16 (B, S, Hq, D), (B, S, Hkv, D) twice
    """
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))

    def sdpa(backend: SDPBackend) -> Kernel:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        return call

    try:
        if name == "fa3":
            kernel = _fa3(q, k, v)
        elif name == "cudnn":
            kernel = sdpa(SDPBackend.CUDNN_ATTENTION)
        elif name == "fa2":
            kernel = sdpa(SDPBackend.FLASH_ATTENTION)
        else:
            kernel = _flex(query, key, value)
        kernel()
        torch.cuda.synchronize()
    except (ImportError, RuntimeError) as error:
        log.warning("baseline %s does not run here: %s", name, str(error).splitlines()[0])
        return None
    return kernel


def _fa3(q: Tensor, k: Tensor, v: Tensor) -> Kernel:
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError:
        from flash_attn_interface import flash_attn_func
    return lambda: flash_attn_func(q, k, v, causal=True)


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Kernel:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return row >= column

    mask = create_block_mask(causal, None, None, q.shape[2], k.shape[2], device=str(q.device))
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)
