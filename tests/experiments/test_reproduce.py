"""experiment=reproduce: the plan, and one experiment after another."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from experiments import reproduce, standing
from experiments.models import ModelSource
from experiments.needs import Size, describe
from experiments.tracking import Untracked
from experiments.unavailable import Unavailable, each
from tests.experiments.conftest import KS, QUIET, SMALL, snapshot, written
from tests.experiments.test_configs import CONF

REPRODUCE = "experiment=reproduce"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(ModelSource, "load", None)


def rows(out: str) -> list[list[str]]:
    """The cells of the plan's tables, their heads aside."""
    lines = [line.strip("|").split("|") for line in out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines if "experiment" not in line[0]]


@pytest.mark.usefixtures("no_model")
def test_a_dry_run_says_of_every_run_whether_it_is_complete_and_changes_nothing(command, model_folder, finished_copy):
    [dense] = [file for file in finished_copy.glob("niah/*/samples.jsonl") if '"method": "dense"' in file.read_text()]
    dense.with_name("summary.json").unlink()
    dense.write_text("".join(dense.read_text().splitlines(keepends=True)[:3]))
    before = snapshot(finished_copy)
    asked = (f"model.path={model_folder}", *SMALL, "method.k=[1,2]", f"results={finished_copy}", QUIET)
    ended = command(REPRODUCE, "dry=true", *asked)
    assert ended.status == 0, ended.err
    assert snapshot(finished_copy) == before
    assert rows(ended.out) == [
        ["niah", "dense", "", "", "800, 900", "8", "3 of 8 done"],
        ["niah", "streaming_llm", "local_blocks=4", "", "800, 900", "8", "complete"],
        *(["niah", "bsfa", f"k={k}", "prose, 2 texts of 900 tokens", "800, 900", "8", "complete"] for k in (1, 2)),
    ]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("asked", "more"), [((), []), (("method=compare",), ["sdpa"])])
def test_a_cpu_has_time_for_dense_attention_a_rival_and_bsfa_at_two_strengths(command, tmp_path, asked, more):
    ended = command(REPRODUCE, "profile=quick", "dry=true", *asked, f"results={tmp_path}", QUIET)
    assert ended.status == 0, ended.err
    assert [row[1] for row in rows(ended.out)] == ["dense", "streaming_llm", "bsfa", "bsfa", *more]
    assert {(row[4], row[5]) for row in rows(ended.out)} == {("1024, 2048", "16")}


@pytest.fixture
def again(command, model_folder, finished_copy):
    """Calls it once more on a finished folder."""
    asked = (f"model.path={model_folder}", *SMALL, KS, f"results={finished_copy}", QUIET)
    return lambda: command(REPRODUCE, *asked)


def main_table(results: Path) -> str:
    [main] = [file for file in results.glob("tables/*.md") if not file.stem.endswith(("-cells", "-paper"))]
    return main.read_text().split("\n", 2)[2]


@pytest.mark.usefixtures("no_model")
def test_a_second_call_finds_everything_done_draws_nothing_and_ends_with_the_report(again, finished_copy, monkeypatch):
    monkeypatch.setattr("experiments.report.make", None)
    before = written(finished_copy)
    ended = again()
    assert ended.status == 0, ended.err
    assert written(finished_copy) == before
    assert "4 runs, 0 of them to do" in ended.out
    assert main_table(finished_copy) in ended.out
    assert ended.out.rstrip().endswith(f"page: {finished_copy / 'report.html'}")


def test_a_report_stands_as_long_as_its_files_its_records_and_its_code(finished_copy, tmp_path, monkeypatch):
    def stands() -> bool:
        tracker = {"_target_": "experiments.tracking.NoTracker"}
        cfg = OmegaConf.create({"results": str(finished_copy), "tracker": tracker})
        return standing.of_store(cfg).said() is not None

    assert stands()
    for part in ("report.html", "report.json", "figures/*-curve.png", "tables/*-cells.csv"):
        [file] = finished_copy.glob(part)
        elsewhere = file.rename(tmp_path / "gone")
        assert not stands(), part
        elsewhere.rename(file)
        assert stands()
    code = Path(shutil.copytree(standing.SOURCES, tmp_path / "code"))
    monkeypatch.setattr(standing, "SOURCES", code)
    for file in (code / "style.py", next(finished_copy.glob("niah/*/samples.jsonl"))):
        content = file.read_bytes()
        file.write_bytes(content.replace(b"1", b"2", 1))
        assert not stands(), file
        file.write_bytes(content)
        assert stands()


