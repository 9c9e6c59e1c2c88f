from __future__ import annotations

import errno
import json
import os

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from bsfa import InputError
from experiments import report
from experiments.records import Run, Store, Writer, first_holding, read_runs, read_samples

CONFIG = {"task": {"name": "niah", "lengths": [512]}, "method": {"name": "dense"}}
MACHINE = {"device": "CPU"}


@pytest.fixture
def run(tmp_path) -> Run:
    return Store(tmp_path).run("niah", CONFIG)


def record(run: Run, *names: str) -> None:
    with run.writing(MACHINE) as writer:
        for name in names:
            writer.append({"id": name, "score": 1.0})


def fill_disk(writer: Writer) -> None:
    """Everything that is written from now on finds no space left."""
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), writer.file.fileno())


def recorded(run: Run) -> list[str]:
    return [sample["id"] for sample in read_samples(run.path / "samples.jsonl")]


def test_the_same_configuration_is_the_same_run_whatever_the_order_of_its_keys(tmp_path, run):
    reordered = {key: CONFIG[key] for key in reversed(CONFIG)}
    assert Store(tmp_path).run("niah", reordered).path == run.path


@given(st.lists(st.integers(1, 9), max_size=3), st.lists(st.integers(1, 9), max_size=3))
def test_two_runs_share_a_folder_only_if_their_configurations_are_equal(tmp_path_factory, one, other):
    store = Store(tmp_path_factory.getbasetemp())
    assert (store.run("niah", {"k": one}).path == store.run("niah", {"k": other}).path) == (one == other)


def test_a_sample_is_on_disk_as_soon_as_it_is_appended(run):
    with run.writing(MACHINE) as writer:
        writer.append({"id": "a", "text": "two\nlines, naïve ☃"})
        [sample] = read_samples(run.path / "samples.jsonl")
    assert sample["text"] == "two\nlines, naïve ☃"


def test_a_run_takes_up_where_it_stopped(run):
    record(run, "a", "b")
    with run.writing(MACHINE) as writer:
        assert writer.done == ["a", "b"]
        writer.append({"id": "c"})
    assert recorded(run) == ["a", "b", "c"]


def test_no_sample_is_recorded_twice(run):
    record(run, "a")
    with pytest.raises(ValueError, match="a is already recorded"):
        record(run, "a")
    assert recorded(run) == ["a"]


@given(st.integers(1, 200))
def test_a_last_line_torn_anywhere_is_dropped_and_the_rest_kept(tmp_path_factory, cut):
    run = Store(tmp_path_factory.mktemp("torn")).run("niah", CONFIG)
    record(run, "a", "b", "c")
    samples = run.path / "samples.jsonl"
    whole = samples.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    samples.write_bytes(whole[: max(last, len(whole) - cut)])
    assert recorded(run) == ["a", "b"]
    record(run, "c")
    assert samples.read_bytes() == whole


def test_a_damaged_line_among_whole_ones_is_named_and_nothing_is_overwritten(run):
    record(run, "a", "b", "c")
    samples = run.path / "samples.jsonl"
    damaged = samples.read_bytes().replace(b'"id": "b"', b'"id: "b"')
    samples.write_bytes(damaged)
    with pytest.raises(InputError, match=r"samples\.jsonl, line 2 is not a record"), run.writing(MACHINE):
        pass
    assert samples.read_bytes() == damaged


ANOTHER = [("config.yaml", "schema: 1", "schema: 99"), ("samples.jsonl", '"schema": 1', '"schema": 99')]


@pytest.mark.parametrize("experiment", ["niah", "fidelity", "longbench", "kernel", "ttft", "equal_kl"])
@pytest.mark.parametrize(("name", "ours", "theirs"), ANOTHER, ids=["config", "samples"])
def test_what_is_of_another_schema_is_neither_read_nor_written_to(tmp_path, experiment, name, ours, theirs):
    run = Store(tmp_path).run(experiment, CONFIG)
    record(run, "a")
    file = run.path / name
    file.write_text(file.read_text().replace(ours, theirs))
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    said = f"{file}.* has schema 99, this version reads 1"
    with pytest.raises(InputError, match=said):
        list(read_runs(tmp_path, experiment))
    with pytest.raises(InputError, match=said):
        report.chapters(experiment, tmp_path)
    with pytest.raises(InputError, match=said):
        record(run, "b")
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


