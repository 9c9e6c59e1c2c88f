"""What the records of `experiment=longbench` and `experiment=lm_eval` say of a method."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from experiments import results, suites
from experiments.results import METHOD, SKIP_NOTHING, Section, table
from experiments.tasks.longbench_tasks import TASKS

PAPER = Path(__file__).with_name("paper_longbench.yaml")
SIZES = ("tasks", "lengths", "samples", "data")  # a sample's id says which text it is of
LM_EVAL_SIZES = ("tasks", "lengths", "limit", "data")
WEAK = 0.1  # a dense score under this leaves nothing to lose


def sections(root: Path, experiment: str, only: str | None = None) -> list[Section]:
    """One section a model and protocol, the tasks' runs together; or the one of a run."""
    return results.sections(root, experiment, SIZES, only)


def lm_eval_sections(root: Path, experiment: str, only: str | None = None) -> list[Section]:
    """One section a model and way of asking, or the one of a run."""
    return [
        dataclasses.replace(
            one, title=f"lm-eval's tasks ({one.samples['protocol'].iloc[0]}), {one.model}, {one.device}"
        )
        for one in results.sections(root, experiment, LM_EVAL_SIZES, only)
    ]


def cells(section: Section) -> pd.DataFrame:
    """One row a task, length and method; see `results.table`."""
    return table(section, ["task", "length"], WEAK)


def lm_eval_cells(section: Section) -> pd.DataFrame:
    """The same without times to the first token, which lm-eval's loop does not give."""
    samples = section.samples.assign(ttft_s=np.nan, length=section.samples["length"].fillna(0).astype(int))
    rows = table(dataclasses.replace(section, samples=samples), ["task", "length"], WEAK)
    return rows.drop(columns=[name for name in rows if name.startswith(("ttft", "speedup"))])


def means(section: Section) -> pd.DataFrame:
    """One row a length and method: means over the tasks that ran, each with equal weight; see `suites.means`."""
    rows = suites.means(section)
    return rows[rows["scope"] == "all"].drop(columns="scope").reset_index(drop=True)


def trade(rows: pd.DataFrame) -> pd.DataFrame:
    """What is paid in score for what is skipped, a row a sparse method, strength and length, from `means`."""
    return rows[~rows["method"].isin(SKIP_NOTHING)].reset_index(drop=True)


def not_run(section: Section) -> list[str]:
    """LongBench's English and code tasks without a record."""
    ran = set(section.samples["task"])
    return [task for task in TASKS if task not in ran]


def beside_the_paper(section: Section, rows: pd.DataFrame) -> pd.DataFrame:
    """Our means and the paper's, each with its model, device, protocol and number of tasks.

    Parameters
    ----------
    rows : DataFrame
        Of `means`.

    Returns
    -------
    DataFrame with source, model, device, protocol, tasks, n, length, the columns of `METHOD`, score (0 to 1) and its
    interval, skip_ratio and speedup (dense TTFT over this one's).
    """
    ours = rows.assign(
        source="these records",
        model=section.model,
        device=section.device,
        protocol=section.samples["protocol"].iloc[0],
        speedup=1 / rows["ttft_of_dense"],
    )
    theirs = _paper().assign(protocol="", calibration="")
    columns = ["source", "model", "device", "protocol", "tasks", "n", "length", *METHOD]
    joined = pd.concat([ours, theirs], ignore_index=True)
    return joined.reindex(columns=[*columns, "score", "score_low", "score_high", "skip_ratio", "speedup"])


def paper_points() -> pd.DataFrame:
    """The paper's sparse methods as `paper.curves` has other tasks': of one length, which its table does not say."""
    rows = _paper()
    dense = rows.loc[rows["method"] == "dense", "score"].item()
    sparse = rows[rows["method"] != "dense"]
    return sparse.assign(length=np.nan, ttft_of_dense=1 / sparse["speedup"], of_dense=sparse["score"] / dense)


def _paper() -> pd.DataFrame:
    """The paper's table, scores from 0 to 1."""
    data = yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    rows = pd.DataFrame(data["rows"]).assign(source=data["source"], model=data["model"], device=data["device"])
    return rows.assign(score=rows["score"] / 100)
