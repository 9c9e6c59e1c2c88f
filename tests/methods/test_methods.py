from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings

from bsfa import InputError, Thresholds, reference
from bsfa.blocks import BlockGrid
from bsfa.methods import Bsfa, Call, Dense, Sdpa, StreamingLLM
from bsfa.model import ModelInfo
from tests.strategies import calls

DEVICE = torch.device("cpu")


def info(n_heads: int, layers: int = 1) -> ModelInfo:
    return ModelInfo("m", "f", n_heads, n_heads, 16, (DEVICE,) * layers)


@settings(max_examples=20)
@given(calls())
def test_dense_methods_are_exact(call):
    q, k, v, grid = call
    if grid.offset < 0:  # SDPA has no answer for rows that see nothing
        q = q[:, -grid.seqlen_k :]
    prefill = Call(0, q, k, v, window_size=(grid.window_size[0], 0))
    expected, _, _ = reference.attention(q, k, v, prefill.grid, softmax_scale=0.25)
    for method in (Dense(), Sdpa()):
        found = method.bind(info(q.shape[2]))(prefill)
        torch.testing.assert_close(found.out, expected, atol=2e-5, rtol=1e-4)
        assert (found.stats.kept == prefill.grid.total()).all()


def test_bsfa_reads_its_layers_heads_and_positions():
    torch.manual_seed(0)
    q, k = torch.randn(1, 384, 2, 16), torch.randn(1, 384, 2, 16)
    values = torch.full((1, 2, 2, 3), -math.inf)
    values[0, 1, 0, 2] = math.inf  # layer 1, head 0, the third query block: its band alone
    attend = Bsfa(Thresholds(values, (8,)), 8).bind(info(2, layers=2))
    assert attend(Call(0, q, k, k)).stats.kept.tolist() == [[12, 12]]
    assert attend(Call(1, q, k, k)).stats.kept.tolist() == [[8, 12]]


def test_bsfa_with_an_absent_k_or_another_model_is_refused():
    thresholds = Thresholds(torch.zeros(1, 2, 4, 3), (8,))
    with pytest.raises(InputError, match=r"k=9 .* holds k=8"):
        Bsfa(thresholds, 9).bind(info(4, layers=2))
    with pytest.raises(InputError, match="2 layers and 4 heads"):
        Bsfa(thresholds, 8).bind(info(4, layers=3))


def test_streaming_llm_keeps_sinks_window_and_band():
    grid = BlockGrid(1024, 1024, causal=True)
    method = StreamingLLM(local_blocks=3, sink_blocks=2)
    assert method.keep(grid, 0) == [0, 1]
    assert method.keep(grid, 7) == [0, 1, 11, 12, 13, 14, 15]


def test_streaming_llm_runs_the_listed_blocks_alone():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 1000, 4, 16), torch.randn(2, 1000, 2, 16), torch.randn(2, 1000, 2, 16)
    method = StreamingLLM(local_blocks=1)
    found = method.bind(info(4))(Call(0, q, k, v))
    grid = BlockGrid(1000, 1000, causal=True)
    kept = sum(len(method.keep(grid, i)) for i in range(grid.n_q))
    assert (found.stats.kept == kept).all()
    v[:, 128:512] = 0  # outside the sinks, and outside the window of the last query block
    assert torch.equal(method.bind(info(4))(Call(0, q, k, v)).out[:, 896:], found.out[:, 896:])


def test_a_negative_window_is_refused():
    with pytest.raises(InputError, match="local_blocks=-1"):
        StreamingLLM(local_blocks=-1)
