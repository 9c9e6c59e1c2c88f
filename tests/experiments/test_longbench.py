from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st

from bsfa import InputError
from experiments import longbench, longbench_tables
from experiments.records import read_samples
from experiments.suite_figures import timed
from experiments.tasks.longbench import Documents, LongBench, cut
from experiments.tasks.longbench_data import DataSet, Folder, Hub, LmEvalScorer, OwnScorer, Row, load
from experiments.tasks.longbench_scores import metric
from experiments.tasks.longbench_tasks import TASKS, UNTEMPLATED
from experiments.unavailable import Unavailable
from tests.conftest import tiny_tokenizer
from tests.experiments.conftest import QUIET, run_here, snapshot
from tests.experiments.test_configs import CONF

PROMPTS = {
    "hotpotqa": "Read.\n{context}\nAsked: {input}\nReply:",
    "trec": "Sort.\n{context}\n{input}",
    "gov_report": "Shorten.\n{context}\nIn short:",
    "lcc": "Go on.\n{context}Next:",
}
LENGTHS = {"hotpotqa": 8, "trec": 4, "gov_report": 16, "lcc": 8}
ASKED = ("profile=quick", "task.lengths=[400]", "task.tasks=[hotpotqa,trec,lcc]", "task.samples=null", QUIET)
ASK = ("experiment=longbench", *ASKED)


def rows(task: str, count: int = 3) -> list[dict]:
    """Rows in LongBench's schema, some longer than the limit."""
    return [
        {
            "input": f"what is number {n}?",
            "context": f"{task} has many words. " * (10 + 30 * n),
            "answers": [f"it is {n}", "or this"],
            "all_classes": ["it is 0", "it is 1"] if task == "trec" else None,
            "_id": str(n),
        }
        for n in range(count)
    ]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as LongBench's files would lie there, without a file for musique."""
    folder = tmp_path_factory.mktemp("texts") / "longbench"
    folder.mkdir()
    (folder / "dataset2prompt.json").write_text(json.dumps(PROMPTS | {"musique": PROMPTS["hotpotqa"]}))
    (folder / "dataset2maxlen.json").write_text(json.dumps(LENGTHS | {"musique": 8}))
    for task in PROMPTS:
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(task)))
    return folder


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, texts: Path) -> Path:
    """A results folder with two methods' LongBench and a report. Read only."""
    results = tmp_path_factory.mktemp("longbench") / "results"
    shared = (f"model.path={model_folder}", f"results={results}")
    for arguments in (
        (*ASK, *shared, f"data.root={texts}", "method=dense"),
        (*ASK, *shared, f"data.root={texts}", "method=streaming_llm", "method.local_blocks=[0]"),
        ("experiment=report", QUIET, f"results={results}"),
    ):
        ended = run_here(*arguments)
        assert ended.status == 0, ended.err
    return results


def documents(texts: Path, task: str, **settings) -> Documents:
    chosen = LongBench(**{"tasks": [task], "lengths": [400]} | settings)
    return Documents(chosen, Folder(str(texts)).read(task, chosen.samples), OwnScorer())


def written(documents: Documents) -> list[str]:
    tokenizer = tiny_tokenizer()
    return [str(tokenizer.decode(sample.tokens)) for sample in documents.make(tokenizer)]


# What a run leaves


def test_every_row_is_answered_and_its_record_says_what_a_reader_must_know(ran):
    found = [sample for file in ran.glob("longbench/*/samples.jsonl") for sample in read_samples(file)]
    assert len(found) == 2 * 3 * 3
    for sample in found:
        assert sample["protocol"] == "chat, own scores"
        assert sample["prompt_tokens"] + LENGTHS[sample["task"]] <= sample["length"] == 400
        assert sample["references"][1] == "or this"
        assert len(sample["prediction"]) <= 4 * LENGTHS[sample["task"]]


def test_no_path_is_in_a_record_and_a_moved_folder_is_the_same_data(ran, texts, tmp_path, model_folder):
    assert not any(str(texts).encode() in content for content in snapshot(ran).values())
    moved = tmp_path / "elsewhere"
    moved.symlink_to(texts)
    again = run_here(*ASK, f"model.path={model_folder}", f"results={ran}", f"data.root={moved}", "method=dense")
    assert again.status == 0
    assert again.out.count("0 of them to do") == 3


def test_what_is_missing_is_named_at_the_end_and_the_rest_runs(command, texts, tmp_path, model_folder):
    arguments = (*ASK, "task.tasks=[musique,trec,qmsum]", "method=dense", f"model.path={model_folder}")
    ended = command(*arguments, f"data.root={texts}", f"results={tmp_path / 'r'}")
    assert ended.error.startswith("error: not run: musique (there is no ")
    assert "qmsum (" in ended.error
    assert "trec" not in ended.error
    assert len(list((tmp_path / "r").glob("longbench/*/summary.json"))) == 1


