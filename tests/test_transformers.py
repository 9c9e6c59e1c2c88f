"""`bsfa.apply` on the architectures people use: the stock model's logits, and the stock model back."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

import bsfa
from bsfa import InputError, Thresholds
from bsfa.clock import WallClock
from bsfa.methods import Bsfa, Dense, Sdpa, StreamingLLM
from bsfa.model import fingerprint
from bsfa.padding import Padding
from tests import conftest
from tests.conftest import tiny_config

SIZES = conftest.SIZES | {"pad_token_id": 0}
SLIDING = {"sliding_window": 70, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS = {
    "llama, head size 128": tiny_config(head_dim=128),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "mistral, sliding": MistralConfig(**SIZES, sliding_window=70),
    "gemma": GemmaConfig(**SIZES, head_dim=32),
    "gemma2, sliding and softcap": Gemma2Config(**SIZES, head_dim=32, attn_logit_softcapping=5.0, **SLIDING),
    "gemma3, sliding": Gemma3TextConfig(**SIZES, head_dim=32, **SLIDING),
    "phi3": Phi3Config(**SIZES),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, bos_token_id=1, eos_token_id=2),
}


def stock(name: str):
    """A random model with its own attention; SDPA has no softcap, so Gemma 2 runs eagerly."""
    torch.manual_seed(0)
    implementation = "eager" if "softcap" in name else "sdpa"
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=implementation).eval()


def open_thresholds(layers: int = 2, heads: int = 4) -> Thresholds:
    return Thresholds(torch.full((1, layers, heads, 3), -math.inf), (16,))


METHODS = [Dense(), Bsfa(open_thresholds(), 16), StreamingLLM(local_blocks=99)]


def batch(length: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Two texts, one padded left and one right."""
    torch.manual_seed(0)
    tokens = torch.randint(3, 128, (2, length))
    mask = torch.ones_like(tokens)
    mask[0, :37] = 0
    mask[1, length - 10 :] = 0
    return tokens, mask


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_gate_that_keeps_all_gives_the_stock_models_logits(name):
    model, (tokens, mask) = stock(name), batch()
    plain, padded = model(tokens).logits, model(tokens, attention_mask=mask).logits
    before = model.config._attn_implementation
    for method in METHODS:
        with bsfa.apply(model, method) as applied:
            torch.testing.assert_close(model(tokens).logits, plain, atol=1e-4, rtol=1e-4)
            found = model(tokens, attention_mask=mask).logits
        torch.testing.assert_close(found[mask.bool()], padded[mask.bool()], atol=1e-4, rtol=1e-4)
        assert applied.skip_ratio() == 0.0
        assert model.config._attn_implementation == before
    assert torch.equal(model(tokens).logits, plain)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_continues_as_the_stock_model_does(name, cache):
    model, (tokens, mask) = stock(name), batch(150)
    mask[1] = 1  # generation pads left
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask, "cache_implementation": cache}
    expected = model.generate(tokens, **options)
    with bsfa.apply(model, METHODS[1]):
        assert torch.equal(model.generate(tokens, **options), expected)


@torch.no_grad()
def test_a_prefill_in_chunks_gives_the_whole_ones_logits_and_decisions(tiny_model):
    tokens = torch.randint(3, 100, (1, 640))
    table = bsfa.calibrate(tiny_model, [tokens], [2], progress=False)
    with bsfa.apply(tiny_model, Bsfa(table, 2)) as applied:
        whole, stats = tiny_model(tokens).logits, list(applied.skip_ratio_by_layer())
        applied.reset()
        cache = DynamicCache(config=tiny_model.config)
        parts = [
            tiny_model(tokens[:, a:b], past_key_values=cache).logits for a, b in [(0, 256), (256, 400), (400, 640)]
        ]
    assert min(stats) > 0.2
    torch.testing.assert_close(torch.cat(parts, dim=1)[:, :256], whole[:, :256])
    with bsfa.apply(tiny_model, Bsfa(table, 2)) as applied:  # chunks of whole blocks: the very same decisions
        cache = DynamicCache(config=tiny_model.config)
        parts = [tiny_model(tokens[:, a:b], past_key_values=cache).logits for a, b in [(0, 256), (256, 640)]]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert applied.skip_ratio_by_layer() == stats


