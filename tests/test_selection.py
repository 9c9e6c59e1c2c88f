from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from bsfa.attention import attend
from bsfa.blocks import BlockGrid
from bsfa.methods import Call
from bsfa.selection import band, block_lists, diagonal_sums, full, highest, last_attention, mean_pool, scores, visible

CPU = torch.device("cpu")
GRIDS = st.builds(
    BlockGrid,
    st.integers(1, 700),
    st.integers(1, 700),
    st.just(True),
    st.sampled_from([(-1, -1), (0, 0), (100, 0)]),
    st.sampled_from([64, 128]),
    st.sampled_from([64, 128]),
)


@given(GRIDS)
def test_masks_are_the_grids_ranges(grid):
    masks = ((visible(grid, CPU), grid.visible), (band(grid, CPU), grid.band), (full(grid, CPU), grid.full))
    for mask, blocks in masks:
        assert mask.shape == (grid.n_q, grid.n_k)
        for i, row in enumerate(mask):
            assert row.nonzero().flatten().tolist() == list(blocks(i))


def test_a_list_covers_what_a_finer_and_a_coarser_rule_selects():
    grid = BlockGrid(300, 300, causal=True)
    fine, coarse = replace(grid, block_q=64, block_k=64), replace(grid, block_k=128)
    keep = torch.zeros(1, 1, fine.n_q, fine.n_k, dtype=torch.bool)
    keep[..., 3, 1] = True  # the second half of query block 1
    keep[..., 0, 1] = True  # the future of its half, though not of its query block
    lists = block_lists(keep, fine, grid)
    assert lists.counts.tolist() == [[[0, 1, 0]]]
    assert lists.indices[0, 0, 1, 0] == 1
    keep = torch.zeros(1, 1, coarse.n_q, coarse.n_k, dtype=torch.bool)
    keep[..., 2] = True
    lists = block_lists(keep, coarse, grid)
    assert lists.counts.tolist() == [[[0, 0, 1]]]  # of keys 256 to 384 there are 44
    assert lists.indices[0, 0, 2, 0] == 4


def test_scores_share_a_key_head_within_a_group():
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, 6, 8), torch.randn(2, 7, 2, 8)
    expected = torch.einsum("bmhd,bnhd->bhmn", q, k.repeat_interleave(3, 2)) * 0.5
    torch.testing.assert_close(scores(q, k, 0.5), expected)


def test_a_ragged_last_block_is_averaged_over_what_it_holds():
    x = torch.arange(10.0)[None, :, None, None]
    assert mean_pool(x, 4).flatten().tolist() == [1.5, 5.5, 8.5]


def test_the_highest_are_the_earlier_of_equals_and_a_count_a_row():
    values = torch.tensor([[1.0, 2.0, 2.0, 2.0], [3.0, 1.0, 2.0, 0.0]])
    assert highest(values, torch.tensor([[2], [3]])).int().tolist() == [[0, 1, 1, 0], [1, 1, 1, 0]]


@given(st.integers(1, 9), st.integers(0, 20))
def test_diagonals_are_named_by_where_they_meet_the_last_row(n, more):
    attention = torch.rand(n, n + more)
    found = diagonal_sums(attention)
    for key in range(n + more):
        assert torch.isclose(found[key], sum(attention[n - 1 - d, key - d] for d in range(min(n, key + 1))))


def test_the_last_queries_attention_is_the_kernels():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 90, 4, 16), torch.randn(1, 90, 2, 16), torch.randn(1, 90, 2, 16)
    call = Call(0, q, k, v, softmax_scale=0.3, window_size=(40, 0))
    out = torch.einsum("bhnk,bkhd->bnhd", last_attention(call, 30), v.repeat_interleave(2, 2))
    expected = attend(q, k, v, causal=True, softmax_scale=0.3, window_size=(40, 0)).out[:, -30:]
    torch.testing.assert_close(out, expected)
