from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bsfa import InputError
from experiments.tasks.base import fit, match_all
from experiments.tasks.niah import Niah
from experiments.tasks.text import LONGEST

GRID = {"lengths": [700, 1500], "depths": 3, "samples": 2}


@pytest.fixture(scope="module")
def tokenizer(model_folder) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_folder)


def prompts(task: Niah, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    return {sample.id: tokenizer.decode(sample.tokens) for sample in task.make(tokenizer)}


def needle(value: str) -> re.Pattern:
    return re.compile(rf"Remember: the secret number for (\S+ [^.]+) reads {value}\.")


def test_the_grid_is_complete_and_its_ids_are_known_before_the_prompts(tokenizer):
    task = Niah(**GRID)
    samples = list(task.make(tokenizer))
    assert [sample.id for sample in samples] == task.ids()
    assert len(set(task.ids())) == 2 * 2 * 3 * 2
    assert {sample.cell["depth"] for sample in samples} == {0.0, 50.0, 100.0}
    assert task.longest() == 1500


def test_prompts_fill_their_length_and_leave_room_for_the_answer(tokenizer):
    task = Niah(**GRID)
    for sample in task.make(tokenizer):
        room = sample.cell["length"] - task.max_new_tokens - len(sample.tokens)
        assert 0 <= room <= LONGEST + 1  # one sentence more would not have fitted


def test_every_prompt_holds_its_needle_once_and_asks_for_it(tokenizer):
    task = Niah(**GRID)
    for sample in task.make(tokenizer):
        prompt = tokenizer.decode(sample.tokens)
        [value] = sample.references
        [key] = needle(value).findall(prompt)
        assert prompt.count(value) == 1
        assert f"Which secret number for {key} does" in prompt
        assert prompt.endswith(f"The secret number for {key} reads")


def test_the_needle_stands_at_its_depth(tokenizer):
    task = Niah([1500], depths=5, samples=1, haystacks=["noise"])
    for sample in task.make(tokenizer):
        prompt = tokenizer.decode(sample.tokens)
        hay = prompt[prompt.index("\n\n") + 2 : prompt.index("\n\nWhich secret")]
        [found] = needle(sample.references[0]).finditer(hay)
        before, after = found.start(), len(hay) - found.end()
        assert 100 * before / (before + after) == pytest.approx(sample.cell["depth"], abs=3)


def test_one_depth_is_the_middle(tokenizer):
    assert Niah([700], depths=1, samples=1, haystacks=["noise"]).ids() == ["noise-700-50-0"]


def test_prompts_differ_between_seeds_and_are_what_this_version_of_the_task_says(tokenizer):
    def hashes(seed: int) -> list[str]:
        return [sample.prompt_hash for sample in Niah([700], depths=2, samples=1, seed=seed).make(tokenizer)]

    assert hashes(0) == hashes(0)
    assert set(hashes(0)).isdisjoint(hashes(1000))
    assert (Niah.version, hashes(0)[0]) == (2, "617427bc6e9fd07d")  # a new prompt needs a new version


def test_samples_of_one_cell_differ(tokenizer):
    texts = prompts(Niah([700], depths=1, samples=4), tokenizer)
    assert len(set(texts.values())) == len(texts)


def test_prompts_go_through_the_chat_template(tokenizer):
    for prompt in prompts(Niah([700], depths=1, samples=1), tokenizer).values():
        assert prompt.startswith("<user>")
        assert prompt.count("<assistant>") == 1


def test_a_tokenizer_without_a_chat_template_is_refused(model_folder):
    bare = AutoTokenizer.from_pretrained(model_folder)
    bare.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        next(Niah(**GRID).make(bare))


def test_a_length_too_short_for_the_question_is_refused(tokenizer):
    with pytest.raises(InputError, match="does not fit"):
        next(Niah([100], depths=1, samples=1).make(tokenizer))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": []}, r"task\.lengths=\[\]"),
        ({"lengths": 512}, r"task\.lengths=512 must be a list"),
        ({"lengths": [512, 0]}, r"task\.lengths"),
        ({"lengths": ["1K"]}, r"task\.lengths"),
        ({"depths": 0}, r"task\.depths=0"),
        ({"samples": -1}, r"task\.samples=-1"),
        ({"samples": 1.5}, r"task\.samples=1\.5"),
        ({"haystacks": []}, "prose, noise"),
        ({"haystacks": ["lorem"]}, "prose, noise"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused_by_name(changes, message):
    with pytest.raises(InputError, match=message):
        Niah(**GRID | changes)


@pytest.mark.parametrize(
    ("prediction", "score"),
    [(" 1234567.", 1.0), ("It is 1234567", 1.0), ("1234568", 0.0), ("123456", 0.0), ("", 0.0), ("1,234,567", 0.0)],
)
def test_an_answer_counts_if_it_holds_the_number(prediction, score):
    assert match_all(prediction, ("1234567",)) == score


def test_several_references_share_the_score_and_case_does_not_matter():
    assert match_all("The BLUE cat", ("blue", "dog")) == 0.5


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(0, 200))
def test_fit_finds_the_longest_prompt_in_the_budget(sentences, budget):
    def build(n: int) -> list[int]:
        return [0] * sum(sentences[i % len(sentences)] for i in range(n))

    fitting = [len(build(n)) for n in range(1, 201) if len(build(n)) <= budget]
    if fitting:
        assert len(fit(build, budget)) == max(fitting)
    else:
        with pytest.raises(InputError):
            fit(build, budget)
