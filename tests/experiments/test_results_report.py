"""What the tables and figures say of a store."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from experiments import readable
from experiments.models import ModelSource
from experiments.records import Store, read_samples
from experiments.results import sections, table
from tests.experiments.conftest import QUIET, snapshot


def write(
    root: Path,
    scores: list[float],
    method: str = "dense",
    strength: str = "",
    *,
    version: int = 1,
    data: str | None = None,
    tokens: int | None = None,
    parameters: dict | None = None,
    model: str = "tiny",
    ttft: float = 1.0,
    process: str = "one",
    lengths: tuple[int, ...] = (1024,),
) -> None:
    """One run's records: a score for each sample of each length."""
    calibration = {"data": data} | ({"length": tokens} if tokens else {}) if data else {}
    config = {
        "task": {"name": "niah", "lengths": list(lengths)},
        "model": {"name": model, "dtype": "float32"},
        "method": {
            "name": method,
            "version": version,
            "strength": strength,
            "parameters": parameters or {},
            "calibration": calibration,
        },
        "backend": "auto",
    }
    with Store(root).run("niah", config).writing({"device": "a CPU"}) as writer:
        for length in lengths:
            for number, score in enumerate(scores):
                writer.append(
                    {
                        "id": f"noise-{length}-{number}",
                        "task": "niah",
                        "haystack": "noise",
                        "length": length,
                        "depth": float(number),
                        "score": score,
                        "skip_ratio": 0.5 if strength else 0.0,
                        "skip_ratio_by_layer": [0.5, 0.5],
                        "ttft_s": ttft * (1 + number),
                        "process": process,
                        "device": "a CPU",
                    }
                )


def rows(root: Path, *by: str) -> pd.DataFrame:
    """The table of a store that has one section, by method and strength."""
    [section] = sections(root, "niah")
    return table(section, [*by]).set_index(["method", "strength"])


def test_runs_that_differ_in_a_setting_no_column_shows_are_rows_of_their_own(tmp_path):
    write(tmp_path, [1, 1], "streaming_llm", "local_blocks=4", parameters={"sink_blocks": 1})
    write(tmp_path, [0, 0, 0], "streaming_llm", "local_blocks=4", parameters={"sink_blocks": 2})
    found = rows(tmp_path)
    assert sorted(found["n"]) == [2, 3]
    assert found["calibration"].str.fullmatch("#[0-9a-f]{6}").all()


def test_a_calibration_on_other_lengths_than_the_longest_judged_names_them(tmp_path):
    for tokens in (None, 512, 1024):
        write(tmp_path, [1, 1], "bsfa", "k=8", data="prose", tokens=tokens, parameters={"given": tokens is None})
    assert set(rows(tmp_path)["calibration"].str.split(" #").str[0]) == {"prose", "prose, 512 tokens"}


def test_runs_of_other_lengths_in_one_section_say_one_thing_of_one_calibration(tmp_path):
    for lengths in ((512,), (512, 1024)):
        write(tmp_path, [1, 1], "bsfa", "k=8", data="prose", tokens=1024, lengths=lengths)
    [section] = sections(tmp_path, "niah", ("lengths",))
    assert set(section.samples["calibration"]) == {"prose"}


def test_a_row_counts_its_samples(tmp_path):
    write(tmp_path, [1, 1, 1, 0])
    row = rows(tmp_path).loc[("dense", "")]
    assert (row["n"], row["score"], row["skip_ratio"]) == (4, 0.75, 0.0)
    assert (row["score_low"], row["score_high"]) == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert (row["ttft_q25_s"], row["ttft_median_s"], row["ttft_q75_s"]) == (1.75, 2.5, 3.25)


def test_sparse_is_held_against_dense_on_the_same_samples_alone(tmp_path):
    write(tmp_path, [1, 1, 0, 0])
    write(tmp_path, [1, 0], "bsfa", "k=2", data="prose")  # on its way
    row = rows(tmp_path).loc[("bsfa", "k=2")]
    assert (row["n"], row["dense_score"], row["difference"]) == (2, 1.0, -0.5)


