"""The report as one page that needs nothing beside it: the tables as they were written, the figures embedded."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.chapters import Chapter

FILE = "report.html"
TEMPLATE = Path(__file__).with_suffix(".html")
ABOUT = {
    "niah": ("Needle in a haystack", "Numbers hidden in noise or prose, asked for at the end: which are found."),
    "ruler": ("RULER", "Eleven kinds of retrieval, tracing and counting in our own words: which answers are right."),
    "reasoning": ("Reasoning", "One to three facts hidden in prose, and variables to trace: which answers are right."),
    "longbench": ("LongBench", "Questions, summaries and code from real documents, scored as LongBench does."),
    "lm_eval": ("lm-eval", "Tasks of lm-eval, by its own prompts and scores."),
    "fidelity": ("Fidelity", "How far the next token's distribution moves from dense attention's on the same text."),
    "equal_kl": (
        "Time at equal KL",
        "What attention takes, selection included, of methods as near to dense attention.",
    ),
    "kernel": ("Kernel", "One attention call on a GPU, against the best dense attention there."),
    "ttft": ("Time to first token", "A whole model reads a prompt, with each method in turn."),
}


@dataclass(frozen=True)
class Part:
    """An experiment on the page."""

    anchor: str
    heading: str
    about: str
    chapters: Sequence[Chapter]


def write(root: Path, found: Mapping[str, Sequence[Chapter]]) -> Path:
    """Write ``report.html`` from chapters whose files stand below ``root``.

    Parameters
    ----------
    found : mapping of str to sequence of Chapter
        By experiment; one without a chapter is named as not run.
    """
    parts = [Part(name, *ABOUT[name], chapters) for name, chapters in found.items()]

    def embedded(name: str) -> str:
        return base64.b64encode((root / "figures" / f"{name}.png").read_bytes()).decode("ascii")

    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(TEMPLATE.name).render(
        parts=[part for part in parts if part.chapters],
        missing=[part for part in parts if not part.chapters],
        embedded=embedded,
        columns=_columns,
        cells=_cells,
    )
    path = root / FILE
    path.write_text(text, encoding="utf-8")
    return path


def _cells(shown: pd.DataFrame) -> list[list[str]]:
    """A table's rows, as its Markdown has them; what is missing is empty."""
    return [["" if pd.isna(cell) else str(cell) for cell in row] for row in shown.to_numpy(dtype=object)]


def _columns(shown: pd.DataFrame) -> list[tuple[str, str]]:
    """Each column's name, and how its cells are set: words to the left, numbers to the right."""
    cells = _cells(shown)
    return [
        (str(name), "number" if all(_is_number(row[place]) for row in cells) else "words")
        for place, name in enumerate(shown.columns)
    ]


def _is_number(cell: str) -> bool:
    return not cell or cell.lstrip("<> +-")[:1].isdigit()
