"""From the command line to the store, and back from every kind of bad input."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from bsfa import Thresholds
from bsfa.provenance import Provenance
from experiments.models import ModelSource
from experiments.records import Writer, read_samples
from experiments.results import sections
from tests.experiments.conftest import CALIBRATION, KS, QUIET, SMALL, Ended, snapshot

ROOT = Path(__file__).parents[2]
DENSE = ("profile=quick", "method=dense", "task.haystacks=[noise]", "task.lengths=[448]", QUIET)
MANY = ("task.depths=10", "task.samples=4")  # some seconds
FEW = ("task.depths=5", "task.samples=1")


def runs(results: Path) -> dict[str, list[dict]]:
    """The samples of every run of a store by the method's label."""
    found = [read_samples(file) for file in sorted(results.glob("niah/*/samples.jsonl"))]
    return {samples[0]["method"]: samples for samples in found if samples}


def ids(results: Path) -> list[str]:
    """The samples of a store's one run, in the order in which they were written."""
    [samples] = runs(results).values()
    return [sample["id"] for sample in samples]


def grid(depths: int, samples: int) -> list[str]:
    """The ids of DENSE's grid."""
    return [f"noise-448-{round(100 * i / (depths - 1), 1):g}-{n}" for i in range(depths) for n in range(samples)]


def store(results: Path) -> dict[str, bytes]:
    """What was computed: records, summaries and thresholds, and not what was drawn of them."""
    files = snapshot(results).items()
    return {
        name: x for name, x in files if name.startswith(("niah/", "calibrate/")) and not name.endswith("report.json")
    }


