"""Facts in a haystack: who is where, who carries what and where was it before, in the manner of BABILong
(arXiv 2406.10149, whose facts are bAbI's, arXiv 1502.05698), in our own words and with our own little worlds.

Several people travel between cities; some pick things up and take them along. What they do is told in order, scattered
in prose. The answer is one city, and takes one, two or three of the facts:

1. where a person is: the last city they came to;
2. where a thing is: who picked it up, and the last city they came to;
3. where a thing was before: who picked it up, the city asked about, and the city they came from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import ClassVar

from experiments.tasks import text
from experiments.tasks.needles import scatter
from experiments.tasks.suite import Draft

PEOPLE = ("Anna", "Bernard", "Clara", "David", "Emma", "Frank")
CITIES = ("Athens", "Cairo", "Dublin", "Lima", "Lisbon", "Oslo", "Prague", "Vienna")
THINGS = ("lantern", "hammer", "basket", "blanket", "bottle", "mirror")
MOVED = "{who} is now in {city}."
TOOK = "{who} picked up the {thing}."

TASK = (
    "The following text has some sentences in it about people, where they go and what they pick up. "
    "What they pick up goes where they go. Keep in mind what happens; you will be asked about it.\n\n"
)
CAST = 3  # people a story


@dataclass(frozen=True)
class Facts:
    """A story whose question takes ``facts`` of its facts, 1 to 3."""

    facts: int

    max_new_tokens: ClassVar[int] = 16

    def draft(self, random: Random, length: int) -> Draft:
        story, question, answer, city = self.tell(random)
        depths = sorted(random.sample(range(101), len(story)))
        source = text.sentences("prose", "evaluate")
        end = random.randrange(len(source))

        def content(units: int) -> str:
            return TASK + " ".join(scatter(text.excerpt(source, end, units), story, depths)) + "\n\n" + question

        return Draft(content, answer, (city,), metric=partial(first_named, choices=CITIES))

    def tell(self, random: Random) -> tuple[list[str], str, str, str]:
        """A story, its question, how the answer begins, and the city asked for."""
        people = random.sample(PEOPLE, CAST)
        things = random.sample(THINGS, CAST)
        walks = [random.sample(CITIES, self.facts + 1) for _ in people]
        lives = [self._life(*parts) for parts in zip(people, walks, things, strict=True)]
        who, walk, thing = people[0], walks[0], things[0]
        question, answer, city = {
            1: (f"Where is {who} now?", f"{who} is now in", walk[-1]),
            2: (f"Where is the {thing} now?", f"The {thing} is now in", walk[-1]),
            3: (
                f"Where was the {thing} just before it was in {walk[-1]}?",
                f"Before it was in {walk[-1]}, the {thing} was in",
                walk[-2],
            ),
        }[self.facts]
        return merge(random, lives), question, answer, city

    def _life(self, who: str, walk: Sequence[str], thing: str) -> list[str]:
        """What one person does, in order; a thing is picked up in the first city."""
        steps = [MOVED.format(who=who, city=city) for city in walk]
        if self.facts > 1:
            steps.insert(1, TOOK.format(who=who, thing=thing))
        return steps


def merge(random: Random, sequences: Sequence[Sequence[str]]) -> list[str]:
    """All of them as one, each in its own order."""
    turns = [number for number, sequence in enumerate(sequences) for _ in sequence]
    random.shuffle(turns)
    rest = [iter(sequence) for sequence in sequences]
    return [next(rest[turn]) for turn in turns]


def first_named(prediction: str, references: tuple[str, ...], choices: Sequence[str]) -> float:
    """1 where the first choice that the prediction names is a reference: a list of all of them is worth nothing."""
    named = re.search(rf"\b({'|'.join(choices)})\b", prediction, re.IGNORECASE)
    return float(named is not None and named[1].lower() in [reference.lower() for reference in references])
