"""A suite: several kinds of prompt, each at several lengths.

Sample n of a kind and length is drawn from (kind, length, seed + n) and from nothing else, so that more samples,
lengths or kinds add prompts and change none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import ClassVar, Protocol

from transformers import PreTrainedTokenizerBase

from bsfa.errors import InputError
from experiments import checks
from experiments.tasks import text, words
from experiments.tasks.base import Metric, Sample, Task, chat_tokens, fit, match_all

PROTOCOL = "ours"  # own wording, generated here; stands in every record


@dataclass(frozen=True)
class Draft:
    """A prompt that is drawn and has no size yet.

    Attributes
    ----------
    content : function from a number of units of haystack to the user's turn
    answer : str
        How the assistant's answer begins.
    references : tuple of str
        What it should bring.
    least : int
        Units below which the prompt makes no sense.
    metric : function of a prediction and the references
    depth : float, optional
        Percent of the haystack before what is asked for, where that is one thing.
    """

    content: Callable[[int], str]
    answer: str
    references: tuple[str, ...]
    least: int = 1
    metric: Metric = match_all
    depth: float | None = None


class Kind(Protocol):
    """One kind of prompt."""

    @property
    def max_new_tokens(self) -> int:
        """The answer budget."""

    def draft(self, random: Random, length: int) -> Draft:
        """Draw a prompt for a length in tokens."""


@dataclass(frozen=True)
class Suite(Task):
    """Kinds x lengths x samples.

    Parameters
    ----------
    tasks : sequence of str
        Names from ``kinds``.
    lengths : sequence of int
        Tokens of the prompt, its answer prefix and the answer budget together.
    samples : int
        Samples a (task, length).
    seed : int
    protocol : {"ours"}
    """

    tasks: Sequence[str]
    lengths: Sequence[int]
    samples: int
    seed: int = 0
    protocol: str = PROTOCOL

    kinds: ClassVar[Mapping[str, Kind]]

    def __post_init__(self) -> None:
        if self.protocol != PROTOCOL:
            raise InputError(f"task.protocol={self.protocol}: task={self.name} has the protocol {PROTOCOL}")
        checks.counts("task.lengths", self.lengths)
        checks.count("task.samples", self.samples)
        checks.seed("task.seed", self.seed)
        checks.names("task.tasks", self.tasks, self.kinds)

    def longest(self) -> int:
        return max(self.lengths)

    def data(self) -> dict[str, str]:
        haystacks = {haystack: text.digest(haystack, "evaluate") for haystack in text.HAYSTACKS}
        return haystacks | {"words": words.digest()}

    def ids(self) -> list[str]:
        return [f"{task}-{length}-{n}" for length, task, n in self._grid()]

    def make(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Sample]:
        for name, (length, task, n) in zip(self.ids(), self._grid(), strict=True):
            kind, seed = self.kinds[task], self.seed + n
            draft = kind.draft(Random(f"{task} {length} {seed}"), length)
            build = partial(_tokens, tokenizer, draft)
            tokens = fit(build, length - kind.max_new_tokens, draft.least)
            cell = {"protocol": self.protocol, "task": task, "length": length}
            if draft.depth is not None:
                cell["depth"] = draft.depth
            yield Sample(name, cell, seed, tuple(tokens), draft.references, kind.max_new_tokens, draft.metric)

    def _grid(self) -> Iterator[tuple[int, str, int]]:
        return itertools.product(self.lengths, self.tasks, range(self.samples))


def _tokens(tokenizer: PreTrainedTokenizerBase, draft: Draft, units: int) -> list[int]:
    return chat_tokens(tokenizer, draft.content(units), draft.answer)
