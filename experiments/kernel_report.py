"""Kernel speed: the table and the figure, from the records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments import style
from experiments.chapters import Chapter, Drawing, Table
from experiments.records import read_runs

# Dense over (QK plus the kept share of PV), both at a rate that a large matrix product reached on an NVIDIA H200.
MATMUL_TFLOPS = 778.0
SHAPE = ("length", "head_size", "q_heads", "kv_heads", "pattern")
NOTE = (
    "Milliseconds: medians of turns that all kernels of a row took in one process, on inputs drawn anew for each row; "
    "speed-up: the best dense attention's time over this one's. Limit: what the same row would gain with every product "
    f"at {MATMUL_TFLOPS:g} TFLOP/s, which a large matrix product reached on an NVIDIA H200."
)


def chapters(root: Path, only: str | None = None) -> list[Chapter]:
    """Every run, or the one with an id."""
    return [
        _chapter(config, samples) for config, samples in read_runs(root, "kernel") if only in (None, config["run_id"])
    ]


def _chapter(config: dict[str, Any], samples: list[dict[str, Any]]) -> Chapter:
    rows, device, name = tabulate(samples), config["device"], f"kernel-{config['run_id'][:6]}"
    title = f"Causal attention on {device}, batch 1, {config['kernel']['dtype']}"
    facts = {
        "device": device,
        "kernel": config["kernel"].get("kernel") or "the best one for the device",
        "dense attention": ", ".join(sorted(set().union(*(sample["baseline_ms"] for sample in samples)))),
        "n": f"{len(rows)} cells, {config['kernel']['repeats']} turns each",
    }
    return Chapter(
        title,
        facts,
        [Table(name, "Every cell", rows, readable(rows), NOTE)],
        [Drawing(name, "Speed-up over the best dense attention against blocks skipped", figure(rows, device))],
    )


def readable(rows: pd.DataFrame) -> pd.DataFrame:
    """A table for people."""
    numbers = {name: rows[name].map(lambda x: "" if pd.isna(x) else f"{x:.3g}") for name in rows.select_dtypes("float")}
    return rows.assign(**numbers)


def tabulate(samples: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a sample: times, and the speed-up over the best dense baseline of the same cell and the limit of it."""
    rows = []
    for sample in samples:
        name, best = min(sample["baseline_ms"].items(), key=lambda item: item[1], default=("", float("nan")))
        flops = 2.0 * sample["length"] ** 2 * sample["q_heads"] * sample["head_size"]  # dense, causal, both products
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
    return pd.DataFrame(rows)


@style.house
def figure(table: pd.DataFrame, device: str) -> Figure:
    """Speed-up over the best dense attention against skip ratio, a panel a head size and pattern."""
    panels = list(table.groupby(["head_size", "pattern"]))
    drawn, axes = style.subplots(1, len(panels), 3.4, 3.0, sharey=True)
    for axis, ((size, pattern), panel) in zip(axes[0], panels, strict=True):
        for number, (length, curve) in enumerate(panel.groupby("length")):
            label = f"{length / 1024:g}K"
            axis.plot(100 * curve["skip_ratio"], curve["speedup_over_best_dense"], label=label, **style.look(number))
        longest = panel[panel["length"] == panel["length"].max()]
        axis.plot(100 * longest["skip_ratio"], longest["limit"], ":", color=style.PASS_LINE, label="limit, longest")
        axis.axhline(1, color=style.PASS_LINE, linewidth=1)
        axis.set(title=f"head size {size}, {pattern}", xlabel="blocks skipped, %")
    axes[0][0].set_ylabel("times the best dense attention")
    axes[0][0].legend()
    drawn.suptitle(f"{device}; limit: every product at {MATMUL_TFLOPS:g} TFLOP/s", fontsize=8)
    return drawn
