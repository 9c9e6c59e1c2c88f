"""English words to name things with, from wonderwords' lists."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from random import Random

from wonderwords import RandomWord

SHORTEST, LONGEST = 4, 9  # letters


@lru_cache
def words(category: str) -> tuple[str, ...]:
    """The plain lower-case words of a category (``noun``, ``adjective``, ``verb``), in alphabetical order."""
    found = RandomWord().filter(include_categories=[category])
    return tuple(
        sorted({w for w in found if w.isascii() and w.isalpha() and w.islower() and SHORTEST <= len(w) <= LONGEST})
    )


def name(random: Random) -> str:
    """An adjective and a noun."""
    return f"{random.choice(words('adjective'))} {random.choice(words('noun'))}"


@lru_cache
def digest() -> str:
    """16 hex digits of the lists, which differ between versions of wonderwords."""
    lists = [words(category) for category in ("adjective", "noun")]
    return hashlib.sha256(repr(lists).encode()).hexdigest()[:16]
