"""Needles found beside a divergence: `experiment=niah`'s answers at the same strength, calibration and length."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from experiments.frontier import CELL, SETTINGS
from experiments.results import Section
from experiments.statistics import mean_interval

SAME = ["method", "strength", *SETTINGS, *CELL]


def beside(rows: pd.DataFrame, section: Section, found: Sequence[Section]) -> pd.DataFrame:
    """A section's points with the needles that the same model found in prompts read alike; a haystack is what fidelity
    calls a source.

    Parameters
    ----------
    rows : DataFrame
        As `frontier.points` gives them.
    found : sequence of Section
        Of ``niah``. A point's answers in the section's own dtype count; where there are none, those in another one.

    Returns
    -------
    The rows with needles_n, needles and its 95% interval, and needles_dtype: NaN where nothing was asked. Without
    needles of that model there are no such columns.
    """
    same = [one for one in found if (one.chunk, _weights(one)) == (section.chunk, _weights(section))]
    if not same:
        return rows
    by_dtype = []
    own_first = sorted(same, key=lambda one: (one.origin["dtype"] != section.origin["dtype"], one.origin["dtype"]))
    for dtype, parts in itertools.groupby(own_first, key=lambda one: one.origin["dtype"]):
        answers = pd.concat([one.samples for one in parts]).rename(columns={"haystack": "source"})
        by_dtype.append(pd.DataFrame(_needles(answers)).assign(needles_dtype=dtype))
    return rows.merge(pd.concat(by_dtype).drop_duplicates(SAME), on=SAME, how="left")


def _needles(answers: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for key, cell in answers.groupby(SAME, sort=False):
        scores = cell.drop_duplicates("prompt_hash")["score"]  # runs of other grids may share prompts
        low, high = mean_interval(scores)
        yield dict(zip(SAME, key, strict=True)) | {
            "needles_n": len(scores),
            "needles": scores.mean(),
            "needles_low": low,
            "needles_high": high,
        }


def _weights(section: Section) -> dict[str, Any]:
    return {key: value for key, value in section.origin.items() if key != "dtype"}
