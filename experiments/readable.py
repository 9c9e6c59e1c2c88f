"""Rows of numbers as people read them: intervals in brackets, percentages, weak cells marked."""

from __future__ import annotations

import pandas as pd

HIDDEN = ("settings", "version")  # that a table's other columns tell apart


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A table for people: intervals in brackets, weak cells marked."""
    shown = scores(rows)
    shown["TTFT s [quartiles]"] = [
        f"{m:.3g} [{a:.3g}, {b:.3g}]"
        for m, a, b in zip(rows["ttft_median_s"], rows["ttft_q25_s"], rows["ttft_q75_s"], strict=True)
    ]
    for name in ("dense", "sdpa"):
        ratios = rows[f"speedup_over_{name}"]
        if ratios.notna().any():
            shown[f"TTFT, {name} / this"] = ["" if pd.isna(x) else f"{x:.2f}" for x in ratios]
    return shown


def scores(rows: pd.DataFrame) -> pd.DataFrame:
    """The same without times."""
    cells = [key for key in ("task", "haystack", "length") if key in rows]
    shown = rows[[*cells, "method", "strength", "calibration", "n"]].copy()
    weak = rows["weak_dense"].map({True: " †", False: ""})
    shown["accuracy % [95%]"] = [x + mark for x, mark in zip(_intervals(rows, "score", ".1f"), weak, strict=True)]
    shown["vs dense, points [95%]"] = _intervals(rows, "difference", "+.1f")
    shown["skip ratio %"] = rows["skip_ratio"].map(percent)
    return shown


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over tasks, for people; a run that lacks some of them says so."""
    shown = rows[["length", "method", "strength", "calibration", "n"]].copy()
    counts = zip(rows["scope"], rows["tasks"], rows["of_tasks"], strict=True)
    shown.insert(
        1, "tasks", [f"{scope} ({n})" if n == of else f"{scope} ({n} of {of} tasks)" for scope, n, of in counts]
    )
    shown["mean % [95%]"] = _intervals(rows, "score", ".1f")
    shown["vs dense, points [95%]"] = _intervals(rows, "difference", "+.1f")
    shown["% of dense [95%]"] = _intervals(rows, "of_dense", ".1f")
    shown["skip ratio %"] = rows["skip_ratio"].map(percent)
    shown["TTFT % of dense"] = rows["ttft_of_dense"].map(percent)
    return shown


def points(rows: pd.DataFrame) -> pd.DataFrame:
    """Points of accuracy against time, for people."""
    shown = rows[["source", "model", "device", "length", "method", "strength", "calibration"]].fillna("")
    shown["n"] = rows["n"].map(lambda n: "" if pd.isna(n) else f"{n:.0f}")
    shown["skip ratio %"] = rows["skip_ratio"].map(percent)
    shown["TTFT % of dense"] = rows["ttft_of_dense"].map(percent)
    shown["accuracy % of dense [95%]"] = _intervals(rows, "of_dense", ".1f")
    return shown


def beside(rows: pd.DataFrame) -> pd.DataFrame:
    """LongBench's means beside the paper's, for people."""
    shown = rows[["source", "model", "device", "protocol", "method", "strength", "calibration"]].copy()
    for name in ("length", "tasks", "n"):
        shown[name] = rows[name].map(lambda n: "" if pd.isna(n) else f"{n:.0f}")
    shown["mean score [95%]"] = [
        f"{100 * score:.2f}" + ("" if pd.isna(low) else f" [{100 * low:.1f}, {100 * high:.1f}]")
        for score, low, high in zip(rows["score"], rows["score_low"], rows["score_high"], strict=True)
    ]
    shown["skip ratio %"] = rows["skip_ratio"].map(percent)
    shown["TTFT, dense / this"] = rows["speedup"].map(lambda x: "" if pd.isna(x) else f"{x:.2f}")
    return shown


def divergences(rows: pd.DataFrame) -> pd.DataFrame:
    """Points of skip ratio against divergence, for people."""
    shown = rows.drop(columns=[name for name in rows if name in HIDDEN or str(name).startswith("needles")]).round(4)
    if "needles" in rows:
        asked = zip(_intervals(rows, "needles", ".1f"), rows["needles_n"], rows["needles_dtype"], strict=True)
        shown["needles % [95%]"] = [f"{found}, n = {n:.0f}, {dtype}" if found else "" for found, n, dtype in asked]
    return shown


def percent(share: float) -> str:
    return "" if pd.isna(share) else f"{100 * share:.1f}"


def _intervals(rows: pd.DataFrame, name: str, form: str) -> list[str]:
    """Percentages with their intervals, where there are any."""
    whole = form.replace(".1f", ".0f")
    columns = (100 * rows[name], 100 * rows[f"{name}_low"], 100 * rows[f"{name}_high"])
    return [
        "" if pd.isna(x) else f"{x:{form}}" + ("" if pd.isna(low) else f" [{low:{whole}}, {high:{whole}}]")
        for x, low, high in zip(*columns, strict=True)
    ]
