"""The CUDA backend against the definition."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from bsfa import cuda, launch, reference
from bsfa.blocks import BLOCK_K, BlockGrid, BlockLists
from bsfa.errors import InputError
from bsfa.gates import ResolvedGate

TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3}
# (B, Sq, Sk, Hq, Hkv, D): whole blocks, ragged ends, chunks of either sign of offset, one query, groups of 1 to 4, more
# key blocks than the kernels describe at once
SHAPES = [
    (1, 128, 128, 2, 1, 128),
    (2, 512, 512, 4, 2, 64),
    (1, 1024, 1024, 8, 2, 128),
    (2, 200, 777, 4, 1, 128),
    (1, 640, 1500, 2, 2, 64),
    (1, 777, 200, 3, 1, 128),
    (1, 1, 500, 4, 2, 128),
    (1, 130, 4300, 2, 1, 64),
]
ABSOLUTE = [-math.inf, 2.8, math.inf]


@pytest.fixture(params=cuda.KERNELS)
def kernel(request) -> str:
    """The name of every kernel that this GPU can run."""
    try:
        cuda.check(torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device="cuda"), request.param)
    except (InputError, RuntimeError, AssertionError) as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    return request.param


def draw(shape, dtype=torch.bfloat16, heads_first=False):
    batch, seqlen_q, seqlen_k, n_q, n_kv, size = shape

    def one(length: int, heads: int) -> torch.Tensor:
        if heads_first:
            return torch.randn(batch, heads, length, size, device="cuda").to(dtype).transpose(1, 2)
        return torch.randn(batch, length, heads, size, device="cuda").to(dtype)

    return one(seqlen_q, n_q), one(seqlen_k, n_kv), one(seqlen_k, n_kv)


def absolute(grid: BlockGrid, heads: int, cut: float, **options) -> ResolvedGate:
    threshold = torch.full((heads, grid.n_q), cut, device="cuda")
    return ResolvedGate(
        threshold, None, "max", **({"order": "diagonal", "keep_diagonal": True, "keep_first": False} | options)
    )


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want).norm() / want.norm().clamp_min(1e-6))


def margin(q, k, cut: float, scale: float, causal: bool, kernel: str) -> float:
    """How near the nearest block maximum comes to a threshold: nearer than rounding, either decision is right."""
    maxima = cuda.block_maxima(q, k, softmax_scale=scale, causal=causal, kernel=kernel)
    distance = (maxima - cut).abs()
    return float(distance[distance.isfinite()].min()) if distance.isfinite().any() else math.inf


def decide(scores: torch.Tensor, grid: BlockGrid, gate: ResolvedGate) -> tuple[torch.Tensor, float]:
    """The gate over scaled scores (B, Hq, Sq, Sk), one block after the other.

    Returns the kept blocks, bool (B, Hq, n_q, n_k), and how near the nearest free decision was to going the other way.
    """
    keep = torch.zeros(*scores.shape[:2], grid.n_q, grid.n_k, dtype=torch.bool, device=scores.device)
    nearest = math.inf
    for i in range(grid.n_q):
        rows = scores[:, :, grid.rows(i)]
        running = torch.full(rows.shape[:3], -math.inf, device=scores.device)
        for j in grid.visit(i, gate.order):
            bar = gate.threshold[:, i, None].expand_as(running)
            if gate.relative is not None:
                bar = torch.fmax(bar, running + gate.relative[:, i, None])
            block = rows[..., j * BLOCK_K : (j + 1) * BLOCK_K]
            hidden = ~grid.entry_mask(i, range(j, j + 1), scores.device)[:, : block.shape[-1]]
            block = block.masked_fill(hidden, -math.inf)
            over = (block - bar[..., None]).masked_fill(hidden, -math.inf).flatten(2).amax(-1)
            kept = (~(block < bar[..., None]) & ~hidden).flatten(2).any(-1)
            if j in gate.protects(grid, i):
                kept = torch.ones_like(kept)
            elif over.isfinite().any():
                nearest = min(nearest, float(over[over.isfinite()].abs().min()))
            grown = (
                torch.maximum(running, block.amax(-1))
                if gate.relative_to == "max"
                else torch.logaddexp(running, block.logsumexp(-1))
            )
            running = torch.where(kept[..., None], grown, running)
            keep[:, :, i, j] = kept
    return keep, nearest


@pytest.mark.parametrize(
    ("held", "abreast"), [(0.5, 1), (1, 1), (2, 2), (3, 3), (5, 4), (7, 4), (8, 8), (1000, 8)], ids=str
)
def test_ctas_take_turns_over_what_l2_holds_in_even_groups(held, abreast, monkeypatch):
    call = launch.Call(batch=2, kv_heads=4, k_length=1000)
    monkeypatch.setattr(launch, "_properties", lambda device: SimpleNamespace(L2_cache_size=int(held * 1000 * 512)))
    call.take_turns(0, row_bytes=512)
    assert call.abreast == abreast


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestAgainstTheDefinition:
    @pytest.mark.parametrize("cut", ABSOLUTE)
    def test_an_absolute_gate(self, kernel, shape, causal, dtype, cut):
        q, k, v = draw(shape, dtype, heads_first=cut == 2.8)
        scale, grid = shape[-1] ** -0.5, BlockGrid(shape[1], shape[2], causal)
        gate = absolute(grid, shape[3], cut)
        out, lse, kept = cuda.attend(
            q, k, v, softmax_scale=scale, causal=causal, gate=gate, return_lse=True, return_stats=True, kernel=kernel
        )
        want, want_lse, keep = reference.attention(q, k, v, grid, softmax_scale=scale, gate=gate)
        if margin(q, k, cut, scale, causal, kernel) > 1e-4:
            assert torch.equal(kept, keep.sum((2, 3)))
            assert relative_error(out, want) < TOLERANCE[dtype]
            assert torch.equal(lse.isfinite(), want_lse.isfinite())
            torch.testing.assert_close(lse, want_lse, atol=2e-3, rtol=0)

    @pytest.mark.parametrize("relative_to", ["max", "lse"])
    @pytest.mark.parametrize("order", ["diagonal", "sink", "ascending"])
    def test_a_relative_gate(self, kernel, shape, causal, dtype, order, relative_to):
        q, k, v = draw(shape, dtype)
        scale, grid = shape[-1] ** -0.5, BlockGrid(shape[1], shape[2], causal)
        relative = torch.empty(shape[3], grid.n_q, device="cuda").uniform_(-2, -1)
        relative = relative if relative_to == "max" else relative - 3.5
        threshold = torch.full((shape[3], grid.n_q), -math.inf, device="cuda")
        gate = ResolvedGate(threshold, relative, relative_to, order, order != "ascending", order == "ascending")
        group = shape[3] // shape[4]
        scores = scale * torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float().repeat_interleave(group, 2))
        keep, nearest = decide(scores, grid, gate)
        out, _, kept = cuda.attend(
            q, k, v, softmax_scale=scale, causal=causal, gate=gate, return_stats=True, kernel=kernel
        )
        want = reference.attention(q, k, v, grid, softmax_scale=scale, blocks=BlockLists.from_mask(keep))[0]
        if nearest > 1e-4:
            assert torch.equal(kept, keep.sum((2, 3)))
            assert relative_error(out, want) < TOLERANCE[dtype]

    def test_without_a_gate(self, kernel, shape, causal, dtype):
        q, k, v = draw(shape, dtype)
        scale, grid = shape[-1] ** -0.5, BlockGrid(shape[1], shape[2], causal)
        out, lse, kept = cuda.attend(
            q, k, v, softmax_scale=scale, causal=causal, return_lse=True, return_stats=True, kernel=kernel
        )
        want, want_lse, keep = reference.attention(q, k, v, grid, softmax_scale=scale)
        assert relative_error(out, want) < TOLERANCE[dtype]
        torch.testing.assert_close(lse, want_lse, atol=2e-3, rtol=0)
        assert torch.equal(kept, keep.sum((2, 3)))

    def test_index_lists(self, kernel, shape, causal, dtype):
        q, k, v = draw(shape, dtype)
        scale, grid = shape[-1] ** -0.5, BlockGrid(shape[1], shape[2], causal)
        keep = torch.rand(shape[0], shape[3], grid.n_q, grid.n_k, device="cuda") < 0.4
        lists = BlockLists.from_mask(keep)
        out, _, kept = cuda.attend(
            q, k, v, softmax_scale=scale, causal=causal, block_lists=lists, return_stats=True, kernel=kernel
        )
        want, _, listed = reference.attention(q, k, v, grid, softmax_scale=scale, blocks=lists)
        assert relative_error(out, want) < TOLERANCE[dtype]
        assert torch.equal(kept, listed.sum((2, 3)))

    def test_block_maxima(self, kernel, shape, causal, dtype):
        q, k, _ = draw(shape, dtype)
        scale, grid = shape[-1] ** -0.5, BlockGrid(shape[1], shape[2], causal)
        got = cuda.block_maxima(q, k, softmax_scale=scale, causal=causal, kernel=kernel)
        group = shape[3] // shape[4]
        scores = scale * torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float().repeat_interleave(group, 2))
        for i in range(grid.n_q):
            for j in range(grid.n_k):
                columns = slice(j * BLOCK_K, (j + 1) * BLOCK_K)
                block = scores[:, :, grid.rows(i), columns]
                seen = grid.entry_mask(i, range(j, j + 1), "cuda")[:, : block.shape[-1]]
                want = block.masked_fill(~seen, -math.inf).amax((2, 3))
                torch.testing.assert_close(got[:, :, i, j], want, atol=1e-3, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
def test_thresholds_of_every_kind_in_one_call(kernel, size):
    """Neighbouring query blocks that keep everything, decide by a bar above or below 0, or keep what they must."""
    q, k, v = draw((2, 900, 1300, 6, 2, size))
    scale, grid = size**-0.5, BlockGrid(900, 1300, causal=True)
    kinds = torch.tensor([-math.inf, 2.8, -0.5, math.inf], device="cuda")
    place = torch.arange(6, device="cuda")[:, None] + torch.arange(grid.n_q, device="cuda")[None, :]
    gate = ResolvedGate(kinds[place % 4], None, "max", "diagonal", True, False)
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float().repeat_interleave(3, 2))
    keep, nearest = decide(scores, grid, gate)
    out, _, kept = cuda.attend(q, k, v, softmax_scale=scale, causal=True, gate=gate, return_stats=True, kernel=kernel)
    want = reference.attention(q, k, v, grid, softmax_scale=scale, blocks=BlockLists.from_mask(keep))[0]
    if nearest > 1e-4:
        assert torch.equal(kept, keep.sum((2, 3)))
        assert relative_error(out, want) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("to", [None, "threshold", "max", "lse"])
def test_scores_far_below_zero(kernel, size, to):
    """Where no score is above 0 maxima, shifts and bars take ways of their own."""
    q, k, v = draw((1, 700, 900, 4, 2, size))
    q, k = -2 * q.abs(), k.abs()
    scale, grid = size**-0.5, BlockGrid(700, 900, causal=True)
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float().repeat_interleave(2, 2))
    low = torch.full((4, grid.n_q), -math.inf, device="cuda")
    gate = {
        None: None,
        "threshold": ResolvedGate(low.clamp_min(float(scores.mean()) + 4.8), None, "max", "diagonal", True, False),
        "max": ResolvedGate(low, low.clamp_min(0.7), "max", "sink", True, True),
        "lse": ResolvedGate(low, low.clamp_min(-2.5), "lse", "sink", True, True),
    }[to]
    keep, nearest = decide(scores, grid, gate or absolute(grid, 4, -math.inf))
    out, lse, kept = cuda.attend(
        q, k, v, softmax_scale=scale, causal=True, gate=gate, return_lse=True, return_stats=True, kernel=kernel
    )
    lists = BlockLists.from_mask(keep)
    want, want_lse, _ = reference.attention(q, k, v, grid, softmax_scale=scale, blocks=lists)
    if nearest > 1e-4:
        assert torch.equal(kept, keep.sum((2, 3)))
        assert relative_error(out, want) < TOLERANCE[torch.bfloat16]
        torch.testing.assert_close(lse, want_lse, atol=2e-3, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("queries", "keys", "heads"), [(280_000, 300, 64), (64, 2_200_000, 8)])
def test_tensors_of_more_elements_than_32_bits_count(kernel, queries, keys, heads):
    def one(length: int, count: int) -> torch.Tensor:
        return torch.randn(1, length, count, 128, dtype=torch.bfloat16, device="cuda")

    q, k, v = one(queries, heads), one(keys, 8), one(keys, 8)
    assert max(q.numel(), k.numel()) > 2**31
    out, lse, _ = cuda.attend(q, k, v, softmax_scale=128**-0.5, causal=False, return_lse=True, kernel=kernel)
    for head in (0, heads - 1):
        key, value = (x[0, :, head * 8 // heads].float() for x in (k, v))
        for rows in (slice(64), slice(queries - 64, None)):
            scores = 128**-0.5 * q[0, rows, head].float() @ key.T
            assert relative_error(out[0, rows, head], scores.softmax(-1) @ value) < TOLERANCE[torch.bfloat16]
            torch.testing.assert_close(lse[0, head, rows], scores.logsumexp(-1), atol=2e-3, rtol=0)


@pytest.mark.gpu
class TestBehaviour:
    shape = (2, 700, 900, 4, 2, 128)
    scale = 128**-0.5

    @pytest.fixture
    def attend(self, kernel):
        return partial(cuda.attend, softmax_scale=self.scale, causal=True, kernel=kernel)

    @pytest.mark.parametrize("relative_to", ["max", "lse"])
    @pytest.mark.parametrize("order", ["diagonal", "sink", "ascending"])
    def test_a_relative_gate_of_minus_infinity_is_dense(self, attend, order, relative_to):
        q, k, v = draw(self.shape)
        grid = BlockGrid(700, 900, causal=True)
        gate = ResolvedGate(
            torch.full((4, grid.n_q), -math.inf, device="cuda"),
            torch.full((4, grid.n_q), -math.inf, device="cuda"),
            relative_to,
            order,
            False,
            False,
        )
        out, _, kept = attend(q, k, v, gate=gate, return_stats=True)
        assert (kept == grid.total()).all()
        assert relative_error(out, attend(q, k, v)[0].float()) < 4e-3

    @pytest.mark.parametrize("size", [64, 128])
    @pytest.mark.parametrize("held", [0, 1, 3, 4, 99])
    def test_how_many_keys_and_values_l2_holds_changes_nothing(self, attend, kernel, size, held, monkeypatch):
        q, k, v = draw((2, 700, 900, 10, 5, size))  # K and V of ten heads to go through
        grid = BlockGrid(700, 900, causal=True)
        kept = torch.rand(2, 10, grid.n_q, grid.n_k, device="cuda").argsort(-1).int()
        lists = BlockLists(kept, torch.randint(0, grid.n_k + 1, kept.shape[:-1], device="cuda").int())
        gates = [{}, {"gate": absolute(grid, 10, 2.8)}, {"block_lists": lists}]
        if cuda.KERNELS[kernel].screen:
            gates.append({"gate": dataclasses.replace(absolute(grid, 10, 2.8), screen=1.0)})
        want = [attend(q, k, v, return_lse=True, return_stats=True, **gate) for gate in gates]
        device = SimpleNamespace(L2_cache_size=held * 900 * 4 * size, multi_processor_count=7)
        monkeypatch.setattr(launch, "_properties", lambda _: device)
        got = [attend(q, k, v, return_lse=True, return_stats=True, **gate) for gate in gates]
        for one, other in zip(got, want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True) if a is not None)

    def test_it_repeats_to_the_bit_and_writes_everything(self, attend):
        q, k, v = draw(self.shape)
        gate = absolute(BlockGrid(700, 900, causal=True), 4, 2.8)
        outs = []
        for _ in range(3):
            poison = torch.full_like(q, math.nan)
            del poison  # the allocator hands it out again as the output
            outs.append(attend(q, k, v, gate=gate, return_lse=True)[:2])
        assert all(torch.equal(x, y) for out in outs[1:] for x, y in zip(out, outs[0], strict=True))
        assert outs[0][0].isfinite().all()

    def test_a_nan_key_shows_where_dense_attention_shows_it(self, attend):
        q, k, v = draw(self.shape)
        k[0, 100, 0] = math.nan
        gate = absolute(BlockGrid(700, 900, causal=True), 4, math.inf)
        out = attend(q, k, v, gate=gate)[0]
        assert out[0, :, :2].isnan().all()
        assert out[0, :, 2:].isfinite().all()
        assert out[1].isfinite().all()

    @pytest.mark.parametrize("width", [0, 3])
    def test_lists_that_are_empty_or_of_unequal_lengths(self, attend, width):
        q, k, v = draw(self.shape)
        grid = BlockGrid(700, 900, causal=True)
        counts = torch.randint(0, width + 1, (2, 4, grid.n_q), dtype=torch.int32, device="cuda")
        indices = torch.randint(0, 4, (2, 4, grid.n_q, width), dtype=torch.int32, device="cuda").sort(-1).values
        indices += torch.arange(width, dtype=torch.int32, device="cuda")  # none twice
        out, _, kept = attend(q, k, v, block_lists=BlockLists(indices, counts), return_stats=True)
        lists = BlockLists(indices, counts)
        want, _, keep = reference.attention(q, k, v, grid, softmax_scale=self.scale, blocks=lists)
        assert relative_error(out, want) < TOLERANCE[torch.bfloat16]
        assert torch.equal(kept, keep.sum((2, 3)))

    @pytest.mark.parametrize("size", [64, 128])
    def test_packed_sequences_equal_the_same_sequences_alone(self, attend, kernel, size):
        lengths = [(300, 300), (1, 129), (500, 64)]
        parts = [draw((1, n_q, n_k, 4, 2, size)) for n_q, n_k in lengths]
        q, k, v = (torch.cat([part[i][0] for part in parts]) for i in range(3))
        cumulative = [
            torch.tensor([0, *torch.tensor(lengths)[:, i].cumsum(0)], dtype=torch.int32, device="cuda") for i in (0, 1)
        ]
        gate = absolute(BlockGrid(500, 300), 4, 2.8)
        out, lse, kept = cuda.attend_varlen(
            q,
            k,
            v,
            *(x.unfold(0, 2, 1) for x in cumulative),
            500,
            300,
            softmax_scale=self.scale,
            causal=True,
            gate=gate,
            return_lse=True,
            return_stats=True,
            kernel=kernel,
        )
        start = 0
        for i, (part, (n_q, n_k)) in enumerate(zip(parts, lengths, strict=True)):
            alone = absolute(BlockGrid(n_q, n_k), 4, 2.8)
            want, want_lse, want_kept = attend(*part, gate=alone, return_lse=True, return_stats=True)
            assert torch.equal(out[start : start + n_q], want[0])
            assert torch.equal(lse[:, start : start + n_q], want_lse[0])
            assert torch.equal(kept[i], want_kept[0])
            start += n_q

    @pytest.mark.parametrize("size", [64, 128])
    def test_padded_sequences_equal_the_same_sequences_alone(self, attend, kernel, size):
        q, k, v = draw((3, 500, 600, 4, 2, size))
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))  # heads first, as a cache has it
        spans_q, spans_k = [(200, 500), (0, 129), (3, 3)], [(300, 600), (60, 200), (0, 70)]
        before = [x.clone() for x in (q, k, v)]
        for x, spans in ((q, spans_q), (k, spans_k), (v, spans_k)):
            for plane, (first, end) in zip(x, spans, strict=True):
                plane[:first], plane[end:] = math.nan, math.nan
        out, lse, kept = cuda.attend_varlen(
            q,
            k,
            v,
            *(torch.tensor(x, dtype=torch.int32, device="cuda") for x in (spans_q, spans_k)),
            300,
            300,
            softmax_scale=self.scale,
            causal=True,
            gate=absolute(BlockGrid(300, 300), 4, 2.8),
            return_lse=True,
            return_stats=True,
            kernel=kernel,
        )
        for b, (rows, keys) in enumerate((slice(*x), slice(*y)) for x, y in zip(spans_q, spans_k, strict=True)):
            gate = absolute(BlockGrid(rows.stop - rows.start, keys.stop - keys.start), 4, 2.8)
            alone = [x[b : b + 1, span] for x, span in zip(before, (rows, keys, keys), strict=True)]
            want, want_lse, want_kept = attend(*alone, gate=gate, return_lse=True, return_stats=True)
            assert torch.equal(out[b, rows], want[0])
            assert torch.equal(lse[b, :, rows], want_lse[0])
            assert torch.equal(kept[b], want_kept[0])

    @pytest.mark.parametrize("size", [64, 128])
    @pytest.mark.parametrize("gated", [False, True])
    def test_a_neighbours_bad_values_stay_with_the_neighbour(self, kernel, gated, size):
        q, k, v = (x[0] for x in draw((1, 200, 200, 4, 2, size)))
        clean = torch.tensor([[0, 100], [100, 200]], dtype=torch.int32, device="cuda")
        gate = absolute(BlockGrid(100, 100, causal=False), 4, 1.0) if gated else None

        def first_sequence():
            options = {"softmax_scale": self.scale, "causal": False, "kernel": kernel, "gate": gate}
            return cuda.attend_varlen(q, k, v, clean, clean, 100, 100, **options)[0][:100]

        want = first_sequence()
        q[100:], k[100:], v[100:] = math.nan, math.nan, math.inf
        assert torch.equal(first_sequence(), want)

    def test_chunks_of_whole_blocks_decide_and_answer_as_the_whole_does(self, attend):
        q, k, v = draw((2, 900, 900, 4, 2, 128))
        options = {"return_lse": True, "return_stats": True}
        whole, lse, kept = attend(q, k, v, gate=absolute(BlockGrid(900, 900), 4, 2.8), **options)
        counted = torch.zeros_like(kept)
        for first, end in ((0, 256), (256, 640), (640, 900)):
            gate = absolute(BlockGrid(end - first, end), 4, 2.8)
            out, own_lse, own_kept = attend(q[:, first:end], k[:, :end], v[:, :end], gate=gate, **options)
            assert torch.equal(out, whole[:, first:end])
            assert torch.equal(own_lse, lse[..., first:end])
            counted += own_kept
        assert torch.equal(counted, kept)
        assert 0 < kept.sum() < 8 * BlockGrid(900, 900).total()

    def test_a_view_it_cannot_read_in_place_is_copied(self, attend):
        q, k, v = draw(self.shape)
        wide = torch.randn(2, 900, 2, 132, device="cuda").to(k.dtype)
        wide[..., 3:131] = k
        assert torch.equal(attend(q, wide[..., 3:131], v)[0], attend(q, k, v)[0])

    def test_one_cache_for_a_whole_batch(self, attend):
        q, k, v = draw(self.shape)
        alike = [x[:1].expand(2, -1, -1, -1) for x in (k, v)]
        assert torch.equal(attend(q, *alike)[0], attend(q, *(x.contiguous() for x in alike))[0])

    def test_it_compiles_whole_and_replays_in_a_graph(self, attend):
        q, k, v = draw(self.shape)
        gate = absolute(BlockGrid(700, 900, causal=True), 4, 2.8)
        want = attend(q, k, v, gate=gate)[0]
        compiled = torch.compile(lambda q, k, v: attend(q, k, v, gate=gate)[0], fullgraph=True)
        assert torch.equal(compiled(q, k, v), want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend(q, k, v, gate=gate)[0]
        out.zero_()
        graph.replay()
        assert torch.equal(out, want)


class TestRefusals:
    def test_a_gate_with_lists(self):
        q = torch.empty(1, 128, 1, 64)
        gate = ResolvedGate(torch.zeros(1, 1), None, "max", "diagonal", True, False)
        lists = BlockLists.shared([[0]], 1, 1, q.device)
        with pytest.raises(InputError, match="a gate or block lists, not both"):
            cuda.attend(q, q, q, softmax_scale=1.0, causal=True, gate=gate, block_lists=lists)

    def test_a_tensor_on_the_cpu(self):
        with pytest.raises(InputError, match="CUDA device"):
            cuda.check(torch.empty(1, 1, 1, 64))

    @pytest.mark.gpu
    def test_a_head_size_and_a_dtype_it_does_not_serve(self, kernel):
        with pytest.raises(InputError, match="head sizes 64 and 128"):
            cuda.check(torch.empty(1, 1, 1, 96, device="cuda", dtype=torch.bfloat16), kernel)
        with pytest.raises(InputError, match="float32"):
            cuda.check(torch.empty(1, 1, 1, 64, device="cuda"), kernel)

    @pytest.mark.gpu
    @pytest.mark.usefixtures("kernel")
    def test_a_kernel_there_is_none_of(self):
        with pytest.raises(InputError, match="none of sm90a, sm80"):
            cuda.check(torch.empty(1, 1, 1, 64, device="cuda", dtype=torch.bfloat16), "sm70")
