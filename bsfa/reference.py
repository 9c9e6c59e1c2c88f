"""The definition: dense scores, a mask, a softmax. Everything else here is tested against this page.

Memory grows with seqlen_q * seqlen_k and skipping saves nothing; `bsfa.blockwise` is the path to use.
"""

from __future__ import annotations

import torch

from bsfa.blocks import BlockGrid, BlockLists
from bsfa.gates import ResolvedGate


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: BlockGrid,
    *,
    softmax_scale: float,
    softcap: float = 0.0,
    gate: ResolvedGate | None = None,
    blocks: BlockLists | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block-sparse attention in fp32.

    Parameters
    ----------
    q : (B, Sq, Hq, D)
    k, v : (B, Sk, Hkv, D)
    softcap : float
        Scores become ``softcap * tanh(s / softcap)`` before anything looks at them; 0 switches it off.

    Returns
    -------
    out : fp32 (B, Sq, Hq, D); 0 for a row that sees nothing
    lse : fp32 (B, Hq, Sq); -inf for a row that sees nothing
    keep : bool (B, Hq, n_q, n_k), the blocks kept
    """
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))

    scores = softmax_scale * (q @ k.transpose(-1, -2))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)

    keep = torch.zeros(*q.shape[:2], grid.n_q, grid.n_k, dtype=torch.bool, device=q.device)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for i in range(grid.n_q):
        rows = grid.rows(i)
        if blocks is not None:
            keep[:, :, i] = _listed(grid, i, blocks)
        elif gate is not None:
            keep[:, :, i] = _gated(scores[:, :, rows], grid, i, gate)
        else:
            keep[:, :, i, grid.visible(i)] = True
        entries = grid.entry_mask(i, range(grid.n_k), q.device)
        mask[:, :, rows] = (keep[:, :, i].repeat_interleave(grid.block_k, -1)[:, :, None] & entries)[..., : k.shape[2]]

    scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    probabilities = (scores - lse[..., None]).exp().masked_fill(~mask, 0.0)
    return (probabilities @ v).transpose(1, 2), lse, keep


def _listed(grid: BlockGrid, i: int, blocks: BlockLists) -> torch.Tensor:
    """Listed and visible blocks of query block ``i``: bool (B, Hq, n_k)."""
    keep = torch.zeros(*blocks.counts.shape[:2], grid.n_k, dtype=torch.bool, device=blocks.counts.device)
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in keep.shape[:2])).tolist():
        listed = blocks.indices[b, h, i, : blocks.counts[b, h, i]].tolist()
        keep[b, h, [j for j in listed if j in grid.visible(i)]] = True
    return keep


def _gated(scores: torch.Tensor, grid: BlockGrid, i: int, gate: ResolvedGate) -> torch.Tensor:
    """Blocks of query block ``i`` that the gate keeps, from its scores (B, Hq, rows, Sk): bool (B, Hq, n_k)."""
    keep = torch.zeros(*scores.shape[:2], grid.n_k, dtype=torch.bool, device=scores.device)
    threshold = gate.threshold[:, i, None]
    running = torch.full(scores.shape[:3], -torch.inf, device=scores.device)
    for j in grid.visit(i, gate.order):
        block = scores[..., j * grid.block_k : (j + 1) * grid.block_k]
        visible = grid.entry_mask(i, range(j, j + 1), scores.device)[:, : block.shape[-1]]
        bar = threshold.expand_as(running)
        if gate.relative is not None:
            bar = torch.fmax(bar, running + gate.relative[:, i, None])
        kept = (~(block < bar[..., None]) & visible).flatten(2).any(-1)
        if j in gate.protects(grid, i):
            kept = torch.ones_like(kept)
        seen = block.masked_fill(~visible, -torch.inf)
        new = seen.amax(-1) if gate.relative_to == "max" else seen.logsumexp(-1)
        new = torch.maximum(running, new) if gate.relative_to == "max" else torch.logaddexp(running, new)
        running = torch.where(kept[..., None], new, running)
        keep[:, :, j] = kept
    return keep
