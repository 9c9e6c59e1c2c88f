"""Needles with keys and values in a haystack: RULER's eight retrieval tasks (arXiv 2404.06654), in our own words.

A needle gives a key's value. Asked for are one key's value, one key's several values, or several keys' values, among
needles of other keys; the haystack is noise, prose, or nothing but needles. Depths are drawn from 40 points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Literal
from uuid import UUID

from experiments.tasks import text, words
from experiments.tasks.suite import Draft

Token = Literal["word", "number", "uuid"]

DEPTHS = tuple(round(100 * i / 39) for i in range(40))
DRAW: dict[Token, Callable[[Random], str]] = {
    "word": words.name,
    "number": lambda random: str(random.randrange(10**6, 10**7)),
    "uuid": lambda random: str(UUID(int=random.getrandbits(128), version=4)),
}
CALLED = {"number": "secret number", "uuid": "secret code"}

# Worded as in niah.py, and for its reason.
ONE_HIDDEN = "A {noun} is hidden in the following text. Memorise it: you will be asked for it.\n\n"
SOME_HIDDEN = "Several {noun}s are hidden in the following text. Memorise them: you will be asked for some.\n\n"
NEEDLE = "Remember: the {noun} for {key} reads {value}."
ASK_ONE = "\n\nWhich {noun} for {key} does the text mention?"
ASK_SOME = "\n\nWhich {noun}s for {key} does the text mention? There are {count} of them."
ANSWER_ONE = "The {noun} for {key} reads"
ANSWER_SOME = "1. The {noun} for {first} reads"  # a list that has begun is gone on with


@dataclass(frozen=True)
class Needles:
    """Keys with values, hidden; some keys are asked for.

    Parameters
    ----------
    haystack : {"noise", "prose", "needles"}
        ``needles``: as many other keys' needles as the length takes.
    key, value : {"word", "number", "uuid"}
    keys : int
        Keys in the haystack, beside those of a haystack of needles.
    values : int
        Values a key.
    asked : int
        Keys asked for.
    """

    haystack: Literal["noise", "prose", "needles"]
    key: Token = "word"
    value: Token = "number"
    keys: int = 1
    values: int = 1
    asked: int = 1

    max_new_tokens: ClassVar[int] = 128

    def draft(self, random: Random, length: int) -> Draft:
        noun = CALLED[self.value]
        keys = _distinct(random, self.key, self.keys)
        values = _distinct(random, self.value, self.keys * self.values)
        owners = [key for key in keys for _ in range(self.values)]
        needles = [NEEDLE.format(noun=noun, key=key, value=value) for key, value in zip(owners, values, strict=True)]
        depths = random.sample(DEPTHS, len(needles))
        hay = self._needles(random, keys) if self.haystack == "needles" else self._text(random, self.haystack)
        count = self.asked * self.values
        names = {"noun": noun, "key": _listed(keys[: self.asked]), "first": keys[0], "count": count}
        before, ask, answer = (
            (SOME_HIDDEN if len(needles) > 1 or self.haystack == "needles" else ONE_HIDDEN),
            (ASK_SOME if count > 1 else ASK_ONE),
            (ANSWER_SOME if count > 1 else ANSWER_ONE),
        )

        def content(units: int) -> str:
            return before.format(**names) + " ".join(scatter(hay(units), needles, depths)) + ask.format(**names)

        depth = depths[0] if count == 1 else None
        return Draft(content, answer.format(**names), tuple(values[:count]), depth=depth)

    def _text(self, random: Random, haystack: str) -> Callable[[int], list[str]]:
        """So many words of text."""
        source = text.sentences(haystack, "evaluate")
        end = random.randrange(len(source))
        return lambda units: text.excerpt(source, end, units)

    def _needles(self, random: Random, taken: Sequence[str]) -> Callable[[int], list[str]]:
        """So many words of needles of other keys."""
        known = set(taken)
        lines: list[str] = []

        def hay(units: int) -> list[str]:
            while len(lines) * len(NEEDLE.split()) < units:
                if (key := DRAW[self.key](random)) not in known:
                    known.add(key)
                    value = DRAW[self.value](random)
                    lines.append(NEEDLE.format(noun=CALLED[self.value], key=key, value=value))
            return text.excerpt(lines[::-1], 0, units)

        return hay


def scatter(hay: list[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
    """The haystack with each needle at its depth, in percent of its sentences; those of one depth keep their order."""
    found: list[str] = []
    done = 0
    for depth, needle in sorted(zip(depths, needles, strict=True), key=lambda pair: pair[0]):
        here = round(len(hay) * depth / 100)
        found += [*hay[done:here], needle]
        done = here
    return found + hay[done:]


def _distinct(random: Random, token: Token, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[DRAW[token](random)] = None
    return list(found)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
