"""Skip ratio against divergence: what the records of `experiment=fidelity` say of a method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from experiments.results import METHOD, Section
from experiments.statistics import bootstrap_interval

CUTS = (0.005, 0.02, 0.05)  # nats a token
TYPICAL = 0.02
CELL = ["source", "length"]
SETTINGS = ["settings", "version"]


def points(section: Section) -> pd.DataFrame:
    """One row a method, strength and cell.

    Returns
    -------
    DataFrame with settings and version, which tell a method of that name from others, n, kl and its 95% interval
    (nats a token), agreement, perplexity over dense's, skip ratio, and the mean over layers and heads of the relative
    error and of the dropped attention mass.
    """
    frame = pd.DataFrame(_points(section.samples))
    return frame.sort_values([*CELL, "method", "calibration", "skip_ratio"], ignore_index=True)


def _points(samples: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for key, cell in samples.groupby([*METHOD, *CELL], sort=False, dropna=False):
        yield {
            **dict(zip([*METHOD, *CELL], key, strict=True)),
            **cell.iloc[0][SETTINGS].to_dict(),
            **divergence(cell),
            "agreement": cell["agreement"].mean(),
            "perplexity_over_dense": float(np.exp((cell["nll"] - cell["nll_dense"]).mean())),
            "skip_ratio": cell["skip_ratio"].mean(),
            "error": _mean(cell["error_by_head"]),
            "dropped_mass": _mean(cell["dropped_mass_by_head"]),
        }


def divergence(cell: pd.DataFrame) -> dict[str, Any]:
    """n, and the mean KL (nats a token) of a method's samples with its 95% interval."""
    low, high = bootstrap_interval(cell["kl"])
    return {"n": len(cell), "kl": float(cell["kl"].mean()), "kl_low": low, "kl_high": high}


def _mean(tables: pd.Series) -> float:
    """Over samples, layers and heads; NaN where a method gives none."""
    values = np.concatenate([np.asarray(table, dtype=float).ravel() for table in tables])
    return float(values.mean()) if values.size else float("nan")


def reach(rows: pd.DataFrame) -> pd.DataFrame:
    """The skip ratio that each method reaches at every cut of `CUTS`, one row a method and cell."""
    found = []
    for key, curve in rows[rows["method"] != "dense"].groupby([*CELL, "method", "calibration"], sort=False):
        found.append(
            dict(zip([*CELL, "method", "calibration"], key, strict=True))
            | {f"skip ratio at KL <= {cut}": skip_at(curve, cut) for cut in CUTS}
        )
    return pd.DataFrame(found)


def skip_at(curve: pd.DataFrame, cut: float) -> str:
    """Where a method's curve crosses a cut, in percent, between neighbouring strengths log-linear in KL.

    A curve that stays under the cut says ``>`` its largest skip ratio, one that stays above says ``<`` its smallest.
    """
    ordered = curve.sort_values("skip_ratio")
    skips, kls = ordered["skip_ratio"].to_numpy(), ordered["kl"].to_numpy()
    over = np.flatnonzero(kls > cut)
    if not len(over):
        return f"> {100 * skips[-1]:.0f}"
    first = int(over[0])
    if first == 0:
        return f"< {100 * skips[0]:.0f}"
    low, high = np.log(np.maximum(kls[first - 1 : first + 1], 1e-12))
    share = (np.log(cut) - low) / (high - low)
    return f"{100 * (skips[first - 1] + share * (skips[first] - skips[first - 1])):.0f}"


def by_head(section: Section, column: str) -> pd.DataFrame:
    """A column of tables by layer and head at one strength a method, the one whose KL is nearest to `TYPICAL`.

    Returns
    -------
    DataFrame with the columns of `METHOD`, kl, and the table: its mean over all texts, fp64 (layers, heads).
    """
    found = []
    samples = section.samples[section.samples["method"] != "dense"]
    for _, method in samples.groupby(["method", "calibration"]):
        kls = method.groupby("strength")["kl"].mean()
        strength = (np.log(kls.clip(lower=1e-12)) - np.log(TYPICAL)).abs().idxmin()
        cell = method[method["strength"] == strength]
        table = np.mean([np.asarray(one, dtype=float) for one in cell[column]], axis=0)
        found.append({**cell.iloc[0][METHOD].to_dict(), "kl": kls[strength], column: table})
    return pd.DataFrame(found, columns=[*METHOD, "kl", column])
