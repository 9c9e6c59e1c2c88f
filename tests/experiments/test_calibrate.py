from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from experiments.calibrate import Calibration
from experiments.tasks import text


@pytest.fixture(scope="module")
def tokenizer(model_folder) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_folder)


def texts(tokenizer: PreTrainedTokenizerBase, data: str, **settings) -> list[str]:
    calibration = Calibration(data=data, **{"length": 3000, "samples": 4, "k_values": [1]} | settings)
    batches = calibration.batches(tokenizer)
    assert len(batches) == calibration.samples
    assert {tuple(batch.shape) for batch in batches} == {(1, calibration.length)}
    assert {batch.dtype for batch in batches} == {torch.int64}
    return [tokenizer.decode(batch[0]) for batch in batches]


def test_prose_is_the_calibration_half_alone(tokenizer):
    mine, theirs = text.prose("calibrate"), text.prose("evaluate")
    for whole in texts(tokenizer, "prose"):
        assert sum(sentence in whole for sentence in mine) > 5
        assert not any(sentence in whole for sentence in theirs)


def test_mixed_is_half_prose_half_noise(tokenizer):
    noise = [text.NOISE[0] in whole for whole in texts(tokenizer, "mixed")]
    assert noise == [False, True, False, True]


def test_texts_differ_from_one_another_and_between_seeds_but_not_between_calls(tokenizer):
    found = texts(tokenizer, "prose")
    assert len(set(found)) == 4
    assert texts(tokenizer, "prose") == found
    assert set(texts(tokenizer, "prose", seed=100)).isdisjoint(found)


def test_a_short_file_is_read_again_until_the_length_is_reached(tokenizer, tmp_path):
    (tmp_path / "own.txt").write_text("Alpha one.\n\nBeta two.\n")
    for whole in texts(tokenizer, str(tmp_path / "own.txt"), length=500):
        assert min(whole.count("Alpha one."), whole.count("Beta two.")) > 15


def test_a_file_is_known_by_its_text_and_not_by_its_folder(tmp_path):
    def identity(folder: str, content: str) -> dict:
        (tmp_path / folder).mkdir(exist_ok=True)
        file = tmp_path / folder / "own.txt"
        file.write_text(content)
        return Calibration(data=str(file), length=10, samples=1, k_values=[1]).identity()

    assert identity("here", "Same.") == identity("there", "Same.")
    assert identity("here", "Same.") != identity("here", "Other.")


@pytest.mark.parametrize("change", [{"data": "noise"}, {"length": 11}, {"samples": 3}, {"k_values": [2]}, {"seed": 1}])
def test_every_setting_makes_another_calibration(change):
    settings = {"data": "prose", "length": 10, "samples": 2, "k_values": [1], "seed": 0}
    assert Calibration(**settings).identity() != Calibration(**settings | change).identity()
