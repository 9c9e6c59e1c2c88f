"""Time to the first token: the table and the figure, from the records alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments import looks, style
from experiments.chapters import Chapter, Drawing, Table
from experiments.records import read_runs
from experiments.results import SKIP_NOTHING

GIB = 2**30
NOTE = (
    "TTFT: from the prompt to the choice of the first token, median [quartiles] of turns that all methods of a length "
    "took in one process. A ratio is that method's TTFT over this row's, in one process. Attention: its share of TTFT, "
    "selection included. Memory: the allocator's peak / what the driver then had in use."
)


def chapters(root: Path, only: str | None = None) -> list[Chapter]:
    """Every run, or the one with an id."""
    return [
        _chapter(config, samples, root / "ttft" / config["run_id"] / "summary.json")
        for config, samples in read_runs(root, "ttft")
        if only in (None, config["run_id"])
    ]


def _chapter(config: dict[str, Any], samples: list[dict[str, Any]], summary: Path) -> Chapter:
    rows, title = tabulate(samples), _title(config)
    name = f"ttft-{config['model']['name']}-{config['run_id'][:6]}"
    facts = {
        "model": f"{config['model']['name']}, {config['model']['dtype']}",
        "device": config["device"],
        "prompt": ", ".join(rows["prompt"].unique()),
        "n": f"{len(rows)} cells, {config['ttft']['repeats']} turns each",
    }
    drawings = []
    if rows["ttft_s"].notna().any():
        drawings.append(Drawing(name, "TTFT, and the gain over the best dense method", figure(rows, title)))
    return Chapter(
        title,
        facts,
        [Table(name, "Every length and method", rows, readable(rows), _notes(rows, left_out(summary)))],
        drawings,
    )


def tabulate(samples: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a sample, with its TTFT as a ratio to every dense method's at the same length in the same process."""
    rows = []
    for sample in samples:
        rivals = {
            other["method"]: other["ttft_s"]
            for other in samples
            if (other["length"], other["process"]) == (sample["length"], sample["process"])
            and _is_dense(other["method"])
            and "ttft_s" in other
        }
        seconds = sample.get("ttft_s")
        rows.append(
            {
                "length": sample["length"],
                "method": sample["method"],
                "prompt": sample["prompt"],
                **{key: sample.get(key) for key in ("skip_ratio", "ttft_s", "ttft_q25_s", "ttft_q75_s")},
                **{key: sample.get(key) for key in ("attention_s", "attention_share")},
                "turns": len(sample.get("turns_s", [])),
                **{key: sample.get(key) for key in ("peak_memory_bytes", "driver_memory_bytes", "out_of_memory")},
                **{f"times_{name}": time / seconds for name, time in rivals.items() if seconds},
            }
        )
    return pd.DataFrame(rows)


def _is_dense(method: str) -> bool:
    return method in SKIP_NOTHING or method.startswith("upstream_")


def readable(rows: pd.DataFrame) -> pd.DataFrame:
    """A table for people."""
    return pd.DataFrame(_shown(row) for _, row in rows.iterrows()).fillna("")


def _shown(row: pd.Series) -> dict[str, str]:
    cell = {"tokens": f"{row['length']:,}", "method": row["method"]}
    if pd.isna(row["ttft_s"]):
        return cell | {"TTFT s [quartiles]": "out of memory"}
    driver = "" if pd.isna(row["driver_memory_bytes"]) else f" / {row['driver_memory_bytes'] / GIB:.1f}"
    ratios = {key: value for key, value in row.items() if str(key).startswith("times_") and not pd.isna(value)}
    return (
        cell
        | {"skip ratio %": f"{100 * row['skip_ratio']:.1f}"}
        | {"TTFT s [quartiles]": f"{row['ttft_s']:.4g} [{row['ttft_q25_s']:.4g}, {row['ttft_q75_s']:.4g}]"}
        | {"attention %": f"{100 * row['attention_share']:.0f}"}
        | {"memory GiB": f"{row['peak_memory_bytes'] / GIB:.1f}{driver}"}
        | {f"{str(key).removeprefix('times_')} / this": f"{value:.2f}" for key, value in ratios.items()}
    )


@style.house
def figure(rows: pd.DataFrame, title: str) -> Figure:
    """TTFT against length, and what each method gains over the best dense one of the same length."""
    rows = rows[rows["ttft_s"].notna()]
    rows = rows.assign(gain=rows.filter(like="times_").min(axis=1))  # the best dense method of the same process
    drawn, (time, gain) = style.panels(2, 4.6, 3.6)
    for (method, _), look in looks.by_method((method, "") for method in rows["method"]).items():
        line = rows[rows["method"] == method].sort_values("length").set_index("length")
        thousands = line.index / 1024
        errors = [line["ttft_s"] - line["ttft_q25_s"], line["ttft_q75_s"] - line["ttft_s"]]
        time.errorbar(thousands, line["ttft_s"], yerr=errors, capsize=2, elinewidth=0.8, **look)
        gain.plot(thousands, line["gain"], **look)
    for axis in (time, gain):
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(rows["length"].unique() / 1024), [f"{n / 1024:g}K" for n in sorted(set(rows["length"]))])
        axis.set_xlabel("prompt, tokens")
    time.set_yscale("log")
    style.plain_log(time.yaxis)
    time.set_ylabel("TTFT, s (quartiles)")
    gain.axhline(1, **style.HOLD)
    gain.set_ylabel("best dense TTFT / this")
    return style.finish(drawn, title)


def _title(config: dict[str, Any]) -> str:
    model = config["model"]
    weights = "random weights" if model.get("init") == "random" else "its own weights"
    processes = f", tensor parallel over {config['processes']}" if "processes" in config else ""
    chunk = f", chunks of {config['prefill']['chunk']:,}" if "prefill" in config else ""
    return f"Time to first token, {model['name']} ({weights}), {model['dtype']}, {config['device']}{processes}{chunk}"


def left_out(summary: Path) -> dict[str, str]:
    """Baselines that did not run, with the reason."""
    return json.loads(summary.read_text())["left_out"] if summary.is_file() else {}


def _notes(rows: pd.DataFrame, missing: dict[str, str]) -> str:
    said = [NOTE]
    if rows["method"].str.contains("set to skip").any():
        said.append(
            "'set to skip': thresholds set on this very prompt so that the share of blocks is skipped; a speed, which "
            "says nothing of accuracy."
        )
    said += [
        f"{row['method']} at {row['length']:,}: {row['out_of_memory']}"
        for _, row in rows[rows["out_of_memory"].notna()].iterrows()
    ]
    said += [f"Left out, {name}: {reason}" for name, reason in missing.items()]
    return "\n\n".join(said)
