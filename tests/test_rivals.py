"""Calibration of the rivals: BLASST's two scalars and MInference's patterns."""

from __future__ import annotations

import json
import math

import pytest
import torch

import bsfa
from bsfa import InputError
from bsfa.methods import Blasst, BlasstFit, MInference
from bsfa.model import ModelInfo
from bsfa.patterns import A_SHAPE, BLOCK_SPARSE, VERTICAL_SLASH, Pattern, Patterns
from bsfa.rivals import fit_blasst, search_patterns

INFO = ModelInfo("m", "f", 2, 2, 16, (torch.device("cpu"),) * 2)
MIXED = Patterns(
    (
        (Pattern(VERTICAL_SLASH, 30, 100), Pattern(A_SHAPE, 64, 128)),
        (Pattern(BLOCK_SPARSE, 0, 0), Pattern(VERTICAL_SLASH, 1000, 6096)),
    )
)


def texts(n: int, length: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randint(3, 100, (1, length)) for _ in range(n)]


def test_blasst_is_fitted_to_the_share_of_blocks_it_skips(tiny_model):
    batches = texts(2, 900)
    fit = fit_blasst(tiny_model, batches, lambdas=(0.5, 0.6, 0.7, 0.8, 0.9), progress=False)
    assert fit.b > 0
    with bsfa.apply(tiny_model, Blasst(fit.factor(0.08))) as applied, torch.no_grad():
        for tokens in batches:
            tiny_model(tokens)
    assert applied.skip_ratio() == pytest.approx(0.08, abs=0.01)  # as much as a random model skips


def test_a_curve_with_no_two_points_cannot_be_fitted(tiny_model):
    with pytest.raises(InputError, match="0 of the skip ratios measured lie between 5% and 95%"):
        fit_blasst(tiny_model, texts(1, 200), lambdas=(1e-9,), progress=False)


def test_a_fit_is_an_exponential_and_a_file(tmp_path):
    fit = BlasstFit(2.0, 3.0)
    assert fit.factor(0.5) == pytest.approx(2 * math.exp(1.5))
    fit.save(tmp_path / "new" / "fit.json")
    assert BlasstFit.load(tmp_path / "new" / "fit.json") == fit
    (tmp_path / "other.json").write_text("[1]")
    for name, message in (("none.json", "cannot read"), ("other.json", "holds two numbers a and b")):
        with pytest.raises(InputError, match=message):
            BlasstFit.load(tmp_path / name)


def test_the_search_takes_the_pattern_that_changes_a_head_least(tiny_model):
    nothing, all_of_it = Pattern(VERTICAL_SLASH, 0, 0), Pattern(A_SHAPE, 0, 700)
    found = search_patterns(tiny_model, texts(2, 700), (nothing, all_of_it, nothing), progress=False)
    assert found.layers == ((all_of_it,) * 4,) * 2


def test_what_the_search_finds_is_a_file_that_minference_reads(tiny_model, tmp_path):
    found = search_patterns(tiny_model, texts(1, 400), ratio=0.02, progress=False)
    file = tmp_path / "new" / "patterns.json"
    found.save(file)
    assert Patterns.load(file) == found
    with bsfa.apply(tiny_model, MInference(ratio=0.001, patterns=str(file))) as applied, torch.no_grad():
        tiny_model(texts(1, 900)[0])
    assert applied.skip_ratio() > 0.1


def test_the_authors_files_are_read_in_the_order_of_their_heads(tmp_path):
    file = tmp_path / "theirs.json"
    theirs = [{"1": ["stream_llm", 100, 800, 0.5], "0": ["vertical_and_slash", 1000, 4096, 12]}]
    file.write_text(json.dumps(theirs))
    assert Patterns.load(file).layers == ((Pattern(VERTICAL_SLASH, 1000, 4096), Pattern(A_SHAPE, 100, 800)),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no pattern file"),
        ("3", "is no pattern file"),
        ('[{"0": ["vertical_and_slash", 1, 2]}]', "is no pattern file"),
        ('[{"7": ["vertical_and_slash", 1, 2, 3]}]', "is no pattern file"),
        ('[{"0": ["diagonal", 1, 2, 3]}]', "diagonal.* is no pattern"),
        ('[{"0": ["stream_llm", -1, 2, 3]}]', "-1.* two sizes from 0"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path, content, message):
    file = tmp_path / "patterns.json"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        Patterns.load(file)


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="cannot read the pattern file nowhere: No such file"):
        MInference(patterns="nowhere").bind(INFO)


def test_another_models_patterns_are_refused(tmp_path):
    MIXED.save(tmp_path / "patterns.json")
    MInference(patterns=str(tmp_path / "patterns.json")).bind(INFO)
    with pytest.raises(InputError, match=r"2 layers with \[2\] heads are not for m, which has 1 with 2"):
        MIXED.check(ModelInfo("m", "f", 2, 2, 16, (torch.device("cpu"),)))
