"""Common words: RULER's counting of a numbered list (arXiv 2404.06654), in our own words.

Ten words come up often, all others seldom; asked for are the ten. A solved example, of other words, comes first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from experiments.tasks.suite import Draft
from experiments.tasks.words import words

COMMON = 10
# Prompts from so many tokens on: how often the ten come up, and the others. RULER starts at 4,096, with 30 and 3.
TIMES = ((4096, 30, 3), (2048, 10, 1), (0, 5, 1))
EXAMPLE_OTHERS, EXAMPLE_OFTEN = 10, 3

TASK = (
    "Below is a numbered list in which a few words come up again and again and all others seldom. "
    "Keep the words that come up most often in mind."
)
QUESTION = "Question: which {count} words come up most often in the list?"
ANSWER = "Answer: the {count} words that come up most often are:"


@dataclass(frozen=True)
class CommonWords:
    """Ten words among many, 30 times against 3 where that fits; see `TIMES`. Past all nouns the others come again."""

    max_new_tokens: ClassVar[int] = 120

    def draft(self, random: Random, length: int) -> Draft:
        often, seldom = next(times for shortest, *times in TIMES if length >= shortest)
        drawn = random.sample(words("noun"), len(words("noun")))
        shown, common, rest = drawn[:COMMON], drawn[COMMON : 2 * COMMON], drawn[2 * COMMON :]
        seed = random.random()
        question, answer = QUESTION.format(count=COMMON), ANSWER.format(count=COMMON)
        example = _numbered(shown * EXAMPLE_OFTEN + rest[-EXAMPLE_OTHERS:], seed)
        solved = f"{example}\n{question}\n{answer} {_numbered(shown)}"

        def content(units: int) -> str:
            others = list(itertools.islice(itertools.cycle(rest[:-EXAMPLE_OTHERS]), units))
            return f"{TASK}\n\n{solved}\n\n{_numbered(common * often + others * seldom, seed)}\n{question}"

        return Draft(content, answer, tuple(common))


def _numbered(items: Sequence[str], seed: float | None = None) -> str:
    """The items, shuffled where there is a seed, as ``1. this 2. that``."""
    order = list(items) if seed is None else Random(seed).sample(items, len(items))
    return " ".join(f"{number}. {item}" for number, item in enumerate(order, start=1))
