"""What the pre-selecting methods share: the geometry of a grid as masks, pooling, ranking, and block lists.

Everything is vectorised torch on the call's device and waits for no GPU. Nothing here grows with Sq * Sk beyond the
block grid; where a rule needs more, `query_chunks` cuts its work into runs of query blocks. A rule stays at its own
block size: it selects on a `BlockGrid` of that size and `block_lists` maps the outcome on to the kernels' blocks,
which then cover all that the rule selected. Comparisons are written so that a NaN keeps what it touches: bad input
shows in the output, as it does in dense attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import pad

from bsfa.attention import check_scale
from bsfa.blocks import BlockGrid, BlockLists
from bsfa.methods.base import Call

CHUNK_ENTRIES = 2**27  # scores that stand in memory at once: 512 MiB of fp32


def visible(grid: BlockGrid, device: torch.device) -> torch.Tensor:
    """Which blocks hold an entry that their queries see: bool (n_q, n_k), `BlockGrid.visible` as a mask."""
    first, start = _first_query(grid, device), _first_key(grid, device)
    last = (first + grid.block_q).clamp(max=grid.seqlen_k) - 1
    seen = start <= last
    left = grid.window_size[0]
    return seen if left < 0 else seen & (start + grid.block_k > first - left)


def band(grid: BlockGrid, device: torch.device) -> torch.Tensor:
    """The diagonal band of a causal grid: bool (n_q, n_k), `BlockGrid.band` as a mask."""
    first, start = _first_query(grid, device), _first_key(grid, device)
    return visible(grid, device) & (start + grid.block_k > first.clamp(min=0))


def full(grid: BlockGrid, device: torch.device) -> torch.Tensor:
    """The blocks of which every query sees every entry: bool (n_q, n_k), `BlockGrid.full` as a mask."""
    first, start = _first_query(grid, device), _first_key(grid, device)
    last = (first + grid.block_q).clamp(max=grid.seqlen_k) - 1
    seen = visible(grid, device) & (start + grid.block_k <= first + 1)
    left = grid.window_size[0]
    return seen if left < 0 else seen & (start >= last - left)


def _first_query(grid: BlockGrid, device: torch.device) -> torch.Tensor:
    return grid.offset + torch.arange(0, grid.n_q * grid.block_q, grid.block_q, device=device)[:, None]


def _first_key(grid: BlockGrid, device: torch.device) -> torch.Tensor:
    return torch.arange(0, grid.n_k * grid.block_k, grid.block_k, device=device)[None, :]


def block_lists(keep: torch.Tensor, native: BlockGrid, grid: BlockGrid) -> BlockLists:
    """Lists for the kernels from what a rule selected at its own block size.

    Parameters
    ----------
    keep : bool (B, Hq, native.n_q, native.n_k)
    native : BlockGrid
        The rule's grid: its query blocks divide the kernels', the kernels' key blocks divide its own.
    grid : BlockGrid
        The kernels' grid of the same call.
    """
    keep = keep & visible(native, keep.device)
    halves = grid.block_q // native.block_q
    keep = pad(keep, (0, 0, 0, grid.n_q * halves - native.n_q)).unflatten(2, (grid.n_q, halves)).any(3)
    keep = keep.repeat_interleave(native.block_k // grid.block_k, dim=-1)[..., : grid.n_k]
    return BlockLists.from_mask(keep & visible(grid, keep.device))


def query_chunks(grid: BlockGrid, entries: int) -> Iterator[range]:
    """Runs of query blocks of which all together have at most `CHUNK_ENTRIES`, at ``entries`` a query block."""
    step = max(1, CHUNK_ENTRIES // max(1, entries))
    for start in range(0, grid.n_q, step):
        yield range(start, min(start + step, grid.n_q))


def scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled dot products of some queries (B, M, Hq, D) with some keys (B, N, Hkv, D): fp32 (B, Hq, M, N).

    K is not expanded over a group of query heads.
    """
    n_kv = k.shape[2]
    group = q.shape[2] // n_kv
    stacked = q.transpose(1, 2).unflatten(1, (n_kv, group)).flatten(2, 3)
    dots = stacked @ k.permute(0, 2, 3, 1)
    return dots.unflatten(2, (group, q.shape[1])).flatten(1, 2).float() * scale


def mean_pool(x: torch.Tensor, size: int) -> torch.Tensor:
    """Means of blocks of ``size`` along a sequence (B, S, H, D), the last one over what it holds: fp32 (B, n, H, D)."""
    length = x.shape[1]
    blocks = -(-length // size)
    sums = pad(x, (0, 0, 0, 0, 0, blocks * size - length)).unflatten(1, (blocks, size)).sum(2, dtype=torch.float32)
    held = (length - torch.arange(0, blocks * size, size, device=x.device)).clamp(max=size)
    return sums / held[:, None, None]


def sum_pool(x: torch.Tensor, size: int) -> torch.Tensor:
    """Sums of blocks of ``size`` along the last axis."""
    blocks = -(-x.shape[-1] // size)
    return pad(x, (0, blocks * size - x.shape[-1])).unflatten(-1, (blocks, size)).sum(-1)


def select(values: torch.Tensor, rule: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A mask over the last axis from a rule on that axis sorted, largest first: values -> bool of the same shape."""
    ordered, order = values.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, order, rule(ordered))


def highest(values: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """The ``count`` largest along the last axis, the earlier of equals; ``count`` broadcasts with ``values``."""
    ranks = torch.arange(values.shape[-1], device=values.device)
    return select(values, lambda ordered: (ranks < count).expand_as(ordered))


def vertical_slash(keys: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """Blocks of a chosen key block, or at a chosen distance of blocks: bool (..., n) each -> bool (..., n, n)."""
    block = torch.arange(keys.shape[-1], device=keys.device)
    apart = (block[:, None] - block[None, :]).clamp(min=0)
    return keys[..., None, :] | distances[..., apart]


def last_attention(call: Call, n: int) -> torch.Tensor:
    """Dense attention of a call's last ``n`` queries: probabilities, fp32 (B, Hq, n, Sk)."""
    grid = BlockGrid(n, call.k.shape[1], causal=True, window_size=call.window_size, block_q=n)
    dots = scores(call.q[:, -n:], call.k, check_scale(call.q, call.softmax_scale))
    seen = grid.entry_mask(0, range(grid.n_k), dots.device)[:, : grid.seqlen_k]
    return dots.masked_fill_(~seen, -torch.inf).softmax(-1)


def diagonal_sums(attention: torch.Tensor) -> torch.Tensor:
    """Sums along diagonals: (..., n, Sk) -> (..., Sk), each named by the key at which it meets the last row."""
    n, length = attention.shape[-2:]
    # Rows one entry longer than they are apart in memory: each starts one further right, and diagonals become columns.
    flat = pad(pad(attention, (n - 1, 0)).flatten(-2), (0, n))
    return flat.unflatten(-1, (n, length + n))[..., :length].sum(-2)


def refuse_chunks(call: Call, name: str, reason: str) -> None:
    """One clear error for a rule that wants the whole prompt in one call.

    Raises
    ------
    NotImplementedError
    """
    queries, keys = call.q.shape[1], call.k.shape[1]
    if queries != keys:
        raise NotImplementedError(
            f"method={name} {reason}, and this call has {queries} queries over {keys} keys; "
            "prefill the prompt in one piece, or use another method"
        )
