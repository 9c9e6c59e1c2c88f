"""experiment=ruler and experiment=reasoning, and answers decoded together, from the command line to the store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.records import Writer, read_samples
from tests.experiments.conftest import QUIET, SUITE

DENSE = ("experiment=ruler", *SUITE, "method=dense", "task.tasks=[vt]", "task.samples=5", QUIET)
DENSE = tuple(argument for argument in DENSE if not argument.startswith("method.k"))


def answers(results: Path, experiment: str = "ruler") -> list[dict]:
    """The samples of a store's one run, in the order in which they were written."""
    [file] = results.glob(f"{experiment}/*/samples.jsonl")
    return read_samples(file)


def test_records_name_task_protocol_and_how_many_were_decoded_together(suites_finished):
    for experiment, tasks in (("ruler", {"vt", "fwe"}), ("reasoning", {"one_fact"})):
        files = list(suites_finished.glob(f"{experiment}/*/samples.jsonl"))
        assert len(files) == 4  # dense, sdpa, streaming_llm, bsfa
        for file in files:
            samples = read_samples(file)
            assert {sample["task"] for sample in samples} == tasks
            assert {sample["protocol"] for sample in samples} == {"ours"}
            assert [sample["batch"] for sample in samples] == [2] * 2 * len(tasks)
            assert all(sample["ttft_s"] > sample["attention_s"] > 0 for sample in samples)
            assert all(
                0.98 * 1200
                <= sample["prompt_tokens"] + {"fwe": 50, "vt": 30, "one_fact": 16}.get(sample["task"], 128)
                <= 1200
                for sample in samples
            )
            cells = json.loads(file.with_name("summary.json").read_text())["cells"]
            assert {(cell["protocol"], cell["task"], cell["n"]) for cell in cells} == {("ours", t, 2) for t in tasks}


def test_answers_are_the_same_however_many_are_decoded_together(command, model_folder, tmp_path):
    for batch in (1, 3):
        arguments = (*DENSE, f"batch={batch}", f"model.path={model_folder}", f"results={tmp_path / str(batch)}")
        assert command(*arguments).status == 0
    alone, together = (answers(tmp_path / batch) for batch in ("1", "3"))
    for key in ("id", "prompt_hash", "prediction", "score", "skip_ratio_by_layer"):
        assert [sample[key] for sample in alone] == [sample[key] for sample in together]
    assert [sample["batch"] for sample in together] == [3, 3, 3, 2, 2]
    again = command(*DENSE, "batch=2", f"model.path={model_folder}", f"results={tmp_path / '1'}")
    assert "0 of them to do" in again.out  # it is the same run


def test_a_run_that_breaks_off_loses_the_answers_in_flight_alone(command, model_folder, tmp_path, monkeypatch):
    arguments = (*DENSE, f"model.path={model_folder}", f"results={tmp_path}")

    def broken(self: Writer, record: dict) -> None:
        if len(self.done) == 3:
            raise NotImplementedError("broken")
        append(self, record)

    append = Writer.append
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "append", broken)
        assert command(*arguments).status != 0
    survived = answers(tmp_path)
    assert len(survived) == 3
    assert command(*arguments).status == 0
    assert answers(tmp_path)[:3] == survived
    assert [sample["id"] for sample in answers(tmp_path)] == [f"vt-1200-{n}" for n in range(5)]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("batch=0", "batch=0"),
        ("batch=many", "batch=many"),
        ("task.tasks=[qa_1]", "task.tasks=['qa_1'] must hold some of niah_single_1"),
        ("task.protocol=official", "task.protocol=official"),
        ("task.lengths=[150]", "does not fit"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(command, model_folder, tmp_path, argument, message):
    ended = command(*DENSE, f"model.path={model_folder}", f"results={tmp_path}", argument)
    assert message in ended.error
    assert not list(tmp_path.glob("ruler/*/samples.jsonl"))
