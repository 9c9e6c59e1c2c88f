"""Intervals for scores. All are 95%."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy  # its `stats` takes a second to import, when first asked for

LEVEL = 0.95
RESAMPLES = 2000


def mean_interval(scores: Sequence[float]) -> tuple[float, float]:
    """Interval of a mean: Wilson for scores of 0 and 1, bootstrap (percentile) otherwise."""
    values = np.asarray(scores, dtype=float)
    if np.isin(values, (0.0, 1.0)).all():
        interval = scipy.stats.binomtest(int(values.sum()), len(values)).proportion_ci(LEVEL, method="wilson")
        return float(interval.low), float(interval.high)
    return bootstrap_interval(values)


def paired_interval(scores: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """Bootstrap interval of the mean difference on the same samples."""
    return bootstrap_interval(np.asarray(scores, dtype=float) - np.asarray(baseline, dtype=float))


def stratified_interval(
    strata: Sequence[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, float]:
    """Bootstrap interval of a statistic of the mean of several strata's means, such as tasks'.

    Parameters
    ----------
    strata : sequence of fp64 (n, columns)
        One row a sample; samples are drawn again within their stratum.
    statistic : function
        From means (resamples, columns) to (resamples,).

    Returns
    -------
    NaN where a stratum has a single sample and so no spread to be seen, or where the statistic is NaN for some draw.
    """
    if min(map(len, strata)) < 2:
        return float("nan"), float("nan")
    random = np.random.default_rng(0)
    means = np.mean([s[random.integers(len(s), size=(RESAMPLES, len(s)))].mean(1) for s in strata], axis=0)
    found = statistic(means)
    if np.isnan(found).any():
        return float("nan"), float("nan")
    low, high = np.percentile(found, (50 * (1 - LEVEL), 50 * (1 + LEVEL)))
    return float(low), float(high)


def bootstrap_interval(scores: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Bootstrap interval (percentile) of a mean of what is no score, such as a divergence: zeros are no failures of as
    many tries. NaN where a value is."""
    values = np.asarray(scores, dtype=float)
    if np.isnan(values).any():
        return float("nan"), float("nan")
    if len(values) < 2 or np.ptp(values) == 0.0:
        return float(values.mean()), float(values.mean())
    found = scipy.stats.bootstrap(
        (values,), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    return float(found.low), float(found.high)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """25%, median, 75%."""
    low, median, high = np.percentile(np.asarray(values, dtype=float), (25, 50, 75))
    return float(low), float(median), float(high)


def summarise(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One run in numbers: all samples together, then each cell (task, haystack and length).

    Returns
    -------
    dict with n, score, score_low, score_high, skip_ratio, ttft_q25_s, ttft_median_s, ttft_q75_s, and ``cells``, a
    list of the same with the cell's names.
    """
    frame = pd.DataFrame(samples)
    keys = [key for key in ("protocol", "task", "haystack", "length") if key in frame]
    cells = [
        dict(zip(keys, name if isinstance(name, tuple) else (name,), strict=True)) | _numbers(cell)
        for name, cell in frame.groupby(keys, sort=True)
    ]
    return _numbers(frame) | {"cells": cells}


def _numbers(frame: pd.DataFrame) -> dict[str, float]:
    low, high = mean_interval(frame["score"])
    q25, median, q75 = quartiles(frame["ttft_s"])
    return {
        "n": len(frame),
        "score": float(frame["score"].mean()),
        "score_low": low,
        "score_high": high,
        "skip_ratio": float(frame["skip_ratio"].mean()),
        "ttft_q25_s": q25,
        "ttft_median_s": median,
        "ttft_q75_s": q75,
    }