def test_the_model_is_restored_after_an_error(tiny_model):
    names = set(AttentionInterface._global_mapping)
    with pytest.raises(RuntimeError, match="mine"), bsfa.apply(tiny_model, Dense()):
        raise RuntimeError("mine")
    assert tiny_model.config._attn_implementation == "sdpa"
    assert set(AttentionInterface._global_mapping) == names


def test_one_inside_another_gives_way_and_comes_back(tiny_model):
    tokens = torch.randint(3, 100, (1, 300))
    with bsfa.apply(tiny_model, Dense()) as outer, torch.no_grad():
        with bsfa.apply(tiny_model, StreamingLLM(1)) as inner:
            tiny_model(tokens)
        assert (len(inner.stats), len(outer.stats)) == (2, 0)
        tiny_model(tokens)
        assert len(outer.stats) == 2


def test_a_clock_times_each_layer(tiny_model):
    with bsfa.apply(tiny_model, Sdpa(), clock=WallClock()) as applied, torch.no_grad():
        tiny_model(torch.randint(3, 100, (1, 64)))
    assert sorted(applied.seconds) == [0, 1]
    assert applied.attention_seconds() > 0


def test_no_grad_is_not_required(tiny_model):
    with bsfa.apply(tiny_model, Dense()):
        logits = tiny_model(torch.randint(3, 100, (1, 64))).logits
    with pytest.raises(NotImplementedError, match="forward only"):
        logits.sum().backward()


def refusals():
    small = {"num_local_experts": 2, "num_experts_per_tok": 1}
    yield GptOssConfig(**SIZES, head_dim=16, **small), "layers.0.self_attn has learned attention sinks"
    yield (
        BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64),
        "BertLMHeadModel",
    )


@pytest.mark.parametrize(("config", "message"), refusals())
def test_a_model_that_cannot_be_served_is_named(config, message):
    kind = BertLMHeadModel if isinstance(config, BertConfig) else AutoModelForCausalLM.from_config
    with pytest.raises(InputError, match=message), bsfa.apply(kind(config), Dense()):
        pass


def test_thresholds_of_another_model_are_refused_before_anything_changes(tiny_model):
    with pytest.raises(InputError, match="3 layers and 4 heads"), bsfa.apply(tiny_model, Bsfa(open_thresholds(3), 16)):
        pass
    assert tiny_model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_compiled_model_decides_and_answers_as_it_does_uncompiled(tiny_model):
    tokens = torch.randint(3, 100, (1, 300))
    method = Bsfa(bsfa.calibrate(tiny_model, [tokens], [1], progress=False), 1)
    compiled = torch.compile(tiny_model, backend="eager")
    answered = []
    for served in (tiny_model, compiled):
        with bsfa.apply(served, method) as applied:
            answered.append((served(tokens).logits, applied.skip_ratio_by_layer()))
    (plain, skipped), (logits, ratios) = answered
    torch.testing.assert_close(logits, plain)
    assert ratios == skipped
    assert min(ratios) > 0
    torch._dynamo.reset()
    with bsfa.apply(tiny_model, method), pytest.raises(torch._dynamo.exc.Unsupported, match="without fullgraph=True"):
        torch.compile(tiny_model, backend="eager", fullgraph=True)(tokens)


@torch.no_grad()
def test_masks_that_are_not_causal_with_padding_are_refused(tiny_model):
    tokens = torch.randint(3, 100, (1, 64))
    with bsfa.apply(tiny_model, Dense()):
        with pytest.raises(NotImplementedError, match="4-D attention mask"):
            tiny_model(tokens, attention_mask=torch.ones(1, 1, 64, 64, dtype=torch.bool))
        with pytest.raises(NotImplementedError, match="packed; pass cu_seq_lens_q"):
            tiny_model(tokens, position_ids=torch.arange(64).remainder(32)[None], use_cache=False)


