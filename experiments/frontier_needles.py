"""Needles found beside a divergence: `experiment=niah`'s answers at the same strength, calibration and length."""

from __future__ import annotations

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
        Of ``niah``. Answers in the section's own dtype count; where there are none, those in another one.

    Returns
    -------
    The rows with needles_n, needles and its 95% interval, and needles_dtype: NaN where nothing was asked. Without
    needles of that model there are no such columns.
    """
    same = [one for one in found if (one.chunk, _weights(one)) == (section.chunk, _weights(section))]
    if not same:
        return rows
    dtype = min((one.origin["dtype"] for one in same), key=lambda name: (name != section.origin["dtype"], name))
    answers = pd.concat([one.samples for one in same if one.origin["dtype"] == dtype])
    needles = pd.DataFrame(_needles(answers.rename(columns={"haystack": "source"})))
    return rows.merge(needles.assign(needles_dtype=dtype), on=SAME, how="left")


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
