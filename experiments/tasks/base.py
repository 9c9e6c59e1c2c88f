"""What a task is: samples, each a prompt with the answers it should bring, deterministic in (seed, index)."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from bsfa.errors import InputError

PROBE = 16  # units: enough to tell what one takes
BISECT = 4  # every so many steps, for prompts that are not linear

Metric = Callable[[str, tuple[str, ...]], float]


def match_all(prediction: str, references: tuple[str, ...]) -> float:
    """Share of the references that the prediction holds, case-insensitive (RULER's string_match_all)."""
    return sum(reference.lower() in prediction.lower() for reference in references) / len(references)


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes
    ----------
    id : str
        Unique in its task.
    cell : dict
        What a table groups by: haystack, length, depth.
    seed : int
        What it was drawn from.
    tokens : tuple of int
        The whole prompt, chat template and answer prefix included.
    references : tuple of str
        The answers.
    max_new_tokens : int
        Answer budget.
    metric : function of a prediction and the references
        0 to 1; RULER's match by default.
    """

    id: str
    cell: dict[str, Any]
    seed: int
    tokens: tuple[int, ...]
    references: tuple[str, ...]
    max_new_tokens: int
    metric: Metric = match_all

    def score(self, prediction: str) -> float:
        """What the answer is worth, 0 to 1."""
        return self.metric(prediction, self.references)

    @property
    def group(self) -> str:
        """The cell without its depth, as a log line names it."""
        return ", ".join(f"{key} {value}" for key, value in self.cell.items() if key != "depth")

    @property
    def prompt_hash(self) -> str:
        return hashlib.sha256(repr(self.tokens).encode()).hexdigest()[:16]


class Task(ABC):
    """A family of samples. ``version`` is part of a record's identity: raise it when prompts or scores change."""

    name: ClassVar[str]
    version: ClassVar[int] = 1

    @abstractmethod
    def ids(self) -> list[str]:
        """The ids of all samples, in the order in which `make` makes them; needs no tokenizer."""

    @abstractmethod
    def make(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Sample]:
        """Make the samples."""

    @abstractmethod
    def longest(self) -> int:
        """Tokens of the longest prompt and its answer."""

    @abstractmethod
    def data(self) -> dict[str, str]:
        """Digests of the text the prompts are made of."""


def chat_tokens(tokenizer: PreTrainedTokenizerBase, content: str, answer_prefix: str) -> list[int]:
    """One user turn through the model's chat template, the assistant's header, and how its answer begins.

    Raises
    ------
    InputError
        A tokenizer without a chat template.
    """
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer {tokenizer.name_or_path} has no chat template; use an instruction-tuned model")
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(str(turn) + answer_prefix, add_special_tokens=False)["input_ids"]


def fit(build: Callable[[int], list[int]], budget: int, least: int = 1) -> list[int]:
    """The longest prompt within a token budget, found by interpolation: prompts are nearly linear in their units.

    Parameters
    ----------
    build : function from a number of units of haystack to the prompt's tokens
        Longer for more units.
    budget : int
        Tokens.
    least : int
        Units that make sense at all.

    Raises
    ------
    InputError
        Not even the least fits.
    """
    low, fitting = least, build(least)
    if len(fitting) > budget:
        raise InputError(f"a prompt of {len(fitting)} tokens does not fit {budget}; use a longer length")
    high = least + PROBE
    while len(longer := build(high)) <= budget:
        step = (high - low) / max(1, len(longer) - len(fitting))  # units a token
        low, fitting, high = high, longer, high + 1 + int((budget - len(longer)) * step)
    over = len(longer)
    attempt = 0
    while high - low > 1:
        attempt += 1
        share = 1 / 2 if attempt % BISECT == 0 else (budget - len(fitting)) / (over - len(fitting))
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        if len(longer := build(middle)) <= budget:
            low, fitting = middle, longer
        else:
            high, over = middle, len(longer)
    return fitting