@contextmanager
def started(*arguments: str):
    """``python run.py ...`` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_samples(process: subprocess.Popen, results: Path, count: int) -> None:
    """Until a run that is on its way has written some samples."""
    while sum(file.read_bytes().count(b"\n") for file in results.glob("niah/*/samples.jsonl")) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


# What a run leaves


def test_every_method_answers_every_prompt_once(finished):
    found = runs(finished)
    assert set(found) == {"dense", "sdpa", "streaming_llm local_blocks=4", "bsfa k=1 (prose)", "bsfa k=2 (prose)"}
    prompts = {tuple((sample["id"], sample["prompt_hash"]) for sample in samples) for samples in found.values()}
    assert len(prompts) == 1
    assert len(set(prompts.pop())) == 2 * 2 * 2


def test_records_say_what_a_reader_must_know(finished):
    for label, samples in runs(finished).items():
        for sample in samples:
            assert sample["method"] == label
            assert sample["prompt_tokens"] <= sample["length"] <= 900
            assert len(sample["skip_ratio_by_layer"]) == 2
            assert sample["ttft_s"] > sample["attention_s"] > 0
            assert sample["clock"] == "cpu perf_counter"
            assert sample["peak_memory_bytes"] > 0
            assert (sample["calibration"].get("data") == "prose") == label.startswith("bsfa")
            assert {"task", "depth", "seed", "prediction", "references", "score", "backend", "device"} <= set(sample)


def test_a_sparser_setting_skips_more_and_dense_skips_nothing(finished):
    ratio = {label: sum(s["skip_ratio"] for s in samples) for label, samples in runs(finished).items()}
    assert ratio["dense"] == ratio["sdpa"] == 0
    assert ratio["bsfa k=1 (prose)"] > ratio["bsfa k=2 (prose)"] > 0


def test_a_complete_run_has_a_summary_of_its_own_records(finished):
    for file in finished.glob("niah/*/summary.json"):
        summary = json.loads(file.read_text())
        samples = read_samples(file.with_name("samples.jsonl"))
        assert summary["n"] == len(samples) == sum(cell["n"] for cell in summary["cells"])
    assert len(list(finished.glob("niah/*/summary.json"))) == 5


def test_the_commands_write_into_the_results_folder_alone(command, model_folder, tmp_path):
    arguments = (*DENSE, f"model.path={model_folder}", "task.depths=1", "task.samples=1", f"results={tmp_path / 'r'}")
    assert command("experiment=niah", *arguments).status == 0
    sweep = command("-m", "experiment=niah", *arguments, "method=dense,sdpa")
    assert sweep.status == 0, sweep.err
    assert command("experiment=report", f"results={tmp_path / 'r'}", QUIET).status == 0
    assert set(runs(tmp_path / "r")) == {"dense", "sdpa"}
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("arguments", [("--help",), ("--cfg", "job"), ("--cfg", "job", "experiment=report")])
def test_help_and_the_config_are_shown_without_a_run(command, arguments):
    shown = command(*arguments)
    assert shown.status == 0
    assert "results: results" in shown.out
    assert list(Path.cwd().iterdir()) == []


# Doing it again


def test_a_finished_command_does_nothing_again(command, model_folder, finished_copy, monkeypatch):
    before = snapshot(finished_copy)
    monkeypatch.setattr(ModelSource, "load", None)  # not even the model is loaded
    again = command("experiment=niah", f"model.path={model_folder}", *SMALL, KS, QUIET, f"results={finished_copy}")
    assert again.status == 0, again.err
    assert "0 of them to do" in again.out
    assert snapshot(finished_copy) == before


def test_a_moved_results_folder_and_another_tracker_are_still_the_same_runs(command, model_folder, finished_copy):
    moved = finished_copy.rename(finished_copy.with_name("moved"))
    arguments = ("experiment=niah", f"model.path={model_folder}", *SMALL, KS, "tracker=wandb", f"results={moved}")
    assert "0 of them to do" in command(*arguments).out


def test_a_new_strength_runs_alone(command, model_folder, finished_copy):
    before = store(finished_copy)
    more = command(
        "experiment=niah",
        f"model.path={model_folder}",
        *SMALL,
        KS,
        "method.members.streaming_llm.local_blocks=[0,4]",
        QUIET,
        f"results={finished_copy}",
    )
    assert more.status == 0, more.err
    assert "6 runs, 1 of them to do" in more.out
    assert before.items() <= store(finished_copy).items()
    assert len(runs(finished_copy)["streaming_llm local_blocks=0"]) == 8


def test_a_command_ends_with_its_table_and_where_the_figures_are(command, model_folder, finished_copy):
    arguments = ("experiment=niah", f"model.path={model_folder}", *SMALL, KS, QUIET, f"results={finished_copy}")
    shutil.rmtree(finished_copy / "figures")
    for _ in range(2):
        out = command(*arguments).out
        assert re.search(r"\| noise +\| streaming_llm +\| local_blocks=4", out)
        assert f"figures: {finished_copy.resolve() / 'figures'}" in out
        assert {path.name.split("-")[-1] for path in (finished_copy / "figures").glob("*.png")} == {
            "curve.png", "heatmap.png", "ttft.png",
        }  # fmt: skip


def test_prompts_in_chunks_are_answered_as_in_one_piece_and_recorded_apart(command, model_folder, finished_copy):
    whole, before = runs(finished_copy), store(finished_copy)
    chunked = command(
        "experiment=niah",
        f"model.path={model_folder}",
        *SMALL,
        "method=bsfa",
        KS,
        "prefill.chunk=256",
        QUIET,
        f"results={finished_copy}",
    )
    assert chunked.status == 0, chunked.err
    assert before.items() <= store(finished_copy).items()
    apart, together = sorted(sections(finished_copy, "niah"), key=lambda section: len(section.samples))
    assert "800, 900 tokens in chunks of 256" in apart.title
    assert "chunks" not in together.title
    for label, expected in whole.items():
        samples = apart.samples[apart.samples["method"] + " " + apart.samples["strength"] + " (prose)" == label]
        for key in ("id", "prompt_hash", "prediction", "score", "skip_ratio", "skip_ratio_by_layer"):
            assert list(samples[key]) == [sample[key] for sample in expected if label.startswith("bsfa")]
    assert (apart.samples["ttft_s"] > apart.samples["attention_s"]).all()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("rivals", "flashprefill, flexprefill, minference, spargeattn, spargeattn_topk wants"),
        ("minference_searched", "minference_searched wants"),
        ("upstream_cudnn", "upstream_cudnn wants"),
        ("upstream_torch_flash", "upstream_torch_flash wants"),
    ],
)
@pytest.mark.parametrize("experiment", [("niah", "task.lengths=[1024]"), ("ttft", "ttft.lengths=[1024]")])
def test_a_method_that_wants_a_prompt_whole_is_refused_before_a_model_is_loaded(
    command, model_folder, tmp_path, monkeypatch, experiment, method, message
):
    monkeypatch.setattr(ModelSource, "load", None)
    name, lengths = experiment
    arguments = (f"experiment={name}", lengths, "profile=quick", f"method={method}", QUIET)
    ended = command(*arguments, "prefill.chunk=512", f"model.path={model_folder}", f"results={tmp_path}")
    assert f"prefill.chunk=512: {message}" in ended.error
    assert not snapshot(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("method=streaming_llm", "method.local_blocks=-1"), "local_blocks=-1"),
        (("method=flashprefill", "+method.colour=red"), "method flashprefill has no colour; it has alpha, sink_blocks"),
        (("method=bsfa", "method.k=2", "+method.colour=red"), "method bsfa has no colour; it has thresholds, k"),
    ],
)
def test_a_parameter_that_makes_no_sense_is_refused_before_a_model_is_loaded(
    command, model_folder, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(ModelSource, "load", None)
    ended = command("experiment=niah", *DENSE, *arguments, f"model.path={model_folder}", f"results={tmp_path}")
    assert message in ended.error


def test_a_damaged_file_of_the_store_is_named_with_the_way_out(command, model_folder, finished_copy):
    arguments = ("experiment=niah", f"model.path={model_folder}", *SMALL, KS, QUIET, f"results={finished_copy}")
    [dense] = [file for file in finished_copy.glob("niah/*/samples.jsonl") if '"method": "dense"' in file.read_text()]
    dense.with_name("summary.json").unlink()
    dense.with_name("env.json").write_text("[")
    assert f"{dense.with_name('env.json')} is damaged; move it away" in command(*arguments).error
    dense.with_name("env.json").unlink()
    [table] = finished_copy.glob("calibrate/*/thresholds.safetensors")
    table.write_bytes(b"torn")
    error = command(*arguments, "task.seed=7").error
    assert f"calibrate again: remove {table}, and the same command does" in error
    table.unlink()
    assert command(*arguments).status == 0


def test_a_torn_last_record_is_made_again_and_no_other(command, model_folder, finished_copy):
    before = store(finished_copy)
    [dense] = [file for file in finished_copy.glob("niah/*/samples.jsonl") if '"method": "dense"' in file.read_text()]
    whole = dense.read_bytes()
    dense.write_bytes(whole[:-30])
    dense.with_name("summary.json").unlink()
    again = command("experiment=niah", f"model.path={model_folder}", *SMALL, KS, QUIET, f"results={finished_copy}")
    assert again.status == 0, again.err
    after = store(finished_copy)
    assert set(after) == set(before)
    assert {name for name in after if after[name] != before[name]} <= {
        str(dense.with_name(name).relative_to(finished_copy)) for name in ("samples.jsonl", "summary.json", "env.json")
    }
    kept = whole.rstrip(b"\n").rfind(b"\n") + 1
    assert dense.read_bytes()[:kept] == whole[:kept]
    old, new = json.loads(whole[kept:]), json.loads(dense.read_bytes()[kept:])
    for key in ("id", "prompt_hash", "prediction", "score", "skip_ratio_by_layer"):
        assert new[key] == old[key]


def test_a_run_killed_in_mid_sample_is_taken_up_at_that_sample(command, model_folder, tmp_path):
    arguments = ("experiment=niah", *DENSE, *MANY, f"model.path={model_folder}", f"results={tmp_path / 'r'}")
    with started(*arguments) as process:
        wait_for_samples(process, tmp_path / "r", 3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    survived = ids(tmp_path / "r")
    assert survived == grid(10, 4)[: len(survived)]
    assert len(survived) < 40
    again = command(*arguments)
    assert again.status == 0, again.err
    assert ids(tmp_path / "r") == grid(10, 4)
    assert again.err.count(f"/{40 - len(survived)} [") > 0  # the progress bar counts what was left


def test_of_two_commands_at_once_the_second_is_refused_and_the_first_goes_on(command, model_folder, tmp_path):
    arguments = ("experiment=niah", *DENSE, *MANY, f"model.path={model_folder}", f"results={tmp_path / 'r'}")
    with started(*arguments) as first:
        wait_for_samples(first, tmp_path / "r", 1)
        first.send_signal(signal.SIGSTOP)
        second = command(*arguments)
        first.send_signal(signal.SIGCONT)
        out, err = first.communicate()
    assert "another process is writing" in second.error
    assert str(tmp_path / "r") in second.error
    assert first.returncode == 0, err
    assert "dense: score" in out
    assert ids(tmp_path / "r") == grid(10, 4)


# The disk


def test_a_full_disk_costs_the_last_sample_alone(command, model_folder, tmp_path, monkeypatch):
    arguments = ("experiment=niah", *DENSE, *FEW, f"model.path={model_folder}", f"results={tmp_path / 'r'}")
    append = Writer.append

    def append_until_full(self: Writer, record: dict) -> None:
        if len(self.done) == 3:
            with open("/dev/full", "wb") as full:
                os.dup2(full.fileno(), self.file.fileno())
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "append", append_until_full)
        full = command(*arguments)
    assert "no space left" in full.error
    assert str(tmp_path / "r" / "niah") in full.error
    assert ids(tmp_path / "r") == grid(5, 1)[:3]
    assert command(*arguments).status == 0
    assert ids(tmp_path / "r") == grid(5, 1)


def test_a_full_disk_under_the_thresholds_is_named(command, model_folder, tmp_path, monkeypatch):
    def full(*_) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("bsfa.provenance.save_file", full)
    arguments = (*CALIBRATION, "calibration.length=256", QUIET, f"results={tmp_path / 'r'}")
    ended = command("experiment=calibrate", f"model.path={model_folder}", *arguments)
    assert "No space left" in ended.error
    assert str(tmp_path / "r" / "calibrate") in ended.error


@pytest.mark.parametrize("place", ["a file/below", "/proc/nowhere"])
@pytest.mark.parametrize("experiment", ["niah", "calibrate"])
def test_a_results_folder_that_cannot_be_written_is_named(command, tmp_path, place, experiment):
    (tmp_path / "a file").touch()
    ended = command(f"experiment={experiment}", *CALIBRATION, QUIET, f"results='{tmp_path / place}'")
    assert place in ended.error
    assert "results=DIR" in ended.error


# What a user may get wrong


@pytest.mark.parametrize(
    ("argument", "choices"),
    [
        ("model=nope", ("llama31_8b", "smollm2")),
        ("method=nope", ("bsfa", "compare", "dense", "sdpa", "streaming_llm")),
        ("experiment=nope", ("calibrate", "niah", "report")),
        ("profile=nope", ("gpu", "paper", "quick")),
        ("tracker=nope", ("none", "wandb")),
    ],
)
def test_an_unknown_name_lists_the_choices(command, argument, choices):
    ended = command(argument)
    assert ended.status != 0
    assert "Traceback" not in ended.err
    assert argument.replace("=", "/") in ended.err
    assert all(f"\t{choice}\n" in ended.err for choice in choices)


@pytest.mark.parametrize("key", ["nope", "task.nope", "method.nope", "model.nope"])
def test_an_unknown_key_is_named(command, key):
    ended = command("experiment=niah", f"{key}=1")
    assert ended.status != 0
    assert "Traceback" not in ended.err
    assert f"Could not override '{key}'" in ended.err


@pytest.fixture(scope="module")
def table(finished) -> Thresholds:
    """Thresholds of the tiny model."""
    [file] = finished.glob("calibrate/*/thresholds.safetensors")
    return Thresholds.load(file)


def official(table: Thresholds, path: Path, **changes) -> Path:
    """The thresholds in a file like the paper's authors'."""
    content = {"thresholds": table.values, "k_values": list(table.k_values), "q_block_size": 128, "k_block_size": 64}
    torch.save(content | changes, path)
    return path


class Execute:
    """A pickle that would make a folder when loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def bsfa_with(command, model_folder, finished_copy) -> Callable[..., Ended]:
    """``method=bsfa`` with a threshold file, in a results folder where nothing may be lost."""
    before = store(finished_copy)

    def call(file: Path | str, *arguments: str) -> Ended:
        ended = command(
            "experiment=niah",
            *SMALL,
            "method=bsfa",
            "method.k=1",
            f"method.thresholds='{file}'",
            f"model.path={model_folder}",
            QUIET,
            f"results={finished_copy}",
            *arguments,
        )
        assert before.items() <= store(finished_copy).items()
        return ended

    return call


