"""What the tables and figures say of a suite's records."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from experiments import notes, paper, readable
from experiments.records import Store
from experiments.results import Section
from experiments.suite_figures import skipped, timed
from experiments.suites import beside_the_paper, cells, means, scores, sections, trade
from tests.experiments.conftest import QUIET


def write(
    root: Path,
    scores: dict[str, list[float]],
    method: str = "dense",
    strength: str = "",
    *,
    lengths: tuple[int, ...] = (4096,),
    samples: int = 0,
    ttft: float = 1.0,
    process: str = "one",
    experiment: str = "ruler",
    protocol: str = "ours",
) -> None:
    """One run's records: a score for each sample of each task and length."""
    config = {
        "task": {"name": experiment, "protocol": protocol, "tasks": list(scores), "lengths": list(lengths)}
        | {"samples": samples or max(map(len, scores.values()))},
        "model": {"name": "tiny", "dtype": "float32"},
        "method": {"name": method, "version": 1, "strength": strength, "parameters": {}, "calibration": {}},
        "backend": "auto",
    }
    with Store(root).run(experiment, config).writing({"device": "a CPU"}) as writer:
        for length in lengths:
            for task, each in scores.items():
                for number, score in enumerate(each):
                    writer.append(
                        {
                            "id": f"{task}-{length}-{number}",
                            "task": task,
                            "protocol": protocol,
                            "length": length,
                            "score": score,
                            "skip_ratio": 0.5 if strength else 0.0,
                            "skip_ratio_by_layer": [0.5, 0.5],
                            "ttft_s": ttft,
                            "process": process,
                            "device": "a CPU",
                        }
                    )


def only(root: Path, experiment: str = "ruler") -> Section:
    [section] = sections(root, experiment)
    return section


def mean(root: Path, method: str, scope: str, length: int = 4096) -> pd.Series:
    rows = means(only(root))
    [row] = rows[(rows["method"] == method) & (rows["scope"] == scope) & (rows["length"] == length)].to_dict("records")
    return pd.Series(row)


EASY_AND_HARD = {"vt": [1.0, 1.0, 0.8, 1.0], "cwe": [0.1, 0.0, 0.0, 0.1]}


def test_every_task_has_equal_weight_however_many_answers_it_has(tmp_path):
    write(tmp_path, {"vt": [1, 1, 1, 1, 1, 1], "fwe": [0, 0]})
    row = mean(tmp_path, "dense", "all")
    assert (row["score"], row["n"], row["tasks"]) == (0.5, 8, 2)


def test_tasks_that_dense_cannot_do_are_marked_and_left_out_of_the_second_mean(tmp_path):
    write(tmp_path, EASY_AND_HARD)
    write(tmp_path, {"vt": [0.5, 1.0, 0.8, 1.0], "cwe": [0.9, 0.9, 0.9, 0.9]}, "bsfa", "k=2")
    marked = cells(only(tmp_path)).set_index(["task", "method"])["weak_dense"]
    assert list(marked[marked].index.get_level_values("task").unique()) == ["cwe"]
    row = mean(tmp_path, "bsfa", "able")
    assert (row["tasks"], row["n"]) == (1, 4)
    assert row["of_dense"] == pytest.approx(3.3 / 3.8)
    assert row["difference"] == pytest.approx(-0.5 / 4)
    assert row["difference_low"] <= row["difference"] <= row["difference_high"] == 0
    assert mean(tmp_path, "bsfa", "all")["of_dense"] > 1


def test_methods_are_held_against_dense_on_the_same_samples_alone(tmp_path):
    write(tmp_path, {"vt": [1, 1, 0, 0]})
    write(tmp_path, {"vt": [1, 1]}, "bsfa", "k=2")
    row = mean(tmp_path, "bsfa", "all")
    assert (row["n"], row["difference"], row["of_dense"]) == (2, 0, 1)


