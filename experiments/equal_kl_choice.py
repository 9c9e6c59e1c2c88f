"""The rule of `experiment=equal_kl`: which strength of a method is timed, by what the store knows of its divergence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from experiments.frontier import CELL, divergence
from experiments.methods import Variant
from experiments.records import Run, read_samples
from experiments.results import calibrated_on

FAMILY = "family"  # column: a method with all its settings but the strength, calibration among them


def points(runs: Sequence[tuple[Variant, Run]]) -> pd.DataFrame:
    """One row a variant and cell of finished runs of `experiment=fidelity`.

    Returns
    -------
    DataFrame with source, length, family, label, method, strength, calibration, run (its id), n, kl with its 95%
    interval (nats a token) and skip ratio.
    """
    return pd.DataFrame(_points(runs))


def _points(runs: Sequence[tuple[Variant, Run]]) -> Iterator[dict[str, Any]]:
    for variant, run in runs:
        identity = variant.identity()
        settings = {key: value for key, value in identity["parameters"].items() if key != variant.config.knob}
        for key, cell in pd.DataFrame(read_samples(run.path / "samples.jsonl")).groupby(CELL, sort=False):
            yield {
                **dict(zip(CELL, key, strict=True)),
                FAMILY: json.dumps([variant.name, settings, identity["calibration"]], sort_keys=True),
                "label": variant.label,
                "method": variant.name,
                "strength": variant.strength,
                "calibration": calibrated_on(identity["calibration"], run.config["task"]["lengths"]),
                "run": run.id,
                **divergence(cell),
                "skip_ratio": float(cell["skip_ratio"].mean()),
            }


def choose(rows: pd.DataFrame, bounds: Sequence[float]) -> pd.DataFrame:
    """One row a cell, bound and family: of the strengths whose mean KL is at most the bound, the one that skips most.

    Of several that skip as much it is the one of least KL, and of those the first. A KL that is not a number is within
    no bound.

    Parameters
    ----------
    rows : DataFrame
        As `points` gives them.
    bounds : sequence of float
        Nats a token.

    Returns
    -------
    The chosen rows, with ``bound``; with ``within``, False where a family has no strength within the bound: then the
    row is the nearest one, of least KL, and nothing is to be timed; and with ``strongest``, True where the family was
    tried no further, so that it might skip more at this bound.
    """
    chosen = []
    for _, cell in rows.groupby(CELL, sort=False):
        for bound in bounds:
            for _, family in cell.groupby(FAMILY, sort=False):
                within = family[family["kl"] <= bound]
                best = _most(within) if len(within) else _nearest(family)
                more = family["skip_ratio"] > best["skip_ratio"]
                chosen.append(best.to_dict() | {"bound": bound, "within": len(within) > 0, "strongest": not more.any()})
    return pd.DataFrame(chosen).drop(columns=FAMILY)


def _most(family: pd.DataFrame) -> pd.Series:
    return family.sort_values(["skip_ratio", "kl"], ascending=[False, True], kind="stable").iloc[0]


def _nearest(family: pd.DataFrame) -> pd.Series:
    return family.sort_values("kl", kind="stable").iloc[0]  # what is not a number comes last
