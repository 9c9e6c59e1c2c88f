"""Methods that are calibrated by a rule: made once, kept beside the others, taken from a file of the user's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bsfa.methods import BlasstFit
from experiments.fidelity import plan
from experiments.models import ModelSource
from experiments.rules import BlasstRule
from tests.experiments.conftest import QUIET, Ended, run_here
from tests.experiments.test_configs import composed

SETTINGS = (
    "experiment=fidelity",
    "profile=quick",
    "calibration.samples=2",
    "calibration.length=384",
    "streams.lengths=[512]",
    "streams.samples=1",
    "streams.tail=16",
    QUIET,
)
CUTS = ("method=fisher_share", "method.calibrated.samples=2")


def fidelity(model: Path, results: Path, *arguments: str) -> Ended:
    return run_here(*SETTINGS, f"model.path={model}", f"results={results}", *arguments)


def samples(results: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(results.glob("fidelity/*/samples.jsonl")):
        yield from map(json.loads, file.read_text().splitlines())


@pytest.fixture(scope="module")
def results(tmp_path_factory, model_folder) -> Path:
    """fisher_share at two budgets. Read only."""
    folder = tmp_path_factory.mktemp("rules") / "results"
    ended = fidelity(model_folder, folder, *CUTS, "method.kl=[0.001,0.1]")
    assert ended.status == 0, ended.err
    return folder


def test_a_larger_budget_skips_more(results):
    by_method = {sample["method"]: sample["skip_ratio"] for sample in samples(results)}
    assert set(by_method) == {"fisher_share kl=0.001 (prose)", "fisher_share kl=0.1 (prose)"}
    assert 0 < by_method["fisher_share kl=0.001 (prose)"] < by_method["fisher_share kl=0.1 (prose)"]


def test_the_cuts_are_made_once_and_a_file_of_them_gives_the_same(results, model_folder, tmp_path):
    [file] = results.glob("calibrate/*/cuts.safetensors")
    written = file.stat().st_mtime_ns
    ended = run_here(
        *("experiment=calibrate", *CUTS, "profile=quick", "calibration.samples=2", "calibration.length=384", QUIET),
        *(f"model.path={model_folder}", f"results={results}"),
    )
    assert str(file) in ended.out
    assert file.stat().st_mtime_ns == written
    assert fidelity(model_folder, tmp_path, *CUTS, "method.kl=0.1", f"method.cuts={file}").status == 0
    assert not list(tmp_path.glob("calibrate/*"))
    ours = [s for s in samples(results) if "kl=0.1" in s["method"]]
    assert [(s["kl"], s["skip_ratio_by_head"]) for s in samples(tmp_path)] == [
        (s["kl"], s["skip_ratio_by_head"]) for s in ours
    ]


def test_a_plan_says_on_what_a_method_is_calibrated_be_it_here_or_in_a_file(results, model_folder, tmp_path):
    def planned(*arguments: str) -> list[str]:
        asked = (*SETTINGS, f"model.path={model_folder}", f"results={tmp_path}", *arguments)
        return [one.calibration for one in plan(composed(*asked))]

    [cuts] = results.glob("calibrate/*/cuts.safetensors")
    assert planned(*CUTS, f"method.cuts={cuts}") == ["prose, 2 texts of 384 tokens"]
    twice = "calibration.data=[noise,mixed]"
    assert planned(*CUTS, twice) == [f"{data}, 2 texts of 384 tokens" for data in ("noise", "mixed")]
    (tmp_path / "fit.json").write_text('{"a": 2.0, "b": 3.0}')
    assert planned("method=blasst_fitted", f"method.fit={tmp_path / 'fit.json'}") == ["file"]
    assert planned("method=dense") == [""]


@pytest.mark.parametrize(
    ("method", "file"),
    [
        (("method=minference_searched", "method.ratio=0.01"), "patterns.json"),
        (("method=blasst_fitted",), "blasst.json"),
    ],
)
def test_rivals_are_calibrated_by_their_own_rules(model_folder, tmp_path, method, file):
    ended = fidelity(model_folder, tmp_path, *method, "calibration.samples=1")
    if file == "blasst.json":  # random weights skip too little for a curve
        assert "BLASST's curve cannot be fitted" in ended.error
        return
    assert ended.status == 0, ended.err
    assert list(tmp_path.glob(f"calibrate/*/{file}"))
    assert {sample["calibration"]["data"] for sample in samples(tmp_path)} == {"prose"}


def test_a_fit_of_blasst_is_read_from_a_file(model_folder, tmp_path):
    file = tmp_path / "fit.json"
    file.write_text('{"a": 2.0, "b": 3.0}')
    ended = fidelity(model_folder, tmp_path / "r", "method=blasst_fitted", f"method.fit={file}")
    assert ended.status == 0, ended.err
    assert {sample["method"] for sample in samples(tmp_path / "r")} == {"blasst_fitted skip=0.5 (file)"}


@pytest.fixture
def fit(tmp_path) -> Path:
    """BLASST's scalars of long texts: for prompts from 347 and, at 0.9, from 937 tokens on."""
    file = tmp_path / "fit.json"
    file.write_text('{"a": 100.0, "b": 2.486}')
    return file


