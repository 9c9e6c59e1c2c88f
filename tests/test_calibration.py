from __future__ import annotations

import math

import pytest
import torch

import bsfa
from bsfa import InputError
from bsfa.calibration import layer_cuts
from bsfa.methods import Bsfa, Call


def test_cuts_are_midway_between_the_kth_and_the_next_block_off_the_band():
    torch.manual_seed(0)
    q, k = torch.randn(1, 700, 2, 16), torch.randn(1, 700, 1, 16)
    _, cuts = layer_cuts(Call(0, q, k, k), [1, 3, 20])
    scores = 0.25 * q[0, :, 1] @ k[0, :, 0].T
    for i in range(6):
        rows = scores[128 * i : 128 * (i + 1)]
        maxima = sorted((rows[:, 64 * j : 64 * (j + 1)].max().item() for j in range(2 * i)), reverse=True)
        for n, kth in enumerate([1, 3, 20]):
            expected = (maxima[kth - 1] + maxima[kth]) / 2 if len(maxima) > kth else -math.inf
            assert cuts[n, 0, 1, i].item() == pytest.approx(expected)


def test_a_long_text_is_cut_as_its_chunks_are(monkeypatch):
    torch.manual_seed(0)
    q = torch.randn(1, 900, 1, 16)
    out, whole = layer_cuts(Call(0, q, q, q), [2, 4])
    monkeypatch.setattr("bsfa.calibration.CHUNK_BLOCKS", 2)
    chunked, cuts = layer_cuts(Call(0, q, q, q), [2, 4])
    assert torch.equal(cuts, whole)
    torch.testing.assert_close(chunked, out)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_texts_side_by_side_are_those_read_one_by_one(tiny_model, two_threads):
    texts = list(torch.randint(3, 100, (5, 1, 700)))
    apart = [bsfa.calibrate(tiny_model, [x], [1, 2], progress=False).values for x in texts]
    together = bsfa.calibrate(tiny_model, texts, [1, 2], progress=False).values
    torch.testing.assert_close(together, sum(apart) / 5)
    assert torch.equal(bsfa.calibrate(tiny_model, texts, [1, 2], progress=False).values, together)
    assert torch.get_num_threads() == 2


def test_what_goes_wrong_in_a_text_is_said_and_the_model_is_as_before(tiny_model, two_threads, monkeypatch):
    before = tiny_model.config._attn_implementation
    monkeypatch.setattr("bsfa.calibration.layer_cuts", lambda *_: pytest.fail("no memory"))
    with pytest.raises(pytest.fail.Exception, match="no memory"):
        bsfa.calibrate(tiny_model, list(torch.randint(3, 100, (4, 1, 300))), [1], progress=False)
    assert tiny_model.config._attn_implementation == before
    assert torch.get_num_threads() == 2


def test_calibrated_on_one_text_the_gate_keeps_k_blocks_of_it(tiny_model):
    tokens = torch.randint(3, 100, (1, 1024))
    table = bsfa.calibrate(tiny_model, [tokens], [1, 3], data="random", progress=False)
    assert table.values.shape == (2, 2, 4, 8)
    for k in (1, 3):
        with bsfa.apply(tiny_model, Bsfa(table, k)) as applied, torch.no_grad():
            tiny_model(tokens)
        first = applied.stats[0][0]  # of later layers the input has changed
        extra = first.kept - 16 - sum(min(k, 2 * i) for i in range(8))
        assert extra.min() == 0
        assert extra.max() <= 1  # the same two tokens at the same distance: a tie


def test_texts_are_averaged_where_they_reach(tiny_model):
    torch.manual_seed(0)
    short, long = torch.randint(3, 100, (2, 400)), torch.randint(3, 100, (1, 700))
    together = bsfa.calibrate(tiny_model, [short, long], [1], progress=False)
    apart = [bsfa.calibrate(tiny_model, [x], [1], progress=False).values for x in (short[:1], short[1:], long)]
    torch.testing.assert_close(together.values[..., :4], sum(x[..., :4] for x in apart) / 3)
    torch.testing.assert_close(together.values[..., 4:], apart[2][..., 4:])
    assert (together.provenance.samples, together.provenance.sequence_length) == (3, 700)


def test_the_file_says_where_it_comes_from(tiny_model):
    tokens = torch.randint(3, 100, (1, 300))
    first, same, other = (
        bsfa.calibrate(tiny_model, [x], [1], data="d", progress=False).provenance for x in (tokens, tokens, tokens + 1)
    )
    assert first == same
    assert first.data == "d"
    assert first.data_hash != other.data_hash
    assert first.fingerprint == other.fingerprint


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "at least one text"),
        ([torch.zeros(5, dtype=torch.int64)], {}, r"must be \(B, S\)"),
        ([torch.zeros(1, 5000, dtype=torch.int64)], {}, "5000 tokens is beyond the model's 2048"),
        ([torch.zeros(1, 8, dtype=torch.int64)], {"k_values": [0, 4]}, "at least 1"),
        ([torch.zeros(1, 8, dtype=torch.int64)], {"block_size": (64, 64)}, r"only \(128, 64\)"),
    ],
)
def test_bad_calibration_input_is_refused_before_any_work(tiny_model, batches, options, message):
    with pytest.raises(InputError, match=message):
        bsfa.calibrate(tiny_model, batches, **options)
