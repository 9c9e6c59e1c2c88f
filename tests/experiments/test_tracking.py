from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from experiments.models import ModelSource
from experiments.records import Run, Store
from experiments.tracking import Untracked, Wandb, split
from experiments.unavailable import Unavailable, each
from tests.experiments.conftest import CALIBRATION, QUIET

DENSE = ("profile=quick", "method=dense")
TINY = (*DENSE, "task.haystacks=[noise]", "task.lengths=[448]", "task.depths=2", "task.samples=1")


@pytest.fixture
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, and none of the settings of who runs the tests."""
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "")  # so that what a test sets is unset after it
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What wandb would take for the whole internet; `accept` fails while nobody has called."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name in ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            monkeypatch.setenv(name, address)
        yield server


def test_wandb_offline_stays_in_the_results_folder_and_off_the_network(
    command, model_folder, tmp_path, no_home, outside
):
    wandb = pytest.importorskip("wandb")
    results = tmp_path / "r"
    arguments = ("tracker=wandb", f"results={results}")
    report = ("experiment=report",)
    for experiment in (("experiment=niah", *TINY, f"model.path={model_folder}"), report, report):
        ended = command(*experiment, *arguments)
        assert ended.status == 0, ended.err
    wandb.teardown()
    with pytest.raises(BlockingIOError):
        outside.accept()
    assert not [path for path in no_home.rglob("*") if "wandb" in path.name]
    assert not list(Path.cwd().iterdir())

    [run] = results.glob("niah/*/summary.json")
    [tracked] = results.glob(f"wandb/offline-run-*-{run.parent.name}/*.wandb")
    content = tracked.read_bytes()
    for expected in (b"skip_ratio", b"ttft_median_s", b"samples.jsonl", b"records-"):
        assert expected in content
    [table] = tracked.parent.rglob("*.table.json")
    assert json.loads(table.read_text())["data"][0][:3] == ["niah", "noise", 448]
    files = [file for file in results.glob("wandb/offline-run-*/*.wandb") if file != tracked]
    assert len({file.name for file in files}) == 1  # the same report is the same run
    reports = [file.read_bytes() for file in files]
    for expected in (b"heatmap", b".tex", b"report.html"):
        assert expected in reports[0]
    for medium in ("*.png", "*.html"):  # what an upload would send is there
        assert list(results.glob(f"wandb/offline-run-*/files/media/**/{medium}"))


SUMMARIES = {
    "fidelity": {"n": 4, "kl": 0.0125},
    "kernel": {"samples": 1, "cells": [{"length": 4096, "ms": 1.5, "fa3_ms": None, "fa3_failed": "out of memory"}]},
    "equal_kl": {
        "left_out": {},
        "cells": [
            {"method": "bsfa", "bound": 0.02, "within": True, "attention_ms": 1.5},
            {"method": "dense", "bound": None, "within": None, "attention_ms": 2.5},
        ],
    },
    "ttft": {
        "left_out": {"upstream_cudnn": "no GPU"},
        "cells": [
            {"length": 512, "ttft_s": 1.5, "out_of_memory": None},
            {"length": 640, "ttft_s": None, "out_of_memory": "20 GiB"},
        ],
    },
}


def finished(root: Path, experiment: str) -> Run:
    """A run that ended with one of `SUMMARIES`."""
    run = Store(root).run(experiment, {"model": {"name": "tiny"}})
    with run.writing({"device": "a CPU"}) as writer:
        writer.append({"id": "a"})
        writer.finish(SUMMARIES[experiment])
    return run


def test_wandb_takes_the_summary_of_every_experiment(tmp_path, no_home, outside):
    wandb = pytest.importorskip("wandb")
    tracker = Wandb("offline", "bsfa", str(tmp_path))
    folders = {}
    for experiment in SUMMARIES:
        run = finished(tmp_path, experiment)
        tracker.runs([(run, experiment)])
        [folders[experiment]] = tmp_path.glob(f"wandb/offline-run-*-{run.id}")
    wandb.teardown()  # writes what its process still had
    content = {experiment: next(folder.glob("*.wandb")).read_bytes() for experiment, folder in folders.items()}
    assert b"0.0125" in content["fidelity"]
    assert b"left_out/upstream_cudnn" in content["ttft"]

    def rows(experiment: str) -> list[list[object]]:
        [table] = folders[experiment].rglob("*.table.json")
        return json.loads(table.read_text())["data"]

    assert rows("ttft") == [[512, 1.5, None], [640, None, "20 GiB"]]
    assert rows("kernel") == [[4096, 1.5, None, "out of memory"]]
    assert rows("equal_kl") == [["bsfa", 0.02, True, 1.5], ["dense", None, None, 2.5]]
    for run in content.values():
        assert b"samples.jsonl" in run


@pytest.fixture
def shown(monkeypatch) -> list[str]:
    """W&B without a network while the list is empty; afterwards, what it was shown."""
    wandb = pytest.importorskip("wandb")
    calls: list[str] = []

    @contextmanager
    def session(self, *, name, **options):
        if not calls:
            raise wandb.errors.CommError("Timed out while retrying\nConsider increasing")
        calls.append(name)
        yield MagicMock()

    monkeypatch.setattr(Wandb, "_open", session)
    return calls


def test_a_run_that_wandb_did_not_take_is_complete_and_shown_by_the_next_command(
    command, model_folder, tmp_path, shown, monkeypatch
):
    asked = ("experiment=niah", *TINY, "method=compare", "method.members.bsfa.k=[1]", *CALIBRATION[1:])
    online = ("tracker=wandb", "tracker.mode=online", f"model.path={model_folder}", f"results={tmp_path / 'r'}")
    error = command(*asked, *online).error
    assert "W&B (online, project bsfa) did not take" in error
    runs = [summary.parent for summary in tmp_path.glob("r/niah/*/summary.json")]
    assert len(runs) == 4  # of all methods
    for run in runs:
        assert f"{run} (Timed out while retrying)" in error
    assert "(Timed out while retrying). It is safe here" in error
    monkeypatch.setattr(ModelSource, "load", None)  # nothing is left to measure
    shown.append("the network is back")
    for _ in range(2):  # once shown is shown
        assert command(*asked, *online).status == 0
        assert sorted(shown[1:]) == ["bsfa k=1 (prose)", "dense", "sdpa", "streaming_llm local_blocks=4"]
    elsewhere = command(*asked, *online, "tracker.project=other")
    assert elsewhere.status == 0, elsewhere.err
    assert len(shown) == 9


def test_a_run_that_wandb_refuses_costs_no_other_its_turn(tmp_path, shown, monkeypatch):
    shown.append("there is a network")
    session = Wandb._open

    def refuses(self, *, name, **options):
        if name == "kernel":
            raise OSError("Entity is full\nUpgrade")
        return session(self, name=name, **options)

    monkeypatch.setattr(Wandb, "_open", refuses)
    runs = {experiment: finished(tmp_path, experiment) for experiment in ("fidelity", "kernel", "ttft")}
    tracker = Wandb("online", "bsfa", str(tmp_path))
    with pytest.raises(Untracked, match=r"did not take \S*/kernel/\w+ \(Entity is full\)\. It is safe"):
        tracker.runs([(run, experiment) for experiment, run in runs.items()])
    assert shown[1:] == ["fidelity", "ttft"]
    assert [name for name, run in runs.items() if (run.path / "tracked.txt").is_file()] == ["fidelity", "ttft"]


def test_a_task_that_was_not_tracked_costs_no_other_its_turn():
    def run(name: str) -> None:
        raise {"a": Untracked("no network"), "b": Unavailable("no data")}[name]

    with pytest.raises(Unavailable, match=r"^complete, but not tracked: a \(no network\); not run: b \(no data\)$"):
        each(["a", "b"], run)


def test_nested_summaries_are_tables_and_flat_numbers():
    tables, numbers = split({"n": 2, "by": {"noise": {"kl": 0.5}, "ks": [1, 2]}, "empty": [], "cells": [{"a": 1}]})
    assert {name: rows.to_dict("records") for name, rows in tables.items()} == {"cells": [{"a": 1}]}
    assert numbers == {"n": 2, "by/noise/kl": 0.5, "by/ks": [1, 2], "empty": []}
    assert split({}) == ({}, {})


def test_without_wandb_there_is_tracker_none_and_a_line_that_says_so(command, model_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what a missing package looks like
    arguments = ("experiment=niah", *TINY, f"model.path={model_folder}", f"results={tmp_path / 'r'}")
    refused = command(*arguments, "tracker=wandb").error
    assert "pip install wandb" in refused
    assert "tracker=none" in refused
    assert not list((tmp_path / "r").glob("niah/*/samples.jsonl"))
    assert command(*arguments, QUIET).status == 0
    assert command("experiment=report", QUIET, f"results={tmp_path / 'r'}").status == 0
    assert not (tmp_path / "r" / "wandb").exists()