@pytest.mark.parametrize("content", [b"- 1", b"a: [", b"\xff", b""])
def test_a_damaged_configuration_is_refused_by_name(run, tmp_path, content):
    record(run, "a")
    (run.path / "config.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.yaml (is damaged|has schema None)"):
        list(read_runs(tmp_path, "niah"))


def test_a_second_writer_is_refused_and_the_first_goes_on(run):
    with run.writing(MACHINE) as first:
        with pytest.raises(InputError, match="another process is writing") as refusal, run.writing(MACHINE):
            pass
        assert str(run.path) in str(refusal.value)
        first.append({"id": "a"})
    assert recorded(run) == ["a"]


def test_the_lock_is_free_again_after_an_error(run):
    with pytest.raises(ZeroDivisionError), run.writing(MACHINE):
        raise ZeroDivisionError
    FileLock(run.path / ".lock", timeout=0).acquire()


def test_a_summary_makes_a_run_complete(run):
    with run.writing(MACHINE) as writer:
        writer.append({"id": "a"})
        assert not run.complete
        writer.finish({"n": 1})
    assert run.complete
    assert json.loads((run.path / "summary.json").read_text()) == {"n": 1}


def test_a_summary_that_could_not_be_written_whole_is_not_there(run):
    with run.writing(MACHINE) as writer:
        (run.path / "summary.json.partial").symlink_to("/dev/full")
        with pytest.raises(InputError, match="no space left"):
            writer.finish({"n": 1})
    assert not run.complete


def test_a_full_disk_is_named_and_costs_the_last_sample_alone(run):
    with pytest.raises(InputError, match="no space left on the disk of") as refusal, run.writing(MACHINE) as writer:  # noqa: PT012
        writer.append({"id": "a"})
        writer.append({"id": "b"})
        fill_disk(writer)
        writer.append({"id": "c"})
    assert str(run.path) in str(refusal.value)
    record(run, "c")
    assert recorded(run) == ["a", "b", "c"]


def test_an_error_that_is_no_full_disk_is_not_taken_for_one(run, monkeypatch):
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        record(run, "a")


def test_every_machine_that_added_to_a_run_is_noted_once(run):
    for machine in ("one", "two", "one"):
        with run.writing({"device": machine}):
            pass
    assert json.loads((run.path / "env.json").read_text()) == [{"device": "one"}, {"device": "two"}]


@pytest.mark.parametrize("place", ["a file/below", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "a file").touch()
    with pytest.raises(InputError, match=r"cannot write to .*(a file/below|/proc/nowhere).*use results=DIR"):
        Store(tmp_path / place)


def test_making_a_store_leaves_nothing_in_it(tmp_path):
    Store(tmp_path / "results")
    assert list((tmp_path / "results").iterdir()) == []


def test_unfinished_runs_are_read_and_empty_ones_are_not(tmp_path, run):
    record(run, "a")
    with Store(tmp_path).run("niah", {"other": 1}).writing(MACHINE):
        pass
    [(config, samples)] = read_runs(tmp_path, "niah")
    assert (config["run_id"], config["task"]["name"], len(samples)) == (run.id, "niah", 1)


def test_a_store_without_the_experiment_has_no_runs(tmp_path):
    assert list(read_runs(tmp_path / "nowhere", "niah")) == []


def test_the_first_folder_with_records_of_what_is_asked_is_read(tmp_path):
    own, published = tmp_path / "own", tmp_path / "published"
    for root in (own, published):
        Store(root)
    assert first_holding(["niah"], own, published) == published
    record(Store(own).run("kernel", CONFIG), "a")
    assert first_holding(["niah"], own, published) == published
    assert first_holding(["niah", "kernel"], own, published) == own
