"""A prompt through the model up to its first token, in one piece or in chunks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import Cache, DynamicCache, StaticCache

from bsfa.blocks import BLOCK_Q
from bsfa.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reader(Protocol):
    """What a prompt is read with: a method, or what one will be made from."""

    @property
    def name(self) -> str: ...

    @property
    def serves_chunks(self) -> bool: ...


@dataclass(frozen=True)
class Prefill:
    """How a prompt is read.

    Parameters
    ----------
    chunk : int, optional
        Tokens a forward pass, a multiple of 128, so that a chunk's query blocks are the whole prompt's: a gate decides
        as it does in one piece, and activations take a chunk's memory. None reads the prompt at once.

    Raises
    ------
    InputError
        A chunk that is not a multiple of 128.
    """

    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is None:
            return
        if not isinstance(self.chunk, int) or self.chunk < 1 or self.chunk % BLOCK_Q:
            raise InputError(
                f"prefill.chunk={self.chunk} must be a multiple of {BLOCK_Q}, the rows of a query block, such as 8192; "
                "null reads a prompt in one piece"
            )

    def check(self, methods: Iterable[Reader], longest: int) -> None:
        """Refuse chunks for a method that wants a prompt whole.

        Raises
        ------
        InputError
        """
        if self.chunk is None or longest <= self.chunk:
            return
        if whole := sorted({method.name for method in methods if not method.serves_chunks}):
            raise InputError(
                f"prefill.chunk={self.chunk}: {', '.join(whole)} wants a prompt in one piece; "
                "set prefill.chunk=null or leave it out"
            )

    def check_keys(self, fewest: Iterable[tuple[str, int]], shortest: int, lengths: str) -> None:
        """Refuse prompts that are too short for a method.

        Parameters
        ----------
        fewest : iterable of (str, int)
            What an error calls a method, and its `Method.fewest_keys`.
        shortest : int
            Tokens of the shortest prompt.
        lengths : str
            The setting that its length comes from.

        Raises
        ------
        InputError
        """
        first, what, setting = shortest, "prompt", lengths
        if self.chunk is not None and self.chunk < shortest:
            first, what, setting = self.chunk, "first chunk", "prefill.chunk"
        if named := ", ".join(f"{name} ({keys:,} or more)" for name, keys in fewest if keys > first):
            raise InputError(
                f"{setting}: a {what} of {first:,} tokens is too short for {named}; take longer ones, a "
                "weaker strength, or one that was fitted at that length"
            )

    def identity(self) -> dict[str, Any]:
        """What tells a run's records from those of a prefill in one piece; nothing for that one."""
        return {} if self.chunk is None else {"prefill": {"chunk": self.chunk}}

    def cache(self, model: PreTrainedModel, length: int) -> Cache:
        """An empty cache to read a prompt into. For chunks as long as the prompt from the start: one that grows copies
        what it holds at every chunk."""
        if self.chunk is None or length <= self.chunk:
            return DynamicCache(config=model.config)
        return StaticCache(config=model.config, max_cache_len=length)

    @torch.inference_mode()
    def read(self, model: PreTrainedModel, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Fill a cache with a prompt.

        Parameters
        ----------
        tokens : int64 (B, S)
            Without padding.
        cache : Cache
            Empty.

        Returns
        -------
        The last token's logits, (B, vocabulary).
        """
        for part in self._parts(tokens):
            logits = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1]

    def _parts(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """The chunks. A last one of a single token goes with the one before: alone it would pass for a decode step."""
        length = tokens.shape[1]
        starts = list(range(0, length, self.chunk or length))
        if len(starts) > 1 and length - starts[-1] == 1:
            starts.pop()
        return [tokens[:, a:b] for a, b in itertools.pairwise([*starts, length])]
