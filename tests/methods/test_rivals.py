"""What every rival has to do: stay causal, leave no query without a key, become dense in its limit, run in a model."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bsfa
from bsfa import InputError
from bsfa.attention import Attended, attend
from bsfa.blocks import BlockLists
from bsfa.gates import Gate
from bsfa.methods import (
    Blasst,
    Call,
    Dense,
    FlashPrefill,
    FlexPrefill,
    Method,
    MInference,
    RowShare,
    SpargeAttn,
    SpargeAttnTopK,
    XAttention,
)
from bsfa.model import ModelInfo
from bsfa.selection import visible
from tests.methods.test_selectors import mask, topical

SPARSE = [
    Blasst(250.0),
    RowShare(0.5),
    XAttention(0.5),
    XAttention(0.2, stride=16),
    MInference(ratio=0.005),
    FlexPrefill(gamma=0.3, tau=0.0, min_budget=128),
    FlexPrefill(gamma=0.3, tau=1.0, min_budget=128),
    SpargeAttn(similarity=-1, cdf=0.5),
    SpargeAttnTopK(similarity=-1, share=0.1),
    FlashPrefill(alpha=0.9, sink_blocks=1, window_blocks=1),
    FlashPrefill(alpha=0.9, sink_blocks=0, window_blocks=1, last_full_blocks=0),
]
DENSE_LIMIT = [
    Blasst(1e-30),
    RowShare(1e-30),
    XAttention(1.0),
    MInference(),
    FlexPrefill(min_budget=10**6),
    SpargeAttn(similarity=1),
    SpargeAttnTopK(share=1.0),
    FlashPrefill(alpha=1e-30),
    FlashPrefill(last_full_blocks=99),
]
IN_CHUNKS = [
    RowShare(0.5),
    XAttention(0.5),
    FlashPrefill(alpha=0.9, sink_blocks=1, window_blocks=1, last_full_blocks=0),
]
IN_ONE_PIECE = [MInference(), FlexPrefill(), SpargeAttn(), SpargeAttnTopK(), FlashPrefill()]
WINDOWS = [(-1, -1), (200, 0)]


def every(methods: list[Method]):
    return pytest.mark.parametrize("method", methods, ids=lambda method: f"{method}")


def info(n_heads: int) -> ModelInfo:
    return ModelInfo("m", "f", n_heads, n_heads, 32, (torch.device("cpu"),))


def prefill(length: int = 1000, **options) -> Call:
    torch.manual_seed(0)
    return Call(0, 2 * topical(2, length, 6), topical(2, length, 2), topical(2, length, 2), **options)


def run(method: Method, call: Call) -> Attended:
    return method.bind(info(call.q.shape[2]))(call)


class Asked(Call):
    """A call that answers with what it is asked to attend, and the log-sum-exp of it."""

    def attend(self, *, gate: Gate | None = None, blocks: BlockLists | None = None):
        options = {"causal": True, "window_size": self.window_size, "gate": gate, "blocks": blocks}
        return blocks, attend(self.q, self.k, self.v, return_lse=True, **options).lse


class Chosen(Call):
    """A call that answers with the lists it is given."""

    def attend(self, *, gate: Gate | None = None, blocks: BlockLists | None = None):
        return blocks


@pytest.mark.parametrize("window_size", WINDOWS)
@pytest.mark.parametrize("length", [257, 1000])
@every(SPARSE)
def test_a_list_is_of_visible_blocks_and_leaves_no_query_without_a_key(method, length, window_size):
    call = prefill(length, window_size=window_size)
    blocks, lse = run(method, Asked(**vars(call)))
    assert lse.isfinite().all()
    if blocks is not None:
        kept, seen = mask(blocks, call.grid.n_k), visible(call.grid, call.q.device)
        assert not (kept & ~seen).any()
        assert (blocks.counts > 0).all()


@every(SPARSE)
def test_no_row_hears_of_a_later_value(method):
    call = prefill()
    before = run(method, call)
    assert before.stats.skip_ratio > 0.02
    call.v[:, 700:] = 99.0
    assert torch.equal(run(method, call).out[:, :700], before.out[:, :700])


@pytest.mark.parametrize("window_size", WINDOWS)
@every(DENSE_LIMIT)
def test_the_limit_is_dense(method, window_size):
    call = prefill(900, window_size=window_size)
    found = run(method, call)
    torch.testing.assert_close(found.out, run(Dense(), call).out)
    assert found.stats.skip_ratio == 0


@every(SPARSE)
def test_a_batch_and_its_heads_are_decided_apart(method):
    call = prefill(600)
    both = run(method, call)
    one = run(method, Call(0, call.q[1:, :, 3:], call.k[1:, :, 1:], call.v[1:, :, 1:]))
    torch.testing.assert_close(one.out, both.out[1:, :, 3:])
    assert torch.equal(one.stats.kept, both.stats.kept[1:, 3:])


@every(IN_CHUNKS)
def test_chunks_of_whole_blocks_are_decided_as_the_whole(method):
    call = prefill(900)
    whole = run(method, call)
    parts = [
        run(method, Call(0, call.q[:, a:b], call.k[:, :b], call.v[:, :b]))
        for a, b in [(0, 256), (256, 384), (384, 900)]
    ]
    torch.testing.assert_close(torch.cat([part.out for part in parts], dim=1), whole.out)
    assert torch.equal(sum(part.stats.kept for part in parts), whole.stats.kept)


@every([*IN_CHUNKS, Blasst(250.0)])
def test_the_last_chunk_may_start_anywhere(method):
    call = prefill(900)
    part = run(method, Call(0, call.q[:, 333:], call.k, call.v))
    assert part.out.isfinite().all()
    assert 0.02 < part.stats.skip_ratio < 1


def test_blasst_decides_the_last_chunk_as_the_whole():
    call = prefill(900)
    part = run(Blasst(250.0), Call(0, call.q[:, 384:], call.k, call.v))
    torch.testing.assert_close(part.out, run(Blasst(250.0), call).out[:, 384:])


@every([XAttention(0.5), FlashPrefill(0.9, 0, 1), FlexPrefill(0.3, min_budget=1), SpargeAttn(-1, 0.5)])
def test_a_nan_shows_in_the_output_as_in_dense_attention(method):
    call = prefill(900)
    call.k[0, 333, 0, 0] = torch.nan
    assert torch.equal(run(method, call).out.isnan(), run(Dense(), call).out.isnan())


@every(IN_CHUNKS)
def test_queries_before_the_first_key_get_nothing(method):
    call = prefill(300)
    found = run(method, Call(0, call.q, call.k[:, :140], call.v[:, :140]))
    assert (found.out[:, :160] == 0).all()
    assert (found.out[:, 160:] != 0).any(-1).all()


@every(IN_ONE_PIECE)
def test_a_rule_over_the_whole_prompt_refuses_a_chunk(method):
    call = prefill(300)
    with pytest.raises(NotImplementedError, match=rf"method={method.name} .* 100 queries over 300 keys.*in one piece"):
        run(method, Call(0, call.q[:, 200:], call.k, call.v))


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that anything made."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tensors = (x for x in tree_leaves(made) if isinstance(x, torch.Tensor))
        self.bytes = max([self.bytes, *(x.untyped_storage().nbytes() for x in tensors)])
        return made


@every([method for method in SPARSE if not isinstance(method, Blasst | RowShare)])
def test_128k_tokens_in_half_precision_fit_on_a_gpu_and_nothing_waits_for_it(method):
    meta = torch.device("meta")  # has shapes and types but no data: what reads a value fails
    q, k = (torch.empty(1, 2**17, heads, 128, dtype=torch.bfloat16, device=meta) for heads in (32, 8))
    model = ModelInfo("m", "f", 32, 8, 128, (meta,))
    with LargestTensor() as largest:
        blocks = method.bind(model)(Chosen(0, q, k, k))
    assert blocks.counts.shape == (1, 32, 1024)
    assert largest.bytes < 2.1 * 2**30


@every(SPARSE + DENSE_LIMIT)
@torch.no_grad()
def test_in_a_model_with_padding(method, tiny_model):
    tokens = torch.randint(3, 100, (2, 400))
    padding = torch.ones_like(tokens)
    padding[0, :37] = 0
    plain = tiny_model(tokens, attention_mask=padding).logits
    with bsfa.apply(tiny_model, method) as applied:
        found = tiny_model(tokens, attention_mask=padding).logits
    assert found.isfinite().all()
    if method in DENSE_LIMIT:
        torch.testing.assert_close(found[padding.bool()], plain[padding.bool()], atol=1e-4, rtol=1e-4)
        assert applied.skip_ratio() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Blasst(0), "factor=0"),
        (lambda: Blasst(float("nan")), "factor=nan"),
        (lambda: XAttention(threshold=1.1), "threshold=1.1 must be a number above 0 up to 1"),
        (lambda: XAttention(threshold="two"), "threshold=two must be a number"),
        (lambda: XAttention(stride=8.0), "stride=8.0 must be a whole number from 1"),
        (lambda: XAttention(stride=24), "stride=24 must divide 128"),
        (lambda: MInference(ratio=0), "ratio=0 must be a number above 0"),
        (lambda: FlexPrefill(gamma=0), "gamma=0"),
        (lambda: FlexPrefill(tau=-1), "tau=-1 must be a number from 0 up to 1"),
        (lambda: FlexPrefill(min_budget=0), "min_budget=0"),
        (lambda: SpargeAttn(cdf=2), "cdf=2"),
        (lambda: SpargeAttn(similarity=2), "similarity=2"),
        (lambda: SpargeAttnTopK(share=-1), "share=-1"),
        (lambda: FlashPrefill(alpha=0), "alpha=0"),
        (lambda: FlashPrefill(window_blocks=0), "window_blocks=0"),
        (lambda: FlashPrefill(sink_blocks=-1), "sink_blocks=-1"),
    ],
)
def test_a_parameter_that_makes_no_sense_is_refused_by_name(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_blasst_factor_fitted_at_longer_prompts_is_refused():
    with pytest.raises(InputError, match=r"factor=1000 over 300 keys is lambda=3.33, above 1; .* at most 300"):
        run(Blasst(1000), prefill(300))


def test_what_a_chunk_of_queries_is_cut_into_changes_nothing(monkeypatch):
    call = prefill(700)
    whole = [run(method, call) for method in SPARSE]
    monkeypatch.setattr("bsfa.selection.CHUNK_ENTRIES", 1)  # one query block at a time
    for method, expected in zip(SPARSE, whole, strict=True):
        assert torch.equal(run(method, call).stats.kept, expected.stats.kept)
