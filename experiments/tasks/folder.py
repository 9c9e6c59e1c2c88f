"""Text in a user's folder, ``data.root=DIR``: JSON lines in LongBench's schema, and plain text files."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from bsfa.errors import InputError


def existing(root: str) -> Path:
    """The folder.

    Raises
    ------
    InputError
        There is none.
    """
    folder = Path(str(root))
    if not folder.is_dir():
        raise InputError(f"data.root={root} is no folder")
    return folder


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises
    ------
    InputError
        It is missing or is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error


def read_rows(path: Path, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file.

    Raises
    ------
    InputError
        The file cannot be read; a line, by its number, that is no object or lacks a key.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                lacking = [key for key in keys if not isinstance(row, dict) or key not in row]
                if lacking:
                    raise InputError(f"{path}, line {number} has no {', '.join(lacking)}")
                yield row
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number} is not JSON: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8: {error}") from error


def texts(root: str) -> tuple[str, ...]:
    """The long texts of a folder: every ``*.txt``, and the ``context`` of every line of every ``*.jsonl``.

    Raises
    ------
    InputError
        No such folder, none in it, a file that cannot be read.
    """
    folder = existing(root)
    found: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".jsonl":
            found += [str(row["context"]) for row in read_rows(path, ["context"])]
        elif path.suffix == ".txt":
            try:
                found.append(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{path} cannot be read as UTF-8: {error}") from error
    found = [text for text in found if text.strip()]
    if not found:
        raise InputError(f"data.root={root} holds no text: no *.txt, and no *.jsonl with a context")
    return tuple(found)


def digest(parts: Iterable[str]) -> str:
    """16 hex digits of texts: what a record says of them in place of a path."""
    found = hashlib.sha256()
    for part in parts:
        content = part.encode()
        found.update(f"{len(content)} ".encode() + content)
    return found.hexdigest()[:16]


def passage(tokenizer: PreTrainedTokenizerBase, source: Sequence[str], length: int, seed: int) -> list[int]:
    """That many tokens of a folder's texts, in an order and from a word on that the seed draws, and round again."""
    random = Random(seed)
    order = random.sample(source, len(source))
    start = random.randrange(len(order[0]))
    order[0] = order[0][order[0].find(" ", start) + 1 :]
    tokens: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for text in itertools.cycle(order):
        tokens += tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]
        if len(tokens) >= length:
            break
    return tokens[:length]
