"""Packed batches: geometry on the device, and the one call that the CUDA backend makes of them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

import bsfa
from bsfa import Gate, InputError, attention, blockwise, cuda, flash_attn_func, flash_attn_varlen_func
from bsfa.blocks import BlockGrid
from bsfa.methods import Bsfa, Dense, RowShare, StreamingLLM
from bsfa.packing import Packing
from tests.conftest import tiny_config

LENGTHS = [(300, 300), (1, 129), (130, 1000), (500, 64), (0, 70)]


def bounds(lengths, device="cpu") -> list[torch.Tensor]:
    """Cumulative lengths of queries and keys."""
    return [torch.tensor([0, *n], device=device).cumsum(0).int() for n in zip(*lengths, strict=True)]


def packed(lengths, heads=4, kv_heads=2, size=16, device="cpu", dtype=torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    total_q, total_k = (sum(n) for n in zip(*lengths, strict=True))
    shapes = ((total_q, heads, size), (total_k, kv_heads, size), (total_k, kv_heads, size))
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


@given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 700)), min_size=1, max_size=5), st.booleans())
def test_the_blocks_of_packed_sequences_are_their_grids(lengths, causal):
    longest_q, longest_k = (max(n) for n in zip(*lengths, strict=True))
    total = Packing.cumulative(*bounds(lengths), longest_q, longest_k).total(causal)
    assert total.tolist() == [BlockGrid(n_q, n_k, causal).total() for n_q, n_k in lengths]


@pytest.mark.parametrize(
    ("cumulative", "message"),
    [
        (torch.zeros(2), r"cu_seqlens_q must be int32 \(B \+ 1,\).*float32 \(2,\)"),
        (torch.zeros(1, dtype=torch.int32), r"got torch.int32 \(1,\)"),
        (torch.zeros(3, dtype=torch.int32), "cu_seqlens_q is for 2 sequences, cu_seqlens_k for 1"),
    ],
)
def test_lengths_of_another_shape_are_refused(cumulative, message):
    with pytest.raises(InputError, match=message):
        Packing.cumulative(cumulative, torch.zeros(2, dtype=torch.int32), 1, 1)


def one_launch(q, k, v, spans_q, spans_k, max_q, max_k, *, gate, softmax_scale, causal, return_lse, return_stats):
    """`cuda.attend_varlen` by the reference, the gate's table read as the kernels read it."""
    *planes, n_rows, heads, _ = q.shape
    out, lse = torch.full_like(q, math.nan), torch.full((*planes, heads, n_rows), math.nan)
    kepts = []
    for b, (rows, keys) in enumerate(zip(spans_q.tolist(), spans_k.tolist(), strict=True)):
        rows, keys = slice(*rows), slice(*keys)
        own_q, own_k, own_v, own_out, own_lse = (x[b] if planes else x for x in (q, k, v, out, lse))
        grid = BlockGrid(rows.stop - rows.start, keys.stop - keys.start, causal)
        own = None
        if gate is not None:
            first = [max(0, grid.offset + 128 * i) // 128 for i in range(grid.n_q)]

            def read(table: torch.Tensor, first: list[int] = first) -> torch.Tensor:
                return table[:, [min(position, table.shape[1] - 1) for position in first]]

            relative = read(gate.relative) if gate.relative is not None else None
            own = dataclasses.replace(gate, threshold=read(gate.threshold), relative=relative)
        alone = (own_q[None, rows], own_k[None, keys], own_v[None, keys])
        options = {"softmax_scale": softmax_scale, "gate": own, "return_lse": True}
        own_out[rows], own_lse[:, rows], kept = blockwise.attention(*alone, grid, **options)
        kepts.append(kept)
    return out, lse if return_lse else None, torch.cat(kepts)


GATES = {
    "dense": None,
    "number": 1.5,
    "heads": torch.linspace(1.0, 2.0, 4),
    "table": torch.linspace(1.0, 2.5, 6).expand(4, 6),
    "relative": Gate(relative=-2.0, relative_to="lse", order="sink"),
}
gates = pytest.mark.parametrize("gate", GATES.values(), ids=GATES)


@gates
def test_one_call_gives_what_a_call_a_sequence_gives(gate, as_if_on_a_gpu, monkeypatch):
    monkeypatch.setattr(cuda, "attend_varlen", one_launch)
    q, k, v = packed(LENGTHS)
    arguments = (q, k, v, *bounds(LENGTHS), 500, 1000)
    options = {"causal": True, "gate": gate, "return_lse": True, "return_skip_stats": True}
    out, lse, stats = flash_attn_varlen_func(*arguments, **options)
    want, want_lse, want_stats = flash_attn_varlen_func(*arguments, **options, backend="reference")
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    assert torch.equal(stats.kept, want_stats.kept)
    assert torch.equal(stats.total, want_stats.total)


@gates
def test_one_call_gives_what_a_call_a_padded_sequence_gives(gate, as_if_on_a_gpu, monkeypatch):
    monkeypatch.setattr(cuda, "attend_varlen", one_launch)
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, rows, heads, 16) for rows, heads in ((500, 4), (900, 2), (900, 2)))
    packing = Packing(
        torch.tensor([(200, 500), (0, 129), (3, 3)]), torch.tensor([(300, 900), (60, 200), (0, 70)]), 300, 600
    )
    options = {"causal": True, "gate": Gate.of(gate), "return_lse": True}
    found = attention.attend_varlen(q, k, v, packing, **options)
    want = attention.attend_varlen(q, k, v, packing, **options, backend="reference")
    assert torch.equal(found.out, want.out)
    assert torch.equal(found.lse, want.lse)
    assert torch.equal(found.stats.kept, want.stats.kept)
    assert torch.equal(found.stats.total, want.stats.total)


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_lengths_on_a_device_are_not_read():
    q, k, v = packed(LENGTHS, device="meta")  # a meta tensor cannot be read
    cumulative = [x.to("meta") for x in bounds(LENGTHS)]
    table = torch.zeros(4, 9, device="meta")
    gate = object.__new__(Gate)  # building a gate reads its table, once and before any call
    gate.__dict__.update(Gate(threshold=0.0).__dict__ | {"threshold": table})
    out, stats = flash_attn_varlen_func(q, k, v, *cumulative, 500, 1000, causal=True, gate=gate, return_skip_stats=True)
    assert (out.shape, stats.kept.shape, stats.total.shape) == (q.shape, (5, 4), (5, 4))