def test_without_dense_there_is_no_difference(tmp_path):
    write(tmp_path, [1, 0], "bsfa", "k=2", data="prose")
    row = rows(tmp_path).loc[("bsfa", "k=2")]
    assert pd.isna(row["difference"])
    assert pd.isna(row["speedup_over_dense"])
    assert not row["weak_dense"]


def test_cells_where_dense_has_too_little_to_lose_are_marked(tmp_path):
    write(tmp_path, [1] * 9 + [0], lengths=(1024,))
    assert not rows(tmp_path, "length")["weak_dense"].any()
    write(tmp_path / "weak", [1] * 8 + [0] * 2)
    write(tmp_path / "weak", [1] * 10, "bsfa", "k=2", data="prose")
    assert rows(tmp_path / "weak", "length")["weak_dense"].all()


def test_times_are_compared_within_one_process_alone(tmp_path):
    write(tmp_path, [1, 1], ttft=3.0)
    write(tmp_path, [1, 1], "bsfa", "k=2", data="prose", ttft=1.0)
    write(tmp_path, [1, 1], "bsfa", "k=4", data="prose", ttft=1.0, process="two")
    found = rows(tmp_path)["speedup_over_dense"]
    assert found["bsfa", "k=2"] == 3.0
    assert math.isnan(found["bsfa", "k=4"])


def test_a_ratio_to_a_method_that_did_not_run_is_no_column(tmp_path):
    write(tmp_path, [1, 1], ttft=3.0)
    write(tmp_path, [1, 1], "bsfa", "k=2", data="prose", ttft=1.0)
    shown = readable.table(rows(tmp_path).reset_index())
    assert [name for name in shown if "/ this" in name] == ["TTFT, dense / this"]
    assert list(shown["TTFT, dense / this"]) == ["1.00", "3.00"]
    write(tmp_path, [1, 1], "sdpa", ttft=1.5, process="two")
    shown = readable.table(rows(tmp_path).reset_index()).set_index("method")
    assert shown.loc["sdpa", "TTFT, sdpa / this"] == "1.00"


def test_a_method_is_shown_in_its_newest_version(tmp_path):
    write(tmp_path, [0, 0], "bsfa", "k=2", data="prose", version=9)
    write(tmp_path, [1, 1], "bsfa", "k=2", data="prose", version=10)
    row = rows(tmp_path).loc[("bsfa", "k=2")]
    assert (row["n"], row["score"]) == (2, 1.0)


def test_calibrations_are_rows_of_their_own(tmp_path):
    for data, score in (("prose", 1), ("noise", 0)):
        write(tmp_path, [score], "bsfa", "k=2", data=data)
    [section] = sections(tmp_path, "niah")
    found = table(section, []).set_index("calibration")["score"]
    assert dict(found) == {"prose": 1.0, "noise": 0.0}


def test_strengths_are_in_the_order_of_their_numbers_after_the_baselines(tmp_path):
    for k in (16, 2, 128):
        write(tmp_path, [1], "bsfa", f"k={k}", data="prose")
    write(tmp_path, [1], "sdpa")
    write(tmp_path, [1])
    assert list(rows(tmp_path).index) == [
        ("dense", ""),
        ("sdpa", ""),
        ("bsfa", "k=2"),
        ("bsfa", "k=16"),
        ("bsfa", "k=128"),
    ]


def test_models_are_never_in_one_table(tmp_path):
    write(tmp_path, [1], model="small")
    write(tmp_path, [0], model="large")
    found = sections(tmp_path, "niah")
    assert len({section.name for section in found}) == 2
    for section in found:
        assert len(section.samples) == 1
        assert section.samples["score"].item() == (1 if "small" in section.title else 0)


# The report


def test_the_report_has_every_table_and_figure_and_says_what_was_run(finished):
    [main] = [file for file in (finished / "tables").glob("*.md") if not file.stem.endswith(("-cells", "-paper"))]
    files = {file.name for folder in ("tables", "figures") for file in (finished / folder).iterdir()}
    name = main.stem
    assert files == {
        *(f"{name}{part}.{kind}" for part in ("", "-cells", "-paper") for kind in ("md", "csv", "tex")),
        *(f"{name}-{figure}.{kind}" for figure in ("curve", "heatmap", "ttft") for kind in ("png", "pdf")),
    }
    text = main.read_text()
    for word in ("niah", "tiny", "float32", "threads", "bsfa", "k=1", "streaming_llm", "sdpa", "prose", "Llama-3.1-8B"):
        assert word in text
    assert "not run here" in text