def test_a_file_of_thresholds_gives_what_the_calibration_gave(bsfa_with, table, finished, finished_copy, tmp_path):
    assert bsfa_with(official(table, tmp_path / "table.pt")).status == 0
    theirs = runs(finished_copy)["bsfa k=1 (file)"]
    ours = runs(finished)["bsfa k=1 (prose)"]
    assert [s["skip_ratio_by_layer"] for s in theirs] == [s["skip_ratio_by_layer"] for s in ours]


def test_a_k_that_is_not_in_the_file_lists_those_that_are(bsfa_with, table, tmp_path):
    error = bsfa_with(official(table, tmp_path / "table.pt"), "method.k=7").error
    assert "k=7" in error
    assert "k=1, 2" in error


@pytest.mark.parametrize("method", ["bsfa", "compare"])
def test_a_k_that_will_not_be_calibrated_lists_those_that_will(command, model_folder, tmp_path, method):
    arguments = (*SMALL, f"method={method}", "method.k=[1,7]", QUIET, f"results={tmp_path}")
    error = command("experiment=niah", f"model.path={model_folder}", *arguments).error
    assert "k=7" in error
    assert "1, 2" in error
    assert not runs(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values[:, :, :3], "2 layers and 3 heads"),
        (lambda values: values[:, :1], "1 layers and 4 heads"),
        (lambda values: values.masked_fill(values == values.flatten()[-1], torch.nan), "NaN"),
        (lambda values: values[0], "thresholds must be"),
    ],
)
def test_thresholds_of_another_shape_or_without_sense_are_refused(bsfa_with, table, tmp_path, change, message):
    file = official(table, tmp_path / "table.pt", thresholds=change(table.values))
    assert message in bsfa_with(file).error


