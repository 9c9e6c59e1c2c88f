"""A model of a given architecture with random weights: for time and memory, never for what it says."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED = 0  # of the weights
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] "


def build(config: PreTrainedConfig, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The model, made on its device in its dtype: what 8 billion weights take, they take there and nowhere before."""
    torch.manual_seed(SEED)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def characters(config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """A tokenizer for a shape that comes without one: one token a printable character."""
    special = ["<unknown>", "<start>", "<end>"]
    alphabet = {token: number for number, token in enumerate([*special, *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(alphabet, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
        chat_template=TEMPLATE,
        model_max_length=getattr(config, "max_position_embeddings", None),
    )
