"""Greedy generation with the prefill timed on its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from bsfa.clock import Clock


@dataclass(frozen=True)
class Generated:
    """``ttft`` is the seconds from the prompt to the first token."""

    text: str
    ttft: float


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends an answer."""
    stops = model.generation_config.eos_token_id
    stops = set(stops) if isinstance(stops, list) else {stops}
    return (stops | {tokenizer.eos_token_id}) - {None}


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: tuple[int, ...],
    max_new_tokens: int,
    clock: Clock,
) -> Generated:
    """Answer one prompt greedily.

    Parameters
    ----------
    tokens : tuple of int
        The prompt.
    clock : Clock
        Times the prefill, up to the first token.
    """
    stops = stop_tokens(model, tokenizer)
    cache = DynamicCache(config=model.config)
    prompt = torch.tensor([tokens], device=model.device)
    with clock.span() as ttft:
        logits = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[0, -1].argmax()
    answer: list[int] = []
    while len(answer) < max_new_tokens and int(token) not in stops:
        answer.append(int(token))
        if len(answer) < max_new_tokens:
            logits = model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True).logits
            token = logits[0, -1].argmax()
    return Generated(str(tokenizer.decode(answer)), ttft())
