"""What the records of a suite, `experiment=ruler` or `experiment=reasoning`, say of a method."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments import paper, results
from experiments.results import METHOD, SKIP_NOTHING, Section, ordered, paired, speedup, table
from experiments.statistics import stratified_interval

SIZES = ("tasks", "lengths", "samples")  # a sample of a suite is the same whatever these are
WEAK = 0.5  # a task where dense scores under this says nothing of a method
SCOPES = ("all", "able")  # over which tasks a mean is taken


def sections(root: Path, experiment: str, only: str | None = None) -> list[Section]:
    """The sections of a suite, or the one of a run: runs of different sizes are one."""
    return results.sections(root, experiment, SIZES, only)


def cells(section: Section) -> pd.DataFrame:
    """One row a method, length and task; see `results.table`."""
    return table(section, ["length", "task"], WEAK)


def means(section: Section) -> pd.DataFrame:
    """One row a length, scope and method: means over tasks, each task with equal weight.

    The scope ``all`` is every task that ran, RULER's mean; ``able`` leaves out those where dense scores under `WEAK` at
    that length.

    Returns
    -------
    DataFrame with tasks (how many), of_tasks (how many of the scope any method ran), n (answers), score, difference (to
    dense, on the same samples) and of_dense (score over dense's), each with a 95% bootstrap interval within tasks,
    skip_ratio, and ttft_of_dense (median of ratios within one process).
    """
    frame = pd.DataFrame(_means(section.samples))
    frame["scope"] = pd.Categorical(frame["scope"], SCOPES)
    return ordered(frame, ["length", "scope"])


def _means(samples: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for length, same in samples.groupby("length"):
        dense = same[same["method"] == "dense"]
        known = dense.drop_duplicates("id").groupby("task")["score"].mean()
        for scope, tasks in zip(SCOPES, (set(same["task"]), set(known.index[known >= WEAK])), strict=True):
            for key, cell in same[same["task"].isin(tasks)].groupby(METHOD, sort=False, dropna=False):
                names = {"length": length, "scope": scope, **dict(zip(METHOD, key, strict=True))}
                yield names | {"of_tasks": len(tasks), **_mean(cell, dense)}


def _mean(cell: pd.DataFrame, dense: pd.DataFrame) -> dict[str, Any]:
    answers, both = cell.drop_duplicates("id"), paired(cell, dense)
    by_task = answers.groupby("task")
    faster = speedup(cell, dense)
    return {
        "tasks": by_task.ngroups,
        "n": len(answers),
        **_with_interval("score", answers, lambda means: means[:, 0]),
        **_with_interval("difference", both, lambda means: means[:, 0] - means[:, 1]),
        **_with_interval("of_dense", both, _ratio),
        "skip_ratio": by_task["skip_ratio"].mean().mean(),
        "ttft_of_dense": 1 / faster if faster else np.nan,
    }


def _with_interval(name: str, answers: pd.DataFrame, statistic) -> dict[str, float]:
    """A statistic of the tasks' mean (score, dense score), with its interval; NaN where there is no answer."""
    if answers.empty:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), np.nan)
    columns = answers.reindex(columns=["score", "dense_score"])
    strata = [columns.loc[task.index].to_numpy(float) for _, task in answers.groupby("task")]
    mean = np.mean([stratum.mean(0) for stratum in strata], axis=0, keepdims=True)
    low, high = stratified_interval(strata, statistic)
    return {name: float(statistic(mean)[0]), f"{name}_low": low, f"{name}_high": high}


def _ratio(means: np.ndarray) -> np.ndarray:
    return np.divide(means[:, 0], means[:, 1], out=np.full(len(means), np.nan), where=means[:, 1] > 0)


def scores(section: Section) -> pd.DataFrame:
    """One row a length and method, one column a task: mean scores."""
    wide = cells(section).pivot_table(index=["length", *METHOD], columns="task", values="score", sort=False)
    tasks = list(dict.fromkeys(section.samples["task"]))
    return ordered(wide[tasks].reset_index(), ["length"])


def trade(rows: pd.DataFrame) -> pd.DataFrame:
    """What is paid in accuracy for what is skipped, a row a sparse method, strength and length, from `means`.

    Over the tasks that dense is able to do, or over all where it is able to do none or did not run.
    """
    rows = rows[~rows["method"].isin(SKIP_NOTHING)]
    able = set(rows.loc[rows["scope"] == "able", "length"])
    return rows[(rows["scope"] == "able") | ~rows["length"].isin(able)].reset_index(drop=True)


def beside_the_paper(section: Section, points: pd.DataFrame) -> pd.DataFrame:
    """Our points of accuracy against time, and the paper's of the same task, each with its model and device.

    Parameters
    ----------
    points : DataFrame
        Of `trade`.
    """
    columns = ["source", "model", "device", "length", "method", "strength", "calibration", "n"]
    ours = points.assign(source="these records", model=section.model, device=section.device)
    theirs = paper.curves(section.task)
    return pd.concat([ours, theirs], ignore_index=True).reindex(
        columns=[*columns, "skip_ratio", "ttft_of_dense", "of_dense", "of_dense_low", "of_dense_high"]
    )
