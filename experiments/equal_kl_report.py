"""Time at equal KL: the table and the figure, from the records alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments import looks, style
from experiments.chapters import Chapter, Drawing, Table
from experiments.frontier import CELL
from experiments.readable import percent
from experiments.records import read_runs
from experiments.statistics import quartiles

OWN = "dense"
SHOWN = (
    "source", "tokens", "KL <=", "method", "strength", "calibration", "KL [95%]", "skip ratio %",
    "attention ms [quartiles]", "dense / this", "best dense / this", "prefill ms", "prefill: best dense / this", "n",
)  # fmt: skip
SPREAD = 0.28  # of a method's line: between its markers
SAID: Any = {"fontsize": 6, "va": "center"}
PARTS = ("attention", "prefill")
CHOSEN = ("method", "strength", "calibration", "kl", "kl_low", "kl_high", "skip_ratio", "within", "strongest")
COLUMNS = (
    *CELL, "texts", "batch", "bound", *CHOSEN, "best_dense", "turns", "timed_skip_ratio",
    *(
        f"{part}_{number}{quartile}"
        for part in PARTS
        for number in ("ms", "times_dense", "times_best_dense")
        for quartile in ("", "_q25", "_q75")
    ),
)  # fmt: skip
NOTE = (
    "Of each method the strength that skips most with a mean KL (nats a token, over the source's texts of the length) "
    "within the bound; 'none': no strength tried is, and the KL is the least of them; '>': the strengths tried end "
    "there, and a stronger one might be within the bound too. KL and skip ratio: `experiment=fidelity`, one text at a "
    "time. Times: the same texts, the batch's size at once, medians [quartiles] over batches and turns in one process; "
    "attention is all layers' calls in a prefill, selection included. A ratio is dense attention's time over this "
    "row's, the median of the turns' ratios: 'dense' is our own kernel without a gate, 'best dense' whichever dense "
    "one takes the least there."
)


def chapters(root: Path, only: str | None = None) -> list[Chapter]:
    """Every run, or the one with an id."""
    return [
        _chapter(config, samples) for config, samples in read_runs(root, "equal_kl") if only in (None, config["run_id"])
    ]


def _chapter(config: dict[str, Any], samples: list[dict[str, Any]]) -> Chapter:
    rows, title = tabulate(config, samples), _title(config, samples)
    model = config["model"]
    name = f"equal_kl-{model['name']}-{config['run_id'][:6]}"
    facts = {
        "model": f"{model['name']}, {model['dtype']}",
        "device": config["device"],
        "n": f"{config['task']['samples']} texts a source and length, {config['equal_kl']['repeats']} turns a batch",
    }
    return Chapter(
        title,
        facts,
        [Table(name, "Every method at every bound", rows, readable(rows), _notes(samples))],
        [Drawing(name, "Attention's speed at equal KL", figure(rows, title))],
    )


def tabulate(config: dict[str, Any], samples: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row a cell and dense method, and one a cell, bound and sparse method, the fastest first.

    Returns
    -------
    DataFrame with source, length, texts (timed) and batch (of them at once); bound (NaN for a dense method) and what
    `equal_kl_choice.choose` says; best_dense, a name; and, NaN where nothing was timed, turns, timed_skip_ratio, and of
    attention and of the prefill milliseconds and the ratios to dense and best dense, with quartiles.
    """
    chosen = pd.DataFrame(config["chosen"])
    dense = [OWN, *config["equal_kl"]["baselines"]]
    rows: list[dict[str, Any]] = []
    for key in dict.fromkeys((sample["source"], sample["length"]) for sample in samples):
        batches = [sample for sample in samples if (sample["source"], sample["length"]) == key]
        cell = _Cell(batches, dense)
        asked = chosen[(chosen["source"] == key[0]) & (chosen["length"] == key[1])].to_dict("records")
        shared = dict(zip(CELL, key, strict=True)) | {
            "texts": sum(len(batch["texts"]) for batch in batches),
            "batch": len(batches[0]["texts"]),
            "best_dense": cell.best,
        }
        rows += [shared | {"method": name} | cell.numbers(name) for name in cell.dense]
        rows += [
            shared
            | {name: row[name] for name in ("bound", *CHOSEN)}
            | (cell.numbers(row["label"]) if row["within"] else {})
            for row in asked
        ]
    frame = pd.DataFrame(rows).reindex(columns=COLUMNS)
    place = frame[["bound", "attention_ms"]].fillna({"bound": 0.0, "attention_ms": float("inf")})
    order = frame[CELL].assign(**place).sort_values([*CELL, "bound", "attention_ms"], kind="stable").index
    return frame.loc[order].reset_index(drop=True)


class _Cell:
    """What was timed on a source's texts of a length: seconds a batch and turn (rows) and method (columns)."""

    def __init__(self, batches: Sequence[dict[str, Any]], dense: Sequence[str]) -> None:
        turns = pd.DataFrame(_turns(batches), columns=["batch", "turn", "method", *PARTS, "skip_ratio"])
        self.seconds = {part: turns.pivot(index=["batch", "turn"], columns="method", values=part) for part in PARTS}
        self.skipped = turns.groupby("method")["skip_ratio"].mean()
        medians = self.seconds["attention"].median().reindex(dense).dropna()
        self.dense = list(medians.index)
        self.best = str(medians.idxmin()) if self.dense else ""

    def numbers(self, method: str) -> dict[str, Any]:
        """Of one method; none where it ran out of memory."""
        if method not in self.skipped:
            return {}
        found: dict[str, Any] = {"timed_skip_ratio": float(self.skipped[method])}
        for part, table in self.seconds.items():
            own = table[method].dropna()
            found |= {"turns": len(own)} | _spread(f"{part}_ms", 1e3 * own)
            for name, base in (("dense", OWN), ("best_dense", self.best)):
                if base in table:
                    found |= _spread(f"{part}_times_{name}", (table[base] / own).dropna())
        return found