def test_the_tables_numbers_are_those_of_the_records(finished):
    [cells] = (finished / "tables").glob("*-cells.csv")
    frame = pd.read_csv(cells, keep_default_na=False)
    assert len(frame) == 5 * 2 * 2
    assert (frame["n"] == 2).all()
    for file in finished.glob("niah/*/samples.jsonl"):
        for sample in read_samples(file):
            strength = next((part for part in sample["method"].split() if "=" in part), "")
            [row] = frame[
                (frame["method"] == sample["method"].split()[0])
                & (frame["strength"] == strength)
                & (frame["haystack"] == sample["haystack"])
                & (frame["length"] == sample["length"])
            ].to_dict("records")
            assert row["ttft_q25_s"] <= row["ttft_median_s"] <= row["ttft_q75_s"]
            assert abs(row["skip_ratio"] - sample["skip_ratio"]) < 0.2


def test_a_table_for_latex_compiles_names_with_underscores(finished):
    for file in (finished / "tables").glob("*.tex"):
        text = file.read_text()
        assert r"streaming\_llm" in text
        assert "_" not in text.replace(r"\_", "").split(r"\midrule")[1]


def test_the_report_is_the_same_from_the_store_alone(command, finished_copy, monkeypatch):
    monkeypatch.setattr(ModelSource, "load", None)
    before = snapshot(finished_copy)
    for folder in ("tables", "figures"):
        for file in (finished_copy / folder).iterdir():
            file.unlink()
    ended = command("experiment=report", QUIET, f"results={finished_copy}")
    assert ended.status == 0, ended.err
    assert snapshot(finished_copy) == before
    assert str(finished_copy / "tables") in ended.out
    assert "streaming_llm" in ended.out


def test_the_report_marks_a_weak_dense_and_explains_the_mark(command, tmp_path):
    write(tmp_path / "weak", [0, 1, 0])
    write(tmp_path / "good", [1, 1, 1])
    assert "† dense" in command("experiment=report", QUIET, f"results={tmp_path / 'weak'}").out
    assert "†" not in command("experiment=report", QUIET, f"results={tmp_path / 'good'}").out


@pytest.mark.parametrize(
    "runs",
    [
        [([1.0], "dense", "")],
        [([1.0], "bsfa", "k=2")],
        [([1.0, 0.5, 0.25], "dense", ""), ([1.0], "bsfa", "k=2")],
        [([0.0, 0.0], "dense", ""), ([1.0, 1.0], "sdpa", "")],
    ],
    ids=["one sample", "no dense", "one ahead of the other", "all or nothing"],
)
def test_a_report_of_runs_on_their_way(command, tmp_path, runs):
    for run in runs:
        write(tmp_path, *run)
    ended = command("experiment=report", QUIET, f"results={tmp_path}")
    assert ended.status == 0, ended.err
    assert len(list((tmp_path / "figures").glob("*.png"))) == 3


def test_a_report_of_nothing_says_what_to_run_first(command, tmp_path):
    assert "experiment=niah" in command("experiment=report", QUIET, f"results={tmp_path}").error


def test_a_report_of_damaged_records_names_the_line(command, tmp_path):
    write(tmp_path, [1, 1])
    [samples] = tmp_path.glob("niah/*/samples.jsonl")
    samples.write_text(samples.read_text().replace("{", "", 1))
    assert "line 1 is not a record" in command("experiment=report", QUIET, f"results={tmp_path}").error


def test_a_report_that_cannot_be_written_says_where(command, tmp_path):
    write(tmp_path, [1])
    (tmp_path / "tables").touch()
    assert str(tmp_path / "tables") in command("experiment=report", QUIET, f"results={tmp_path}").error
