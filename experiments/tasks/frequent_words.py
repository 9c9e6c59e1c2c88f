"""Frequent words: RULER's counting of made-up words (arXiv 2404.06654), in our own words.

How often a word comes up falls with the square of its rank (Zipf, exponent 2). The first rank is a filler of dots;
asked for are the next three.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase
from typing import ClassVar

from experiments.tasks.suite import Draft

EXPONENT = 2.0
ZETA = 1.6449340668482264  # of EXPONENT: what the shares of all ranks add up to
FILLER = "..."
ASKED = 3
LETTERS = 6
LEAST = 100  # words: the third of those asked for comes up six times, the next four

TASK = (
    "Below is a text of made-up words, with dots between them that mean nothing. "
    "Watch which words come up most often.\n\n"
)
QUESTION = "\n\nQuestion: which three made-up words come up most often in the text? Leave out the dots."
ANSWER = "Answer: the three words that come up most often are"


@dataclass(frozen=True)
class FrequentWords:
    """Made-up words of six letters."""

    max_new_tokens: ClassVar[int] = 50

    def draft(self, random: Random, length: int) -> Draft:
        names = _made_up(Random(random.random()))
        asked = list(itertools.islice(names, ASKED))
        ranked = [FILLER, *asked]
        seed = random.random()

        def content(units: int) -> str:
            expected = (round(units / ZETA * rank**-EXPONENT) for rank in itertools.count(1))
            counts = list(itertools.takewhile(bool, expected))
            ranked.extend(itertools.islice(names, max(0, len(counts) - len(ranked))))
            text = [word for word, count in zip(ranked, counts, strict=False) for _ in range(count)]
            return TASK + " ".join(Random(seed).sample(text, len(text))) + QUESTION

        return Draft(content, ANSWER, tuple(asked), least=LEAST)


def _made_up(random: Random) -> Iterator[str]:
    """Different words without end."""
    known: set[str] = set()
    while True:
        word = "".join(random.choices(ascii_lowercase, k=LETTERS))
        if word not in known:
            known.add(word)
            yield word
