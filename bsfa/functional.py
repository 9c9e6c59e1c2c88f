"""`flash_attn_func` and `flash_attn_varlen_func`: flash-attn 2's calls, with a block gate."""

from __future__ import annotations

import torch

from bsfa.attention import Attended, Backend, attend, attend_varlen
from bsfa.errors import InputError
from bsfa.gates import Gate
from bsfa.packing import Packing


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    gate: Gate | float | torch.Tensor | None = None,
    return_lse: bool = False,
    return_skip_stats: bool = False,
    backend: Backend = "auto",
):
    """Block-sparse attention with flash-attn 2's arguments; forward only.

    Parameters
    ----------
    q : (B, Sq, Hq, D) fp16 or bf16, on the reference backend also fp32
    k, v : (B, Sk, Hkv, D), Hq a multiple of Hkv
    softmax_scale : float, optional
        1/sqrt(D) by default.
    causal : bool
        Bottom-right aligned.
    window_size : (int, int)
        A query at position p sees the keys of [p - left, p + right]; -1 is unbounded.
    softcap : float
        Scores become ``softcap * tanh(s / softcap)``, and the gate sees them so; 0 switches it off.
    deterministic : bool
        Accepted; the forward always is.
    gate : None, float, tensor or Gate
        None computes every visible block. A float or tensor is short for ``Gate(threshold=...)``.
    return_lse : bool
        Also the log-sum-exp of the scaled scores over the kept blocks, fp32 (B, Hq, Sq).
    return_skip_stats : bool
        Also `SkipStats`: blocks kept and in all, int64 (B, Hq) each.
    backend : {"auto", "reference", "cuda"}
        ``auto``: cuda for tensors on a CUDA device, else reference. Nothing falls back in silence.

    Returns
    -------
    out (B, Sq, Hq, D), or a tuple of it and what was asked for, in the order lse, statistics. A row that sees
    nothing gives 0 and lse -inf.

    Raises
    ------
    NotImplementedError
        dropout, ALiBi or attention probabilities; a backward pass through the output.
    InputError
        Tensors, scale or gate that do not go together.
    """
    _refuse(dropout_p, alibi_slopes, return_attn_probs)
    attended = attend(
        q,
        k,
        v,
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        gate=Gate.of(gate),
        return_lse=return_lse,
        count=return_skip_stats,
        backend=backend,
    )
    return _returned(attended, return_lse, return_skip_stats)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    gate: Gate | float | torch.Tensor | None = None,
    return_lse: bool = False,
    return_skip_stats: bool = False,
    backend: Backend = "auto",
):
    """`flash_attn_func` over a packed batch.

    Parameters
    ----------
    q : (total_q, Hq, D)
    k, v : (total_k, Hkv, D)
    cu_seqlens_q, cu_seqlens_k : int32 (B + 1,)
        Cumulative sequence lengths, from 0 to the total. On a GPU their values are not read, for that would wait for
        it: as in flash-attn, wrong ones go unnoticed.
    max_seqlen_q, max_seqlen_k : int
        The longest sequence's.

    Returns
    -------
    out (total_q, Hq, D); lse fp32 (Hq, total_q); statistics (B, Hq). See `flash_attn_func`.
    """
    _refuse(dropout_p, alibi_slopes, return_attn_probs, block_table)
    if not q.dim() == k.dim() == v.dim() == 3:
        raise InputError(f"packed q, k, v must be (total, heads, head size), got {q.dim()}, {k.dim()}, {v.dim()} axes")
    attended = attend_varlen(
        q,
        k,
        v,
        Packing.cumulative(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        gate=Gate.of(gate),
        return_lse=return_lse,
        count=return_skip_stats,
        backend=backend,
    )
    return _returned(attended, return_lse, return_skip_stats)


def _refuse(
    dropout_p: float,
    alibi_slopes: torch.Tensor | None,
    return_attn_probs: bool,
    block_table: torch.Tensor | None = None,
) -> None:
    if dropout_p:
        raise NotImplementedError(f"dropout_p={dropout_p}: only 0.0 is supported")
    if alibi_slopes is not None:
        raise NotImplementedError("alibi_slopes is not supported; pass None")
    if return_attn_probs:
        raise NotImplementedError("return_attn_probs is not supported; use return_lse=True for the log-sum-exp")
    if block_table is not None:
        raise NotImplementedError("block_table (a paged KV cache) is not supported; pass None")


def _returned(attended: Attended, return_lse: bool, return_skip_stats: bool):
    if not (return_lse or return_skip_stats):
        return attended.out
    extras = [attended.lse] * return_lse + [attended.counted] * return_skip_stats
    return (attended.out, *extras)
