"""The records of a store as data frames, and what a table says of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.records import read_runs
from experiments.statistics import mean_interval, paired_interval, quartiles

GOOD_ENOUGH = 0.9  # a dense score under this leaves too little to lose; such cells are marked
METHOD = ["method", "strength", "calibration"]
SKIP_NOTHING = ("dense", "sdpa")  # methods that others are held against


@dataclass(frozen=True)
class Section:
    """The runs that may be compared: one task, one model, one backend.

    Attributes
    ----------
    title : str
        Task, model, dtype and device, for captions.
    name : str
        For file names.
    samples : DataFrame
        One row a sample, with the columns of `METHOD`.
    task, model, device : str
        Their names.
    chunk : int or None
        Tokens of a prompt's chunks; None: prompts are read whole.
    origin : dict
        What tells the model from others, its dtype too.
    """

    title: str
    name: str
    samples: pd.DataFrame
    task: str
    model: str
    device: str
    chunk: int | None
    origin: dict[str, Any]


def sections(root: Path, experiment: str, sizes: Collection[str] = (), only: str | None = None) -> list[Section]:
    """The sections of an experiment, in a fixed order. Where a run was made by several versions, the newest counts.

    Parameters
    ----------
    sizes : collection of str
        Settings of the task that say which of its samples a run has and change none of them: runs that differ in these
        alone are of one section.
    only : str, optional
        A run's id: the section that it is in.
    """
    groups: dict[str, list[tuple[dict[str, Any], list[dict[str, Any]]]]] = {}
    for config, samples in read_runs(root, experiment):
        shared: dict[str, Any] = {key: config[key] for key in ("model", "backend", "prefill") if key in config}
        shared["task"] = {key: value for key, value in config["task"].items() if key not in sizes}
        groups.setdefault(json.dumps(shared, sort_keys=True), []).append((config, samples))
    return [
        _section(hashlib.sha256(key.encode()).hexdigest()[:6], runs)
        for key, runs in sorted(groups.items())
        if only is None or only in [config["run_id"] for config, _ in runs]
    ]


def _section(digest: str, runs: list[tuple[dict[str, Any], list[dict[str, Any]]]]) -> Section:
    frames = []
    judged = {length for config, _ in runs for length in config["task"]["lengths"]}
    for config, samples in runs:
        method = config["method"]
        same = {key: value for key, value in method["calibration"].items() if key != "id"}  # in any dtype
        settings = json.dumps([method["parameters"], same], sort_keys=True)
        frame = pd.DataFrame(samples).assign(
            method=method["name"],
            strength=method["strength"],
            calibration=calibrated_on(method["calibration"], judged),
            settings=hashlib.sha256(settings.encode()).hexdigest()[:6],
            version=method["version"],
        )
        frames.append(frame)
    joined = pd.concat(frames, ignore_index=True)
    newest = joined.groupby([*METHOD, "settings"])["version"].transform("max")
    joined = joined[joined["version"] == newest]
    alike = joined.groupby(METHOD)["settings"].transform("nunique") > 1
    joined.loc[alike, "calibration"] = (joined["calibration"] + " #" + joined["settings"]).str.strip()
    model, task = runs[0][0]["model"], runs[0][0]["task"]
    devices = ", ".join(sorted(joined["device"].unique()))
    lengths = ", ".join(map(str, sorted(judged)))
    protocol = f" (protocol {task['protocol']})" if "protocol" in task else ""
    chunks = f" in chunks of {runs[0][0]['prefill']['chunk']}" if "prefill" in runs[0][0] else ""
    title = f"{task['name']}{protocol} at {lengths} tokens{chunks}, {model['name']}, {model['dtype']}, {devices}"
    name = f"{task['name']}-{model['name']}-{digest}"
    chunk = runs[0][0].get("prefill", {}).get("chunk")
    return Section(title, name, joined, task["name"], model["name"], devices, chunk, model)


def calibrated_on(calibration: dict[str, Any], lengths: Collection[int]) -> str:
    """What a table says of a calibration: its texts, and their tokens where those are not the longest judged."""
    data, tokens = calibration.get("data", ""), calibration.get("length")
    return data if tokens in (None, max(lengths, default=tokens)) else f"{data}, {tokens} tokens"


def table(section: Section, by: list[str], weak: float = GOOD_ENOUGH) -> pd.DataFrame:
    """One row a method and cell.

    Parameters
    ----------
    by : list of str
        Columns of a sample that make a cell, such as haystack and length.
    weak : float
        The dense score under which a cell is marked.

    Returns
    -------
    DataFrame with n, score and its 95% interval, the paired difference to dense with its interval, skip ratio, TTFT
    quartiles in seconds, TTFT speed-up over each dense baseline in the same process, and ``weak_dense``.
    """
    frame = pd.DataFrame(_rows(section.samples, by, weak))
    return ordered(frame, by)


def ordered(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Rows by cell, the baselines first, then by method, calibration and strength."""
    place = frame[[*by, "method", "calibration", "strength"]].assign(
        method=frame["method"].map(lambda name: (name not in SKIP_NOTHING, name)),
        strength=frame["strength"].map(_number),
    )
    return frame.loc[place.sort_values(list(place.columns)).index].reset_index(drop=True)


def _rows(samples: pd.DataFrame, by: list[str], weak: float) -> Iterator[dict[str, Any]]:
    baselines = {name: samples[samples["method"] == name] for name in SKIP_NOTHING}
    for key, cell in samples.groupby([*METHOD, *by], sort=False, dropna=False):
        answers = cell.drop_duplicates("id")  # runs of one section may share samples
        low, high = mean_interval(answers["score"])
        q25, median, q75 = quartiles(cell["ttft_s"])
        yield {
            **dict(zip([*METHOD, *by], key, strict=True)),
            "n": len(answers),
            "score": answers["score"].mean(),
            "score_low": low,
            "score_high": high,
            **_against_dense(answers, baselines["dense"], weak),
            "skip_ratio": answers["skip_ratio"].mean(),
            "ttft_q25_s": q25,
            "ttft_median_s": median,
            "ttft_q75_s": q75,
            **{f"speedup_over_{name}": speedup(cell, base) for name, base in baselines.items()},
        }


def paired(cell: pd.DataFrame, dense: pd.DataFrame) -> pd.DataFrame:
    """The answers that dense attention gave too, each once, with its score as ``dense_score``."""
    theirs = dense.drop_duplicates("id").set_index("id")["score"].rename("dense_score")
    return cell.drop_duplicates("id").join(theirs, on="id", how="inner")


def _against_dense(cell: pd.DataFrame, dense: pd.DataFrame, weak: float) -> dict[str, Any]:
    both = paired(cell, dense)
    if both.empty:
        nothing = dict.fromkeys(("dense_score", "difference", "difference_low", "difference_high"), np.nan)
        return nothing | {"weak_dense": False}
    low, high = paired_interval(both["score"], both["dense_score"])
    return {
        "dense_score": both["dense_score"].mean(),
        "difference": both["score"].mean() - both["dense_score"].mean(),
        "difference_low": low,
        "difference_high": high,
        "weak_dense": bool(both["dense_score"].mean() < weak),
    }


def speedup(cell: pd.DataFrame, base: pd.DataFrame) -> float | None:
    """Median ratio of the baseline's TTFT to the method's, over samples that one process ran through both."""
    both = cell.merge(base, on=["id", "process"], suffixes=("", "_base"))
    return float((both["ttft_s_base"] / both["ttft_s"]).median()) if len(both) else None


def _number(strength: str) -> float:
    """The value in ``k=8``."""
    return float(strength.split("=")[1]) if strength else 0.0
