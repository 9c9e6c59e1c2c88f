"""The reference backend: block by block in plain PyTorch, on any device.

For one query block and the heads of one KV group it computes the exact scores of the visible keys, lets the gate
decide from their maxima, and runs softmax and PV over the kept blocks alone. Memory grows with the longer sequence,
never with the product of the two, and K and V are not expanded over a group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import pad

from bsfa import screen
from bsfa.blocks import BlockGrid, BlockLists, Tile
from bsfa.gates import ResolvedGate


@dataclass(frozen=True)
class Logits:
    """From dot products to what the softmax sees. Monotone, so it may be applied to a maximum instead of a block."""

    softmax_scale: float
    softcap: float = 0.0

    def __call__(self, dots: torch.Tensor) -> torch.Tensor:
        """Overwrites its argument. -inf, which marks a hidden entry, stays -inf."""
        scores = dots.mul_(self.softmax_scale)
        if not self.softcap:
            return scores
        hidden = scores == -torch.inf
        return scores.div_(self.softcap).tanh_().mul_(self.softcap).masked_fill_(hidden, -torch.inf)


@dataclass(frozen=True)
class _Group:
    """The query heads that share one KV head, in one batch element, in fp32 and cut into blocks."""

    batch: int
    heads: range
    queries: torch.Tensor  # (G, Sq, D)
    keys: torch.Tensor  # (n_k, block_k, D), zeros past Sk
    values: torch.Tensor  # the same
    # One query block's dot products and its probabilities, reused: fresh pages cost as much as the products.
    scratch: torch.Tensor
    probabilities: torch.Tensor
    hidden: Callable[[Tile], torch.Tensor]  # the entries a tile does not see; the diagonal tiles of a call are alike

    @classmethod
    def split(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: BlockGrid) -> Iterator[_Group]:
        n_kv = k.shape[2]
        size = q.shape[2] // n_kv
        scratch, probabilities = q.new_empty(2, size * grid.block_q * grid.n_k * grid.block_k, dtype=torch.float32)
        hidden = lru_cache(maxsize=4)(lambda tile: ~tile.sees(q.device))
        for b, h in itertools.product(range(q.shape[0]), range(n_kv)):
            heads = range(h * size, (h + 1) * size)
            queries = q[b, :, heads.start : heads.stop].float().transpose(0, 1)
            keys, values = (
                pad(x[b, :, h].float(), (0, 0, 0, grid.n_k * grid.block_k - grid.seqlen_k)).unflatten(
                    0, (grid.n_k, grid.block_k)
                )
                for x in (k, v)
            )
            yield cls(b, heads, queries, keys, values, scratch, probabilities, hidden)


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
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Block-sparse attention. Arguments as in `bsfa.reference.attention`.

    Returns
    -------
    out : (B, Sq, Hq, D), dtype of q
    lse : fp32 (B, Hq, Sq), or None
    kept : int64 (B, Hq), the blocks kept
    """
    logits = Logits(softmax_scale, softcap)
    out = torch.zeros_like(q)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, device=q.device) if return_lse else None
    kept = torch.zeros(q.shape[0], q.shape[2], dtype=torch.int64)
    for group in _Group.split(q, k, v, grid):
        for i in range(grid.n_q):
            if not grid.visible(i):
                continue
            rows = grid.rows(i)
            for head, columns, dots in _kept_dots(group, grid, i, logits, gate, blocks):
                if not columns:
                    continue
                kept[group.batch, head] += len(columns)
                scores = logits(dots)
                out[group.batch, rows, head] = _softmax_pv(
                    scores, scores.amax(-1), _take(group.values, columns), group.probabilities
                )
                if lse is not None:
                    lse[group.batch, head, rows] = scores.logsumexp(-1)
    return out, lse, kept.to(q.device)