def test_a_plan_has_the_tasks_that_are_there(texts, tmp_path, model_folder):
    asked = (*ASKED, "task.tasks=[musique,trec]", "method=dense", f"data.root={texts}", f"model.path={model_folder}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["experiment=longbench", *asked, f"results={tmp_path}"])
    [planned] = longbench.plan(cfg)
    assert (planned.method, len(planned.ids)) == ("dense", 3)


def test_the_report_has_the_paper_beside_ours_and_names_what_did_not_run(ran):
    [main] = [path for path in (ran / "tables").glob("longbench-*.md") if "-tasks" not in path.name]
    text = main.read_text()
    assert "protocol chat, own scores" in text
    assert "40.24" in text
    assert "A100" in text
    assert "Not run: narrativeqa, qasper" in text
    [section] = longbench_tables.sections(ran, "longbench")
    beside = longbench_tables.beside_the_paper(section, longbench_tables.means(section))
    ours = beside[beside["source"] == "these records"]
    assert set(ours["method"]) == {"dense", "streaming_llm"}
    assert (ours["n"] == 9).all()
    assert (ours["tasks"] == 3).all()
    samples = section.samples[section.samples["method"] == "dense"]
    dense = ours.loc[ours["method"] == "dense", "score"].item()
    assert dense == pytest.approx(samples.groupby("task")["score"].mean().mean())
    names = {f"{section.name}-{figure}.png" for figure in ("skipped", "ttft")}
    assert {path.name for path in (ran / "figures").glob("*.png")} == names


def test_the_papers_points_stand_in_the_figure_as_shares_of_dense(ran):
    theirs = longbench_tables.paper_points().set_index("method")
    assert theirs.loc["bsfa", ["ttft_of_dense", "of_dense"]].tolist() == pytest.approx([1 / 1.1, 39.88 / 40.24])
    [section] = longbench_tables.sections(ran, "longbench")
    ours = longbench_tables.trade(longbench_tables.means(section))
    assert list(ours["method"]) == ["streaming_llm"]
    panels = timed(ours, longbench_tables.paper_points(), section.title).axes
    assert panels[-1].get_legend_handles_labels()[1] == ["bsfa (the paper)", "spargeattn (the paper)"]


# Prompts


@given(
    st.integers(0, 600), st.integers(0, 40), st.integers(0, 60), st.integers(1, 300), st.sampled_from(["", "<user>"])
)
def test_a_prompt_fits_and_loses_context_alone(context, before, after, budget, template):
    tokenizer = tiny_tokenizer()
    text = "".join(chr(97 + n % 26) for n in range(context))
    row = Row("I" * before, text, "Q" * after, ("a",), (), {})

    def build(content: str) -> list[int]:
        return tokenizer("x" * len(template) + content, add_special_tokens=False)["input_ids"]

    room = budget - before - after - len(template)
    if room < 1 and context > room:
        with pytest.raises(InputError, match=f"of {budget} and leave no room"):
            cut(tokenizer, build, row, budget)
        return
    tokens = cut(tokenizer, build, row, budget)
    prompt = str(tokenizer.decode(tokens))[len(template) :]
    assert len(tokens) == min(budget, len(template) + before + context + after)
    assert prompt.startswith(row.before)
    assert prompt.endswith(row.after)
    whole, half = row.before + text + row.after, (budget - len(template)) // 2
    if len(whole) > len(prompt) and before < half and after < half:  # the halves of the whole, as LongBench has them
        assert prompt[:half] == whole[:half]
        assert prompt[-half:] == whole[-half:]


@pytest.mark.parametrize("task", sorted(PROMPTS))
def test_the_template_is_for_the_tasks_that_have_one(texts, task):
    wrapped = written(documents(texts, task))
    assert all(prompt.startswith("<user>") == (task not in UNTEMPLATED) for prompt in wrapped)
    plain = written(documents(texts, task, protocol="plain"))
    assert not any("<user>" in prompt for prompt in plain)
    question = "what is number 2?"
    assert (question in wrapped[2]) == (question in plain[2]) == ("{input}" in PROMPTS[task])


def test_a_model_without_a_template_is_refused_and_not_asked_raw(texts):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        next(documents(texts, "hotpotqa").make(tokenizer))
    assert next(documents(texts, "trec").make(tokenizer)).tokens


def test_more_samples_and_lengths_keep_the_ids(texts):
    few = documents(texts, "trec", samples=2).ids()
    assert few == documents(texts, "trec", lengths=[400, 800]).ids()[:2]
    assert len(set(documents(texts, "trec", lengths=[400, 800]).ids())) == 6


# Scores


@pytest.mark.parametrize(
    ("task", "prediction", "reference", "score"),
    [
        ("qasper", "The Answer, it is blue!", "answer is blue", 2 * 3 / (4 + 3)),
        ("hotpotqa", "no", "yes", 0),
        ("triviaqa", "\nParis\nQuestion: and", "paris", 1),
        ("gov_report", "the cat sat", "the cat ran", 2 / 3),
        ("samsum", "the cat\nthe dog", "the cat", 1),
        ("trec", "Food", "Food", 1),
        ("trec", "Food and Date", "Date", 0.5),
        ("trec", "Date of birth", "Date of birth", 1),  # Date is a part of the right one
        ("trec", "Dates of birth", "Food", 0),
        ("passage_count", "There are 7, or 8, no 7.", "7", 2 / 3),
        ("passage_count", "none", "7", 0),
        ("passage_retrieval_en", "Paragraph 12", "Paragraph 12", 1),
        ("passage_retrieval_en", "Paragraph 1", "Paragraph 12", 0),
        ("lcc", "```python\n# a comment\n\nx = 1\ny = 2", "x = 1", 1),
        ("repobench-p", "", "x = 1", 0),
    ],
)
def test_an_answer_is_worth_what_longbench_says(task, prediction, reference, score):
    found = metric(task, ["Food", "Date", "Date of birth"])(prediction, ("nothing like it", reference))
    assert found == pytest.approx(score)


ANSWERS = ("The Answer, it is blue!", "7 and 8", "Paragraph 3", "It is 1. The red answer is 7.", "")
REFERENCES = {"passage_count": ("7", "9"), "passage_retrieval_en": ("Paragraph 7",)}
OTHERWISE = {"gov_report", "qmsum", "multi_news", "samsum", "lcc", "repobench-p"}  # by other packages than lm-eval's


@pytest.mark.parametrize("task", sorted(set(TASKS) - OTHERWISE))
def test_our_scores_are_lm_evals(task):
    pytest.importorskip("rouge")
    pytest.importorskip("lm_eval")
    row = Row("", "", "", REFERENCES.get(task, ("blue", "answer is 7")), ("blue", "7", "8"), {})
    theirs, ours = LmEvalScorer().metric(task, row), OwnScorer().metric(task, row)
    for answer in ANSWERS:
        assert ours(answer, row.answers) == pytest.approx(theirs(answer, row.answers))


# Bad input


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("task.tasks=[dureader]", "dureader"),
        ("task.tasks=[]", "must hold some of narrativeqa"),
        ("task.protocol=raw", "task.protocol=raw is none of chat, plain"),
        ("task.scorer=mine", "task.scorer=mine is none of own, lm_eval"),
        ("task.samples=0", "task.samples=0"),
        ("data.root=/nowhere", "data.root=/nowhere is no folder"),
        ("task.lengths=[20]", "use a longer task.lengths"),
        ("task.lengths=[4096]", "lower task.lengths"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(command, texts, model_folder, setting, message):
    arguments = (*ASK, f"model.path={model_folder}", "method=dense", f"data.root={texts}", setting)
    assert message in command(*arguments).error


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), ('{"input": ""}\n', "line 1 has no context, answers"), ("\n{\n", "line 2 is not JSON")],
)
def test_a_damaged_file_is_named_with_its_line(texts, tmp_path, content, message):
    for name in ("dataset2prompt.json", "dataset2maxlen.json"):
        (tmp_path / name).write_text((texts / name).read_text())
    (tmp_path / "trec.jsonl").write_text(content)
    with pytest.raises(Unavailable, match=message):
        Folder(str(tmp_path)).read("trec", None)