@pytest.mark.usefixtures("no_model")
def test_a_report_that_was_broken_off_is_made_again(again, command, finished_copy, monkeypatch):
    def broken(*_) -> None:
        raise KeyboardInterrupt

    before = snapshot(finished_copy)
    with monkeypatch.context() as patch:
        patch.setattr("experiments.chapters.Drawing.write", broken)
        with pytest.raises(KeyboardInterrupt):
            command("experiment=report", f"results={finished_copy}", QUIET)
    assert snapshot(finished_copy) != before
    assert again().status == 0
    assert snapshot(finished_copy) == before


@pytest.mark.usefixtures("no_model")
def test_every_record_is_hashed_once_for_its_table_and_once_for_the_report(again, finished_copy, monkeypatch):
    (finished_copy / "report.html").unlink()
    digest, read = hashlib.file_digest, []

    def counted(file, name):
        read.append(file.name)
        return digest(file, name)

    monkeypatch.setattr("experiments.standing.hashlib.file_digest", counted)
    assert again().status == 0
    assert (finished_copy / "report.html").is_file()
    records = [name for name in read if name.endswith("samples.jsonl")]
    assert len(set(records)) == 5
    assert len(records) == 10


@NO_GPU
@pytest.mark.usefixtures("no_model")
def test_the_papers_plan_needs_neither_gpu_nor_model_and_says_what_a_run_would(command, tmp_path):
    ended = command(REPRODUCE, "profile=paper", "dry=true", f"results={tmp_path / 'r'}", QUIET)
    assert ended.status == 0, ended.err
    assert {row[0] for row in rows(ended.out)} == {"niah", "ruler", "reasoning", "kernel", "ttft"}
    assert {row[6] for row in rows(ended.out)} == {"to do"}
    assert "longbench: 16 tasks from the hub" in ended.out
    assert "needs a CUDA GPU, and there is none here" in ended.out
    assert "meta-llama/Llama-3.1-8B-Instruct, 8.03 billion parameters, 16.1 GB" in ended.out
    assert "17.2 GB of keys and values at 131,072 tokens" in ended.out
    assert re.search(r"at least \d{3} hours on an NVIDIA H200", ended.out)
    assert snapshot(tmp_path) == {}


@NO_GPU
def test_what_is_missing_is_skipped_and_named_at_the_end(command, tmp_path):
    ended = command(REPRODUCE, "profile=gpu", "experiments=[niah,kernel]", f"results={tmp_path}", QUIET)
    assert ended.error.startswith("error: not run: niah (device cuda: this machine has no CUDA GPU")
    assert "kernel (experiment=kernel times GPU kernels and there is no CUDA GPU here)" in ended.error
    assert f"report ({tmp_path} holds no records" in ended.error


@NO_GPU
def test_an_experiment_that_fails_costs_no_other_its_turn(command, tmp_path, monkeypatch):
    def out_of_memory(cfg) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nSee the manual")

    monkeypatch.setattr("experiments.accuracy.run", out_of_memory)
    ended = command(REPRODUCE, "profile=gpu", "experiments=[niah,kernel]", f"results={tmp_path}", QUIET)
    assert ended.status == 2
    [line] = ended.err.splitlines()
    assert "niah (failed, the log has its traceback: OutOfMemoryError: CUDA out of memory. Tried" in line
    assert "kernel (experiment=kernel times GPU kernels" in line
    assert "in out_of_memory" in ended.out


def test_nothing_that_failed_keeps_its_model_from_being_freed():
    class Model:
        """Stands for one."""

    alive: list[weakref.ref] = []

    def run(name: str) -> None:
        model = Model()
        gc.collect()
        assert not [one for one in alive if one() is not None]
        alive.append(weakref.ref(model))
        raise Unavailable(f"{name} is missing")

    with pytest.raises(Unavailable, match=r"a is missing.*b is missing"):
        each(["a", "b"], run)


def test_tasks_that_a_tracker_did_not_take_make_an_experiment_that_it_did_not_take():
    def refused(task: str) -> None:
        raise Untracked("no key")

    with pytest.raises(Untracked, match=r"^complete, but not tracked: longbench"):
        each(["longbench"], lambda experiment: each(["qasper", "qmsum"], refused))