def test_a_padded_batch_is_not_taken_for_a_packed_one():
    q, k, v = (x[None] for x in packed(LENGTHS))
    with pytest.raises(InputError, match="got 4, 4, 4 axes"):
        flash_attn_varlen_func(q, k, v, *bounds(LENGTHS), 500, 1000, causal=True)


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_lengths_at_hand_are_checked_before_the_call():
    q, k, v = packed(LENGTHS)
    with pytest.raises(InputError, match="must rise from 0 to"):
        flash_attn_varlen_func(q, k, v, *(x + 1 for x in bounds(LENGTHS)), 500, 1000, causal=True)


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.fixture(autouse=True)
    def _gpu(self):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA GPU")

    @pytest.mark.parametrize("size", [64, 128])
    @pytest.mark.parametrize("table", [None, (2.5, 3.5)], ids=["dense", "table"])
    def test_packed_sequences_equal_the_same_sequences_alone(self, size, table):
        gate = Gate(threshold=torch.linspace(*table, 7, device="cuda").expand(4, 7)) if table else None
        q, k, v = packed(LENGTHS, size=size, device="cuda", dtype=torch.bfloat16)
        cumulative = bounds(LENGTHS, "cuda")
        options = {"causal": True, "gate": gate, "return_lse": True, "return_skip_stats": True}
        out, lse, stats = flash_attn_varlen_func(q, k, v, *cumulative, 500, 1000, **options)
        for b in range(len(LENGTHS)):
            rows, keys = (slice(int(x[b]), int(x[b + 1])) for x in cumulative)
            one, one_lse, one_stats = flash_attn_func(q[None, rows], k[None, keys], v[None, keys], **options)
            assert torch.equal(out[rows], one[0])
            assert torch.equal(lse[:, rows], one_lse[0])
            assert torch.equal(stats.kept[b], one_stats.kept[0])
            assert torch.equal(stats.total[b], one_stats.total[0])

    def test_a_call_does_not_wait_for_the_gpu(self):
        q, k, v = packed(LENGTHS, size=128, device="cuda", dtype=torch.bfloat16)
        cumulative, gate = bounds(LENGTHS, "cuda"), Gate(threshold=torch.zeros(4, 9, device="cuda"))
        options = {"causal": True, "gate": gate, "return_skip_stats": True}
        flash_attn_varlen_func(q, k, v, *cumulative, 500, 1000, **options)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            flash_attn_varlen_func(q, k, v, *cumulative, 500, 1000, **options)
            flash_attn_func(q[None, :300], k[None, :300], v[None, :300], **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @torch.no_grad()
    def test_a_padded_batch_decides_as_its_sequences_do(self):
        torch.manual_seed(0)
        sizes = {"hidden_size": 256, "head_dim": 64}
        model = small_model(**sizes)
        tokens = torch.randint(3, 100, (3, 700), device="cuda")
        mask = torch.ones_like(tokens)
        mask[0, :37], mask[1, :300] = 0, 0
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        table = bsfa.calibrate(model, [tokens], [2], progress=False)
        for method in (Dense(), Bsfa(table, 2), RowShare(0.05), StreamingLLM(local_blocks=1)):
            with bsfa.apply(model, method) as applied:
                together = model(tokens, attention_mask=mask, position_ids=positions).logits
                kept = applied.stats[0][0].kept
                applied.reset()
                alone = [model(tokens[b : b + 1, mask[b].bool()]).logits[0] for b in range(3)]
                want = torch.cat([stats.kept for stats in applied.stats[0]])
            assert (kept - want).abs().sum() / want.sum() < 0.05  # other matrix shapes: rounding
            error = (together[mask.bool()].float() - torch.cat(alone).float()).norm() / torch.cat(alone).float().norm()
            assert error < 0.1

    @torch.no_grad()
    def test_a_layer_does_not_wait_for_the_gpu(self):
        model = small_model(hidden_size=256, head_dim=64)
        tokens = torch.randint(3, 100, (1, 700), device="cuda")
        table = bsfa.calibrate(model, [tokens], [2], progress=False)
        for method in (Dense(), Bsfa(table, 2), RowShare(0.05)):
            with bsfa.apply(model, method):
                model(tokens, use_cache=True, logits_to_keep=1)
                torch.cuda.set_sync_debug_mode("error")
                try:
                    model(tokens, use_cache=True, logits_to_keep=1)
                finally:
                    torch.cuda.set_sync_debug_mode("default")


def small_model(**sizes):
    """A tiny model on the GPU."""
    return LlamaForCausalLM(tiny_config(**sizes)).to("cuda", torch.bfloat16).eval()
