"""The blockwise path against the definition."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsfa import blockwise, reference
from bsfa.blocks import BlockGrid, BlockLists
from bsfa.gates import Gate
from tests.strategies import calls, gates


@settings(max_examples=60)
@given(st.data())
def test_gated_attention_is_the_definition(data):
    q, k, v, grid = data.draw(calls())
    gate = data.draw(st.one_of(st.none(), gates(q.shape[2])))
    options = {
        "softmax_scale": 0.25,
        "softcap": data.draw(st.sampled_from([0.0, 0.0, 3.0])),
        "gate": gate.resolve(grid, q.shape[2], q.device) if gate else None,
    }
    out, lse, keep = reference.attention(q, k, v, grid, **options)
    found, found_lse, kept = blockwise.attention(q, k, v, grid, return_lse=True, **options)
    assert torch.equal(kept, keep.sum((2, 3)))
    torch.testing.assert_close(found, out, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found_lse, lse, atol=1e-4, rtol=1e-4)


@settings(max_examples=30)
@given(calls(), st.integers(0, 2**31))
def test_listed_blocks_are_the_definition(call, seed):
    q, k, v, grid = call
    shape = (q.shape[0], q.shape[2], grid.n_q, grid.n_k)
    lists = BlockLists.from_mask(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4)
    out, lse, keep = reference.attention(q, k, v, grid, softmax_scale=0.25, blocks=lists)
    found, found_lse, kept = blockwise.attention(q, k, v, grid, softmax_scale=0.25, blocks=lists, return_lse=True)
    assert torch.equal(kept, keep.sum((2, 3)))
    torch.testing.assert_close(found, out, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found_lse, lse, atol=1e-4, rtol=1e-4)


@settings(max_examples=30)
@given(calls())
def test_block_maxima_are_those_of_the_scores(call):
    q, k, _, grid = call
    maxima = blockwise.block_maxima(q, k, grid, softmax_scale=0.25)
    scores = 0.25 * torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2))
    for i in range(grid.n_q):
        entries = grid.entry_mask(i, range(grid.n_k))[:, : grid.seqlen_k]
        block = scores[:, :, grid.rows(i)].masked_fill(~entries, -math.inf)
        block = torch.nn.functional.pad(block, (0, 64 * grid.n_k - grid.seqlen_k), value=-math.inf)
        torch.testing.assert_close(maxima[:, :, i], block.unflatten(-1, (-1, 64)).amax((2, 4)))


@settings(max_examples=30)
@given(calls())
def test_attention_with_its_maxima_is_both(call):
    q, k, v, grid = call
    out, maxima = blockwise.attention_and_maxima(q, k, v, grid, softmax_scale=0.25, softcap=3.0)
    torch.testing.assert_close(
        out, reference.attention(q, k, v, grid, softmax_scale=0.25, softcap=3.0)[0], atol=2e-5, rtol=1e-4
    )
    assert torch.equal(maxima, blockwise.block_maxima(q, k, grid, softmax_scale=0.25, softcap=3.0))


def test_a_threshold_equal_to_a_block_maximum_keeps_the_block():
    q, k = torch.ones(1, 128, 1, 16), torch.zeros(1, 256, 1, 16)
    k[:, 70] = 0.5  # every query's score with it is 0.25 * 8 = 2, exactly
    grid = BlockGrid(128, 256, causal=True)
    for threshold, blocks in [(2.0, 3), (2.0 + 1e-6, 2)]:
        gate = Gate(threshold=threshold).resolve(grid, 1, q.device)
        assert blockwise.attention(q, k, k, grid, softmax_scale=0.25, gate=gate)[2].item() == blocks


def test_a_nan_score_keeps_its_block_and_shows_in_its_row_alone():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 256, 1, 16), torch.randn(1, 256, 1, 16), torch.randn(1, 256, 1, 16)
    q[0, 200] = math.nan
    grid = BlockGrid(256, 256, causal=True)
    gate = Gate(threshold=math.inf).resolve(grid, 1, q.device)
    out, _, kept = blockwise.attention(q, k, v, grid, softmax_scale=0.25, gate=gate)
    assert kept.item() == 6  # both bands, and the two blocks the NaN row sees before its own
    assert out[0, 200].isnan().all()
    assert not out[0, :200].isnan().any()
    assert not out[0, 201:].isnan().any()


def test_memory_does_not_grow_with_the_product_of_the_lengths():
    sizes = []
    for n in (1024, 4096):
        q = torch.zeros(1, n, 1, 16)
        with torch.profiler.profile(profile_memory=True) as profile:
            blockwise.attention(q, q, q, BlockGrid(n, n, causal=True), softmax_scale=0.25)
        sizes.append(max(event.cpu_memory_usage for event in profile.events()))
    assert sizes[1] <= 4.5 * sizes[0]
