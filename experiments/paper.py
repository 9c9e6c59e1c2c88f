"""The paper's own numbers, to set beside ours: paper.yaml as a table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import yaml

FILE = Path(__file__).with_name("paper.yaml")
METHOD = "bsfa"
HOLDS = 0.99  # of dense accuracy


def curves(task: str) -> pd.DataFrame:
    """The paper's points for a task, none where it has none.

    Returns
    -------
    DataFrame with method, length (tokens), ttft_of_dense and of_dense (both shares of dense attention's), model, device
    and source.
    """
    data = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    columns = ["method", "length", "ttft_of_dense", "of_dense"]
    points = [
        (curve["method"], curve["length"], ttft / 100, accuracy / 100)
        for curve in data["curves"]
        if curve["task"] == task
        for ttft, accuracy in curve["points"]
    ]
    return pd.DataFrame(points, columns=columns).assign(
        model=data["model"], device=data["device"], source=data["source"]
    )


def headline(task: str) -> str:
    """The paper's fastest point for a task that holds dense accuracy, and where it comes from."""
    points = curves(task)
    able = points[(points["method"] == METHOD) & (points["of_dense"] >= HOLDS)]
    best = able.loc[able["ttft_of_dense"].idxmin()]
    ttft, accuracy = best["ttft_of_dense"], best["of_dense"]
    return (
        f"The paper's {METHOD}, {best['model']} on an {best['device']}, {task} at {best['length'] // 1024}K: TTFT "
        f"{100 * ttft:.1f}% of dense ({1 / ttft:.2f}x) at {100 * accuracy:.1f}% of dense accuracy (arXiv 2512.07011). "
        "That model and that GPU were not run here."
    )
