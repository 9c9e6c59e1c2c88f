"""A pattern for every head: what MInference's search finds, in the JSON of its authors' configuration files."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bsfa.errors import InputError
from bsfa.model import ModelInfo
from bsfa.whole import whole

VERTICAL_SLASH, BLOCK_SPARSE, A_SHAPE = "vertical_and_slash", "block_sparse", "stream_llm"  # the files' names
KINDS = (VERTICAL_SLASH, BLOCK_SPARSE, A_SHAPE)


class Pattern(NamedTuple):
    """One head's pattern and its sizes: keys kept as verticals, distances kept as slashes.

    An A-shape keeps the first keys and the nearest distances. A block-sparse head has its own size, see
    `bsfa.methods.MInference`.
    """

    kind: str
    vertical: int
    slash: int


@dataclass(frozen=True)
class Patterns:
    """One pattern a layer and head.

    Raises
    ------
    InputError
        An unknown kind, a size below 0.
    """

    layers: tuple[tuple[Pattern, ...], ...]

    def __post_init__(self) -> None:
        for pattern in (pattern for layer in self.layers for pattern in layer):
            if pattern.kind not in KINDS or min(pattern.vertical, pattern.slash) < 0:
                raise InputError(f"{tuple(pattern)} is no pattern: one of {', '.join(KINDS)}, and two sizes from 0")

    def check(self, model: ModelInfo) -> None:
        """Refuse a model with other layers or heads.

        Raises
        ------
        InputError
        """
        if [len(layer) for layer in self.layers] != [model.n_heads] * model.n_layers:
            heads = sorted({len(layer) for layer in self.layers})
            raise InputError(
                f"patterns of {len(self.layers)} layers with {heads} heads are not for {model.name or 'this model'}, "
                f"which has {model.n_layers} with {model.n_heads}; search its own"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all. The authors' fourth entry, the score in their search, is 0."""
        layers = [{str(h): [*pattern, 0] for h, pattern in enumerate(layer)} for layer in self.layers]
        with whole(Path(path)) as partial:
            partial.write_text(json.dumps(layers), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Patterns:
        """Read a file of `save`, or one of MInference's authors.

        Raises
        ------
        InputError
            No such file, or one that holds something else.
        """
        try:
            layers = json.loads(Path(path).read_text(encoding="utf-8"))
            heads = [[layer[str(h)] for h in range(len(layer))] for layer in layers]
            patterns = tuple(tuple(Pattern(str(kind), int(v), int(s)) for kind, v, s, _ in layer) for layer in heads)
        except OSError as error:
            raise InputError(f"cannot read the pattern file {path}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} is no pattern file, a list of layers {{head: [kind, v, s, score]}}") from error
        return cls(patterns)
