"""The cost of a cut, against the divergence that it really causes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import bsfa
from bsfa import Cuts, InputError, calibrate_cuts
from bsfa.distance import share_gate
from bsfa.methods import Call, FisherShare, Method
from tests.conftest import tiny_config

TAIL = 64
SHARES = (0.0, 0.02, 0.05, 1e30)


def texts(*lengths: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randint(3, 100, (1, length)) for length in lengths]


@dataclass(frozen=True)
class OneHead(Method):
    """The gate at one layer and head, nothing elsewhere."""

    layer: int
    head: int
    relative: float

    def bind(self, model):
        cuts = torch.full((model.n_layers, model.n_heads), -torch.inf)
        cuts[self.layer, self.head] = self.relative
        gates = [share_gate(row) for row in cuts]
        return lambda call: call.attend(gate=gates[call.layer])


def log_p(model: LlamaForCausalLM, tokens: torch.Tensor, method: Method) -> tuple[torch.Tensor, bsfa.SkipStats]:
    with torch.no_grad(), bsfa.apply(model, method) as applied:
        logits = model(tokens, logits_to_keep=TAIL).logits
    return logits[0].log_softmax(-1), applied.stats


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(initializer_range=0.1)).eval()


@pytest.fixture(scope="module")
def found(model) -> Cuts:
    return calibrate_cuts(model, texts(900, 700), SHARES, tail=TAIL, progress=False)


def test_the_estimate_is_the_divergence_that_one_heads_loss_causes(model):
    [tokens] = texts(640)
    table = calibrate_cuts(model, [tokens], SHARES, (), tail=TAIL, samples=32, progress=False)
    dense, _ = log_p(model, tokens, OneHead(0, 0, -torch.inf))
    estimated, measured = [], []
    for layer, head, (n, share) in ((la, h, x) for la in range(2) for h in range(4) for x in enumerate(SHARES)):
        sparse, stats = log_p(model, tokens, OneHead(layer, head, float(torch.tensor(share).log())))
        assert table.kept[n, layer, head, 0] == stats[layer][0].kept[0, head]
        estimated.append(float(table.cost[n, layer, head, 0]))
        measured.append(float((dense.exp() * (dense - sparse)).sum(-1).mean()))
    assert all(cost == 0 for cost in estimated[:: len(SHARES)])
    pairs = [(e, m) for e, m in zip(estimated, measured, strict=True) if e]
    assert len(pairs) >= 16
    assert all(1 / 2 < e / m < 2 for e, m in pairs)
    logs = np.log(pairs)
    assert np.corrcoef(logs[:, 0], logs[:, 1])[0, 1] > 0.95


def test_blocks_are_counted_by_class_and_no_class_of_a_short_text(found):
    visible = torch.tensor([sum(2 * i + 2 for i in range(*r)) for r in ((6, 8), (4, 6), (0, 4))], dtype=torch.float32)
    other = torch.tensor([sum(2 * i + 2 for i in range(*r)) for r in ((4, 6), (2, 4), (0, 2))], dtype=torch.float32)
    odd = torch.tensor([1.0, 0, 0])  # 900 and 700 tokens end in the first half of a block
    expected = torch.cat([((visible - odd) + (other - odd)) / 2, torch.zeros(2)])
    torch.testing.assert_close(found.kept[0], expected.expand(2, 4, 5))
    assert (found.cost[:, 0, :, :3].max(0).values > 0).all()
    assert not found.cost[:, 1, :, 1:].any()  # what the last layer does before the tail changes no token of it
    assert not found.cost[..., 3:].any()


def test_a_batch_counts_as_its_texts(model):
    rows = torch.cat(texts(500, 500))
    together, apart = (
        calibrate_cuts(model, batches, (0.0, 0.05), tail=TAIL, samples=2, progress=False)
        for batches in ([rows], [rows[:1], rows[1:]])
    )
    assert torch.equal(together.kept, apart.kept)
    assert together.change.shape == apart.change.shape == (2, 2, 4, 5, 4)
    assert together.provenance == apart.provenance


def test_the_model_is_left_as_it_was_and_a_calibration_can_be_repeated(model, found):
    before = model.config._attn_implementation
    again = calibrate_cuts(model, texts(900, 700), SHARES, tail=TAIL, progress=False)
    assert again.digest() == found.digest()
    assert model.config._attn_implementation == before
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


def test_a_budget_next_to_nothing_is_dense_and_a_boundless_one_keeps_sink_and_diagonal(model, found):
    [tokens] = texts(800)
    exact, _ = log_p(model, tokens, OneHead(0, 0, -torch.inf))
    nothing, _ = log_p(model, tokens, FisherShare(found, 1e-30))
    torch.testing.assert_close(nothing, exact)
    _, stats = log_p(model, texts(900)[0], FisherShare(found, 1e9))
    assert (stats[0][0].kept == 2 + 6 * 3 + 2).all()  # the last query block sees one block of its band


def test_a_coupling_buys_other_cuts_for_a_loss_of_the_same_order(model, found):
    alone, together = (found.select(0.05, coupling=coupling) for coupling in (0, 1))
    assert not torch.equal(alone, together)
    [tokens] = texts(800)
    dense, _ = log_p(model, tokens, OneHead(0, 0, -torch.inf))
    sparse, stats = log_p(model, tokens, FisherShare(found, 0.05, coupling=1.0))
    assert (dense.exp() * (dense - sparse)).sum(-1).mean() < 0.3
    assert stats[0][0].kept.sum() < stats[0][0].total.sum()


def test_the_last_query_blocks_read_the_first_class(model, found):
    """Cuts that keep all near the end and nothing before it."""
    values = torch.zeros(2, 2, 4, 2)
    values[0], values[1, ..., 1] = 10, 1
    change = torch.zeros(*values.shape, 1)
    change[1, ..., 0, :] = 1
    cuts = Cuts(values, change, 1, (0.0, 1e30), (2,), provenance=found.provenance)
    [tokens] = texts(768)
    kept = {}
    for length in (768, 512):
        _, stats = log_p(model, tokens[:, :length], FisherShare(cuts, 0.1))
        kept[length] = stats[0][0].kept[0].tolist()
    assert kept == {768: [12 + 10 + 2 + 3 * 3] * 4, 512: [8 + 6 + 2 + 3] * 4}


def test_each_chunk_of_a_prefill_ends_as_a_prompt_does(model, found):
    torch.manual_seed(0)
    q, k = torch.randn(1, 768, 4, 16), torch.randn(1, 768, 2, 16)
    call = Call(1, q, k, k)
    attend = FisherShare(found, 0.05).bind(bsfa.model.describe(model))
    first, second = (attend(replace(call, q=q[:, a:b], k=k[:, :b], v=k[:, :b])) for a, b in ((0, 384), (384, 768)))
    alone = attend(replace(call, q=q[:, :384], k=k[:, :384], v=k[:, :384]))
    whole = attend(call)
    assert torch.equal(first.out, alone.out)
    torch.testing.assert_close(second.out, whole.out[:, 384:])
    assert (first.stats.kept + second.stats.kept >= whole.stats.kept).all()


def test_padding_changes_nothing(model, found):
    long, short = (x[0] for x in texts(600, 400))
    ids = torch.stack([long, torch.cat([torch.zeros(200, dtype=torch.int64), short])])
    mask = (torch.arange(600) >= torch.tensor([[0], [200]])).long()
    with torch.no_grad(), bsfa.apply(model, FisherShare(found, 0.02)):
        padded = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        torch.testing.assert_close(padded[1, 200:], model(short[None]).logits[0], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(padded[0], model(long[None]).logits[0], atol=1e-4, rtol=1e-3)


def test_cuts_of_another_model_are_refused(found):
    other = LlamaForCausalLM(tiny_config(num_hidden_layers=1))
    with pytest.raises(InputError, match="2 layers and 4 heads"), bsfa.apply(other, FisherShare(found, 0.01)):
        pass


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "at least one text"),
        (texts(100), {}, "no text shorter than the tail"),
        (texts(300), {"samples": 0}, "samples=0"),
        (texts(300), {"shares": [0.1, 0.2]}, "must rise from 0"),
        (texts(300), {"edges": [4, 2]}, "must rise, from 1"),
    ],
)
def test_bad_calibration_input_is_refused_before_any_work(model, batches, options, message):
    with pytest.raises(InputError, match=message):
        calibrate_cuts(model, batches, **options)