@torch.no_grad()
def test_a_model_whose_layers_are_compiled_one_by_one_is_the_model_that_was_calibrated(tiny_model):
    tokens = torch.randint(3, 100, (1, 300))
    method = Bsfa(bsfa.calibrate(tiny_model, [tokens], [1], progress=False), 1)
    layers = tiny_model.model.layers
    layers[0] = torch.compile(layers[0], backend="eager")
    with bsfa.apply(tiny_model, method) as applied:
        tiny_model(tokens)
    assert applied.skip_ratio() > 0
    torch._dynamo.reset()


def test_training_with_dropout_is_refused():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(attention_dropout=0.1)).train()
    with bsfa.apply(model, Dense()), pytest.raises(NotImplementedError, match=r"model.eval\(\)"):
        model(torch.randint(3, 100, (1, 64)))


def test_a_fingerprint_knows_a_model_in_any_dtype_and_not_its_neighbour(tiny_model):
    state = {name: weight.bfloat16().float() for name, weight in tiny_model.state_dict().items()}
    tiny_model.load_state_dict(state)
    own = fingerprint(tiny_model)
    assert fingerprint(tiny_model.bfloat16()) == own
    assert fingerprint(tiny_model.half()) == own
    torch.manual_seed(1)
    assert fingerprint(AutoModelForCausalLM.from_config(tiny_config())) != own


PACKED = [Dense(), Bsfa(open_thresholds(), 16), StreamingLLM(local_blocks=1)]


@pytest.mark.parametrize("method", PACKED, ids=lambda method: method.name)
@torch.no_grad()
def test_a_packed_batch_is_its_sequences(tiny_model, method):
    torch.manual_seed(0)
    parts = [torch.randint(3, 100, (1, n)) for n in (300, 5, 170)]
    lengths = [part.shape[1] for part in parts]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None], "use_cache": False}
    with bsfa.apply(tiny_model, method) as applied:
        want = torch.cat([tiny_model(part).logits for part in parts], dim=1)
        alone = applied.skip_ratio_by_layer()
        applied.reset()
        where = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 300, "max_length_k": 300}
        got = tiny_model(torch.cat(parts, dim=1), **packed, **where).logits
        assert applied.skip_ratio_by_layer() == alone
        with pytest.raises(NotImplementedError, match="pass cu_seq_lens_q"):
            tiny_model(torch.cat(parts, dim=1), **packed)
        with pytest.raises(InputError, match="one row of tokens, got 2 rows"):
            tiny_model(torch.zeros(2, 8, dtype=torch.int64), use_cache=False, **where)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_padded_batch_decides_as_its_sequences_do(tiny_model):
    tokens, mask = batch(700)
    tokens, positions = tokens % 100, (mask.cumsum(1) - 1).clamp_min(0)
    table = bsfa.calibrate(tiny_model, [tokens], [2], progress=False)
    for method in (Bsfa(table, 2), StreamingLLM(local_blocks=1)):
        with bsfa.apply(tiny_model, method) as applied:
            together = tiny_model(tokens, attention_mask=mask, position_ids=positions).logits
            kept = [stats[0].kept for stats in applied.stats.values()]
            applied.reset()
            alone = [tiny_model(tokens[b : b + 1, mask[b].bool()]).logits[0] for b in (0, 1)]
            want = [torch.cat([stats.kept for stats in layer]) for layer in applied.stats.values()]
        assert all(torch.equal(x, y) for x, y in zip(kept, want, strict=True))
        assert 0.1 < applied.skip_ratio() < 0.9
        torch.testing.assert_close(together[mask.bool()], torch.cat(alone), atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_a_mask_is_read_once_for_all_layers(tiny_model, monkeypatch):
    read = []
    of = Padding.of
    monkeypatch.setattr(Padding, "of", lambda *arguments: read.append(1) or of(*arguments))
    tokens, mask = batch(150)
    with bsfa.apply(tiny_model, Dense()):
        for _ in range(2):
            tiny_model(tokens % 100, attention_mask=mask)
    assert len(read) == 2