def test_runs_of_other_sizes_are_one_section_and_no_sample_counts_twice(tmp_path):
    write(tmp_path, {"vt": [1, 0]}, process="one", ttft=4.0)
    write(tmp_path, {"vt": [1, 0, 0, 0], "fwe": [1, 1]}, lengths=(4096, 8192), process="two", ttft=9.0)
    write(tmp_path, {"vt": [1, 0]}, "bsfa", "k=2", process="one", ttft=2.0)
    write(tmp_path, {"vt": [1, 0, 0, 0], "fwe": [1, 1]}, "blasst", "factor=8", process="two", ttft=3.0)
    section = only(tmp_path)
    assert "4096, 8192 tokens" in section.title
    assert cells(section).query("method == 'dense' and length == 4096").set_index("task")["n"].to_dict() == {
        "vt": 4,
        "fwe": 2,
    }
    assert mean(tmp_path, "bsfa", "all")["ttft_of_dense"] == 0.5
    assert mean(tmp_path, "blasst", "all")["ttft_of_dense"] == pytest.approx(1 / 3)


def test_protocols_are_never_in_one_table_and_are_named(tmp_path):
    write(tmp_path, {"vt": [1]})
    write(tmp_path, {"vt": [0]}, protocol="official")
    found = sections(tmp_path, "ruler")
    assert len({section.name for section in found}) == 2
    for section in found:
        assert f"(protocol {section.samples['protocol'].item()})" in section.title


def test_one_answer_a_task_has_no_interval(tmp_path):
    write(tmp_path, {"vt": [1.0], "fwe": [0.5]})
    row = mean(tmp_path, "dense", "all")
    assert row["score"] == 0.75
    assert np.isnan(row["score_low"])


def test_an_interval_holds_its_mean(tmp_path):
    write(tmp_path, {"vt": [1.0, 0.0, 1.0, 0.6], "fwe": [0.3, 0.4, 0.8, 1.0]})
    row = mean(tmp_path, "dense", "all")
    assert 0 < row["score_low"] < row["score"] < row["score_high"] < 1


def test_the_trade_is_over_what_dense_can_do_or_over_all_where_that_is_nothing(tmp_path):
    write(tmp_path, EASY_AND_HARD)
    write(tmp_path, EASY_AND_HARD, "bsfa", "k=2")
    assert list(trade(means(only(tmp_path)))["scope"]) == ["able"]
    write(tmp_path / "weak", {"cwe": [0.1, 0.1]})
    write(tmp_path / "weak", {"cwe": [0.1, 0.0]}, "bsfa", "k=2")
    assert list(trade(means(only(tmp_path / "weak")))["scope"]) == ["all"]


def test_scores_stand_side_by_side(tmp_path):
    write(tmp_path, EASY_AND_HARD)
    write(tmp_path, {"vt": [0, 0]}, "bsfa", "k=2")
    wide = scores(only(tmp_path)).set_index("method")
    assert wide.loc["dense", ["vt", "cwe"]].tolist() == pytest.approx([0.95, 0.05])
    assert wide.loc["bsfa", "vt"] == 0
    assert np.isnan(wide.loc["bsfa", "cwe"])


# The paper's numbers


def test_the_papers_points_say_where_they_come_from(tmp_path):
    write(tmp_path, EASY_AND_HARD)
    write(tmp_path, EASY_AND_HARD, "bsfa", "k=2", ttft=0.5)
    section = only(tmp_path)
    rows = beside_the_paper(section, trade(means(section)))
    ours, theirs = rows[rows["model"] == "tiny"], rows[rows["model"] != "tiny"]
    assert ours[["device", "length", "ttft_of_dense", "of_dense"]].values.tolist() == [["a CPU", 4096, 0.5, 1.0]]
    assert set(theirs["model"]) == {"Llama-3.1-8B"}
    assert set(theirs["device"]) == {"A100"}
    assert theirs["source"].str.contains("arXiv").all()
    first = theirs[theirs["length"] == 65536].iloc[0]
    assert (first["ttft_of_dense"], first["of_dense"]) == pytest.approx((0.824, 0.935))


def test_every_curve_of_the_paper_is_read():
    data = yaml.safe_load(paper.FILE.read_text())
    read = sum(len(paper.curves(task)) for task in ("ruler", "niah"))
    assert read == sum(len(curve["points"]) for curve in data["curves"]) == 34
    assert paper.curves("reasoning").empty


