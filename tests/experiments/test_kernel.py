"""experiment=kernel without a GPU: what is refused, and what a sample says of a baseline that does not run."""

from __future__ import annotations

import pytest
import torch

from bsfa import cuda
from bsfa.attention import block_maxima
from experiments import kernel
from experiments.kernel_baselines import BASELINES
from tests.experiments.conftest import QUIET


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
        ("kernel.baselines=null", "kernel.baselines=None must hold some of"),
        ("kernel.baselines=[fa9]", "kernel.baselines=['fa9'] must hold some of fa3"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(command, tmp_path, argument, message):
    assert message in command("experiment=kernel", argument, QUIET, f"results={tmp_path}").error


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Three baselines, of which one runs, in place of the GPU's; the gated kernel's place is taken by its geometry."""

    def out_of_memory(q, k, v):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 GiB.\nmore")

    def missing(q, k, v):
        raise ModuleNotFoundError("No module named 'fa3_fwd_interface'")

    for name, factory in (("fa3", missing), ("cudnn", out_of_memory), ("fa2", lambda q, k, v: lambda: q)):
        monkeypatch.setitem(BASELINES, name, factory)
    monkeypatch.setattr(
        cuda, "block_maxima", lambda q, k, kernel, **options: block_maxima(q, k, backend="reference", **options)
    )
    monkeypatch.setattr(cuda, "attend", lambda *_, **options: (None, None, torch.ones(1, 4)))
    monkeypatch.setattr(kernel, "in_turns", lambda kernels, repeats: dict.fromkeys(kernels, (1.0, 2.0, 3.0)))


@pytest.mark.usefixtures("on_a_cpu")
def test_a_baseline_that_does_not_run_stands_in_every_sample_with_its_reason():
    grid = kernel.Grid([256], [0.0, 0.5], [64], [[4, 2]], ["random"], ["fa3", "cudnn", "fa2"], "bfloat16", 1, 0, None)
    [shape] = grid.shapes()
    for sample in kernel.measure(shape, grid.skips, grid, torch.device("cpu")):
        assert sample["baseline_ms"] == {"fa2": 2.0}
        assert sample["baselines_failed"] == {
            "fa3": "No module named 'fa3_fwd_interface'",
            "cudnn": "CUDA out of memory. Tried to allocate 32.00 GiB.",
        }