def block_maxima(
    q: torch.Tensor, k: torch.Tensor, grid: BlockGrid, *, softmax_scale: float, softcap: float = 0.0
) -> torch.Tensor:
    """The largest visible scaled score of every block: fp32 (B, Hq, n_q, n_k), -inf where nothing is visible."""
    logits = Logits(softmax_scale, softcap)
    maxima = torch.full((q.shape[0], q.shape[2], grid.n_q, grid.n_k), -torch.inf, device=q.device)
    for group in _Group.split(q, k, k, grid):
        for i in range(grid.n_q):
            visible = grid.visible(i)
            if visible:
                tile = logits(_block_max(_dots(group, grid, i), grid))
                maxima[group.batch, group.heads.start : group.heads.stop, i, visible.start : visible.stop] = tile
    return maxima


def attention_and_maxima(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: BlockGrid, *, softmax_scale: float, softcap: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention (B, Sq, Hq, D) and what `block_maxima` gives, from one product of queries and keys."""
    logits = Logits(softmax_scale, softcap)
    out = torch.zeros_like(q)
    maxima = torch.full((q.shape[0], q.shape[2], grid.n_q, grid.n_k), -torch.inf, device=q.device)
    for group in _Group.split(q, k, v, grid):
        heads = slice(group.heads.start, group.heads.stop)
        for i in range(grid.n_q):
            visible = grid.visible(i)
            if visible:
                scores = logits(_dots(group, grid, i))
                row_max = scores.unflatten(-1, (len(visible), grid.block_k)).amax(-1)
                maxima[group.batch, heads, i, visible.start : visible.stop] = row_max.amax(1)
                values = group.values[visible.start : visible.stop]
                attended = _softmax_pv(scores.flatten(0, 1), row_max.amax(-1).flatten(), values, group.probabilities)
                out[group.batch, grid.rows(i), heads] = attended.unflatten(0, (len(group.heads), -1)).transpose(0, 1)
    return out, maxima


def _kept_dots(
    group: _Group,
    grid: BlockGrid,
    i: int,
    logits: Logits,
    gate: ResolvedGate | None,
    blocks: BlockLists | None,
) -> Iterator[tuple[int, list[int], torch.Tensor]]:
    """For each head of the group: its number, the blocks kept, their dot products (rows, kept * block_k)."""
    visible = grid.visible(i)
    if blocks is not None:
        for g, head in enumerate(group.heads):
            listed = blocks.indices[group.batch, head, i, : blocks.counts[group.batch, head, i]].tolist()
            columns = [j for j in listed if j in visible]
            dots = group.queries[g, grid.rows(i)] @ _take(group.keys, columns).flatten(0, 1).T
            for c, j in enumerate(columns):
                if j not in grid.full(i):
                    hidden = group.hidden(grid.tile(i, range(j, j + 1)))
                    dots[:, c * grid.block_k : (c + 1) * grid.block_k].masked_fill_(hidden, -torch.inf)
            yield head, columns, dots
        return
    dots = _dots(group, grid, i)
    heads = slice(group.heads.start, group.heads.stop)
    may = None
    if gate is not None and gate.screen is not None:
        keys = group.keys[visible.start : visible.stop]
        may = screen.listed(group.queries[:, grid.rows(i)], keys, grid, i, gate, logits.softmax_scale, heads)
    keep = _decide(dots, grid, i, logits, gate, heads, may)
    tiles = dots.unflatten(-1, (len(visible), grid.block_k))
    for g, head in enumerate(group.heads):
        kept = keep[g].nonzero().flatten().tolist()
        yield head, [visible[c] for c in kept], _take(tiles[g], kept, dim=1).flatten(1)


def _dots(group: _Group, grid: BlockGrid, i: int) -> torch.Tensor:
    """Dot products of query block ``i`` with every visible block: (G, rows, visible * block_k), -inf where hidden."""
    visible, full = grid.visible(i), grid.full(i)
    keys = group.keys[visible.start : visible.stop].flatten(0, 1)
    queries = group.queries[:, grid.rows(i)].flatten(0, 1)
    out = group.scratch[: len(queries) * len(keys)].view(len(queries), len(keys))
    dots = torch.mm(queries, keys.T, out=out).unflatten(0, (len(group.heads), -1))
    for run in (range(visible.start, full.start), range(full.stop, visible.stop)):
        if run:
            columns = slice((run.start - visible.start) * grid.block_k, (run.stop - visible.start) * grid.block_k)
            dots[..., columns].masked_fill_(group.hidden(grid.tile(i, run)), -torch.inf)
    return dots


def _block_max(dots: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """(G, rows, n * block_k) -> (G, n). Rows first: that reduction runs along contiguous memory."""
    return dots.amax(1).unflatten(-1, (-1, grid.block_k)).amax(-1)


def _decide(
    dots: torch.Tensor,
    grid: BlockGrid,
    i: int,
    logits: Logits,
    gate: ResolvedGate | None,
    heads: slice,
    may: torch.Tensor | None,
) -> torch.Tensor:
    """Which visible blocks of query block ``i`` each head of a group keeps: bool (G, visible). ``may``: the same, those
    that the gate's screen has left; None for all."""
    visible = grid.visible(i)
    if may is None:
        may = torch.ones(dots.shape[0], len(visible), dtype=torch.bool, device=dots.device)
    if gate is None:
        return may
    threshold = gate.threshold[heads, i]
    if gate.relative is not None:
        return _decide_relative(dots, grid, i, logits, gate, threshold, gate.relative[heads, i], may)
    keep = may & ~(logits(_block_max(dots, grid)) < threshold[:, None])
    protected = [j - visible.start for j in gate.protects(grid, i)]
    keep[:, protected] = True
    return keep


def _decide_relative(
    dots: torch.Tensor,
    grid: BlockGrid,
    i: int,
    logits: Logits,
    gate: ResolvedGate,
    threshold: torch.Tensor,
    relative: torch.Tensor,
    may: torch.Tensor,
) -> torch.Tensor:
    """The gate with a running statistic, which makes each decision depend on those before it."""
    visible, protected = grid.visible(i), gate.protects(grid, i)
    tiles = dots.unflatten(-1, (len(visible), grid.block_k))
    row_max = logits(tiles.amax(-1))
    sees = grid.entry_mask(i, visible, dots.device).unflatten(-1, (-1, grid.block_k)).any(-1)
    running = torch.full_like(row_max[..., 0], -torch.inf)
    keep = torch.zeros_like(may)
    for j in grid.visit(i, gate.order):
        c = j - visible.start
        bar = torch.fmax(threshold[:, None], running + relative[:, None])
        keep[:, c] = may[:, c] & (~(row_max[..., c] < bar) & sees[:, c]).any(-1)
        if j in protected:
            keep[:, c] = True
        if gate.relative_to == "max":
            grown = torch.maximum(running, row_max[..., c])
        else:
            grown = torch.logaddexp(running, logits(tiles[..., c, :].clone()).logsumexp(-1))
        running = torch.where(keep[:, c, None], grown, running)
    return keep


def _take(blocks: torch.Tensor, columns: list[int], dim: int = 0) -> torch.Tensor:
    """Blocks by number along ``dim``; a view where the numbers are one run, as they are in a dense call."""
    if columns and columns[-1] - columns[0] + 1 == len(columns):
        return blocks.narrow(dim, columns[0], len(columns))
    return blocks.index_select(dim, torch.tensor(columns, dtype=torch.int64, device=blocks.device))


def _softmax_pv(
    scores: torch.Tensor, row_max: torch.Tensor, values: torch.Tensor, scratch: torch.Tensor
) -> torch.Tensor:
    """Attention of some rows (rows, n * block_k), their largest scores at hand, over their kept keys (n, block_k, D).

    A row that sees nothing gives 0; a NaN score stays NaN, as in dense attention.
    """
    probabilities = torch.softmax(scores, -1, out=scratch[: scores.numel()].view_as(scores))
    return (probabilities @ values.flatten(0, 1)).masked_fill_((row_max == -torch.inf)[:, None], 0.0)
