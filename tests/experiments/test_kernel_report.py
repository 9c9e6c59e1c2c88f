"""The kernel's table and figure, from the records of several runs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from experiments import kernel_report, page
from experiments.records import Store
from tests.experiments.conftest import QUIET

SAMPLE = {
    "length": 1024, "head_size": 128, "q_heads": 4, "kv_heads": 2, "dtype": "bfloat16", "skip_asked": 0.5,
    "skip_ratio": 0.5, "ms": 2.0, "ms_q25": 1.9, "ms_q75": 2.1,
}  # fmt: skip


def write(root: Path, length: int, kernel: str | None = None, device: str = "a GPU") -> str:
    """One run of one length; its id."""
    grid = {"lengths": [length], "dtype": "bfloat16", "repeats": 3, "kernel": kernel}
    run = Store(root).run("kernel", {"kernel": grid, "device": device})
    with run.writing({"device": device}) as writer:
        for pattern, baselines in (("random", {"fa2": 4.0, "fa3": 3.0}), ("structured", {})):
            writer.append({**SAMPLE, "id": pattern, "length": length, "pattern": pattern, "baseline_ms": baselines})
    return run.id


def test_the_kernels_table_and_figure_are_made_from_the_records(command, tmp_path):
    write(tmp_path, 1024)
    ended = command("experiment=report", QUIET, f"results={tmp_path}")
    assert ended.status == 0, ended.err
    [table], [_] = tmp_path.glob("tables/kernel-*.csv"), tmp_path.glob("figures/kernel-*.png")
    rows = pd.read_csv(table).set_index("pattern")
    assert rows.loc["random", ["best_dense", "speedup_over_best_dense"]].tolist() == ["fa3", 1.5]
    assert pd.isna(rows.loc["structured", "speedup_over_best_dense"])
    assert "Causal attention on a GPU" in (tmp_path / page.FILE).read_text()
    [chapter] = kernel_report.chapters(tmp_path)
    assert chapter.facts["dense attention"] == "fa2, fa3"


def test_runs_of_one_device_and_kernel_are_one_table_and_those_of_another_kernel_their_own(tmp_path):
    long, short = write(tmp_path, 4096), write(tmp_path, 1024)
    other = write(tmp_path, 1024, kernel="sm80")
    best, sm80 = kernel_report.chapters(tmp_path)
    assert best.tables[0].rows["length"].tolist() == [1024, 1024, 4096, 4096]
    assert sm80.tables[0].rows["length"].tolist() == [1024, 1024]
    assert (best.tables[0].name, sm80.tables[0].name) == ("kernel-a-gpu-best-bfloat16", "kernel-a-gpu-sm80-bfloat16")
    assert "sm80" in sm80.title
    for run, expected in ((long, best), (short, best), (other, sm80)):
        [found] = kernel_report.chapters(tmp_path, only=run)
        assert found.title == expected.title


@pytest.mark.parametrize(
    ("device", "said"), [("NVIDIA H200", False), ("NVIDIA H100 80GB HBM3", True)], ids=["its own", "another's"]
)
def test_a_limit_that_another_device_reached_is_said_to_be(tmp_path, device, said):
    write(tmp_path, 1024, device=device)
    [chapter] = kernel_report.chapters(tmp_path)
    assert (f"not measured on {device}" in chapter.tables[0].below) == said


def test_where_all_rows_have_the_same_baselines_the_note_names_those_that_the_best_is_of(tmp_path):
    run = Store(tmp_path).run("kernel", {"kernel": {"dtype": "bfloat16", "repeats": 3}, "device": "a GPU"})
    with run.writing({"device": "a GPU"}) as writer:
        writer.append({**SAMPLE, "id": "a", "pattern": "random", "baseline_ms": {"fa2": 4.0, "cudnn": 3.0}})
    [chapter] = kernel_report.chapters(tmp_path)
    assert "Best dense: of fa2, cudnn in every row." in chapter.tables[0].below
    assert "best_dense_of" not in chapter.tables[0].shown


def test_the_best_dense_attention_says_of_which_and_the_table_which_did_not_run(tmp_path):
    grid = {"lengths": [1024], "dtype": "bfloat16", "repeats": 3, "kernel": None, "baselines": ["fa2", "fa3", "flex"]}
    run = Store(tmp_path).run("kernel", {"kernel": grid, "device": "a GPU"})
    failed = {"fa3": "CUDA out of memory. Tried to allocate 32.00 GiB.", "flex": "No module named 'triton'"}
    with run.writing({"device": "a GPU"}) as writer:
        for length, times, more in (
            (1024, {"fa2": 4.0, "fa3": 3.0, "flex": 5.0}, {"baselines_failed": {}}),
            (2048, {"fa2": 4.0}, {"baselines_failed": failed}),
            (4096, {"fa2": 4.0, "flex": 3.0}, {}),  # a record of before reasons were kept
        ):
            shape = {"id": str(length), "length": length, "pattern": "random", "baseline_ms": times}
            writer.append({**SAMPLE, **shape, **more})
    [chapter] = kernel_report.chapters(tmp_path)
    [table] = chapter.tables
    rows, shown = table.rows.set_index("length"), table.shown.set_index("length")
    assert rows["best_dense_of"].tolist() == ["fa2, fa3, flex", "fa2", "fa2, flex"]
    assert rows["best_dense"].tolist() == ["fa3", "fa2", "flex"]
    assert rows.loc[2048, "fa3_failed"] == failed["fa3"]
    assert shown["best_dense_of"].tolist() == rows["best_dense_of"].tolist()
    assert shown["fa3_ms"].tolist() == ["3", "out of memory", "not run"]
    assert shown["flex_ms"].tolist() == ["5", "not run", "3"]
    assert "fa3 did not run at 2,048 tokens, head size 128: CUDA out of memory" in table.below
    assert "flex did not run at 2,048 tokens, head size 128: No module named 'triton'" in table.below
    assert "fa3 did not run at 4,096 tokens, head size 128: the record does not say why" in table.below
