from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from experiments import report, results
from experiments.frontier import points, skip_at
from experiments.frontier_needles import beside
from experiments.records import read_runs
from experiments.results import sections
from experiments.streams import Streams
from tests.experiments.conftest import FIDELITY, FRONTIER, QUIET, run_here

LAYERS, HEADS = 2, 4  # of the model in tests/conftest.py


def samples(results: Path) -> pd.DataFrame:
    files = results.glob("fidelity/*/samples.jsonl")
    return pd.DataFrame([json.loads(line) for file in files for line in file.read_text().splitlines()])


def test_every_text_is_read_with_every_method_and_dense_is_no_distance_from_itself(compared):
    found = samples(compared)
    assert (found.groupby("method").size() == 4).all()  # two sources, two texts
    dense = found[found["method"] == "dense"]
    assert (dense["kl"].abs() < 1e-6).all()
    assert (dense["agreement"] == 1).all()
    assert (dense["nll"] == dense["nll_dense"]).all()


def test_a_method_that_drops_blocks_is_at_a_distance_and_drops_mass(compared):
    found = samples(compared)
    sparse = found[found["method"] == "streaming_llm local_blocks=2"]
    assert (sparse["skip_ratio"] > 0.3).all()
    assert (sparse["kl"] > 0).all()
    for column in ("skip_ratio_by_head", "error_by_head", "dropped_mass_by_head"):
        for table in sparse[column]:
            assert [len(row) for row in table] == [HEADS] * LAYERS
            assert all(0 < value < 1 for row in table for value in row)


def test_a_second_call_finds_everything_done(compared, model_folder, tmp_path):
    copy = Path(shutil.copytree(compared, tmp_path / "copy"))
    ended = run_here(*FRONTIER, f"model.path={model_folder}", QUIET, f"results={copy}")
    assert ended.status == 0
    assert "0 of them to do" in ended.out + ended.err
    assert len(samples(copy)) == len(samples(compared))


def test_the_report_has_the_curve_the_points_and_the_heads(compared):
    tables, figures = (
        {path.name.split("-", 2)[-1] for path in (compared / kind).iterdir()} for kind in ("tables", "figures")
    )
    assert {name.rpartition("-")[2] for name in tables} >= {"points.md", "points.csv", "points.tex"}
    assert {name.rpartition("-")[2] for name in figures} == {"curve.png", "curve.pdf", "heads.png", "heads.pdf"}


def test_dense_attention_is_no_distance_from_itself_for_sure(compared):
    [section] = sections(compared, "fidelity")
    rows = points(section).set_index("method")
    assert (rows.loc["dense", ["kl_low", "kl_high"]].abs() < 1e-6).all(axis=None)


def test_needles_stand_beside_the_divergence_of_the_same_method_strength_and_calibration(compared, finished):
    [section] = sections(compared, "fidelity")
    [needles] = sections(finished, "niah")
    rows = beside(points(section), section, [needles])
    assert len(rows) == len(points(section))
    asked = rows[rows["needles_n"].notna()]
    assert set(asked["method"]) == {"dense", "bsfa"}  # streaming_llm had other strengths there
    for row in asked.to_dict("records"):
        answers = needles.samples[(needles.samples["length"] == 900) & (needles.samples["haystack"] == row["source"])]
        answers = answers[(answers["method"] == row["method"]) & (answers["strength"] == row["strength"])]
        assert (row["needles"], row["needles_n"]) == (answers["score"].mean(), len(answers))
        assert row["needles_low"] <= row["needles"] <= row["needles_high"]
    shown = report.fidelity(section, [needles]).tables[1].shown
    assert (shown["needles % [95%]"] != "").sum() == len(asked) == 2 * 3


