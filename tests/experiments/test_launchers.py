"""Sweeps: over processes by Hydra's launchers, and next to other processes that write the same runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from filelock import FileLock

from bsfa import InputError
from experiments import launchers
from tests.experiments.conftest import CALIBRATION, QUIET

ROOT = Path(__file__).parents[2]
TINY = ("experiment=niah", *CALIBRATION, "task.lengths=[448]", "task.depths=1", "task.haystacks=[noise]", QUIET)


def complete(results: Path) -> set[str]:
    """Method and strength of every run that has a summary."""
    configs = [
        yaml.safe_load(file.with_name("config.yaml").read_text()) for file in results.glob("niah/*/summary.json")
    ]
    return {f"{config['method']['name']} {config['method']['strength']}".strip() for config in configs}


def test_a_sweep_over_processes_whose_jobs_have_runs_in_common(command, model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    few = ("method=compare", "~method.members.sdpa", "~method.members.streaming_llm", "method.k=1,2")
    arguments = (*TINY, *few, f"model.path={model_folder}", f"results={tmp_path / 'r'}")
    ended = command("-m", "launcher=submitit_local", *arguments)
    assert ended.status == 0, ended.err
    assert complete(tmp_path / "r") == {"dense", "bsfa k=1", "bsfa k=2"}


@pytest.mark.parametrize("launcher", ["slurm", "joblib"])
def test_a_launcher_of_sweeps_is_refused_without_one(command, launcher):
    assert command(f"launcher={launcher}", "experiment=report").error == (
        f"error: launcher={launcher} launches the jobs of a sweep; add -m"
    )


def test_a_launcher_that_is_not_installed_is_one_line(command, monkeypatch):
    monkeypatch.setattr(launchers, "find_spec", lambda name: None)
    assert "pip install hydra-submitit-launcher" in command("-m", "launcher=slurm", "experiment=report").error
    assert "pip install hydra-joblib-launcher" in command("-m", "launcher=joblib", "experiment=report").error


def test_in_a_sweep_a_run_that_another_process_writes_is_left_to_it(command, model_folder, tmp_path):
    arguments = (*TINY, f"model.path={model_folder}", f"results={tmp_path / 'r'}")
    assert command(*arguments, "method=dense").status == 0
    [summary] = tmp_path.glob("r/niah/*/summary.json")
    summary.unlink()
    summary.with_name("samples.jsonl").unlink()
    with FileLock(summary.with_name(".lock")):
        assert "another process is writing" in command(*arguments, "method=dense").error
        ended = command("-m", *arguments, "method=dense,sdpa")
        assert ended.status == 0, ended.err
        assert "is left to the process that is writing it" in ended.out
        assert complete(tmp_path / "r") == {"sdpa"}
    assert command("-m", *arguments, "method=dense,sdpa").status == 0
    assert complete(tmp_path / "r") == {"dense", "sdpa"}


def test_a_job_that_makes_no_sense_is_named_and_the_others_run(command, model_folder, tmp_path):
    arguments = (*TINY, f"model.path={model_folder}", "method=bsfa", "method.k=7,1", f"results={tmp_path / 'r'}")
    ended = command("-m", *arguments)
    assert "k=7 is not calibrated" in ended.error
    assert complete(tmp_path / "r") == {"bsfa k=1"}


def test_every_process_takes_a_gpu_of_its_own(monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr(launchers.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"GPU-{number}"))
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    process = launchers.own_gpu.__wrapped__
    first, second = process(), process()
    assert taken == [0, 1]
    with pytest.raises(InputError, match=r"all 2 GPUs are taken.*hydra\.launcher\.n_jobs"):
        process()
    first.release()
    assert process() is not None
    assert taken == [0, 1, 0]
    second.release()
