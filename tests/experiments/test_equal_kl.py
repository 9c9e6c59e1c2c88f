"""Time at equal KL: which strengths are chosen, what is recorded of them, and what the table makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import equal_kl, equal_kl_report, report
from experiments.chapters import Chapter
from experiments.equal_kl_choice import choose
from experiments.models import ModelSource
from experiments.records import read_samples
from tests.experiments.conftest import FRONTIER, QUIET, snapshot, written
from tests.experiments.test_configs import composed

EQUAL_KL = ("experiment=equal_kl", *FRONTIER[1:], "equal_kl.repeats=1", "equal_kl.baselines=[sdpa,upstream_cudnn]")
ONE = (*(x for x in EQUAL_KL if not x.startswith("method")), "method=row_share", "method.share=[0.003,0.03]")
BOUNDS = "equal_kl.bounds=[0.02,5]"  # the second lets every method of a random model in


@pytest.fixture
def store(compared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compared, tmp_path / "store"))


def batches(results: Path) -> list[dict]:
    [file] = results.glob("equal_kl/*/samples.jsonl")
    return read_samples(file)


def curve(*points: tuple[str, float, float]) -> pd.DataFrame:
    """Strength, KL and skip ratio of one method on one cell."""
    frame = pd.DataFrame(points, columns=["strength", "kl", "skip_ratio"])
    return frame.assign(source="prose", length=900, family="a", label=frame["strength"])


@pytest.mark.parametrize(
    ("points", "chosen", "within", "strongest"),
    [
        ([("a", 0.001, 0.2), ("b", 0.02, 0.4), ("c", 0.021, 0.5)], "b", True, False),  # the bound is within it
        ([("c", 0.03, 0.5), ("b", 0.01, 0.4), ("a", 0.001, 0.2)], "b", True, False),  # in whatever order
        ([("a", 0.001, 0.2), ("b", 0.03, 0.3), ("c", 0.01, 0.4)], "c", True, True),  # a curve that comes back
        ([("a", 0.01, 0.4), ("b", 0.002, 0.4), ("c", 0.002, 0.4)], "b", True, True),  # as much skipped, the nearest
        ([("a", 0.04, 0.4), ("b", 0.03, 0.5)], "b", False, True),
        ([("a", np.nan, 0.9), ("b", 0.01, 0.1)], "b", True, False),
        ([("a", np.nan, 0.9), ("b", 0.03, 0.1)], "b", False, False),
        ([("a", np.nan, 0.9)], "a", False, True),
    ],
)
def test_the_strength_that_skips_most_within_the_bound_is_chosen(points, chosen, within, strongest):
    [row] = choose(curve(*points), [0.02]).to_dict("records")
    assert (row["strength"], row["within"], row["strongest"]) == (chosen, within, strongest)


def test_every_method_cell_and_bound_has_its_own_choice():
    one = curve(("a", 0.001, 0.2), ("b", 0.01, 0.4))
    rows = choose(pd.concat([one, one.assign(family="b"), one.assign(source="noise")]), [0.005, 0.02])
    assert list(zip(rows["source"], rows["bound"], rows["strength"], strict=True)) == [
        *(("prose", 0.005, "a"),) * 2,
        *(("prose", 0.02, "b"),) * 2,
        ("noise", 0.005, "a"),
        ("noise", 0.02, "b"),
    ]


def test_the_chosen_strengths_take_turns_with_dense_attention_on_the_texts_that_they_were_judged_on(
    command, model_folder, store, monkeypatch
):
    arguments = (*EQUAL_KL, BOUNDS, f"model.path={model_folder}", QUIET, f"results={store}")
    ended = command(*arguments)
    assert ended.status == 0, ended.err
    judged = pd.DataFrame([sample for file in store.glob("fidelity/*/samples.jsonl") for sample in read_samples(file)])
    skipped = judged.groupby(["method", "source"])["skip_ratio"].mean()
    found = batches(store)
    assert [batch["texts"] for batch in found] == [["noise-900-0", "noise-900-1"], ["prose-900-0", "prose-900-1"]]
    for batch in found:
        hashes = judged[judged["source"] == batch["source"]].drop_duplicates("id")["tokens_hash"]
        assert batch["tokens_hash"] == list(hashes)
        assert batch["left_out"].keys() == {"upstream_cudnn"}
        turns = {turn["method"]: turn for turn in batch["turns"]}
        assert list(turns)[:2] == ["dense", "sdpa"]
        assert len(turns) >= 2 + 13  # families
        for label, turn in turns.items():
            assert len(turn["attention_turns_s"]) == len(turn["turns_s"]) == 1
            assert 0 < turn["attention_s"] < turn["ttft_s"]
            if label != "sdpa":  # each text of a batch is decided on as it is by itself
                assert turn["skip_ratio"] == pytest.approx(skipped[label, batch["source"]], abs=1e-3)
    [table] = (store / "tables").glob("equal_kl-*.csv")
    rows = pd.read_csv(table)
    assert len(rows) == 2 * (2 + 2 * 13)
    assert (rows["kl"].isna() == rows["bound"].isna()).all()
    assert (rows.loc[rows["within"] == True, "kl"] <= rows.loc[rows["within"] == True, "bound"]).all()  # noqa: E712
    bsfa = rows[(rows["method"] == "bsfa") & (rows["bound"] == 0.02)]
    assert bsfa["attention_ms"].isna().all()  # named, and not timed
    assert "none, nearest k=2" in ended.out
    assert "upstream_cudnn: method=upstream_cudnn runs on a CUDA GPU alone" in ended.out
    assert "Attention at equal KL, tiny, float32, 2 texts at once" in ended.out
    monkeypatch.setattr(ModelSource, "load", None)  # nothing is left to measure
    before = table.read_bytes()
    table.unlink()
    again = command(*arguments)
    assert again.status == 0, again.err
    assert table.read_bytes() == before
    assert "upstream_cudnn was left out; remove" in again.out
    monkeypatch.setattr(Chapter, "write", None)  # nor to draw
    last = written(store)
    assert table.with_suffix(".md").read_text().split("\n", 2)[2] in command(*arguments).out
    assert written(store) == last
    [chapter] = report.chapters("equal_kl", store)
    assert (store / "figures" / f"{chapter.drawings[0].name}.png").is_file()


def test_without_the_divergences_the_command_that_measures_them_is_named(command, model_folder, tmp_path):
    arguments = ("method=row_share", "method.share=[0.01,0.1]", f"model.path={model_folder}", QUIET)
    ended = command("experiment=equal_kl", "profile=quick", "equal_kl.batch=1", *arguments, f"results={tmp_path}")
    assert "lacks the divergence of 2 of 2 strengths, the first row_share share=0.01" in ended.error
    asked = f"profile=quick method=row_share 'method.share=[0.01,0.1]' model.path={model_folder} tracker=none"
    assert f"run `python run.py experiment=fidelity {asked} results={tmp_path}` first" in ended.error
    assert snapshot(tmp_path) == {}


def test_it_is_planned_once_the_divergences_are_known(command, model_folder, store, tmp_path):
    unknown = command(
        *("experiment=reproduce", "profile=gpu", "experiments=[fidelity,equal_kl]", "dry=true", QUIET),
        *("method=row_share", f"model.path={model_folder}", f"results={tmp_path}"),
    )
    assert unknown.status == 0, unknown.err
    assert "| fidelity" in unknown.out
    assert "| equal_kl" not in unknown.out
    [one] = equal_kl.plan(composed(*ONE, f"model.path={model_folder}", QUIET, f"results={store}"))
    assert (one.ids, one.readings, one.state) == (["noise-900-0", "prose-900-0"], 2 * 2 * 2, "to do")


def test_a_run_that_was_stopped_goes_on_at_the_batch_it_was_at(command, model_folder, store, monkeypatch):
    arguments = (*ONE, "equal_kl.batch=1", f"model.path={model_folder}", QUIET, f"results={store}")
    measure, calls = equal_kl.Turns.measure, []

    def stopped(self, tokens, turns):
        calls.append(tokens.shape)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, tokens, turns)

    monkeypatch.setattr(equal_kl.Turns, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        command(*arguments)
    assert [batch["id"] for batch in batches(store)] == ["noise-900-0"]
    assert command(*arguments).status == 0
    assert [batch["id"] for batch in batches(store)] == ["noise-900-0", "noise-900-1", "prose-900-0", "prose-900-1"]
    assert calls == [(1, 900)] * 5
    [summary] = store.glob("equal_kl/*/summary.json")
    assert {cell["method"] for cell in json.loads(summary.read_text())["cells"]} == {"dense", "sdpa", "row_share"}


def test_ratios_are_of_the_same_turn_and_a_method_without_memory_is_named():
    choice = {"source": "prose", "length": 900, "calibration": "", "kl": 0.01, "kl_low": 0.0, "kl_high": 0.02}
    choice |= {"skip_ratio": 0.5, "bound": 0.02, "within": True, "strongest": False}
    config = {
        "equal_kl": {"baselines": ["sdpa"], "repeats": 2},
        "chosen": [choice | {"method": x, "strength": "k=1", "label": f"{x} k=1"} for x in ("bsfa", "greedy")],
    }

    def turn(method: str, *turns: float) -> dict:
        return {"method": method, "attention_turns_s": turns, "turns_s": [2 * x for x in turns], "skip_ratio": 0.5}

    def batch(name: str, scale: float) -> dict:
        turns = [
            turn("dense", 8 * scale, 4 * scale),
            turn("sdpa", 4 * scale, 2 * scale),
            turn("bsfa k=1", scale, scale),
        ]
        turns.append({"method": "greedy k=1", "out_of_memory": "CUDA out of memory."})
        return {"id": name, "source": "prose", "length": 900, "texts": ["a", "b"], "turns": turns}

    rows = equal_kl_report.tabulate(config, [batch("a", 1.0), batch("b", 10.0)])
    assert list(rows["method"]) == ["sdpa", "dense", "bsfa", "greedy"]
    assert set(rows["best_dense"]) == {"sdpa"}
    assert set(rows["texts"]) == {4}
    bsfa = rows.set_index("method").loc["bsfa"]
    assert (bsfa["attention_ms"], bsfa["turns"]) == (5500, 4)
    assert bsfa["attention_times_dense"] == 6  # of 8, 4, 8, 4
    assert bsfa["attention_times_best_dense"] == bsfa["prefill_times_best_dense"] == 3
    shown = equal_kl_report.readable(rows).set_index("method")
    assert shown.loc["greedy", "attention ms [quartiles]"] == "out of memory"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("equal_kl.bounds=[]", "equal_kl.bounds=[] must be numbers above 0"),
        ("equal_kl.bounds=[-1]", "equal_kl.bounds=[-1] must be numbers above 0"),
        ("equal_kl.bounds=0.02", "equal_kl.bounds=0.02 must be numbers above 0"),
        ("equal_kl.bounds=[true]", "equal_kl.bounds=[True] must be numbers above 0"),
        ("equal_kl.bounds=[0.02,0.02]", "holds a number twice"),
        ("equal_kl.batch=0", "equal_kl.batch=0"),
        ("equal_kl.repeats=0", "equal_kl.repeats=0"),
        ("equal_kl.baselines=[fa9]", "equal_kl.baselines=['fa9'] must hold some of upstream_torch_flash"),
        ("streams.samples=3", "equal_kl.batch=2 must divide streams.samples=3, or be more"),
        ("method=dense", "equal_kl times methods that have a strength"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(command, model_folder, setting, message):
    arguments = ("experiment=equal_kl", "profile=quick", f"model.path={model_folder}", QUIET)
    assert message in command(*arguments, setting).error