def test_an_experiment_that_a_tracker_did_not_take_is_said_to_be_complete(command, model_folder, monkeypatch, tmp_path):
    def refused(name, cfg):
        raise Untracked("no key")

    asked = (f"model.path={model_folder}", *SMALL, "method.k=[1,2]", f"results={tmp_path}", QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(reproduce, "show", lambda configs: None)
        patch.setattr(reproduce, "call", refused)
        assert "complete, but not tracked: niah (no key)" in command(REPRODUCE, *asked).error


def test_dry_is_true_or_false(command):
    assert "dry=maybe must be true or false" in command(REPRODUCE, "dry=maybe").error


def test_a_setting_goes_to_the_experiments_that_have_it(command, tmp_path):
    asked = ("profile=gpu", "experiments=[niah,kernel,ttft]", "task.lengths=[2048]", "method=bsfa", "method.k=[8]")
    ended = command(REPRODUCE, "dry=true", *asked, f"results={tmp_path}", QUIET)
    assert ended.status == 0, ended.err
    found = {row[0]: row for row in rows(ended.out)}
    assert found["niah"][1:6] == ["bsfa", "k=8", "prose, 16 texts of 2,048 tokens", "2048", "40"]
    assert found["kernel"][4] == "4096, 16384, 65536, 131072"
    assert found["ttft"][1].startswith("bsfa k=8 (prose), bsfa set to skip 80%")
    assert re.fullmatch(r"prose, 16 texts of [\d,]+ tokens", found["ttft"][3])
    assert "llama31_8b_random, 8.03 billion" in ended.out  # the profile's choice for ttft


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("experiments=[niah,longbench]", "['longbench'] is none of profile=gpu's niah, ruler"),
        ("experiments=niah", "experiments=niah must be a list, such as [niah, ruler"),
        ("experiments=[]", "experiments=[] must be a list, such as"),
        ("experiments=[ruler]", "task.depths=2 is a setting of none of ruler"),
        ("experiments=[niah] task.lengths=512", "task.lengths=512 must be a list"),
        ("experiments=[niah] method.k=[7]", "k=7"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(command, tmp_path, argument, message):
    ended = command(REPRODUCE, "profile=gpu", "task.depths=2", *argument.split(), f"results={tmp_path}", QUIET)
    assert message in ended.error
    assert "not run" not in ended.error


def test_a_models_size_is_that_of_its_configuration(tiny_model):
    size = Size.of(tiny_model.config)
    assert size.parameters == tiny_model.num_parameters()
    assert size.embeddings == 2 * 128 * tiny_model.config.hidden_size
    assert (size.cache, size.attention) == (2 * 2 * 2 * 16, 2 * 4 * 16)
    assert size.operations(10) == 20 * (size.parameters - size.embeddings) + 2 * 100 * size.attention


def test_a_hub_model_is_known_before_it_is_downloaded_and_the_embedded_one_is_not(tmp_path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hub, embedded = (
            instantiate(compose("config", [f"model={name}", "profile=quick"]).model)
            for name in ("llama31_8b", "smollm2")
        )
    assert hub.identity() == {"name": "Llama-3.1-8B-Instruct", "dtype": "float32", "hub": hub.path, "revision": "main"}
    assert hub.architecture().num_hidden_layers == 32
    assert list(describe(embedded, [])) == []
    assert dataclasses.replace(hub, path="another/model").architecture() is None


def test_a_model_folder_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nothing known"}')
    with pytest.raises(Unavailable, match=r"cannot read .*config\.json"):
        ModelSource("tiny", "float32", "cpu", path=str(tmp_path)).architecture()


@NO_GPU
def test_a_gpu_that_is_missing_is_missed_before_a_record_is_made(command, tmp_path):
    for experiment in ("ttft", "kernel"):
        ended = command(
            f"experiment={experiment}", "profile=gpu", "model=llama31_8b_random", QUIET, f"results={tmp_path}"
        )
        assert "no CUDA GPU" in ended.error
    assert snapshot(tmp_path) == {}


def test_a_missing_model_is_unavailable(model_folder, tmp_path):
    with pytest.raises(Unavailable, match="no model folder"):
        ModelSource("tiny", "float32", "cpu", path=str(tmp_path / "nowhere")).load()


def test_nothing_to_do_brings_neither_models_nor_figures():
    heavy = ("transformers.modeling_utils", "scipy.stats", "matplotlib", "wandb")
    code = f"import run, sys, experiments.accuracy, experiments.standing; print(set(sys.modules) & set({heavy}))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=CONF.parent, capture_output=True, text=True, check=True)
    assert ended.stdout == "set()\n"
