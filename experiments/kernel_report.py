"""Kernel speed: the table and the figure, from the records alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments import looks, style
from experiments.anchors import MATMUL_DEVICE, MATMUL_TFLOPS
from experiments.chapters import Chapter, Drawing, Table
from experiments.records import read_runs

OUT_OF_MEMORY = "out of memory"  # in what an allocator says
BEST = "best"  # what a run has that names no kernel
SHAPE = ("length", "head_size", "q_heads", "kv_heads", "pattern")
NOTE = (
    "Milliseconds: medians of turns that all kernels of a row took in one process, on inputs drawn anew for each row; "
    "speed-up: the best dense attention's time over this one's. A cell that two runs measured has two rows. Screen: "
    "the same gate behind a screen by 8-bit scores, at a share of its bound, and how many of the blocks that the gate "
    "alone keeps are lost by it. Limit, without a screen: "
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
    samples = [with_failures(sample, config["kernel"]) for config, several in runs for sample in several]
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
        [Table(name, "Every cell", rows, readable(rows), below(device, rows, samples))],
        [Drawing(name, "Speed-up over the best dense attention against blocks skipped", figure(rows, dense, title))],
    )


def below(device: str, rows: pd.DataFrame, samples: list[dict[str, Any]]) -> str:
    """Under the table."""
    elsewhere = (
        f" It was not measured on {device}: take the limit for an NVIDIA Hopper's rate, not for a bound here."
        if MATMUL_DEVICE not in device
        else ""
    )
    of = rows["best_dense_of"].unique()
    best = f"Best dense: of {of[0] or 'none'} in every row." if len(of) == 1 else "Best dense: of those that ran."
    return "\n\n".join([NOTE + elsewhere, best, *not_run(samples)])


def with_failures(sample: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """A sample that names the baselines asked for that did not run; older records say neither which nor why."""
    silent = [name for name in asked.get("baselines", ()) if name not in sample["baseline_ms"]]
    return {"baselines_failed": dict.fromkeys(silent, "the record does not say why")} | sample


def not_run(samples: list[dict[str, Any]]) -> list[str]:
    """A line a baseline and reason: where it did not run, so that the best dense one is of the others; one why there
    is no screen."""
    cells: dict[tuple[str, str], dict[str, None]] = {}
    for sample in samples:
        for name, reason in sample["baselines_failed"].items():
            cells.setdefault((name, reason), {})[f"{sample['length']:,} tokens, head size {sample['head_size']}"] = None
    screens = {sample["no_screen"]: None for sample in samples if sample.get("no_screen")}
    return [
        *(f"{name} did not run at {'; '.join(places)}: {reason}" for (name, reason), places in cells.items()),
        *(f"No screen: {reason}" for reason in screens),
    ]


def readable(rows: pd.DataFrame) -> pd.DataFrame:
    """A table for people. Which baselines the best one is of is said where rows differ in it; the facts name them."""
    shown = rows.assign(
        **{name: rows[name].map(lambda x: "" if pd.isna(x) else f"{x:.3g}") for name in rows.select_dtypes("float")}
    )
    for name in rows.filter(regex="_failed$"):
        why = shown.pop(name).dropna().map(lambda reason: OUT_OF_MEMORY if OUT_OF_MEMORY in reason else "not run")
        time = name.replace("_failed", "_ms")
        shown[time] = shown[time].mask(shown.index.isin(why.index), why)
    return shown if rows["best_dense_of"].nunique() > 1 else shown.drop(columns="best_dense_of")


def tabulate(samples: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a sample, by shape and skip ratio: times, the speed-up over the best dense one and of which it is the
    best, and the limit of the speed-up; ``NAME_failed``: why a baseline has no time."""
    rows = []
    for sample in samples:
        times, failed = sample["baseline_ms"], sample.get("baselines_failed", {})
        name, best = min(times.items(), key=lambda item: item[1], default=("", float("nan")))
        flops = 2.0 * sample["length"] ** 2 * sample["q_heads"] * sample["head_size"]  # dense, causal, both products
        # Dense over (QK plus the kept share of PV), both at that rate.
        floor = flops * (1 - sample["skip_ratio"] / 2) / MATMUL_TFLOPS / 1e9
        rows.append(
            {
                **{key: sample[key] for key in SHAPE},
                "skip_ratio": sample["skip_ratio"],
                "bsfa_ms": sample["ms"],
                **{f"{other}_ms": times.get(other, float("nan")) for other in (*times, *failed)},
                **{f"{other}_failed": reason for other, reason in failed.items()},
                "best_dense": name,
                "best_dense_of": ", ".join(times),
                "speedup_over_best_dense": best / sample["ms"],
                **_screened(sample, best),
                "limit": best / floor,
            }
        )
    return pd.DataFrame(rows).sort_values([*SHAPE, "skip_ratio"], kind="stable", ignore_index=True)


def _screened(sample: dict[str, Any], best: float) -> dict[str, float]:
    """Columns of each screen: milliseconds, speed-up over the best dense attention, kept blocks lost."""
    columns: dict[str, float] = {}
    for name, screen in sample.get("screened", {}).items():
        of = name.replace(" ", "_")
        columns |= {f"{of}_ms": screen["ms"], f"{of}_speedup": best / screen["ms"], f"{of}_lost": screen["lost"]}
    return columns


@style.house
def figure(table: pd.DataFrame, dense: str, title: str) -> Figure:
    """Speed-up over the best dense attention against skip ratio, a panel a head size and pattern."""
    panels = list(table.groupby(["head_size", "pattern"]))
    some = ", of those that ran" if table["best_dense_of"].nunique() > 1 else ""
    lengths = sorted(table["length"].unique())
    screened = list(table.filter(regex="^screen_.*_speedup$").columns[:1])
    drawn, axes = style.panels(len(panels), 4.2, 3.4, sharey=True)
    for axis, ((size, pattern), panel) in zip(axes, panels, strict=True):
        for number, length in enumerate(lengths):
            curve, look = panel[panel["length"] == length], looks.numbered(number)
            skipped = 100 * curve["skip_ratio"]
            axis.plot(skipped, curve["speedup_over_best_dense"], label=f"{length / 1024:g}K tokens", **look)
            axis.plot(skipped, curve["limit"], color=look["color"], linestyle=":", linewidth=1)
            for column in screened:
                axis.plot(skipped, curve[column], color=look["color"], linestyle="--", linewidth=1.2)
        axis.axhline(1, label=f"dense: best of {dense}{some}", **style.HOLD)
        axis.set(title=f"head size {size}, {pattern}", xlabel="blocks skipped, %")
    for column in screened:
        share = column.split("_")[1]
        axes[0].plot([], [], label=f"behind a screen, {share} of its bound", **style.HOLD | {"linestyle": "--"})
    axes[0].plot([], [], label=f"limit: {MATMUL_TFLOPS:g} TFLOP/s, {MATMUL_DEVICE}", **style.CUT)
    return style.finish(drawn, title, "times the best dense attention")
