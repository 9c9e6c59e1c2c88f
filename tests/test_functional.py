from __future__ import annotations

import inspect
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bsfa
from bsfa import Gate, InputError, flash_attn_func, flash_attn_varlen_func

ROOT = Path(__file__).parents[1]


def qkv(seqlen_q=200, seqlen_k=200, n_heads=4, n_kv=2, head_dim=16, dtype=torch.float32):
    torch.manual_seed(0)
    q = torch.randn(1, seqlen_q, n_heads, head_dim, dtype=dtype)
    k, v = (torch.randn(1, seqlen_k, n_kv, head_dim, dtype=dtype) for _ in range(2))
    return q, k, v


def test_the_positional_arguments_are_flash_attns():
    names = [p.name for p in inspect.signature(flash_attn_func).parameters.values() if p.kind != p.KEYWORD_ONLY]
    assert names == [
        "q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes",
        "deterministic", "return_attn_probs",
    ]  # fmt: skip


def test_no_gate_is_dense_attention_and_so_is_a_gate_of_minus_infinity():
    q, k, v = qkv()
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    for gate in (None, -math.inf, Gate()):
        out, stats = flash_attn_func(q, k, v, causal=True, gate=gate, return_skip_stats=True)
        torch.testing.assert_close(out, expected)
        assert stats.skip_ratio == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32_and_returned_in_kind(dtype):
    q, k, v = qkv(dtype=dtype)
    out = flash_attn_func(q, k, v, causal=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out, flash_attn_func(q.float(), k.float(), v.float(), causal=True).to(dtype))


def test_a_chunk_of_a_prefill_decides_as_the_whole_does():
    q, k, v = qkv(seqlen_q=640, seqlen_k=640)
    gate = Gate(threshold=torch.linspace(3.2, 4.2, 5).expand(4, 5))
    whole, stats = flash_attn_func(q, k, v, causal=True, gate=gate, return_skip_stats=True)
    chunks = [
        flash_attn_func(q[:, a:b], k[:, :b], v[:, :b], causal=True, gate=gate, return_skip_stats=True)
        for a, b in [(0, 256), (256, 384), (384, 640)]
    ]
    assert 0.1 < stats.skip_ratio < 0.9
    torch.testing.assert_close(torch.cat([out for out, _ in chunks], dim=1), whole)
    assert torch.equal(sum(part.kept for _, part in chunks), stats.kept)
    assert torch.equal(sum(part.total for _, part in chunks), stats.total)


def test_a_batch_is_its_elements():
    torch.manual_seed(1)
    q, k, v = (torch.randn(3, 190, 2, 16) for _ in range(3))
    out, lse = flash_attn_func(q, k, v, causal=True, gate=2.0, return_lse=True)
    for b in range(3):
        one, one_lse = flash_attn_func(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True, gate=2.0, return_lse=True)
        assert torch.equal(one[0], out[b])
        assert torch.equal(one_lse[0], lse[b])


def test_rows_that_see_nothing_give_zero_and_minus_infinity():
    q, k, v = qkv(seqlen_q=200, seqlen_k=50)
    out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
    assert (out[:, :150] == 0).all()
    assert (lse[..., :150] == -math.inf).all()
    assert lse[..., 150:].isfinite().all()


def test_a_packed_batch_is_its_sequences():
    torch.manual_seed(2)
    lengths_q, lengths_k = [130, 1, 70], [200, 64, 70]
    q = torch.randn(sum(lengths_q), 4, 16)
    k, v = (torch.randn(sum(lengths_k), 2, 16) for _ in range(2))
    bounds = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k)]
    out, lse, stats = flash_attn_varlen_func(
        q, k, v, *bounds, 130, 200, causal=True, gate=1.5, return_lse=True, return_skip_stats=True
    )
    assert out.shape == q.shape
    assert lse.shape == (4, len(q))
    for b in range(3):
        rows, keys = (slice(x[b], x[b + 1]) for x in bounds)
        one = flash_attn_func(
            q[None, rows], k[None, keys], v[None, keys], causal=True, gate=1.5, return_skip_stats=True
        )
        assert torch.equal(out[rows], one[0][0])
        assert torch.equal(stats.kept[b], one[1].kept[0])


def test_strided_inputs_need_no_copy_by_the_caller():
    q, k, v = qkv()
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(
        flash_attn_func(*heads_first, causal=True, gate=1.0), flash_attn_func(q, k, v, causal=True, gate=1.0)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 8, 4)}, r"must be \(batch, seqlen, heads, head size\)"),
        ({"k": torch.zeros(1, 8, 2, 16, dtype=torch.float16)}, "one dtype"),
        ({n: torch.zeros(1, 8, 2, 16, dtype=torch.float64) for n in "qkv"}, "float64 is not supported"),
        ({"v": torch.zeros(1, 8, 2, 16, device="meta")}, "one device"),
        ({"q": torch.zeros(1, 8, 4, 32)}, "one head size"),
        ({"q": torch.zeros(1, 8, 3, 16)}, "multiple of KV heads, got 3 and 2"),
        ({"v": torch.zeros(1, 9, 2, 16)}, "k and v must have one shape"),
        ({"softmax_scale": -1.0}, "positive and finite, got -1.0"),
        ({"softmax_scale": math.nan}, "positive and finite, got nan"),
        ({"gate": torch.zeros(3)}, "for 3 heads, the call has 4"),
        ({"gate": math.nan}, "NaN"),
        ({"backend": "triton"}, "'triton' is none of auto, reference, cuda"),
        ({"backend": "cuda"}, "'cuda'.*'reference'"),
    ],
)
def test_bad_input_is_one_clear_error(change, message):
    call = dict(zip("qkv", qkv(8, 8), strict=True)) | change
    with pytest.raises(InputError, match=message):
        flash_attn_func(**call)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dropout_p": 0.1}, "dropout_p=0.1"),
        ({"alibi_slopes": torch.zeros(4)}, "alibi_slopes"),
        ({"return_attn_probs": True}, "return_lse"),
    ],
)
def test_what_flash_attn_has_and_this_has_not_is_named(option, message):
    with pytest.raises(NotImplementedError, match=message):
        flash_attn_func(*qkv(8, 8), **option)


def test_a_backward_pass_says_that_there_is_none():
    q, k, v = qkv(8, 8)
    out = flash_attn_func(q.requires_grad_(), k, v)
    with pytest.raises(NotImplementedError, match="forward only"):
        out.sum().backward()


@pytest.mark.parametrize("bounds", [[0, 5], [1, 8], [0, 6, 4, 8], [0, 8]])
def test_bad_sequence_bounds_are_refused(bounds):
    q = torch.zeros(8, 2, 16)
    bounds = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(InputError, match="cu_seqlens_q"):
        flash_attn_varlen_func(q, q, q, bounds, bounds, 7, 8)


def test_reports_do_not_bring_torch_nor_attention_alone_transformers():
    asked = (
        "import sys, bsfa; from experiments import kernel_report, figures; print('torch' in sys.modules)",
        "import bsfa.methods; bsfa.flash_attn_func; print('transformers' in sys.modules)",
    )
    ended = subprocess.run(
        [sys.executable, "-c", "; ".join(asked)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert ended.stdout.split() == ["False", "False"]
    assert callable(bsfa.apply)
