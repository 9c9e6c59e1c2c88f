"""Tensor parallelism over two processes: each attends with its own heads, as one process would with all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import bsfa
from bsfa.model import fingerprint
from experiments.records import read_samples
from tests.conftest import tiny_config
from tests.parallel import TOKENS, read

ROOT = Path(__file__).parents[1]
WORKER = "tests.parallel"


def torchrun(*arguments: str, devices: str) -> str:
    """Run `tests.parallel` in two processes, on GPUs or, where ``devices`` is empty, on the CPU; what they printed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            "-m",
            WORKER,
            *arguments,
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": devices},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def both(model, folder: Path, out: Path, devices: str) -> tuple[dict, list[dict]]:
    """What one process reads of a model, and what each of two does."""
    bsfa.calibrate(model, [TOKENS], [2], progress=False).save(out / "thresholds.safetensors")
    arguments = (str(folder), str(out / "thresholds.safetensors"), str(out))
    assert "tensor parallel over 2" in torchrun(*arguments, devices=devices)
    return read(model, arguments[1]), [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_decide_and_answer_as_one_does(model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    whole, halves = both(model, model_folder, tmp_path, devices="")
    assert 0 < sum(map(sum, whole["bsfa"]["kept"])) < sum(map(sum, whole["dense"]["kept"]))
    for name, one in whole.items():
        parts = [half["methods"][name] for half in halves]
        assert [a + b for a, b in zip(*(part["kept"] for part in parts), strict=True)] == one["kept"], name
        for part in parts:
            torch.testing.assert_close(torch.tensor(part["logits"]), torch.tensor(one["logits"]), atol=1e-4, rtol=1e-4)
    assert {half["fingerprint"] for half in halves} == {fingerprint(model)}
    assert "not shared out by tensor parallelism" in halves[0]["calibration"]
    [file] = tmp_path.glob("ttft/*/samples.jsonl")  # of both processes one record
    ratios = {sample["method"]: sample["skip_ratio"] for sample in read_samples(file)}
    assert ratios == {"dense": 0.0, "bsfa set to skip 50%": pytest.approx(0.5, abs=0.06)}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs")
def test_two_gpus_decide_and_answer_as_one_does(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(hidden_size=256, head_dim=64)).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "model")
    whole, halves = both(model.to("cuda"), tmp_path / "model", tmp_path, devices="0,1")
    for name, one in whole.items():
        parts = [half["methods"][name] for half in halves]
        first = parts[0]["kept"][0] + parts[1]["kept"][0]  # later layers see sums rounded in another order
        assert sum(abs(a - b) for a, b in zip(first, one["kept"][0], strict=True)) <= 0.05 * sum(one["kept"][0]), name
        for part in parts:
            error = torch.tensor(part["logits"]) - torch.tensor(one["logits"])
            assert error.norm() < 0.1 * torch.tensor(one["logits"]).norm(), name
