"""Variable tracking: RULER's chain of assignments in noise (arXiv 2404.06654), in our own words.

One variable is given a number, four more are each given the one before; asked for are all five. A solved example, of
other names, comes first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from string import ascii_uppercase
from typing import ClassVar

from experiments.tasks import text
from experiments.tasks.needles import scatter
from experiments.tasks.suite import Draft

HOPS = 4
LETTERS = 5
EXAMPLE_WORDS = 60

# An arrow from what is given to who gets it: the answer is the chain itself, each link of it a look-up in the text.
TASK = (
    "The text below gives numbers to variables and passes them on: A -> B gives what is in A to B. "
    "Follow a number from one variable to the next and name every variable that gets it."
)
LINK = "{other} -> {name}."
QUESTION = "Question: which {count} variables get the number {value}?"
ANSWER = "Answer: {value} ->"


@dataclass(frozen=True)
class VariableTracking:
    """One chain of ``hops`` copies."""

    hops: int = HOPS

    max_new_tokens: ClassVar[int] = 30

    def draft(self, random: Random, length: int) -> Draft:
        count = self.hops + 1
        names = _names(random, 2 * count)
        values = random.sample(range(10_000, 100_000), 2)
        end = random.randrange(len(text.NOISE))
        shown, asked = (
            _Chain(names[part * count : (part + 1) * count], value, sorted(random.sample(range(101), count)), end)
            for part, value in enumerate(values)
        )
        solved = f"{shown.text(EXAMPLE_WORDS)}\n{shown.question}\n{shown.answer} {' -> '.join(shown.names)}."
        return Draft(
            lambda units: f"{TASK}\n\n{solved}\n\n{asked.text(units)}\n{asked.question}",
            asked.answer,
            tuple(asked.names),
        )


@dataclass(frozen=True)
class _Chain:
    """Variables that all hold one value, in the order in which they get it."""

    names: Sequence[str]
    value: int
    depths: Sequence[int]
    end: int

    @property
    def question(self) -> str:
        return QUESTION.format(count=len(self.names), value=self.value)

    @property
    def answer(self) -> str:
        return ANSWER.format(value=self.value)

    def text(self, size: int) -> str:
        """That many words of noise, with the assignments in it."""
        links = itertools.pairwise([self.value, *self.names])
        lines = [LINK.format(other=other, name=name) for other, name in links]
        hay = text.excerpt(text.NOISE, self.end, size)
        return " ".join(scatter(hay, lines, self.depths))


def _names(random: Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(random.choices(ascii_uppercase, k=LETTERS))] = None
    return list(found)