def test_a_folder_without_prompts_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"has no dataset2prompt\.json and no dataset2maxlen\.json: .* put them beside"
    ):
        Folder(str(tmp_path))
    for name in ("dataset2prompt.json", "dataset2maxlen.json"):
        (tmp_path / name).write_text("no")
    with pytest.raises(InputError, match=r"dataset2prompt\.json cannot be read"):
        Folder(str(tmp_path))


def test_the_hub_needs_lm_eval(command, model_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.longbench.metrics", None)
    error = command(*ASK, f"model.path={model_folder}", "method=dense").error
    assert "pip install 'lm_eval[longbench,hf]'" in error
    assert "data.root=DIR" in error
    with pytest.raises(Unavailable):  # and so costs a plan of several experiments this one alone
        Hub()


def test_a_hub_that_is_not_reached_is_one_line():
    class Offline:
        def load(self, names):
            raise ConnectionError("no route\nmore of it")

    with pytest.raises(Unavailable, match="no route; without network use data"):
        load(Offline(), "trec")


def test_the_hubs_prompts_are_lm_evals(monkeypatch):
    """Around a made-up row in the schema of lm-eval's data set."""
    lm_eval = pytest.importorskip("lm_eval.api.task")
    pytest.importorskip("rouge")
    hub = Hub()
    doc = {"question": "why?", "context": "some {{text}}", "answers": ["so"], "all_classes": None}
    dataset = {"test": pytest.importorskip("datasets").Dataset.from_list([doc])}
    monkeypatch.setattr(lm_eval.ConfigurableTask, "download", lambda self, *_: setattr(self, "dataset", dataset))
    data = hub.read("hotpotqa", None)
    assert isinstance(data, DataSet)
    [row] = data.rows
    assert data.max_new_tokens == 32
    assert row.before
    assert row.context == "some {{text}}"
    assert row.after.endswith("Question: why?\nAnswer:")
