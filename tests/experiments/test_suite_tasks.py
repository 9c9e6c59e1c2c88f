"""The prompts of experiment=ruler and experiment=reasoning."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bsfa import InputError
from experiments.tasks import text
from experiments.tasks.base import Sample
from experiments.tasks.facts import CITIES, Facts, first_named
from experiments.tasks.needles import scatter
from experiments.tasks.reasoning import Reasoning
from experiments.tasks.ruler import Ruler
from experiments.tasks.suite import Suite

SHORT, LONG = 3500, 9000  # characters, which are tokens here
SUITES = {Ruler: list(Ruler.kinds), Reasoning: list(Reasoning.kinds)}
TASKS = [pytest.param(suite, task, id=f"{suite.name}-{task}") for suite, tasks in SUITES.items() for task in tasks]
BUDGETS = {"vt": 30, "cwe": 120, "fwe": 50, "one_fact": 16, "two_facts": 16, "three_facts": 16}


@pytest.fixture(scope="module")
def tokenizer(model_folder) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_folder)


def samples(tokenizer, suite: type[Suite], task: str, lengths=(SHORT,), number: int = 3, seed: int = 0) -> list[Sample]:
    return list(suite([task], list(lengths), number, seed).make(tokenizer))


def prompts(tokenizer, suite: type[Suite], task: str, **settings) -> list[tuple[str, Sample]]:
    return [(tokenizer.decode(s.tokens), s) for s in samples(tokenizer, suite, task, **settings)]


# Every task


@pytest.mark.parametrize(("suite", "task"), TASKS)
def test_prompt_and_answer_fill_their_length_within_2_percent(tokenizer, suite, task):
    for sample in samples(tokenizer, suite, task, (SHORT, LONG), number=2):
        size = len(sample.tokens) + sample.max_new_tokens
        assert 0.98 * sample.cell["length"] <= size <= sample.cell["length"]
        assert sample.max_new_tokens == BUDGETS.get(task, 128)


@pytest.mark.parametrize(("suite", "task"), TASKS)
def test_the_question_is_whole_at_every_length_and_ends_in_the_answers_beginning(tokenizer, suite, task):
    short, long = (prompts(tokenizer, suite, task, lengths=[length], number=1)[0][0] for length in (SHORT, LONG))
    for prompt in (short, long):
        assert prompt.startswith("<user>")
        assert prompt.count("<assistant>") == 1
        question, answer = prompt.split("</s><assistant>")
        assert re.search(r"[?.]$", question)
        assert answer
        assert not answer.endswith(" ")


@pytest.mark.parametrize(("suite", "task"), TASKS)
def test_more_samples_lengths_and_tasks_change_no_prompt(tokenizer, suite, task):
    few = {s.id: s.prompt_hash for s in samples(tokenizer, suite, task, number=2)}
    tasks = list(dict.fromkeys([next(iter(suite.kinds)), task]))
    more = {s.id: s.prompt_hash for s in suite(tasks, [4000, SHORT], 3).make(tokenizer)}
    assert few.items() <= more.items()
    later = {s.prompt_hash for s in samples(tokenizer, suite, task, number=1, seed=1)}
    assert later == {more[f"{task}-{SHORT}-1"]}
    assert len(set(more.values())) == len(more) == 2 * 3 * len(tasks)


@pytest.mark.parametrize("suite", SUITES)
def test_ids_are_known_before_the_prompts_and_records_name_the_protocol(tokenizer, suite):
    suite = suite(list(suite.kinds), [4000], 1)
    made = list(suite.make(tokenizer))
    assert [sample.id for sample in made] == suite.ids()
    assert [sample.cell["task"] for sample in made] == list(suite.kinds)
    assert {sample.cell["protocol"] for sample in made} == {"ours"}


def test_prompts_are_what_this_version_of_the_suites_says(tokenizer):
    tasks = ["niah_single_1", "niah_multikey_3", "vt", "cwe", "fwe"]  # prose differs between versions of Python
    prompts = [sample.prompt_hash for sample in Ruler(tasks, [SHORT], 1).make(tokenizer)]
    stories = [Facts(facts).tell(Random(0)) for facts in (1, 2, 3)]
    digests = [hashlib.sha256(repr(made).encode()).hexdigest()[:16] for made in (prompts, stories)]
    # a new prompt needs a new version
    assert [(Ruler.version, digests[0]), (Reasoning.version, digests[1])] == [
        (1, "a3641f6aa263db00"),
        (1, "7194b8748acff033"),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, r"task\.tasks=\[\] must hold some of niah_single_1, "),
        ({"tasks": ["qa_1"]}, r"task\.tasks=\['qa_1'\] must hold some of"),
        ({"lengths": [0]}, r"task\.lengths"),
        ({"samples": 0}, r"task\.samples=0"),
        ({"protocol": "official"}, r"task\.protocol=official"),
    ],
)
def test_a_suite_that_makes_no_sense_is_refused_by_name(changes, message):
    with pytest.raises(InputError, match=message):
        Ruler(**{"tasks": ["vt"], "lengths": [2048], "samples": 1} | changes)


@pytest.mark.parametrize(("suite", "task"), TASKS)
def test_a_length_too_short_for_the_question_is_refused(tokenizer, suite, task):
    with pytest.raises(InputError, match="does not fit"):
        samples(tokenizer, suite, task, [200])


# Needles


@pytest.mark.parametrize(
    ("task", "keys", "values", "asked"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_2", 1, 1, 1),
        ("niah_single_3", 1, 1, 1),
        ("niah_multikey_1", 4, 1, 1),
        ("niah_multivalue", 1, 4, 1),
        ("niah_multiquery", 4, 1, 4),
    ],
)
def test_every_needle_is_there_once_and_those_asked_for_are_the_references(tokenizer, task, keys, values, asked):
    for prompt, sample in prompts(tokenizer, Ruler, task):
        found = re.findall(r"Remember: the secret (?:number|code) for ([^.]+?) reads (\S+)\.", prompt)
        assert len(found) == len(set(found)) == keys * values
        assert len({key for key, _ in found}) == keys
        question = prompt[prompt.rindex("Which secret") :]
        wanted = {value for key, value in found if key in question}
        assert wanted == set(sample.references)
        assert len(sample.references) == asked * values
        assert not any(value in question for value in sample.references)
        assert ("depth" in sample.cell) == (len(sample.references) == 1)


@pytest.mark.parametrize(("task", "kind"), [("niah_multikey_2", "number"), ("niah_multikey_3", "code")])
def test_a_haystack_of_needles_is_nothing_else_and_its_keys_differ(tokenizer, task, kind):
    for prompt, sample in prompts(tokenizer, Ruler, task):
        hay = prompt[prompt.index("\n\n") + 2 : prompt.rindex("\n\n")]
        found = re.findall(rf"Remember: the secret {kind} for ([^.]+?) reads (\S+)\.", hay)
        assert len(found) > 20
        assert len({key for key, _ in found}) == len(found)
        rest = re.sub(rf"Remember: the secret {kind} for [^.]+? reads \S+\.", "", hay).strip()
        assert len(rest) < 140  # the first one may lack its beginning
        [key] = [key for key, value in found if value in sample.references]
        assert f"Which secret {kind} for {key} does" in prompt


@given(st.lists(st.sampled_from(range(101)), min_size=1, max_size=6), st.integers(0, 30))
def test_needles_stand_at_their_depths_and_the_hay_keeps_its_order(depths, size):
    hay, needles = [f"hay {i}" for i in range(size)], [f"needle {i}" for i in range(len(depths))]
    found = scatter(hay, needles, depths)
    assert [x for x in found if x in hay] == hay
    for depth, needle in zip(depths, needles, strict=True):
        before = [x for x in found[: found.index(needle)] if x in hay]
        assert len(before) == round(size * depth / 100)


@given(st.integers(0, 400), st.integers(0, 9))
def test_an_excerpt_has_so_many_words_and_ends_with_a_whole_sentence(size, end):
    found = text.excerpt(text.NOISE, end, size)
    assert sum(len(sentence.split()) for sentence in found) == size
    assert not found or text.NOISE[(end - 1) % len(text.NOISE)].endswith(found[-1])


# Variables, common words, frequent words


@pytest.mark.parametrize("suite", SUITES)
def test_a_chain_gives_its_number_to_five_variables_in_the_order_of_the_text(tokenizer, suite):
    for prompt, sample in prompts(tokenizer, suite, "vt"):
        example, asked = (part for part in prompt.split("Question:")[:2])
        value = re.search(r"get the number (\d+)\?", prompt[prompt.rindex("Question:") :])[1]
        links = re.findall(r"(\w+) -> (\w+)\.", asked)
        chain = [value]
        for start, end in links[-5:]:
            assert start == chain[-1]
            chain.append(end)
        assert tuple(chain[1:]) == sample.references
        assert not any(name in example for name in sample.references)
        assert prompt.endswith(f"{value} ->")
        assert f"{value} -> {sample.references[0]}" not in prompt[prompt.rindex("Question:") :]


@pytest.mark.parametrize(("length", "often", "seldom"), [(SHORT, 10, 1), (LONG, 30, 3)])
def test_ten_words_come_up_often_and_the_others_seldom(tokenizer, length, often, seldom):
    [(prompt, sample)] = prompts(tokenizer, Ruler, "cwe", lengths=[length], number=1)
    listed = prompt.split("Question:")[1].split("\n\n")[1]
    counts = Counter(re.findall(r"\d+\. ([a-z]+)", listed))
    assert {word for word, count in counts.items() if count == often} == set(sample.references)
    assert set(counts.values()) == {often, seldom}
    assert len(sample.references) == 10
    example = prompt.split("Question:")[0]
    assert not any(re.search(rf"\b{word}\b", example) for word in sample.references)


def test_the_three_words_asked_for_are_the_most_frequent_but_for_the_dots(tokenizer):
    for prompt, sample in prompts(tokenizer, Ruler, "fwe"):
        made_up = prompt[prompt.index("\n\n") : prompt.rindex("\n\n")].split()
        counts = Counter(made_up).most_common()
        assert counts[0][0] == "..."
        assert tuple(word for word, _ in counts[1:4]) == sample.references
        assert counts[3][1] > counts[4][1]
        assert counts[1][1] / counts[0][1] == pytest.approx(2**-2, rel=0.1)


# Facts


def answer(question: str, story: list[str]) -> str:
    """The city asked for, by walking through the story."""
    where, carried_by, visits = {}, {}, {}
    for line in story:
        if moved := re.fullmatch(r"(\w+) is now in (\w+)\.", line):
            where[moved[1]] = moved[2]
            for thing, who in carried_by.items():
                if who == moved[1]:
                    visits[thing].append(moved[2])
        else:
            who, thing = re.fullmatch(r"(\w+) picked up the (\w+)\.", line).groups()
            carried_by[thing] = who
            visits[thing] = [where[who]]
    if before := re.fullmatch(r"Where was the (\w+) just before it was in (\w+)\?", question):
        places = visits[before[1]]
        return places[places.index(before[2]) - 1]
    if thing := re.fullmatch(r"Where is the (\w+) now\?", question):
        return visits[thing[1]][-1]
    return where[re.fullmatch(r"Where is (\w+) now\?", question)[1]]


@pytest.mark.parametrize("facts", [1, 2, 3])
@given(st.integers(0, 10**6))
def test_a_story_has_the_answer_that_it_says(facts, seed):
    story, question, begins, place = Facts(facts).tell(Random(seed))
    assert answer(question, story) == place
    assert question.split()[2 if facts == 1 else 3].rstrip("?") in begins
    assert len(story) == 3 * (facts + 1 + (facts > 1))


@pytest.mark.parametrize("task", ["one_fact", "two_facts", "three_facts"])
def test_the_facts_are_in_the_prompt_in_order(tokenizer, task):
    for prompt, sample in prompts(tokenizer, Reasoning, task):
        hay, question = prompt.split("</s>")[0].rsplit("\n\n", 1)
        story = re.findall(r"[A-Z]\w+ (?:is now in|picked up the) \w+\.", hay)
        assert answer(question, story) == sample.references[0]


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        (" Lima.", 1.0),
        ("LIMA, I think, not Oslo", 1.0),
        (" Oslo or Lima", 0.0),
        (" old Lima", 1.0),
        (" Limassol", 0.0),
        ("", 0.0),
        (", ".join(CITIES), 0.0),
    ],
)
def test_the_first_city_that_is_named_counts(prediction, score):
    assert first_named(prediction, ("Lima",), CITIES) == score
