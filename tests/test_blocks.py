from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bsfa.blocks import ORDERS, BlockGrid, BlockLists
from bsfa.errors import InputError
from tests.strategies import WINDOWS

GRIDS = st.builds(
    BlockGrid, seqlen_q=st.integers(1, 500), seqlen_k=st.integers(1, 600), causal=st.booleans(), window_size=WINDOWS
)


def visible_entries(grid: BlockGrid) -> torch.Tensor:
    """The mask of a call, straight from its definition: (Sq, Sk)."""
    position = torch.arange(grid.seqlen_q)[:, None] + grid.seqlen_k - grid.seqlen_q
    key = torch.arange(grid.seqlen_k)[None, :]
    left, right = grid.window_size
    mask = torch.ones(grid.seqlen_q, grid.seqlen_k, dtype=torch.bool)
    if grid.causal:
        mask &= key <= position
    elif right >= 0:
        mask &= key <= position + right
    if left >= 0:
        mask &= key >= position - left
    return mask


@given(GRIDS)
def test_visible_blocks_are_those_with_a_visible_entry(grid: BlockGrid):
    mask = visible_entries(grid)
    for i in range(grid.n_q):
        seen = {j for j in range(grid.n_k) if mask[grid.rows(i), 64 * j : 64 * (j + 1)].any()}
        assert set(grid.visible(i)) == seen


@given(GRIDS)
def test_full_blocks_need_no_mask_and_the_others_do(grid: BlockGrid):
    mask = torch.nn.functional.pad(visible_entries(grid), (0, 64 * grid.n_k - grid.seqlen_k))
    for i in range(grid.n_q):
        full = {j for j in grid.visible(i) if mask[grid.rows(i), 64 * j : 64 * (j + 1)].all()}
        assert set(grid.full(i)) == full
        assert torch.equal(grid.entry_mask(i, range(grid.n_k)), mask[grid.rows(i)])


@given(GRIDS)
def test_band_is_the_visible_blocks_at_or_past_the_first_query_of_a_causal_call(grid: BlockGrid):
    for i in range(grid.n_q):
        first = grid.seqlen_k - grid.seqlen_q + 128 * i
        at_or_past = {j for j in grid.visible(i) if min(64 * (j + 1), grid.seqlen_k) > first}
        causal = grid.causal or grid.window_size[1] == 0
        assert set(grid.band(i)) == (at_or_past if causal else set())


@given(GRIDS, st.sampled_from(ORDERS))
def test_every_order_visits_each_visible_block_once(grid: BlockGrid, order):
    for i in range(grid.n_q):
        assert sorted(grid.visit(i, order)) == list(grid.visible(i))


def test_orders_of_a_block_in_the_middle():
    grid = BlockGrid(512, 512, causal=True)
    assert list(grid.visit(2, "diagonal")) == [5, 4, 3, 2, 1, 0]
    assert list(grid.visit(2, "sink")) == [0, 5, 4, 3, 2, 1]
    assert list(grid.visit(2, "ascending")) == [0, 1, 2, 3, 4, 5]


@given(st.integers(1, 900), st.integers(1, 900), st.integers(1, 8))
def test_thresholds_are_read_by_absolute_position_clamped_to_the_table(seqlen_q, seqlen_k, length):
    grid = BlockGrid(seqlen_q, seqlen_k, causal=True)
    picked = grid.pick(torch.arange(length)[None])[0].tolist()
    expected = [(seqlen_k - seqlen_q + 128 * i) // 128 for i in range(grid.n_q)]
    assert picked == [min(max(e, 0), length - 1) for e in expected]


@given(st.integers(0, 2**31))
def test_block_lists_hold_the_blocks_of_their_mask_in_ascending_order(seed):
    keep = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed)) < 0.4
    lists = BlockLists.from_mask(keep)
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        listed = lists.indices[tuple(index)][: lists.counts[tuple(index)]]
        assert listed.tolist() == keep[tuple(index)].nonzero().flatten().tolist()


def test_a_mask_of_the_wrong_kind_is_refused():
    with pytest.raises(InputError, match="bool tensor"):
        BlockLists.from_mask(torch.zeros(2, 3))
