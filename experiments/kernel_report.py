"""Kernel speed: the table and the figure, from the records alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments import looks, style
from experiments.chapters import Chapter, Drawing, Table
from experiments.peak import MATMUL_DEVICE, MATMUL_TFLOPS
from experiments.records import read_runs

BEST = "best"  # what a run has that names no kernel
SHAPE = ("length", "head_size", "q_heads", "kv_heads", "pattern")
NOTE = (
    "Milliseconds: medians of turns that all kernels of a row took in one process, on inputs drawn anew for each row; "
    "speed-up: the best dense attention's time over this one's. A cell that two runs measured has two rows. Limit: "
    f"what the same row would gain with every product at {MATMUL_TFLOPS:g} TFLOP/s, which a large matrix product "
    f"reached on an {MATMUL_DEVICE}."
)

Run = tuple[dict[str, Any], list[dict[str, Any]]]


def chapters(root: Path, only: str | None = None) -> list[Chapter]:
    """One a device, dtype and kernel, of all its runs; or the one that a run with an id is in."""
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for config, samples in read_runs(root, "kernel"):
        asked = config["kernel"]
        groups.setdefault((config["device"], asked["dtype"], asked.get("kernel") or BEST), []).append((config, samples))
    return [
        _chapter(*key, runs)
        for key, runs in sorted(groups.items())
        if only is None or only in [config["run_id"] for config, _ in runs]
    ]


def _chapter(device: str, dtype: str, kernel: str, runs: list[Run]) -> Chapter:
    samples = [sample for _, several in runs for sample in several]
    rows = tabulate(samples)
    dense = ", ".join(sorted(set().union(*(sample["baseline_ms"] for sample in samples))))
    name = re.sub(r"[^a-z0-9]+", "-", f"kernel {device} {kernel} {dtype}".lower())
    title = f"Causal attention on {device}, {kernel} kernel, batch 1, {dtype}"
    facts = {
        "device": device,
        "kernel": "the best one for the device" if kernel == BEST else kernel,
        "dense attention": dense,
        "n": " + ".join(f"{len(cells)} cells of {config['kernel']['repeats']} turns" for config, cells in runs),
    }
    return Chapter(
        title,
        facts,
        [Table(name, "Every cell", rows, readable(rows), note(device))],
        [Drawing(name, "Speed-up over the best dense attention against blocks skipped", figure(rows, dense, title))],
    )


def note(device: str) -> str:
    """Under the table."""
    if MATMUL_DEVICE in device:
        return NOTE
    return f"{NOTE} It was not measured on {device}: take the limit for an NVIDIA Hopper's rate, not for a bound here."


def readable(rows: pd.DataFrame) -> pd.DataFrame:
    """A table for people."""
    numbers = {name: rows[name].map(lambda x: "" if pd.isna(x) else f"{x:.3g}") for name in rows.select_dtypes("float")}
    return rows.assign(**numbers)


def tabulate(samples: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a sample, by shape and skip ratio: times, the speed-up over the best dense one, and the limit of it."""
    rows = []
    for sample in samples:
        name, best = min(sample["baseline_ms"].items(), key=lambda item: item[1], default=("", float("nan")))
        flops = 2.0 * sample["length"] ** 2 * sample["q_heads"] * sample["head_size"]  # dense, causal, both products
        # Dense over (QK plus the kept share of PV), both at that rate.
        floor = flops * (1 - sample["skip_ratio"] / 2) / MATMUL_TFLOPS / 1e9
        rows.append(
            {
                **{key: sample[key] for key in SHAPE},
                "skip_ratio": sample["skip_ratio"],
                "bsfa_ms": sample["ms"],
                **{f"{other}_ms": time for other, time in sample["baseline_ms"].items()},
                "best_dense": name,
                "speedup_over_best_dense": best / sample["ms"],
                "limit": best / floor,
            }
        )
    return pd.DataFrame(rows).sort_values([*SHAPE, "skip_ratio"], kind="stable", ignore_index=True)


@style.house
def figure(table: pd.DataFrame, dense: str, title: str) -> Figure:
    """Speed-up over the best dense attention against skip ratio, a panel a head size and pattern."""
    panels = list(table.groupby(["head_size", "pattern"]))
    lengths = sorted(table["length"].unique())
    drawn, axes = style.panels(len(panels), 4.2, 3.4, sharey=True)
    for axis, ((size, pattern), panel) in zip(axes, panels, strict=True):
        for number, length in enumerate(lengths):
            curve, look = panel[panel["length"] == length], looks.numbered(number)
            skipped = 100 * curve["skip_ratio"]
            axis.plot(skipped, curve["speedup_over_best_dense"], label=f"{length / 1024:g}K tokens", **look)
            axis.plot(skipped, curve["limit"], color=look["color"], linestyle=":", linewidth=1)
        axis.axhline(1, label=f"dense: best of {dense}", **style.HOLD)
        axis.set(title=f"head size {size}, {pattern}", xlabel="blocks skipped, %")
    axes[0].plot([], [], label=f"limit: {MATMUL_TFLOPS:g} TFLOP/s, {MATMUL_DEVICE}", **style.CUT)
    return style.finish(drawn, title, "times the best dense attention")
