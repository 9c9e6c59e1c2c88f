"""Tensor parallelism over two processes on the CPU: every process attends with its own heads, as one process would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import bsfa
from bsfa.model import fingerprint
from tests.parallel import TOKENS, read

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def thresholds(model_folder, tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """The model in one process, and a file of its thresholds."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    file = tmp_path_factory.mktemp("thresholds") / "thresholds.safetensors"
    bsfa.calibrate(model, [TOKENS], [2], progress=False).save(file)
    return model, file


def test_two_processes_decide_and_answer_as_one_does(model_folder, thresholds, tmp_path):
    model, file = thresholds
    worker = (str(ROOT / "tests" / "parallel.py"), str(model_folder), str(file), str(tmp_path))
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *worker],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    whole = read(model, str(file))
    assert 0 < sum(map(sum, whole["bsfa"]["kept"])) < sum(map(sum, whole["dense"]["kept"]))
    for name, one in whole.items():
        halves = [part["methods"][name] for part in (first, second)]
        assert [a + b for a, b in zip(*(half["kept"] for half in halves), strict=True)] == one["kept"], name
        for half in halves:
            torch.testing.assert_close(torch.tensor(half["logits"]), torch.tensor(one["logits"]), atol=1e-4, rtol=1e-4)
    assert first["fingerprint"] == second["fingerprint"] == fingerprint(model)
    assert "not shared out by tensor parallelism" in first["calibration"]
