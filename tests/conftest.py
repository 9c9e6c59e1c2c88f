"""A tiny model and tokenizer, on disk as a user's would be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bsfa import attention

# A tiny model's threads wait for one another longer than they work, and ten times longer where cores are shared.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

settings.register_profile("bsfa", deadline=None)
settings.load_profile("bsfa")

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_config(**changes) -> LlamaConfig:
    """Two layers, four query heads on two KV heads, head size 16, scores far enough apart to be gated."""
    return LlamaConfig(**(SIZES | {"max_position_embeddings": 2048, "initializer_range": 0.2} | changes))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    alphabet = ["<pad>", "<s>", "</s>", *(chr(i) for i in range(32, 127)), "\n"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture
def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config()).eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model with its tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    """The CUDA backend's path, whatever the tensors' device."""
    monkeypatch.setattr(attention, "pick_backend", lambda backend, device: "cuda" if backend == "auto" else backend)
    monkeypatch.setattr(attention, "_check_cuda", lambda *_: None)
