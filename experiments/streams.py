"""Running text to hold a method's next-token distribution against dense attention's on."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from bsfa.errors import InputError
from experiments import checks
from experiments.tasks import folder, text

OWN = "data"  # the source that is the user's folder, data.root


@dataclass(frozen=True)
class Stream:
    """One text: its id, the cell it belongs to, and its tokens."""

    id: str
    source: str
    length: int
    seed: int
    tokens: tuple[int, ...]

    @property
    def tokens_hash(self) -> str:
        return hashlib.sha256(repr(self.tokens).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Streams:
    """A grid of sources x lengths x samples, from text that nothing is calibrated on.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of a text.
    samples : int
        Texts a (source, length).
    tail : int
        Tokens at the end of a text over which distributions are compared.
    sources : sequence of {"prose", "noise", "data"}
    seed : int
        Text number n of the grid is drawn from seed + n.
    texts : sequence of str
        What the source ``data`` is made of.
    """

    lengths: Sequence[int]
    samples: int
    tail: int
    sources: Sequence[str] = text.HAYSTACKS
    seed: int = 0
    texts: Sequence[str] = ()

    name: ClassVar[str] = "fidelity"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        checks.counts("streams.lengths", self.lengths)
        checks.count("streams.samples", self.samples)
        checks.seed("streams.seed", self.seed)
        checks.count("streams.tail", self.tail)
        if self.tail >= min(self.lengths):
            raise InputError(f"streams.tail={self.tail} must be under the shortest of streams.lengths={self.lengths}")
        checks.names("streams.sources", self.sources, (*text.HAYSTACKS, OWN))
        if OWN in self.sources and not self.texts:
            raise InputError(f"streams.sources holds {OWN}: data.root=DIR says which folder that is")

    def ids(self) -> list[str]:
        return [f"{source}-{length}-{n}" for source, length, n in self._grid()]

    def longest(self) -> int:
        return max(self.lengths)

    def data(self) -> dict[str, str]:
        return {
            source: folder.digest(self.texts) if source == OWN else text.digest(source, "evaluate")
            for source in self.sources
        }

    def make(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Stream]:
        """Make the texts, in the order of `ids`."""
        numbered = enumerate(zip(self._grid(), self.ids(), strict=True), start=self.seed)
        for seed, ((source, length, _), name) in numbered:
            yield Stream(name, source, length, seed, tuple(self._tokens(tokenizer, source, length, seed)))

    def _tokens(self, tokenizer: PreTrainedTokenizerBase, source: str, length: int, seed: int) -> list[int]:
        if source == OWN:
            return folder.passage(tokenizer, self.texts, length, seed)
        return text.running(tokenizer, text.sentences(source, "evaluate"), length, seed)

    def _grid(self) -> Iterator[tuple[str, int, int]]:
        return itertools.product(self.sources, self.lengths, range(self.samples))
