"""The paper's own numbers, to set beside ours: paper.yaml as a table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import yaml

FILE = Path(__file__).with_name("paper.yaml")


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