def test_thresholds_for_other_blocks_are_refused(bsfa_with, table, tmp_path):
    assert "(64, 64)" in bsfa_with(official(table, tmp_path / "table.pt", q_block_size=64)).error


def test_thresholds_of_another_model_are_refused_though_the_shape_is_the_same(bsfa_with, table, tmp_path):
    file = tmp_path / "theirs.safetensors"
    Thresholds(table.values, table.k_values, provenance=Provenance(model="theirs", fingerprint="0" * 16)).save(file)
    error = bsfa_with(file).error
    assert "theirs" in error
    assert "weights differ" in error


@pytest.mark.parametrize("size", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused(bsfa_with, table, tmp_path, size):
    for whole in (official(table, tmp_path / "table.pt"), tmp_path / "table.safetensors"):
        if not whole.exists():
            table.save(whole)
        content = whole.read_bytes()
        torn = whole.with_stem("torn")
        torn.write_bytes(content[: int(size * len(content))])
        assert "torn" in bsfa_with(torn).error


@pytest.mark.parametrize("dump", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content, 2))])
def test_a_file_that_would_execute_code_is_refused_and_not_executed(bsfa_with, table, tmp_path, dump):
    content = {"thresholds": table.values, "k_values": [1], "q_block_size": Execute(tmp_path / "executed")}
    dump(content, tmp_path / "evil.pt")
    assert "would execute code" in bsfa_with(tmp_path / "evil.pt").error
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [{"weights": 1}, [1, 2], {"thresholds": 1, "k_values": 1}])
def test_a_file_of_something_else_is_refused(bsfa_with, tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    assert "other.pt" in bsfa_with(tmp_path / "other.pt").error


def test_a_missing_file_is_named(bsfa_with, tmp_path):
    assert "no threshold file at" in bsfa_with(tmp_path / "nowhere.pt").error


def test_a_refused_command_ends_with_status_2_and_one_line(model_folder, tmp_path):
    torch.save({"thresholds": Execute(tmp_path / "executed")}, tmp_path / "evil.pt")
    arguments = (*SMALL, "method=bsfa", f"method.thresholds={tmp_path / 'evil.pt'}", QUIET, f"results={tmp_path / 'r'}")
    with started("experiment=niah", f"model.path={model_folder}", *arguments) as process:
        _, err = process.communicate()
    assert process.returncode == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "executed").exists()