# Figures and the report


def drawn(figure) -> dict[str, list[str]]:
    """The labels in each panel of a figure, by its title."""
    return {axis.get_title(): axis.get_legend_handles_labels()[1] for axis in figure.axes}


def test_the_figures_have_a_panel_a_length_and_the_papers_beside_them(tmp_path):
    for method, strength, ttft in (
        ("dense", "", 1.0),
        ("bsfa", "k=2", 0.8),
        ("bsfa", "k=4", 0.9),
        ("blasst", "x=1", 0.7),
    ):
        write(tmp_path, EASY_AND_HARD, method, strength, ttft=ttft, lengths=(2048, 4096))
    section = only(tmp_path)
    ours = {f"{length} tokens": ["bsfa", "blasst"] for length in (2048, 4096)}
    assert drawn(skipped(trade(means(section)), section.title)) == ours
    panels = drawn(timed(trade(means(section)), paper.curves("ruler"), section.title))
    assert {title: panels[title] for title in ours} == ours
    assert panels["the paper: Llama-3.1-8B, A100"][0] == "bsfa (the paper, 32K)"
    apart = trade(means(section)).assign(ttft_of_dense=math.nan)
    alone = timed(apart, paper.curves("ruler"), section.title)
    assert list(drawn(alone)) == ["the paper: Llama-3.1-8B, A100"]
    assert "the paper's curves stand alone" in " ".join(alone.get_suptitle().split())


@pytest.mark.parametrize(
    ("experiment", "runs"),
    [
        ("ruler", [("dense", "", EASY_AND_HARD), ("bsfa", "k=2", EASY_AND_HARD)]),
        ("reasoning", [("dense", "", {"vt": [0.0, 0.0]}), ("bsfa", "k=2", {"vt": [1.0]})]),
        ("ruler", [("bsfa", "k=2", {"vt": [1.0]})]),
    ],
    ids=["two methods", "dense knows nothing", "no dense"],
)
def test_a_report_of_a_suite_on_its_way(command, tmp_path, experiment, runs):
    for method, strength, answers in runs:
        write(tmp_path, answers, method, strength, experiment=experiment)
    ended = command("experiment=report", QUIET, f"results={tmp_path}")
    assert ended.status == 0, ended.err
    name = only(tmp_path, experiment).name
    tables = {f"{name}{part}.{kind}" for part in ("", "-cells", "-tasks", "-paper") for kind in ("md", "csv", "tex")}
    assert {file.name for file in (tmp_path / "tables").iterdir()} == tables
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {
        f"{name}-{figure}.{kind}" for figure in ("skipped", "ttft") for kind in ("png", "pdf")
    }
    assert "protocol ours" in ended.out
    assert "nan" not in "".join(file.read_text() for file in (tmp_path / "tables").glob("*.md"))


def test_a_mean_over_fewer_tasks_than_its_neighbours_is_marked(tmp_path):
    write(tmp_path, {"vt": [1.0, 1.0], "fwe": [1.0, 1.0]})
    write(tmp_path, {"vt": [1.0, 1.0], "fwe": [0.5, 1.0]}, "blasst", "x=1")
    assert "not to be compared" not in notes.means(means(only(tmp_path)))
    write(tmp_path, {"vt": [1.0, 1.0]}, "bsfa", "k=2")
    shown = readable.means(means(only(tmp_path))).set_index("method")["tasks"]
    assert shown.groupby(level=0).first().to_dict() == {
        "dense": "all (2)",
        "blasst": "all (2)",
        "bsfa": "all (1 of 2 tasks)",
    }
    assert "not to be compared" in notes.means(means(only(tmp_path)))
    section = only(tmp_path)
    [note] = skipped(trade(means(section)), section.title).axes[0].texts
    assert note.get_text() == "1 of 2 tasks"


def test_a_table_marks_a_task_that_dense_cannot_do(tmp_path):
    write(tmp_path, EASY_AND_HARD)
    shown = readable.table(cells(only(tmp_path))).set_index("task")["accuracy % [95%]"]
    assert "†" in shown["cwe"]
    assert "†" not in shown["vt"]
