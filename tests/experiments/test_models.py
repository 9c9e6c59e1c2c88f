from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from bsfa import InputError
from experiments.models import ModelSource


def source(path: Path, **settings) -> ModelSource:
    return ModelSource(**{"name": "tiny", "dtype": "float32", "device": "cpu", "path": str(path)} | settings)


@pytest.fixture
def copied(model_folder, tmp_path) -> Path:
    """The same model elsewhere, in a folder of the same name."""
    return Path(shutil.copytree(model_folder, tmp_path / model_folder.name))


def test_a_model_is_itself_wherever_it_lies_and_in_another_dtype_another(model_folder, copied):
    assert source(copied).identity() == source(model_folder).identity()
    assert source(copied, dtype="bfloat16").identity() != source(model_folder).identity()


@pytest.mark.parametrize("place", [0.05, 0.5, 0.999])
def test_other_weights_are_another_model(model_folder, copied, place):
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[int(place * len(content))] ^= 1
    weights.write_bytes(content)
    assert source(copied).identity() != source(model_folder).identity()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_another_tokenizer_or_chat_template_is_another_model(model_folder, copied, name):
    (copied / name).write_text((copied / name).read_text() + " ")
    assert source(copied).identity() != source(model_folder).identity()


def test_a_missing_package_names_the_command_that_installs_it():
    with pytest.raises(InputError, match=r"pip install no-such-model, or use model\.path=DIR"):
        ModelSource("tiny", "float32", "cpu", package="no-such-model").identity()


def test_a_model_is_loaded_in_its_dtype_and_ready_to_answer(model_folder):
    model = source(model_folder, dtype="bfloat16").load().model
    assert model.dtype == torch.bfloat16
    assert not model.training