def test_a_length_beyond_the_models_positions_is_refused_before_anything_is_computed(command, model_folder, tmp_path):
    arguments = (*SMALL, "task.lengths=[512,4096]", KS, QUIET, f"results={tmp_path}")
    error = command("experiment=niah", f"model.path={model_folder}", *arguments).error
    assert "4096" in error
    assert "2048" in error
    assert "task.lengths" in error
    assert not list(tmp_path.glob("*/*/thresholds.safetensors"))
    assert not runs(tmp_path)


def test_calibration_texts_beyond_the_models_positions_are_refused(command, model_folder, tmp_path):
    arguments = (*CALIBRATION, "calibration.length=4096", QUIET, f"results={tmp_path}")
    error = command("experiment=calibrate", f"model.path={model_folder}", *arguments).error
    assert "4096" in error
    assert "lower calibration.length" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("task.lengths=512",), "task.lengths=512 must be a list"),
        (("task.depths=0",), "task.depths=0"),
        (("task.haystacks=[lorem]",), "must hold some of prose, noise"),
        (("task.lengths=[100]",), "does not fit"),
        (("model.dtype=int4",), "float32, bfloat16, float16"),
        (("task.seed=one",), "task.seed=one must be a whole number"),
        (("backend=nope",), "none of auto, reference, cuda"),
        (("backend=cuda",), "'cuda' needs tensors on a CUDA device, got cpu"),
        (("model.path=",), "model.path= must be text and not empty"),
        (("method=bsfa", "method.k=2", "calibration.data=[]"), "calibration.data=[] names no texts"),
        (("tracker=wandb", "tracker.mode=loud"), "tracker.mode=loud"),
        (("method=bsfa", "method.k=2", "calibration.data=lorem"), "prose, noise, mixed"),
        (("method=bsfa", "method.k=2", "calibration.data=[3]"), "calibration.data=[3] names no texts"),
        (("method=bsfa", "method.k=2", "calibration.length=1"), "calibration.length=1: one token is a decode step"),
        (("method=bsfa", "method.k=2", "method.calibrated=null"), "method.calibrated=null"),
        (("method=fisher_share", "method.calibrated.tail=x"), "method.calibrated.tail=x must be a whole number"),
        (("task.haystacks=[noise,noise]",), "task.haystacks holds noise twice"),
        (("task.haystacks=noise",), "task.haystacks=noise must hold some of prose, noise"),
        (("batch=true",), "batch=True must be a whole number"),
        (("own_gpu=perhaps",), "own_gpu=perhaps must be true or false"),
        (("method=streaming_llm", "method.knob=nope"), "method.knob=nope is none of"),
        (("method=streaming_llm", "method._target_=bsfa.methods.Nope"), "is no method's class"),
        (("+method.name=3",), "method.name=3 must be text"),
        (("method=compare", "method.members.dense=null"), "~method.members.dense leaves it out"),
        (
            ("method=compare", "method.members.bsfa.k=[2]", "+method.members.dense.name=sdpa"),
            "method: sdpa is there twice",
        ),
        (("model.device=null",), "model.device=None must be text"),
        (("model.path=[a]",), "model.path=['a'] must be text"),
        (("tracker=wandb", "tracker.project=3"), "tracker.project=3 must be text"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(command, model_folder, tmp_path, arguments, message):
    ended = command("experiment=niah", *DENSE, *FEW, f"model.path={model_folder}", f"results={tmp_path}", *arguments)
    assert message in ended.error
    assert not runs(tmp_path)


def test_records_have_no_place_in_a_folder_without_a_name(command, model_folder):
    for value in ("", "null", "[a]"):
        assert "results=" in command("experiment=niah", *DENSE, f"model.path={model_folder}", f"results={value}").error
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is what this profile wants")
def test_a_gpu_profile_without_a_gpu_names_the_one_that_works(command, model_folder):
    assert "profile=quick" in command("experiment=niah", "profile=gpu", QUIET, f"model.path={model_folder}").error


def test_a_gpu_that_runs_out_of_memory_is_one_line_with_the_ways_out(command, tmp_path, monkeypatch):
    def out_of_memory(cfg) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nSee the manual")

    monkeypatch.setattr("experiments.accuracy.run", out_of_memory)
    error = command("experiment=niah", *DENSE, QUIET, f"results={tmp_path}").error
    assert "Tried to allocate 20 GiB. What was recorded is safe" in error
    assert "batch=1" in error


# Models and texts


@pytest.fixture
def model_copy(model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture
def with_model(command, tmp_path) -> Callable[[Path | str], Ended]:
    return lambda path: command("experiment=niah", *DENSE, *FEW, f"model.path={path}", f"results={tmp_path / 'r'}")


def test_a_model_folder_that_is_not_there_is_named(with_model, tmp_path):
    assert f"no model folder {tmp_path / 'nowhere'}" in with_model(tmp_path / "nowhere").error


def test_a_folder_without_a_model_is_refused(with_model, tmp_path):
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in with_model(tmp_path / "empty").error


def test_truncated_weights_are_refused(with_model, model_copy):
    weights = model_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert f"cannot load the model {model_copy}" in with_model(model_copy).error


def test_a_hub_model_without_network_points_to_a_local_folder(with_model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "model.path=DIR" in with_model("nobody/no-such-model").error


def test_a_model_without_a_chat_template_is_refused(with_model, model_copy):
    for file in (model_copy / "chat_template.jinja", model_copy / "tokenizer_config.json"):
        if file.suffix == ".jinja":
            file.unlink(missing_ok=True)
        else:
            file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": None}))
    assert "no chat template" in with_model(model_copy).error


def test_another_model_in_the_same_folder_is_another_run(with_model, model_copy, tmp_path):
    assert with_model(model_copy).status == 0
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_copy)).save_pretrained(model_copy)
    assert with_model(model_copy).status == 0
    assert len(list((tmp_path / "r").glob("niah/*/summary.json"))) == 2


def test_calibration_on_a_text_of_ones_own(command, model_folder, tmp_path):
    source = tmp_path / "own.txt"
    arguments = ("experiment=calibrate", *CALIBRATION, "calibration.length=256", f"calibration.data={source}")
    arguments += (f"model.path={model_folder}", QUIET, f"results={tmp_path / 'r'}")
    source.write_bytes(b"\xff\xfe\x00not text")
    assert "cannot be read as UTF-8" in command(*arguments).error
    source.write_text("\n \n")
    assert "holds no text" in command(*arguments).error
    source.write_text("One sentence.\nAnd another one.\n")
    ended = command(*arguments)
    assert ended.status == 0, ended.err
    [file] = (tmp_path / "r").glob("calibrate/*/thresholds.safetensors")
    assert str(file) in ended.out
    assert Thresholds.load(file).provenance.samples == 2
    source.write_text("One sentence.\nAnd yet another one.\n")
    assert command(*arguments).status == 0
    assert len(list((tmp_path / "r").glob("calibrate/*/thresholds.safetensors"))) == 2  # another text is another table
