"""Greedy generation: each prompt read and timed on its own, the answers to several prompts decoded together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from bsfa.clock import Clock
from bsfa.errors import InputError
from experiments.prefill import Prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Prefilled:
    """A prompt that has been read.

    Attributes
    ----------
    cache : DynamicCache
        Its keys and values. `decode` uses it up.
    length : int
        Tokens of the prompt.
    token : Tensor
        The answer's first token, int64 ().
    ttft : function
        The seconds from the prompt to that token; waits for a GPU.
    """

    cache: DynamicCache
    length: int
    token: torch.Tensor
    ttft: Callable[[], float]


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends an answer."""
    stops = model.generation_config.eos_token_id
    stops = set(stops) if isinstance(stops, list) else {stops}
    return (stops | {tokenizer.eos_token_id}) - {None}


def check_batch(model: PreTrainedModel, batch: int) -> None:
    """Refuse to decode prompts together whose caches cannot stand side by side.

    Raises
    ------
    InputError
        A layer that does not keep every key, such as one with a sliding window.
    """
    layers = DynamicCache(config=model.config).layers
    if batch > 1 and any(type(layer) is not DynamicLayer for layer in layers):
        raise InputError(f"batch={batch}: {type(model).__name__} has layers that do not keep every key; use batch=1")


@torch.inference_mode()
def prefill(model: PreTrainedModel, tokens: tuple[int, ...], how: Prefill, clock: Clock) -> Prefilled:
    """Read one prompt, up to the answer's first token."""
    cache = DynamicCache(config=model.config)
    prompt = torch.tensor([tokens], device=model.device)
    with clock.span() as ttft:
        token = how.read(model, prompt, cache)[0].argmax()
    return Prefilled(cache, len(tokens), token, ttft)


@torch.inference_mode()
def decode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prefilled], max_new_tokens: int
) -> list[str]:
    """Go on greedily from several prompts at once, a token each a step.

    Returns
    -------
    list of str
        The answers, each up to its own stop token.
    """
    stops = stop_tokens(model, tokenizer)
    lengths = torch.tensor([prompt.length for prompt in prompts], device=model.device)
    longest = int(lengths.max())
    cache = prompts[0].cache if len(prompts) == 1 else _side_by_side(model, prompts, longest)
    padded = bool((lengths < longest).any())
    seen = torch.arange(longest + max_new_tokens, device=model.device) >= (longest - lengths)[:, None]
    token = torch.stack([prompt.token for prompt in prompts])
    answers: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for step in range(max_new_tokens):
        values = token.tolist()
        going -= {row for row in going if values[row] in stops}
        for row in going:
            answers[row].append(values[row])
        if not going or step + 1 == max_new_tokens:
            break
        logits = model(
            input_ids=token[:, None],
            position_ids=lengths[:, None] + step,
            attention_mask=seen[:, : longest + step + 1] if padded else None,
            past_key_values=cache,
            use_cache=True,
        ).logits
        token = logits[:, -1].argmax(-1)
    return [str(tokenizer.decode(answer)) for answer in answers]


def _side_by_side(model: PreTrainedModel, prompts: Sequence[Prefilled], longest: int) -> DynamicCache:
    """One cache of several prompts, padded on the left. Layer by layer, so that no more than one is held twice."""
    together = DynamicCache(config=model.config)
    for index in range(len(prompts[0].cache.layers)):
        layers: list[Any] = [prompt.cache.layers.pop(0) for prompt in prompts]
        keys, values = (
            torch.cat([pad(tensor, (0, 0, longest - tensor.shape[2], 0)) for tensor in tensors])
            for tensors in ([layer.keys for layer in layers], [layer.values for layer in layers])
        )
        together.update(keys, values, index)
    return together