NIAH = ("experiment=niah", "profile=quick", "task.haystacks=[noise]", "task.depths=1", "task.samples=1", QUIET)
TTFT = ("experiment=ttft", "profile=quick", "ttft.baselines=[]", "ttft.skips=[]", QUIET)
FIT = "method=blasst_fitted"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SETTINGS, "streams.lengths=[512,1024]"), "streams.lengths: a prompt of 512 tokens is too short for"),
        ((*NIAH, "task.lengths=[900,1024]"), "task.lengths: a prompt of 900 tokens is too short for"),
        ((*NIAH, "task.lengths=[1024]", "prefill.chunk=512"), "prefill.chunk: a first chunk of 512 tokens"),
        ((*TTFT, "ttft.lengths=[512,1024]"), "ttft.lengths: a prompt of 512 tokens is too short for"),
        ((*NIAH, "task.lengths=[900,1024]", "experiment=reproduce", "dry=true"), "a prompt of 900 tokens"),
    ],
    ids=["fidelity", "niah", "chunks", "ttft", "reproduce"],
)
def test_prompts_too_short_for_a_fit_are_refused_before_a_model_is_loaded(
    command, model_folder, tmp_path, fit, monkeypatch, arguments, message
):
    monkeypatch.setattr(ModelSource, "load", None)
    results = (f"model.path={model_folder}", f"results={tmp_path / 'r'}")
    error = command(*arguments, FIT, f"method.fit={fit}", "method.skip=[0.5,0.9]", *results).error
    assert message in error
    assert "blasst_fitted skip=0.9 (file) (937 or more); take longer ones, a weaker strength" in error
    assert "skip=0.5" not in error
    assert not list((tmp_path / "r").glob("*/*"))


def test_a_prompt_of_less_than_its_length_is_refused_before_anything_is_calibrated_or_answered(
    command, model_folder, tmp_path
):
    asked = (*NIAH, "task.lengths=[944]", f"model.path={model_folder}", f"results={tmp_path / 'r'}")
    group = ("method=compare", "+method.members.blasst={_target_:bsfa.methods.Blasst,knob:factor,factor:937}")
    error = command(*asked, *group).error
    assert re.search(r"task.lengths: a prompt of 9[0-3]\d tokens is too short for blasst factor=937 \(937", error)
    assert not list((tmp_path / "r").glob("*/*"))


@pytest.mark.parametrize("experiment", [SETTINGS, (*TTFT, "ttft.lengths=[512]")], ids=["fidelity", "ttft"])
def test_prompts_too_short_for_a_new_fit_are_refused_before_one_is_read_and_its_file_is_kept(
    command, model_folder, tmp_path, fit, monkeypatch, experiment
):
    monkeypatch.setattr(BlasstRule, "make", lambda *_: BlasstFit.load(fit))
    asked = (*experiment, FIT, "method.skip=[0.5,0.9]", f"model.path={model_folder}", f"results={tmp_path / 'r'}")
    message = "a prompt of 512 tokens is too short for blasst_fitted skip=0.9 (prose) (937 or more)"
    assert message in command(*asked).error
    assert not any(file.read_text() for file in (tmp_path / "r").glob("*/*/samples.jsonl"))
    monkeypatch.setattr(ModelSource, "load", None)  # the fit is known now
    assert message in command(*asked).error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*CUTS, "calibration.length=100"), "calibration.length=100 is under the 192 tokens"),
        ((*CUTS, "experiment=calibrate", "calibration.length=100"), "calibration.length=100 is under the 192 tokens"),
        ((*CUTS, "method.kl=0"), "kl=0 must be a number above 0"),
        ((*CUTS, "+method.coupling=2"), "coupling=2 must be a number from 0 up to 1"),
        ((*CUTS, "method.cuts=nowhere"), "no file of cuts at nowhere"),
        ((*CUTS, "method.shared=[rows]"), "shared=rows is none of layers, heads, positions"),
        ((*CUTS, "experiment=calibrate", "method.cuts=mine.safetensors"), "or its file is given"),
        (("method=dense", "experiment=calibrate"), "no method of `method=` is calibrated"),
    ],
)
def test_what_makes_no_sense_is_refused(model_folder, results, tmp_path, arguments, message):
    settings = [s for s in SETTINGS if not s.startswith(("streams", "experiment"))]
    experiment = [] if "experiment=calibrate" in arguments else [s for s in SETTINGS if s not in settings]
    ended = run_here(*experiment, *settings, f"model.path={model_folder}", f"results={tmp_path}", *arguments)
    assert message in ended.error
    assert not list(tmp_path.glob("calibrate/*/*.safetensors"))
