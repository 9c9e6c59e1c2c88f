from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import longbench_tables
from experiments.records import read_samples
from tests.experiments.conftest import QUIET, run_here, snapshot

lm_eval = pytest.importorskip("lm_eval")

GENERATE = """
task: tiny_generate
output_type: generate_until
doc_to_text: "{{q}} Answer:"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["z"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: first, filter: [{function: regex, regex_pattern: "(.)"}, {function: take_first}]}
  - {name: whole, filter: [{function: take_first}]}
"""
CHOOSE = """
task: tiny_choose
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: gold
doc_to_choice: "{{choices}}"
num_fewshot: 1
fewshot_split: test
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
SHARED = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
metadata: {{version: 1}}
"""
TASKS = ["tiny_generate", "tiny_choose"]
KEYS = {"tiny_generate": "exact_match,first", "tiny_choose": "acc,none"}


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two tasks of lm-eval's, and of one whose data is not there."""
    folder = tmp_path_factory.mktemp("tasks")
    with (folder / "rows.jsonl").open("w") as rows:
        for n in range(6):
            row = {"q": f"word {n} " * 60, "a": "?!.,;:"[n], "choices": ["yes", "no", "perhaps"], "gold": n % 3}
            rows.write(json.dumps(row) + "\n")
    for name, text in (("generate", GENERATE), ("choose", CHOOSE)):
        (folder / f"{name}.yaml").write_text(text + SHARED.format(rows=folder / "rows.jsonl"))
    lost = GENERATE.replace("tiny_generate", "tiny_lost") + SHARED.format(rows=folder / "lost.jsonl")
    (folder / "lost.yaml").write_text(lost)
    return folder


def asked(model: Path, tasks: Path, *more: str) -> tuple[str, ...]:
    where = (f"model.path={model}", f"lm_eval.include_path={tasks}")
    return ("experiment=lm_eval", "profile=quick", QUIET, *where, *more)


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, tasks: Path) -> Path:
    """A results folder with two methods' answers and a report. Read only."""
    results = tmp_path_factory.mktemp("lm_eval") / "results"
    arguments = asked(model_folder, tasks, f"tasks=[{','.join(TASKS)}]", f"results={results}")
    for command in (
        (*arguments, "method=dense"),
        (*arguments, "method=streaming_llm", "method.local_blocks=[0]"),
        ("experiment=report", QUIET, f"results={results}"),
    ):
        ended = run_here(*command)
        assert ended.status == 0, ended.err
    return results


def samples(results: Path, method: str) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for file in results.glob("lm_eval/*/samples.jsonl"):
        for sample in read_samples(file):
            if sample["method"].startswith(method):
                found.setdefault(sample["task"], []).append(sample)
    return found


def test_a_dense_score_is_lm_evals_own_on_the_same_samples(ran, model_folder, tasks):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    own = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(model_folder), batch_size=1),
        tasks=list(TASKS),
        task_manager=TaskManager(include_defaults=False, include_path=tasks),
        bootstrap_iters=0,
    )
    ours = samples(ran, "dense")
    for task, key in KEYS.items():
        records = ours[task]
        assert len(records) == 6
        assert sum(record["score"] for record in records) / 6 == pytest.approx(own["results"][task][key])
        assert [record["metrics"][key] for record in records] == [record["score"] for record in records]
        theirs = {answer["doc_id"]: answer for answer in own["samples"][task] if answer["filter"] == key.split(",")[1]}
        for number, record in enumerate(records):
            assert record["id"] == f"{task}-{number}"
            if task == "tiny_generate":
                assert record["prediction"] == theirs[number]["filtered_resps"][0]


def test_records_say_whose_prompts_they_are_and_what_was_skipped(ran):
    for method in ("dense", "streaming_llm"):
        for task, records in samples(ran, method).items():
            for record in records:
                assert record["protocol"].startswith("official, lm_eval 0.")
                assert record["attention_s"] > 0
                assert record["prompt_tokens"] > 400
                assert (record["skip_ratio"] > 0.2) == (method == "streaming_llm")
                assert len(record["skip_ratio_by_layer"]) == 2
                assert record["references"]
                assert record["prediction"] in (" yes", " no", " perhaps") or task == "tiny_generate"


def test_a_finished_command_does_nothing_again(ran, model_folder, tasks):
    before = snapshot(ran)
    arguments = asked(model_folder, tasks, f"tasks=[{','.join(TASKS)}]", f"results={ran}", "method=dense")
    again = run_here(*arguments)
    assert again.out.count("0 of them to do") == 2
    drawn = {name for name in before if name.endswith("report.json")}  # of other runs too, which were made since
    assert {name: content for name, content in snapshot(ran).items() if name not in drawn} == {
        name: content for name, content in before.items() if name not in drawn
    }
    last = snapshot(ran)
    assert run_here(*arguments).out.count("0 of them to do") == 2
    assert snapshot(ran) == last
    assert not any(str(tasks).encode() in content for content in before.values())


def test_a_task_whose_data_is_missing_is_named_and_the_rest_runs(command, model_folder, tasks, tmp_path):
    arguments = asked(model_folder, tasks, "tasks=[tiny_lost,tiny_generate]", "lm_eval.limit=2", "method=dense")
    ended = command(*arguments, f"results={tmp_path / 'r'}")
    assert ended.error.startswith("error: not run: tiny_lost (lm-eval cannot load it: ")
    assert "tiny_generate" not in ended.error
    assert len(samples(tmp_path / "r", "dense")["tiny_generate"]) == 2


def test_the_report_has_a_row_a_task_and_method(ran):
    [section] = longbench_tables.lm_eval_sections(ran, "lm_eval")
    rows = longbench_tables.lm_eval_cells(section)
    assert set(zip(rows["task"], rows["method"], strict=True)) == {
        (t, m) for t in TASKS for m in ("dense", "streaming_llm")
    }
    assert (rows["n"] == 6).all()
    assert list((ran / "tables").glob("lm_eval-*.md"))


def test_lm_eval_may_be_absent(command, model_folder, tasks, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert "pip install 'lm_eval[hf]'" in command(*asked(model_folder, tasks, "tasks=[tiny_choose]")).error


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tasks=[]", "tasks=[] names no task"),
        ("tasks=tiny_choose", "tasks=tiny_choose must be a list"),
        ("tasks=[tiny_nothing]", "has no task tiny_nothing"),
        ("lm_eval.limit=0", "lm_eval.limit=0"),
        ("lm_eval.lengths=[]", "lm_eval.lengths=[]"),
        ("lm_eval.include_path=/nowhere", "lm_eval.include_path=/nowhere is no folder"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(command, model_folder, tasks, monkeypatch, setting, message):
    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda **options: manager(**options | {"include_defaults": False})
    )
    assert message in command(*asked(model_folder, tasks, "tasks=[tiny_choose]", "method=dense"), setting).error
