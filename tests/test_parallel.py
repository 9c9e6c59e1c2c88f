"""Tensor parallelism over two processes: each attends with its own heads, as one process would with all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import bsfa
from bsfa.model import fingerprint
from experiments.records import read_samples
from tests.conftest import tiny_config, tiny_tokenizer
from tests.parallel import TOKENS, TTFT, read

ROOT = Path(__file__).parents[1]


def torchrun(worker: str, *arguments: str, devices: str) -> subprocess.CompletedProcess:
    """Run a module in two processes, on GPUs or, where ``devices`` is empty, on the CPU."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    return subprocess.run(
        [sys.executable, "-m", *launcher, "-m", worker, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": devices},
        capture_output=True,
        text=True,
        timeout=300,  # processes that wait for one another would not end
    )


def both(model, folder: Path, out: Path, devices: str) -> tuple[dict, list[dict]]:
    """What one process reads of a model, and what each of two does."""
    bsfa.calibrate(model, [TOKENS], [2], progress=False).save(out / "thresholds.safetensors")
    arguments = (str(folder), str(out / "thresholds.safetensors"), str(out))
    ended = torchrun("tests.parallel", *arguments, devices=devices)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("tensor parallel over 2") == 1  # of both processes one report
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


def test_a_process_that_runs_out_of_memory_ends_all_with_one_message_and_leaves_the_cell_as_lost(
    model_folder, tmp_path
):
    asked = ("method=streaming_llm", "ttft.lengths=[512,640]", "ttft.skips=[]", "ttft.baselines=[sdpa]")
    settings = (*TTFT, *asked, f"model.path={model_folder}", f"results={tmp_path}")
    ended = torchrun("tests.parallel_out_of_memory", *settings, devices="")
    assert ended.returncode != 0
    assert "Error executing job" not in ended.stderr
    [line] = re.findall("error: .*", ended.stderr)
    assert "640/streaming_llm local_blocks=4: process 1 of 2 is out of memory (CUDA out of memory. Tried" in line
    [run] = tmp_path.glob("ttft/*")
    assert [sample["id"] for sample in read_samples(run / "lost.jsonl")] == ["640/streaming_llm local_blocks=4"]
    assert {sample["id"] for sample in read_samples(run / "samples.jsonl")} == {
        "512/streaming_llm local_blocks=4",
        "512/sdpa",
    }


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs")
def test_two_gpus_decide_and_answer_as_one_does(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "model"
    LlamaForCausalLM(tiny_config(hidden_size=256, head_dim=64)).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)  # rotary frequencies stay in fp32
    whole, halves = both(model.eval().to("cuda"), folder, tmp_path, devices="0,1")
    for name, one in whole.items():
        parts = [half["methods"][name] for half in halves]
        first = parts[0]["kept"][0] + parts[1]["kept"][0]  # later layers see sums rounded in another order
        assert sum(abs(a - b) for a, b in zip(first, one["kept"][0], strict=True)) <= 0.05 * sum(one["kept"][0]), name
        for part in parts:
            error = torch.tensor(part["logits"]) - torch.tensor(one["logits"])
            assert error.norm() < 0.1 * torch.tensor(one["logits"]).norm(), name
