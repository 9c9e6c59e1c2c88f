"""Haystack text that needs no download: prose from Python's own language reference, and noise.

Prose is split by topic into a half to calibrate on and a half to be judged on, so that no method is judged on its
calibration texts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from pydoc_data.topics import topics
from random import Random
from typing import Literal, get_args

from transformers import PreTrainedTokenizerBase

from bsfa.errors import InputError

Haystack = Literal["prose", "noise"]
Split = Literal["calibrate", "evaluate"]
HAYSTACKS: tuple[str, ...] = get_args(Haystack)

NOISE = (
    "The kettle stands on the stove.",
    "A cat sleeps by the door.",
    "Rain falls on the roof.",
    "The clock on the wall keeps time.",
    "Somebody walks past the window.",
)
# What marks a paragraph as code, grammar or a table, and what to take out of one that is not.
_NOT_PROSE = re.compile(r"::=|>>>|==|--|\.\.\. |[|{}\\#@]|^\s*[a-z_.]+\(", re.MULTILINE)
_MARKUP = re.compile(r"[*`\"“”]|\[\d+\]")
_SENTENCE = re.compile(r"[A-Z][^=<>]*[a-z)][.]", re.ASCII)
_SENTENCE_END = re.compile(r"(?<=[a-z)][.])\s+(?=[A-Z])")
SHORTEST, LONGEST = 40, 400  # characters of a sentence worth keeping


@lru_cache
def prose(split: Split) -> tuple[str, ...]:
    """Sentences of Python's language reference (PSF licence, in every CPython as `pydoc_data.topics`)."""
    sentences: dict[str, None] = {}
    for number, name in enumerate(sorted(topics)):
        if (number % 2 == 0) != (split == "calibrate"):
            continue
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            if _NOT_PROSE.search(paragraph):
                continue
            for sentence in _SENTENCE_END.split(" ".join(_MARKUP.sub("", paragraph).split())):
                if SHORTEST <= len(sentence) <= LONGEST and _SENTENCE.fullmatch(sentence):
                    sentences[sentence] = None
    if split == "evaluate":  # topics quote one another
        sentences = {s: None for s in sentences if s not in set(prose("calibrate"))}
    return tuple(sentences)


def sentences(haystack: str, split: Split) -> Sequence[str]:
    """The sentences of a haystack.

    Raises
    ------
    InputError
        An unknown haystack.
    """
    if haystack not in HAYSTACKS:
        raise InputError(f"haystack {haystack!r} is none of {', '.join(HAYSTACKS)}")
    return prose(split) if haystack == "prose" else NOISE


def digest(haystack: str, split: Split) -> str:
    """16 hex digits of a haystack's text: it differs between Python versions, and is part of a run's identity."""
    return hashlib.sha256("\n".join(sentences(haystack, split)).encode()).hexdigest()[:16]


def running(tokenizer: PreTrainedTokenizerBase, source: Sequence[str], length: int, seed: int) -> list[int]:
    """That many tokens of text: sentences in a random order, again from the start where they run out."""
    random = Random(seed)
    tokens: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    while len(tokens) < length:
        order = random.sample(source, len(source))
        tokens += tokenizer(" ".join(order) + " ", add_special_tokens=False)["input_ids"]
    return tokens[:length]


def excerpt(source: Sequence[str], end: int, size: int) -> list[str]:
    """That many words of running text up to sentence ``end``, round the source; the first sentence may lack its start.

    Parameters
    ----------
    end : int
        Number of the sentence that the excerpt stops before.
    size : int
        Words.
    """
    found: list[str] = []
    missing = size
    while missing > 0:
        end -= 1
        words = source[end % len(source)].split()
        found.append(" ".join(words[-missing:]))
        missing -= len(words)
    return found[::-1]
