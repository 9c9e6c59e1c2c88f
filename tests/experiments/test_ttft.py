"""Time to first token: what is recorded of a cell, and what a cell that cannot be measured costs."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from bsfa import Gate
from bsfa.methods import Call, StreamingLLM
from experiments import ttft_report, turns
from experiments.at_skip import quantiles
from experiments.chapters import Chapter
from experiments.models import ModelSource
from experiments.records import Run, read_samples
from tests.experiments.conftest import QUIET, written

SHAPE = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 500, "max_position_embeddings": 2048,
}  # fmt: skip
SMALL = (
    "experiment=ttft", "profile=quick", "model=llama31_8b_random", "ttft.lengths=[512,640]", "ttft.repeats=2", QUIET,
    *(f"model.shape.{key}={value}" for key, value in SHAPE.items()),
)  # fmt: skip


def samples(results: Path) -> dict[str, dict]:
    [file] = results.glob("ttft/*/samples.jsonl")
    return {sample["id"]: sample for sample in read_samples(file)}


def test_every_cell_is_recorded_and_what_does_not_run_here_is_named(command, tmp_path, monkeypatch):
    asked = ("ttft.skips=[0.5]", "ttft.screens=[1.0]", "ttft.baselines=[sdpa,upstream_cudnn]")
    arguments = (*SMALL, *asked, f"results={tmp_path}")
    ended = command(*arguments)
    assert ended.status == 0, ended.err
    found = samples(tmp_path)
    methods = ("dense", "bsfa set to skip 50%", "bsfa set to skip 50%, screen 1", "sdpa")
    assert list(found) == [f"{length}/{method}" for length in (512, 640) for method in methods]
    for sample in found.values():
        assert sample["ttft_q25_s"] <= sample["ttft_s"] <= sample["ttft_q75_s"]
        assert len(sample["turns_s"]) == 2
        assert 0 < sample["attention_share"] < 1
        assert sample["peak_memory_bytes"] > 0
        assert (sample["clock"], sample["prompt"]) == ("cpu perf_counter", "random")
        assert sample["skip_ratio"] == pytest.approx(0.5 if "set" in sample["method"] else 0, abs=0.06)
    same = [found[f"640/{method}"]["skip_ratio"] for method in methods[1:3]]
    assert same[0] == same[1]
    assert len({sample["process"] for sample in found.values()}) == 1
    [table] = (tmp_path / "tables").glob("ttft-*.csv")
    rows = pd.read_csv(table).set_index(["length", "method"])
    one, other = found["640/sdpa"]["ttft_s"], found["640/bsfa set to skip 50%"]["ttft_s"]
    assert rows.loc[(640, "bsfa set to skip 50%"), "times_sdpa"] == pytest.approx(one / other)
    assert "random weights" in ended.out
    assert "upstream_cudnn: method=upstream_cudnn runs on a CUDA GPU alone" in ended.out
    assert len(list((tmp_path / "figures").glob("ttft-*.png"))) == 1
    before = table.read_bytes()
    table.unlink()
    again = command("experiment=report", QUIET, f"results={tmp_path}")
    assert again.status == 0, again.err
    assert table.read_bytes() == before
    assert "Time to first token, llama31_8b_random" in (tmp_path / "report.html").read_text()
    monkeypatch.setattr(ModelSource, "load", None)  # nothing is left to measure
    monkeypatch.setattr(Chapter, "write", None)  # nor to draw
    last = written(tmp_path)
    once_more = command(*arguments)
    assert once_more.status == 0, once_more.err
    assert written(tmp_path) == last
    assert (tmp_path / "tables" / f"{table.stem}.md").read_text().split("\n", 2)[2] in once_more.out
    assert "upstream_cudnn was left out: method=upstream_cudnn runs on a CUDA GPU alone" in once_more.out


@pytest.fixture
def short_of_memory(monkeypatch):
    """A method for which 640 tokens are too many."""
    bind = StreamingLLM.bind

    def limited(self, model):
        attend = bind(self, model)

        def within(call):
            if call.q.shape[1] == 640:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...\nmore")
            return attend(call)

        return within

    monkeypatch.setattr(StreamingLLM, "bind", limited)


@pytest.mark.usefixtures("short_of_memory")
def test_a_length_that_does_not_fit_costs_one_cell_and_says_what_it_asked_for(command, tmp_path):
    arguments = (*SMALL, "ttft.skips=[]", "ttft.baselines=[sdpa]", "method=streaming_llm", f"results={tmp_path}")
    ended = command(*arguments)
    assert ended.status == 0, ended.err
    found = samples(tmp_path)
    assert len(found) == 4
    assert found["640/streaming_llm local_blocks=4"]["out_of_memory"].startswith(
        "CUDA out of memory. Tried to allocate"
    )
    assert all("ttft_s" in sample for name, sample in found.items() if name != "640/streaming_llm local_blocks=4")
    assert "streaming_llm local_blocks=4 at 640: CUDA out of memory. Tried to allocate 20.00 GiB." in ended.out


def test_a_cell_that_another_process_lost_is_recorded_and_not_measured_again(command, tmp_path, monkeypatch):
    arguments = (*SMALL, "ttft.skips=[]", "ttft.baselines=[sdpa]", f"results={tmp_path}")
    measure = turns.Turns.measure

    def loses(self, tokens, contenders):
        if tokens.shape[1] == 640:
            [run] = [Run(folder, {}) for folder in tmp_path.glob("ttft/*")]
            shared = {"task": "ttft", "length": 640, "method": "dense", "prompt": "random", "process": "theirs"}
            run.lose({"id": "640/dense", **shared, "out_of_memory": "CUDA out of memory."})
            assert run.done() == {"512/dense", "512/sdpa", "640/dense"}
            raise RuntimeError("Connection closed by peer")
        return measure(self, tokens, contenders)

    with monkeypatch.context() as patch:
        patch.setattr(turns.Turns, "measure", loses)
        ended = command(*arguments)
    assert (ended.status, "error" in ended.err) == (2, False)  # the other process has said why
    again = command(*arguments)
    assert again.status == 0, again.err
    found = samples(tmp_path)
    assert found["640/dense"]["out_of_memory"] == "CUDA out of memory."
    assert found["640/sdpa"]["process"] not in ("theirs", found["512/sdpa"]["process"])
    assert len(found) == 4


def test_a_run_that_was_stopped_goes_on_at_the_length_it_was_at(command, tmp_path, monkeypatch):
    arguments = (*SMALL, "ttft.skips=[]", "ttft.baselines=[]", f"results={tmp_path}")
    measure = turns.Turns.measure

    def stopped(self, tokens, contenders):
        if tokens.shape[1] == 640:
            raise KeyboardInterrupt
        return measure(self, tokens, contenders)

    with monkeypatch.context() as patch:
        patch.setattr(turns.Turns, "measure", stopped)
        with pytest.raises(KeyboardInterrupt):
            command(*arguments)
    first = samples(tmp_path)["512/dense"]
    assert command(*arguments).status == 0
    found = samples(tmp_path)
    assert found["512/dense"] == first
    assert found["640/dense"]["process"] != first["process"]
    monkeypatch.setattr("experiments.models.ModelSource.load", None)  # nothing is left to do
    assert command(*arguments).status == 0


def test_ratios_are_taken_within_one_process():
    shared = {"length": 512, "prompt": "random", "turns_s": [1.0]}
    rows = ttft_report.tabulate(
        [
            shared | {"method": "sdpa", "ttft_s": 4.0, "process": "a"},
            shared | {"method": "bsfa", "ttft_s": 2.0, "process": "a"},
            shared | {"method": "row_share", "ttft_s": 1.0, "process": "b"},
        ]
    ).set_index("method")
    assert rows["times_sdpa"]["bsfa"] == 2.0
    assert pd.isna(rows["times_sdpa"]["row_share"])


def test_chunks_are_another_run_and_read_every_token(command, tmp_path):
    chunked = command(*SMALL, "ttft.baselines=[]", "prefill.chunk=256", f"results={tmp_path}")
    assert chunked.status == 0, chunked.err
    assert "chunks of 256" in chunked.out
    assert samples(tmp_path)["640/bsfa set to skip 80%"]["skip_ratio"] == pytest.approx(0.75, abs=0.1)
    assert command(*SMALL, "ttft.baselines=[]", f"results={tmp_path}").status == 0
    assert len(list(tmp_path.glob("ttft/*"))) == 2


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("ttft.skips=[1.0]", "ttft.skips=[1.0] must be shares"),
        ("ttft.lengths=[0]", "ttft.lengths=[0]"),
        ("ttft.lengths=[4096]", "beyond the model's 2048 positions; lower ttft.lengths"),
        ("ttft.baselines=[fa9]", "ttft.baselines=['fa9'] must hold some of upstream_torch_flash"),
        ("ttft.lengths=[1,512]", "one token is a decode step"),
        ("ttft.baselines=sdpa", "ttft.baselines=sdpa must hold some of"),
        ("ttft.lengths=[512,512]", "ttft.lengths=[512, 512] holds a number twice"),
        ("ttft.skips=[0.8,0.801]", "set to skip 80% would be two"),
        ("ttft.prompt=poem", "ttft.prompt=poem is none of random, prose"),
        ("prefill.chunk=100", "prefill.chunk=100 must be a multiple of 128"),
        ("model.init=pretrained", "a shape without weights: model.init=random"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(command, tmp_path, argument, message):
    assert message in command(*SMALL, argument, f"results={tmp_path}").error


def test_a_method_that_is_a_baseline_too_is_one_row(command, tmp_path):
    arguments = ("method=sdpa", "ttft.skips=[]", "ttft.baselines=[sdpa]", "ttft.lengths=[512]", f"results={tmp_path}")
    ended = command(*SMALL, *arguments)
    assert ended.status == 0, ended.err
    assert list(samples(tmp_path)) == ["512/sdpa"]


def test_a_method_that_wants_a_prompt_whole_refuses_chunks(command, tmp_path):
    ended = command(*SMALL, "method=flexprefill", "prefill.chunk=128", f"results={tmp_path}")
    assert "flexprefill wants a prompt in one piece" in ended.error


def test_a_model_on_disk_gives_its_shape_to_random_weights(command, model_folder, tmp_path):
    arguments = ("experiment=ttft", "profile=quick", "ttft.lengths=[256]", "ttft.baselines=[]", QUIET)
    ended = command(*arguments, f"model.path={model_folder}", "model.init=random", f"results={tmp_path}")
    assert ended.status == 0, ended.err
    assert "tiny-random (random weights)" in ended.out
    [file] = tmp_path.glob("ttft/*/summary.json")
    assert json.loads(file.read_text())["cells"][0]["prompt"] == "random"


def test_a_cut_leaves_the_wanted_share_of_all_blocks_under_it():
    torch.manual_seed(0)
    call = Call(0, torch.randn(1, 1000, 4, 16), torch.randn(1, 1000, 2, 16), torch.randn(1, 1000, 2, 16))
    for skip in (0.0, 0.25, 0.5):
        stats = call.attend(gate=Gate(threshold=quantiles(call, skip))).stats
        total = int(stats.total[0, 0])
        assert (stats.total - stats.kept == round(skip * total)).all()
    assert (quantiles(call, 0.99) == torch.inf).all()  # more than there is beside the diagonal
