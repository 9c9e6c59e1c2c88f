"""Needle in a haystack: one sentence with a number, somewhere in a long text, and a question for the number.

A grid of haystacks x lengths x depths x samples. Wording and haystacks are our own; the key is an adjective and a
noun (wonderwords), the value seven digits, as in RULER's single-key task (arXiv 2404.06654).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import ClassVar

from transformers import PreTrainedTokenizerBase
from wonderwords import RandomWord

from experiments import checks
from experiments.tasks import text
from experiments.tasks.base import Sample, Task, chat_tokens, fit

# What stands before the number must be rare in the haystack: to a head that looks for what followed the same word, a
# needle that says "of the" or "is" looks like every other block of technical prose, and no threshold tells it apart.
INSTRUCTION = "A secret number is hidden in the following text. Memorise it: you will be asked for it.\n\n"
NEEDLE = "Remember: the secret number for {key} reads {value}."
QUESTION = "\n\nWhich secret number for {key} does the text mention?"
ANSWER = "The secret number for {key} reads"


@dataclass(frozen=True)
class Niah(Task):
    """Single-key needle grid.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of the prompt and its answer together.
    depths : int
        Needle positions, evenly spread from the start of the haystack (0%) to its end (100%).
    samples : int
        Samples a (haystack, length, depth).
    seed : int
        Sample number n of the grid is drawn from seed + n.
    haystacks : sequence of {"prose", "noise"}
    split : {"evaluate", "calibrate"}
        The half of the prose to draw from; calibration has its own.
    max_new_tokens : int
        Answer budget.
    """

    lengths: Sequence[int]
    depths: int
    samples: int
    seed: int = 0
    haystacks: Sequence[str] = text.HAYSTACKS
    split: text.Split = "evaluate"
    max_new_tokens: int = 16

    name: ClassVar[str] = "niah"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        for name in ("depths", "samples", "max_new_tokens"):
            checks.count(f"task.{name}", getattr(self, name))
        checks.seed("task.seed", self.seed)
        checks.counts("task.lengths", self.lengths)
        checks.names("task.haystacks", self.haystacks, text.HAYSTACKS)

    def longest(self) -> int:
        return max(self.lengths)

    def data(self) -> dict[str, str]:
        return {haystack: text.digest(haystack, self.split) for haystack in self.haystacks}

    def ids(self) -> list[str]:
        return [f"{haystack}-{length}-{depth:g}-{n}" for haystack, length, depth, n in self._grid()]

    def make(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Sample]:
        words, random = _words()
        numbered = enumerate(zip(self._grid(), self.ids(), strict=True), start=self.seed)
        for seed, ((haystack, length, depth, _), name) in numbered:
            random.seed(seed)
            key = f"{words.word(include_categories=['adjective'])} {words.word(include_categories=['noun'])}"
            value = str(random.randrange(10**6, 10**7))
            source = text.sentences(haystack, self.split)
            prompt = _Prompt(tokenizer, source, random.randrange(len(source)), depth, key, value)
            tokens = fit(prompt.tokens, length - self.max_new_tokens)
            cell = {"haystack": haystack, "length": length, "depth": depth}
            yield Sample(name, cell, seed, tuple(tokens), (value,), self.max_new_tokens)

    def _grid(self) -> Iterator[tuple[str, int, float, int]]:
        last = max(1, self.depths - 1)
        depths = [round(100 * i / last, 1) for i in range(self.depths)] if self.depths > 1 else [50.0]
        return itertools.product(self.haystacks, self.lengths, depths, range(self.samples))


@cache
def _words() -> tuple[RandomWord, Random]:
    """wonderwords' lists, which take a while to read, and the random numbers it draws by: every sample seeds them."""
    random = Random()
    return RandomWord(rng=random), random


@dataclass(frozen=True)
class _Prompt:
    """One needle and the text to hide it in, from the sentence at ``start`` on and round again."""

    tokenizer: PreTrainedTokenizerBase
    source: Sequence[str]
    start: int
    depth: float
    key: str
    value: str

    def tokens(self, sentences: int) -> list[int]:
        """The prompt with that many sentences of haystack."""
        hay = [self.source[(self.start + i) % len(self.source)] for i in range(sentences)]
        hay.insert(round(sentences * self.depth / 100), NEEDLE.format(key=self.key, value=self.value))
        content = INSTRUCTION + " ".join(hay) + QUESTION.format(key=self.key)
        return chat_tokens(self.tokenizer, content, ANSWER.format(key=self.key))
