"""A gate's screen: what it must not change, and what it saves."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsfa import Gate, cuda, flash_attn_func, flash_attn_varlen_func, screen
from bsfa.attention import attend
from bsfa.blocks import ORDERS, BlockGrid
from bsfa.errors import InputError
from bsfa.gates import ResolvedGate
from tests.strategies import calls


def screened(gate: Gate, share: float = 1.0) -> Gate:
    return dataclasses.replace(gate, screen=share)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_with_the_whole_bound_nothing_is_decided_otherwise(data):
    q, k, v, grid = data.draw(calls())
    cut = data.draw(st.floats(0.5, 3.5))
    gate = Gate(
        threshold=data.draw(st.sampled_from([-math.inf, cut, math.inf])),
        relative=data.draw(st.sampled_from([-math.inf, -cut, 0.0, cut])),
        order=data.draw(st.sampled_from(ORDERS)),
        keep_diagonal=data.draw(st.booleans()),
        keep_first=data.draw(st.booleans()),
    )
    options = {"causal": grid.causal, "window_size": grid.window_size, "return_lse": True}
    want, got = (attend(q, k, v, gate=x, **options) for x in (gate, screened(gate)))
    assert torch.equal(got.stats.kept, want.stats.kept)
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.lse, want.lse)


def listed(q, k, grid: BlockGrid, gate: ResolvedGate, scale: float) -> torch.Tensor:
    """`screen.listed` for every query block and head: bool (B, Hq, n_q, n_k)."""
    group = q.shape[2] // k.shape[2]
    may = torch.zeros(q.shape[0], q.shape[2], grid.n_q, grid.n_k, dtype=torch.bool, device=q.device)
    padded = torch.nn.functional.pad(k.float(), (0, 0, 0, 0, 0, grid.n_k * grid.block_k - grid.seqlen_k))
    for b in range(q.shape[0]):
        for h in range(k.shape[2]):
            heads = slice(h * group, (h + 1) * group)
            keys = padded[b, :, h].unflatten(0, (grid.n_k, grid.block_k))
            for i in range(grid.n_q):
                visible = grid.visible(i)
                if visible:
                    queries = q[b, grid.rows(i), heads].float().transpose(0, 1)
                    seen = keys[visible.start : visible.stop]
                    may[b, heads, i, visible.start : visible.stop] = screen.listed(
                        queries, seen, grid, i, gate, scale, heads
                    )
    return may


def test_most_of_what_is_skipped_needs_no_exact_scores():
    torch.manual_seed(0)
    q, k = torch.randn(1, 512, 2, 64), torch.randn(1, 2048, 1, 64)
    grid = BlockGrid(512, 2048, causal=True)
    kept = attend(q, k, k, causal=True, gate=Gate(threshold=4.0)).stats.kept.sum()
    gate = Gate(threshold=4.0, screen=0.25).resolve(grid, 2, q.device)
    left = listed(q, k, grid, gate, 0.125).sum()
    assert kept <= left < kept + 0.1 * (2 * grid.total() - kept)


def test_a_smaller_share_of_the_bound_lists_no_more():
    torch.manual_seed(0)
    q, k = torch.randn(1, 256, 4, 64), torch.randn(1, 1024, 2, 64)
    grid = BlockGrid(256, 1024, causal=True)
    shares = [listed(q, k, grid, Gate(threshold=4.2, screen=x).resolve(grid, 4, q.device), 0.125) for x in (0.1, 1, 9)]
    assert all((less <= more).all() for less, more in itertools.pairwise(shares))
    assert shares[0].sum() < shares[1].sum() < shares[2].sum()


BAD_KEYS = pytest.mark.parametrize("bad", [math.nan, math.inf])
BAD_PLACES = pytest.mark.parametrize("key", [100, 1010], ids=["a whole block", "the diagonal"])
BAD_GATES = pytest.mark.parametrize(
    "gate",
    [Gate(threshold=9.0), *(Gate(relative=-0.3, order=order) for order in ORDERS)],
    ids=["absolute", *ORDERS],
)


@BAD_KEYS
@BAD_PLACES
@BAD_GATES
def test_a_bad_key_keeps_what_it_keeps_without_a_screen(gate, key, bad):
    torch.manual_seed(0)
    q = torch.randn(1, 1, 1, 64) + 0.1 * torch.randn(1, 128, 1, 64)
    k, v = torch.randn(1, 1024, 1, 64), torch.randn(1, 1024, 1, 64)
    k[0, key] = bad
    want, got = (attend(q, k, v, causal=True, gate=x) for x in (gate, screened(gate)))
    assert got.stats.kept == want.stats.kept
    assert torch.equal(got.out.nan_to_num(7.0), want.out.nan_to_num(7.0))


@pytest.mark.parametrize("share", [0.0, -1.0, math.nan, math.inf, "half"])
def test_a_share_that_is_none_is_refused_by_its_value(share):
    with pytest.raises(InputError, match="screen must be a number above 0"):
        Gate(threshold=1.0, screen=share)


def test_a_screen_of_the_log_sum_exp_is_refused():
    with pytest.raises(InputError, match="relative_to='lse' has no screen"):
        Gate(relative=-1.0, relative_to="lse", screen=1.0)


def test_a_screen_with_a_soft_cap_is_refused():
    q = torch.randn(1, 8, 1, 16)
    with pytest.raises(InputError, match="soft cap"):
        flash_attn_func(q, q, q, softcap=3.0, gate=Gate(threshold=1.0, screen=1.0))


# (B, Sq, Sk, Hq, Hkv, D): as in test_cuda.py, and more key blocks than a ring of records or a word of votes holds
SHAPES = [
    (1, 128, 128, 2, 1, 128),
    (2, 512, 512, 4, 2, 64),
    (2, 200, 777, 4, 1, 128),
    (1, 640, 1500, 2, 2, 64),
    (1, 777, 200, 3, 1, 128),
    (1, 1, 500, 4, 2, 128),
    (1, 130, 4300, 2, 1, 64),
    (1, 2100, 2100, 8, 2, 128),
    (1, 4096, 4096, 12, 4, 64),
]


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.fixture(autouse=True)
    def _seeded(self):
        try:
            cuda.check(torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device="cuda"), screen=True)
        except (InputError, RuntimeError, AssertionError) as error:
            pytest.skip(str(error))
        torch.manual_seed(0)

    def draw(self, shape, dtype=torch.bfloat16):
        batch, n_q, n_k, heads, kv_heads, size = shape
        return [
            torch.randn(batch, n, h, size, device="cuda").to(dtype) for n, h in ((n_q, heads), *2 * [(n_k, kv_heads)])
        ]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("relative", [-math.inf, -1.5])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_with_the_whole_bound_nothing_is_decided_otherwise(self, shape, relative, order, causal, dtype):
        q, k, v = self.draw(shape, dtype)
        gate = Gate(3.0 if relative == -math.inf else 1.0, relative, order=order, keep_first=order == "ascending")
        want, got = (attend(q, k, v, causal=causal, gate=x, return_lse=True) for x in (gate, screened(gate)))
        assert torch.equal(got.stats.kept, want.stats.kept)
        assert torch.equal(got.out, want.out)
        assert torch.equal(got.lse, want.lse)

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("relative", [-math.inf, -1.5])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_it_lists_what_the_reference_lists_in_the_order_of_visit(self, shape, relative, order):
        q, k, _ = self.draw(shape)
        grid, scale = BlockGrid(shape[1], shape[2], causal=True), shape[-1] ** -0.5
        gate = Gate(3.0 if relative == -math.inf else -math.inf, relative, order=order, screen=0.5)
        resolved = gate.resolve(grid, shape[3], q.device)
        want = listed(q, k, grid, resolved, scale)
        indices, counts = torch.ops.bsfa.screen(
            *(q, k, None, None, shape[1], shape[2], resolved.threshold, resolved.relative),
            *(ORDERS.index(order), True, False, 0.5, scale, True, None),
        )
        got = torch.zeros_like(want)
        for row in torch.cartesian_prod(*(torch.arange(n) for n in want.shape[:3])).tolist():
            blocks = indices[tuple(row)][: counts[tuple(row)]].tolist()
            got[tuple(row)][blocks] = True
            visited = [j for j in grid.visit(row[2], order) if j in set(blocks)]
            assert blocks == visited
        assert (got != want).sum() <= 0.001 * want.numel()  # within rounding of a bar

    @pytest.mark.parametrize("size", [64, 128])
    def test_sequences_of_a_padded_batch_are_screened_as_if_alone(self, size):
        q, k, v = self.draw((3, 500, 1200, 4, 2, size))
        spans_q, spans_k = [(200, 500), (0, 129), (3, 3)], [(300, 1200), (60, 200), (0, 70)]
        before = [x.clone() for x in (q, k, v)]
        for x, spans in ((q, spans_q), (k, spans_k), (v, spans_k)):
            for plane, (first, end) in zip(x, spans, strict=True):
                plane[:first], plane[end:] = math.nan, math.nan
        options = {"softmax_scale": size**-0.5, "causal": True, "return_stats": True}

        def table(queries: int, keys: int) -> ResolvedGate:
            return screened(Gate(threshold=2.8)).resolve(BlockGrid(queries, keys), 4, q.device)

        on_gpu = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in (spans_q, spans_k)]
        out, _, kept = cuda.attend_varlen(q, k, v, *on_gpu, 300, 900, gate=table(300, 900), **options)
        for b, (rows, keys) in enumerate((slice(*x), slice(*y)) for x, y in zip(spans_q, spans_k, strict=True)):
            alone = [x[b : b + 1, span] for x, span in zip(before, (rows, keys, keys), strict=True)]
            gate = table(rows.stop - rows.start, keys.stop - keys.start)
            want, _, want_kept = cuda.attend(*alone, gate=gate, **options)
            assert torch.equal(out[b, rows], want[0])
            assert torch.equal(kept[b], want_kept[0])

    @pytest.mark.parametrize("size", [64, 128])
    def test_it_repeats_to_the_bit_over_many_ctas(self, size):
        q, k, v = self.draw((1, 8192, 8192, 8, 2, size))
        gate = Gate(threshold=3.6, screen=0.25)
        first, *others = (attend(q, k, v, causal=True, gate=gate) for _ in range(20))
        assert all(torch.equal(other.out, first.out) for other in others)
        assert all(torch.equal(other.stats.kept, first.stats.kept) for other in others)

    @pytest.mark.parametrize("size", [64, 128])
    def test_more_query_blocks_than_the_gpu_computes_at_a_time(self, size):
        q, k, v = self.draw((1, 4096, 4096, 32, 8, size))
        gate = Gate(threshold=3.6)
        want, got = (attend(q, k, v, causal=True, gate=x) for x in (gate, screened(gate)))
        assert torch.equal(got.stats.kept, want.stats.kept)
        assert torch.equal(got.out, want.out)

    @BAD_KEYS
    @BAD_PLACES
    @BAD_GATES
    def test_a_bad_key_keeps_what_it_keeps_without_a_screen(self, gate, key, bad):
        q, k, v = self.draw((1, 128, 1024, 1, 1, 64))
        q = q[:, :1] + 0.1 * q
        k[0, key] = bad
        want, got = (attend(q, k, v, causal=True, gate=x) for x in (gate, screened(gate)))
        assert torch.equal(got.stats.kept, want.stats.kept)
        assert torch.equal(got.out.nan_to_num(7.0), want.out.nan_to_num(7.0))

    @pytest.mark.parametrize("relative", [-math.inf, -1.5, 0.5])
    def test_tables_of_an_odd_number_of_query_blocks_without_groups(self, relative):
        q, k, v = self.draw((1, 5 * 128, 1500, 3, 3, 128))
        table = torch.empty(3, 12, device="cuda").uniform_(2.5, 3.5)
        cuts = relative if relative == -math.inf else torch.full_like(table, relative)
        gate = Gate(table, cuts, keep_diagonal=False)
        want, got = (attend(q, k, v, causal=True, gate=x) for x in (gate, screened(gate)))
        assert torch.equal(got.stats.kept, want.stats.kept)
        assert torch.equal(got.out, want.out)

    def test_packed_sequences_read_their_tables_by_position(self):
        q, k, v = (x[0] for x in self.draw((1, 1300, 1300, 4, 2, 128)))
        bounds = torch.tensor([0, 300, 301, 1300], dtype=torch.int32, device="cuda")
        table = torch.empty(4, 6, device="cuda").uniform_(2.0, 3.0)
        gate = Gate(table, table - 5.0, order="sink")
        options = {"causal": True, "return_lse": True, "return_skip_stats": True}
        want, got = (
            flash_attn_varlen_func(q, k, v, bounds, bounds, 999, 999, gate=x, **options) for x in (gate, screened(gate))
        )
        assert torch.equal(got[2].kept, want[2].kept)
        assert torch.equal(got[0], want[0])

    def test_a_nan_key_shows(self):
        q, k, v = self.draw((2, 700, 900, 4, 2, 128))
        k[0, 100, 0] = math.nan
        out = attend(q, k, v, causal=True, gate=Gate(threshold=math.inf, screen=1.0)).out
        assert out[0, :, :2].isnan().all()
        assert out[0, :, 2:].isfinite().all()
        assert out[1].isfinite().all()

    def test_it_compiles_whole_and_replays_in_a_graph(self):
        q, k, v = self.draw((1, 900, 900, 4, 2, 128))
        gate = Gate(threshold=2.8, screen=1.0).resolve(BlockGrid(900, 900, causal=True), 4, q.device)

        def run(q, k, v):
            return cuda.attend(q, k, v, softmax_scale=128**-0.5, causal=True, gate=gate)[0]

        want = run(q, k, v)
        assert torch.equal(torch.compile(run, fullgraph=True)(q, k, v), want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(q, k, v)
        out.zero_()
        graph.replay()
        assert torch.equal(out, want)
