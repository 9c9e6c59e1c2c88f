"""experiment=kernel without a GPU: what is refused, and what a sample says of a baseline that does not run."""

from __future__ import annotations

import sys

import pytest
import torch

from bsfa import cuda
from bsfa.attention import block_maxima
from bsfa.methods.upstream import Cudnn
from experiments import kernel
from experiments.chapters import Chapter
from tests.experiments.conftest import QUIET, written


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("kernel.heads=[32,8]", "kernel.heads=[32, 8] must be pairs of query and KV heads"),
        ("kernel.heads=[[32,7]]", "kernel.heads=[[32, 7]] must be pairs"),
        ("kernel.dtype=int8", "kernel.dtype=int8 is none of bfloat16, float16"),
        ("kernel.skips=[]", "kernel.skips=[] must be shares"),
        ("kernel.skips=[half]", "must be shares from 0 to below 1"),
        ("kernel.skips=[0.5,0.5]", "kernel.skips=[0.5, 0.5] holds a share twice"),
        ("kernel.patterns=[]", "kernel.patterns=[] must hold some of random"),
        ("kernel.head_sizes=128", "kernel.head_sizes=128 must hold some of 64, 128"),
        ("kernel.lengths=4096", "kernel.lengths=4096 must be a list"),
        ("kernel.screens=[0]", "kernel.screens=[0] must be shares above 0 of a screen's bound"),
        ("kernel.baselines=null", "kernel.baselines=None must hold some of"),
        ("kernel.baselines=[fa9]", "kernel.baselines=['fa9'] must hold some of fa3"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(command, tmp_path, argument, message):
    assert message in command("experiment=kernel", argument, QUIET, f"results={tmp_path}").error


@pytest.fixture
def on_a_cpu(monkeypatch):
    """The baselines that are not for a CPU fail in other ways; the gated kernel's place is taken by its geometry."""

    def out_of_memory(call):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 GiB.\nmore")

    monkeypatch.setattr(Cudnn, "load", lambda self, devices: out_of_memory)
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(
        cuda, "block_maxima", lambda q, k, kernel, **options: block_maxima(q, k, backend="reference", **options)
    )
    monkeypatch.setattr(cuda, "attend", lambda *_, **options: (None, None, torch.ones(1, 4)))
    monkeypatch.setattr(kernel, "in_turns", lambda kernels, repeats: dict.fromkeys(kernels, (1.0, 2.0, 3.0)))


@pytest.mark.usefixtures("on_a_cpu")
def test_a_baseline_that_does_not_run_stands_in_every_sample_with_its_reason():
    grid = kernel.Grid([256], [0.0, 0.5], [64], [[4, 2]], ["random"], ["fa3", "cudnn", "flex"], "bfloat16", 1, 0, None)
    [shape] = grid.shapes()
    for sample in kernel.measure(shape, grid.skips, grid, torch.device("cpu")):
        assert sample["baseline_ms"] == {"flex": 2.0}
        assert sample["baselines_failed"] == {
            "fa3": "needs the module fa3_fwd_interface or flash_attn_interface "
            "(import of fa3_fwd_interface halted; None in sys.modules): pip install fa3-fwd",
            "cudnn": "CUDA out of memory. Tried to allocate 32.00 GiB.",
        }


@pytest.fixture
def one_cell(on_a_cpu, command, tmp_path, monkeypatch):
    """Measures a cell of a length, as if this CPU were a GPU."""
    monkeypatch.setattr(kernel, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    small = ("kernel.skips=[0.5]", "kernel.head_sizes=[64]", "kernel.heads=[[4,2]]", "kernel.patterns=[random]")
    asked = ("experiment=kernel", "profile=quick", *small, "kernel.baselines=[fa2]", QUIET, f"results={tmp_path}")
    return lambda length: command(*asked, f"kernel.lengths=[{length}]")


def test_a_finished_run_is_drawn_again_only_where_its_table_has_another(one_cell, tmp_path, monkeypatch):
    assert one_cell(256).status == 0
    with monkeypatch.context() as patch:
        patch.setattr(Chapter, "write", None)
        before = written(tmp_path)
        again = one_cell(256)
        assert again.status == 0, again.err
        assert written(tmp_path) == before
    [table] = tmp_path.glob("tables/*.csv")
    assert table.with_suffix(".md").read_text().split("\n", 2)[2] in again.out
    assert one_cell(384).status == 0
    table.write_text("of the first run alone")
    assert "384" in one_cell(256).out
    assert len(table.read_text().splitlines()) == 1 + 2


def test_tables_that_cannot_be_written_cost_no_record_and_are_drawn_by_the_next_call(one_cell, tmp_path):
    (tmp_path / "tables").touch()
    assert f"cannot write tables and figures below {tmp_path}" in one_cell(256).error
    assert list(tmp_path.glob("kernel/*/summary.json"))
    (tmp_path / "tables").unlink()
    assert one_cell(256).status == 0
    assert list(tmp_path.glob("figures/*.png"))
