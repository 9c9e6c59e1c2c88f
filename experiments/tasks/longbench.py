"""LongBench v1, English and code (arXiv 2308.14508): its data and its prompts from outside, its parameters here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from bsfa.errors import InputError
from experiments import checks
from experiments.tasks import longbench_data
from experiments.tasks.base import Sample, Task, chat_tokens
from experiments.tasks.longbench_data import DataSet, Row, Scorer
from experiments.tasks.longbench_tasks import TASKS, UNTEMPLATED

PROTOCOLS = ("chat", "plain")


@dataclass(frozen=True)
class LongBench:
    """Which tasks, how long, and how they are put to the model.

    Parameters
    ----------
    tasks : sequence of str
        From `TASKS`.
    lengths : sequence of int
        Limits in tokens of the whole prompt and its answer together; each makes every sample once. What is longer loses
        the middle of its context.
    samples : int, optional
        The first rows of each task; None: all.
    protocol : {"chat", "plain"}
        Through the model's chat template, but for `UNTEMPLATED` (LongBench's own way), or never.
    scorer : {"own", "lm_eval"}
        See `experiments.tasks.longbench_data`.
    """

    tasks: Sequence[str]
    lengths: Sequence[int]
    samples: int | None = None
    protocol: str = "chat"
    scorer: str = "own"

    def __post_init__(self) -> None:
        checks.counts("task.lengths", self.lengths)
        if self.samples is not None:
            checks.count("task.samples", self.samples)
        checks.names("task.tasks", self.tasks, TASKS)
        checks.choice("task.protocol", self.protocol, PROTOCOLS)
        checks.choice("task.scorer", self.scorer, longbench_data.SCORERS)

    def longest(self) -> int:
        return max(self.lengths)


@dataclass(frozen=True)
class Documents(Task):
    """One task's rows at every length."""

    settings: LongBench
    rows: DataSet
    scorer: Scorer

    name: ClassVar[str] = "longbench"

    @property
    def protocol(self) -> str:
        """How prompts are put and answers scored, as records and tables name it."""
        return f"{self.settings.protocol}, {self.scorer.name} scores"

    def longest(self) -> int:
        return self.settings.longest()

    def data(self) -> dict[str, str]:
        return {"texts": self.rows.digest(), "scorer": self.scorer.name}

    def ids(self) -> list[str]:
        return [f"{self.rows.name}-{length}-{n}-{row.digest()[:6]}" for length, n, row in self._grid()]

    def make(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Sample]:
        wrapped = self.settings.protocol == "chat" and self.rows.name not in UNTEMPLATED
        build = _chat(tokenizer) if wrapped else _plain(tokenizer)
        for name, (length, n, row) in zip(self.ids(), self._grid(), strict=True):
            tokens = cut(tokenizer, build, row, length - self.rows.max_new_tokens)
            cell = {"protocol": self.protocol, "task": self.rows.name, "length": length}
            metric = self.scorer.metric(self.rows.name, row)
            yield Sample(name, cell, n, tuple(tokens), row.answers, self.rows.max_new_tokens, metric)

    def _grid(self) -> Iterator[tuple[int, int, Row]]:
        return ((length, n, row) for length in self.settings.lengths for n, row in enumerate(self.rows.rows))


def _chat(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    return lambda content: chat_tokens(tokenizer, content, "")


def _plain(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    return lambda content: tokenizer(content)["input_ids"]


def cut(tokenizer: PreTrainedTokenizerBase, build: Callable[[str], list[int]], row: Row, budget: int) -> list[int]:
    """A prompt within a token budget: of one that is too long the first and the last half, before any template.

    What falls out is always context: where a half would end in the question or the instruction, that is kept whole and
    the other half gives way.

    Parameters
    ----------
    build : function from the user's text to the prompt's tokens
        Wraps it in the template.
    budget : int
        Tokens.

    Raises
    ------
    InputError
        Not even instruction and question fit.
    """
    tokens = build(row.before + row.context + row.after)
    if len(tokens) <= budget:
        return tokens
    starts = [start for start, _ in _offsets(tokenizer, row.context)]
    before, after = (len(_offsets(tokenizer, part)) for part in (row.before, row.after))
    bare = len(build(row.before + row.after))
    kept = min(budget - bare, len(starts) - 1)
    while kept > 0:
        first = min(max((kept + after - before) // 2, 0), kept)
        context = (
            row.context[: starts[first]] + row.context[starts[first - kept] if first < kept else len(row.context) :]
        )
        tokens = build(row.before + context + row.after)
        if len(tokens) <= budget:
            return tokens
        kept -= len(tokens) - budget
    raise InputError(
        f"instruction and question take {bare} tokens of {budget} and leave no room for a context; "
        "use a longer task.lengths"
    )


def _offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """Where each token of a text begins and ends, in characters."""
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
