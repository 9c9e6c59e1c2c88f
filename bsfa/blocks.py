"""Block geometry: the one place that knows query blocks, key blocks, the diagonal band and offsets.

An attention call of ``seqlen_q`` queries over ``seqlen_k`` keys is cut into blocks of ``block_q`` queries by
``block_k`` keys. Queries are aligned bottom-right with the keys (flash-attn 2.1's convention): query row ``r`` of
the call stands at the absolute position ``offset + r`` with ``offset = seqlen_k - seqlen_q``, so that a chunk of a
chunked prefill sees every key before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch

from bsfa.errors import InputError

BLOCK_Q = 128  # queries a block: BSFA's kernel (arXiv 2512.07011)
BLOCK_K = 64  # keys a block: the same

Order = Literal["diagonal", "sink", "ascending"]
ORDERS: tuple[str, ...] = get_args(Order)


@dataclass(frozen=True)
class BlockGrid:
    """The blocks of one attention call.

    Parameters
    ----------
    seqlen_q, seqlen_k : int
        Queries and keys of the call.
    causal : bool
        Bottom-right aligned causal mask.
    window_size : (int, int)
        flash-attn's sliding window: a query at position p sees the keys of [p - left, p + right]; -1 is unbounded.
    block_q, block_k : int
        Rows and columns of a block.
    """

    seqlen_q: int
    seqlen_k: int
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    block_q: int = BLOCK_Q
    block_k: int = BLOCK_K

    @property
    def offset(self) -> int:
        """Absolute position of the call's first query; negative where there are more queries than keys."""
        return self.seqlen_k - self.seqlen_q

    @property
    def n_q(self) -> int:
        return -(-self.seqlen_q // self.block_q)

    @property
    def n_k(self) -> int:
        return -(-self.seqlen_k // self.block_k)

    @property
    def _left(self) -> int:
        return self.window_size[0]

    @property
    def _right(self) -> int:
        return 0 if self.causal else self.window_size[1]

    def rows(self, i: int) -> slice:
        """Rows of query block ``i`` in this call."""
        return slice(i * self.block_q, min((i + 1) * self.block_q, self.seqlen_q))

    def visible(self, i: int) -> range:
        """Key blocks in which query block ``i`` sees at least one entry."""
        rows = self.rows(i)
        first = 0 if self._left < 0 else max(0, self.offset + rows.start - self._left)
        last = self.seqlen_k - 1
        if self._right >= 0:
            last = min(last, self.offset + rows.stop - 1 + self._right)
        if last < first:
            return range(0)
        return range(first // self.block_k, last // self.block_k + 1)

    def full(self, i: int) -> range:
        """The visible blocks of query block ``i`` of which every row sees every entry; the others want a mask."""
        visible, rows = self.visible(i), self.rows(i)
        first, stop = 0, self.seqlen_k
        if self._left >= 0:
            first = max(0, self.offset + rows.stop - 1 - self._left)
        if self._right >= 0:
            stop = max(0, min(stop, self.offset + rows.start + self._right + 1))
        start = min(max(visible.start, -(-first // self.block_k)), visible.stop)
        return range(start, max(start, min(visible.stop, stop // self.block_k)))

    def band(self, i: int) -> range:
        """Diagonal band of query block ``i``: its visible blocks with a key at or past its first query.

        Empty in a non-causal call.
        """
        visible = self.visible(i)
        if self._right != 0:
            return range(visible.stop, visible.stop)
        first = max(0, self.offset + self.rows(i).start) // self.block_k
        return range(min(max(visible.start, first), visible.stop), visible.stop)

    def visit(self, i: int, order: Order) -> Sequence[int]:
        """The visible key blocks of query block ``i`` in the order a gate sees them.

        ``diagonal``: descending, so the diagonal band comes first (the paper's). ``sink``: block 0, then the same.
        ``ascending``: from block 0 up.
        """
        visible = self.visible(i)
        if order == "ascending":
            return visible
        descending = visible[::-1]
        if order == "diagonal" or 0 not in visible:
            return descending
        return [0, *descending[:-1]]

    def pick(self, table: torch.Tensor) -> torch.Tensor:
        """The columns of a table of cuts (Hq, n_blocks) that this call's query blocks read: (Hq, n_q).

        A query block reads its absolute position ``(offset + block_q * i) // block_q``, clamped to the table, so
        that a chunk of a prefill reads the rows it would read in one piece. No host synchronisation.
        """
        if table.shape[1] == 1:
            return table.expand(-1, self.n_q)
        first = self.offset // self.block_q
        if first >= 0 and first + self.n_q <= table.shape[1]:
            return table[:, first : first + self.n_q]
        index = torch.arange(first, first + self.n_q, device=table.device)
        return table[:, index.clamp_(0, table.shape[1] - 1)]

    def total(self) -> int:
        """Blocks with at least one visible entry, the diagonal among them: what a skip ratio is a share of."""
        return _total(self)

    def entry_mask(self, i: int, blocks: range, device: torch.device | str = "cpu") -> torch.Tensor:
        """Which entries query block ``i`` sees in a run of key blocks.

        Returns
        -------
        bool tensor (rows, len(blocks) * block_k); keys past ``seqlen_k`` are not visible.
        """
        return self.tile(i, blocks).sees(device)

    def tile(self, i: int, blocks: range) -> Tile:
        """Query block ``i`` against a run of key blocks."""
        rows, first, columns = self.rows(i), blocks.start * self.block_k, len(blocks) * self.block_k
        return Tile(
            rows.stop - rows.start,
            columns,
            self.offset + rows.start - first,
            min(columns, self.seqlen_k - first),
            self._left,
            self._right,
        )


@dataclass(frozen=True)
class Tile:
    """Rows against columns, by where they stand to each other alone: equal tiles see the same entries.

    Parameters
    ----------
    rows, columns : int
    ahead : int
        The first row's position less the first column's.
    keys : int
        Columns that are keys at all; those after them are past the sequence's end.
    left, right : int
        The sliding window, -1 for unbounded.
    """

    rows: int
    columns: int
    ahead: int
    keys: int
    left: int
    right: int

    def sees(self, device: torch.device | str) -> torch.Tensor:
        """Which entries are visible: bool (rows, columns)."""
        position = torch.arange(self.ahead, self.ahead + self.rows, device=device)[:, None]
        key = torch.arange(self.columns, device=device)[None, :]
        mask = (key < self.keys).expand(self.rows, -1)
        if self.right >= 0:
            mask = mask & (key <= position + self.right)
        if self.left >= 0:
            mask = mask & (key >= position - self.left)
        return mask


@lru_cache(maxsize=256)  # every layer asks again
def _total(grid: BlockGrid) -> int:
    return sum(len(grid.visible(i)) for i in range(grid.n_q))


@dataclass(frozen=True, eq=False)
class BlockLists:
    """An index list of key blocks for every batch, head and query block: what a pre-selecting method hands over.

    Attributes
    ----------
    indices : int32 (B, Hq, n_q, width)
        Key blocks, the first ``counts`` of each row valid, in the order of visit.
    counts : int32 (B, Hq, n_q)
    """

    indices: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def from_mask(cls, keep: torch.Tensor) -> BlockLists:
        """From a bool tensor (B, Hq, n_q, n_k)."""
        if keep.dtype != torch.bool or keep.dim() != 4:
            raise InputError(f"keep must be a bool tensor (B, Hq, n_q, n_k), got {keep.dtype} {tuple(keep.shape)}")
        counts = keep.sum(-1, dtype=torch.int32)
        indices = torch.argsort(~keep, dim=-1, stable=True).to(torch.int32)
        return cls(indices, counts)

    @classmethod
    def shared(cls, rows: list[list[int]], batch: int, n_heads: int, device: torch.device) -> BlockLists:
        """One list a query block, the same for every batch element and head."""
        counts = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        indices = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.int32)
        for i, row in enumerate(rows):
            indices[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
        return cls(indices.to(device).expand(batch, n_heads, -1, -1), counts.to(device).expand(batch, n_heads, -1))