def _turns(batches: Sequence[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    for batch in batches:
        for one in batch["turns"]:
            for turn, seconds in enumerate(zip(one.get("attention_turns_s", []), one.get("turns_s", []), strict=True)):
                yield batch["id"], turn, one["method"], *seconds, one["skip_ratio"]


def _spread(name: str, values: pd.Series) -> dict[str, float]:
    """Median and quartiles; nothing of nothing."""
    if values.empty:
        return {}
    low, middle, high = quartiles(values.to_numpy())
    return {name: middle, f"{name}_q25": low, f"{name}_q75": high}


def readable(rows: pd.DataFrame) -> pd.DataFrame:
    """A table for people."""
    return pd.DataFrame(_shown(row) for _, row in rows.iterrows())


def _shown(row: pd.Series) -> dict[str, str]:
    cell = dict.fromkeys(SHOWN, "") | {"source": row["source"], "tokens": f"{row['length']:,}", "method": row["method"]}
    if not pd.isna(row["bound"]):
        within, end = bool(row["within"]), "> " if row["strongest"] else ""
        cell |= {
            "KL <=": f"{row['bound']:g}",
            "strength": row["strength"] if within else f"none, nearest {row['strength']}",
            "calibration": row["calibration"],
            "KL [95%]": f"{row['kl']:.2g} [{row['kl_low']:.2g}, {row['kl_high']:.2g}]",
            "skip ratio %": f"{end}{percent(row['skip_ratio'])}" if within else "",
        }
        if not within:
            return cell
    if pd.isna(row["attention_ms"]):
        return cell | {"attention ms [quartiles]": "out of memory"}
    spread = ", ".join(f"{row[f'attention_ms_{q}']:.4g}" for q in ("q25", "q75"))
    return cell | {
        "attention ms [quartiles]": f"{row['attention_ms']:.4g} [{spread}]",
        "dense / this": _ratio(row["attention_times_dense"]),
        "best dense / this": _ratio(row["attention_times_best_dense"]),
        "prefill ms": f"{row['prefill_ms']:.4g}",
        "prefill: best dense / this": _ratio(row["prefill_times_best_dense"]),
        "n": f"{row['texts']} texts, {row['turns']:.0f} turns",
    }


def _ratio(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.2f}"


@style.house
def figure(rows: pd.DataFrame, title: str) -> Figure:
    """Attention's speed-up over our own dense kernel, a panel a source and length, a line of markers a bound."""
    sparse = rows[rows["bound"].notna()]
    names = [looks.label(*pair) for pair in zip(sparse["method"], sparse["calibration"], strict=True)]
    sparse = sparse.assign(name=names)
    order = sparse.groupby("name")["attention_times_dense"].max().sort_values(na_position="first")
    heights = {name: float(number) for number, name in enumerate(order.index)}
    bounds = sorted(sparse["bound"].unique())
    cells = list(rows.groupby(CELL, sort=False))
    drawn, axes = style.panels(len(cells), 4.6, 1.0 + 0.26 * len(heights), sharex=True, sharey=True)
    for axis, ((source, length), cell) in zip(axes, cells, strict=True):
        for number, bound in enumerate(bounds):
            points = sparse[sparse.index.isin(cell.index) & (sparse["bound"] == bound)]
            apart = points["name"].map(heights) + SPREAD * ((len(bounds) - 1) / 2 - number)
            look = looks.numbered(number) | {"linestyle": "none", "markersize": 4}
            times = points["attention_times_dense"]
            quartile = [times - points["attention_times_dense_q25"], points["attention_times_dense_q75"] - times]
            axis.errorbar(times, apart, xerr=quartile, elinewidth=0.8, label=f"KL <= {bound:g}", **look)
            for height in apart[~points["within"].astype(bool)]:
                axis.text(0.01, height, "none", transform=axis.get_yaxis_transform(), color=look["color"], **SAID)
        best = cell["best_dense"].iloc[0]
        axis.axvline(1, label="dense, the same kernel", **style.HOLD)
        for gain in cell.loc[cell["method"] == best, "attention_times_dense"].dropna():
            axis.axvline(gain, label="best dense", **style.CUT)
        axis.set(title=f"{source}, {length} tokens; best dense: {best}", xlabel="dense attention's time / this one's")
        axis.tick_params(labelbottom=True)
        axis.set_yticks(list(heights.values()), list(heights))
        axis.set_ylim(-0.6, len(heights) - 0.4)
    return style.finish(drawn, title)


def _title(config: dict[str, Any], samples: Sequence[dict[str, Any]]) -> str:
    model, texts = config["model"], len(samples[0]["texts"])
    together = f"{texts} texts at once" if texts > 1 else "a text at a time"
    return f"Attention at equal KL, {model['name']}, {model['dtype']}, {together}, {config['device']}"


def left_out(samples: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Baselines that did not run, with the reason."""
    return {name: reason for sample in samples for name, reason in sample["left_out"].items()}


def _notes(samples: Sequence[dict[str, Any]]) -> str:
    lost = [
        f"{one['method']} on {sample['id']}: {one['out_of_memory']}"
        for sample in samples
        for one in sample["turns"]
        if "out_of_memory" in one
    ]
    return "\n\n".join([NOTE, *lost, *(f"Left out, {name}: {reason}" for name, reason in left_out(samples).items())])