def test_needles_of_another_model_or_calibration_stand_beside_nothing(compared, finished):
    [section] = sections(compared, "fidelity")
    [needles] = sections(finished, "niah")
    other = dataclasses.replace(needles, origin=needles.origin | {"digest": "0"})
    assert "needles" not in beside(points(section), section, [other])
    rounded = dataclasses.replace(needles, origin=needles.origin | {"dtype": "bfloat16"})
    assert set(beside(points(section), section, [rounded])["needles_dtype"].dropna()) == {"bfloat16"}
    assert set(beside(points(section), section, [rounded, needles])["needles_dtype"].dropna()) == {"float32"}
    some = dataclasses.replace(needles, samples=needles.samples[needles.samples["haystack"] == "noise"])
    mixed = beside(points(section), section, [rounded, some]).dropna(subset="needles_n")
    assert {(row["source"], row["needles_dtype"]) for _, row in mixed.iterrows()} == {
        ("noise", "float32"),
        ("prose", "bfloat16"),
    }
    longer = dataclasses.replace(needles, samples=needles.samples.assign(settings="another"))
    assert beside(points(section), section, [longer])["needles"].isna().all()


def test_a_calibration_on_the_same_texts_in_another_dtype_is_the_same_setting(finished, monkeypatch):
    [needles] = sections(finished, "niah")
    runs = list(read_runs(finished, "niah"))
    for config, _ in runs:
        config["method"]["calibration"]["id"] = "another"
    monkeypatch.setattr(results, "read_runs", lambda root, experiment: runs)
    [again] = sections(finished, "niah")
    assert set(again.samples["settings"]) == set(needles.samples["settings"])


@pytest.mark.parametrize(
    ("kls", "cut", "said"),
    [
        ([0.001, 0.01, 0.1], 0.01 * 10**0.5, "50"),  # half way in log KL between 40 and 60%
        ([0.001, 0.01, 0.1], 0.5, "> 60"),
        ([0.001, 0.01, 0.1], 0.0005, "< 20"),
        ([0.001, 0.1, 0.01], 0.02, "33"),  # the first crossing counts
    ],
)
def test_where_a_curve_crosses_a_cut(kls, cut, said):
    assert skip_at(pd.DataFrame({"skip_ratio": [0.2, 0.4, 0.6], "kl": kls}), cut) == said


def test_texts_differ_by_seed_and_are_the_same_again(model_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    def tokens(seed: int) -> list[tuple[int, ...]]:
        return [stream.tokens for stream in Streams([300], 2, 16, seed=seed).make(tokenizer)]

    assert tokens(0) == tokens(0)
    assert not set(tokens(0)) & set(tokens(100))
    assert {len(text) for text in tokens(0)} == {300}


def test_a_users_texts_are_a_source_that_is_known_by_what_it_holds(command, model_folder, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "book.txt").write_text("A book of some words. " * 30)
    (folder / "rows.jsonl").write_text(json.dumps({"context": "The context of a row. " * 30}) + "\n")
    shared = (*FIDELITY[:-1], f"model.path={model_folder}", QUIET, f"results={tmp_path / 'r'}", "method=dense")
    ended = command(*shared, f"data.root={folder}")
    assert ended.status == 0, ended.err
    found = samples(tmp_path / "r")
    assert list(found["source"]) == ["noise", "noise", "prose", "prose", "data", "data"]
    assert found["tokens_hash"].is_unique
    moved = folder.rename(tmp_path / "moved")
    assert "0 of them to do" in command(*shared, f"data.root={moved}").out
    (moved / "book.txt").write_text("Another book. " * 30)
    assert "1 of them to do" in command(*shared, f"data.root={moved}", "streams.sources=[data]").out
    assert len(samples(tmp_path / "r")) == 8


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("streams.sources=[data]", "data.root=DIR"),
        ("data.root=/nowhere", "data.root=/nowhere is no folder"),
        ("streams.tail=900", "streams.tail=900 must be under the shortest"),
        ("streams.sources=[lorem]", "lorem"),
        ("streams.samples=0", "streams.samples=0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(command, model_folder, setting, message):
    assert message in command(*FIDELITY, f"model.path={model_folder}", QUIET, setting).error
