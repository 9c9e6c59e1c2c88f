"""Trackers: Weights & Biases, or none. A tracker is shown finished runs and reports; the store stays the record.

Where a run was shown stands in its folder, in ``tracked.txt``, from then on: what a failure of the network left out is
shown by the next command that finds the run complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pandas as pd

from bsfa.errors import InputError
from experiments import checks
from experiments.records import ID_DIGITS, Run
from experiments.unavailable import Unavailable, reason

log = logging.getLogger(__name__)
SHOWN = "tracked.txt"  # in a run's folder


class Untracked(Unavailable):
    """What is recorded could not be shown to a tracker."""

    what: ClassVar[str] = "complete, but not tracked"


class Tracker(Protocol):
    def runs(self, complete: Iterable[tuple[Run, str]]) -> None:
        """Show runs that are complete, each by a label, but for those that have been.

        Raises
        ------
        Untracked
            Once all were tried: those that it did not take, with the reason of each.
        """

    def report(self, tables: list[Path], figures: list[Path], page: Path) -> None:
        """Show a report's files.

        Raises
        ------
        Untracked
        """


class NoTracker:
    """Keeps nothing."""

    def runs(self, complete: Iterable[tuple[Run, str]]) -> None: ...

    def report(self, tables: list[Path], figures: list[Path], page: Path) -> None: ...


@dataclass(frozen=True)
class Wandb:
    """One W&B run for each run of the store, with its tables, its numbers and its records as an artifact, and one for
    each report of other numbers.

    Parameters
    ----------
    mode : {"offline", "online"}
        Offline writes to ``folder`` and nothing leaves the machine.
    project : str
    folder : str

    Raises
    ------
    InputError
        wandb is not installed.
    """

    mode: Any
    project: str
    folder: str

    def __post_init__(self) -> None:
        if self.mode not in ("offline", "online"):
            raise InputError(f"tracker.mode={self.mode} is neither offline nor online; tracker=none switches it off")
        checks.text("tracker.project", self.project)
        checks.text("tracker.folder", self.folder)
        if find_spec("wandb") is None:  # importing it takes seconds, and a call may have nothing to track
            raise InputError("tracker=wandb needs wandb: pip install wandb, or use tracker=none")

    def runs(self, complete: Iterable[tuple[Run, str]]) -> None:
        self._try({str(run.path): partial(self._show, run, label) for run, label in complete if not self._has(run)})

    def report(self, tables: list[Path], figures: list[Path], page: Path) -> None:
        self._try({f"the report {page}": partial(self._show_report, tables, figures, page)})

    @property
    def _place(self) -> str:
        """As `SHOWN` has it."""
        return f"wandb {self.mode} {self.project}"

    def _has(self, run: Run) -> bool:
        shown = run.path / SHOWN
        return shown.is_file() and self._place in shown.read_text(encoding="utf-8").splitlines()

    def _show(self, run: Run, label: str) -> None:
        import wandb

        tables, numbers = split(json.loads((run.path / "summary.json").read_text(encoding="utf-8")))
        options = {"name": label, "group": run.config["experiment"], "config": run.config, "id": run.id}
        with self._open(**options) as session:
            session.log({name: wandb.Table(list(rows), rows.to_numpy().tolist()) for name, rows in tables.items()})
            session.summary.update(numbers)
            artifact = wandb.Artifact(f"records-{run.id}", type="records")
            for file in ("config.yaml", "env.json", "samples.jsonl", "summary.json"):
                artifact.add_file(str(run.path / file))
            session.log_artifact(artifact)
        with (run.path / SHOWN).open("a", encoding="utf-8") as lines:
            lines.write(f"{self._place}\n")

    def _show_report(self, tables: list[Path], figures: list[Path], page: Path) -> None:
        import wandb

        # The same records give the same tables: their report again is the same run, not one more.
        digest = hashlib.sha256(b"".join(table.read_bytes() for table in tables)).hexdigest()[:ID_DIGITS]
        options = {"name": "report", "group": "report", "config": {}, "id": f"report-{digest}"}
        with self._open(**options) as session:
            images = {f.stem: wandb.Image(str(f)) for f in figures if f.suffix == ".png"}
            session.log({**images, "page": wandb.Html(str(page), inject=False)})
            artifact = wandb.Artifact("report", type="report")
            for file in (*tables, *figures, page):
                artifact.add_file(str(file))
            session.log_artifact(artifact)

    def _try(self, showing: Mapping[str, Callable[[], None]]) -> None:
        """Show one thing after another, by what an error calls it."""
        if not showing:
            return
        import wandb

        refused = []
        for what, show in showing.items():
            try:
                show()
            except (wandb.Error, OSError) as error:
                refused.append(f"{what} ({reason(error)})")
                log.warning("W&B did not take %s", refused[-1])
        if refused:
            raise Untracked(
                f"W&B ({self.mode}, project {self.project}) did not take {', '.join(refused)}. "
                "It is safe here, and the same command shows it again; tracker=none does without"
            )

    def _open(self, **options: Any):
        import wandb

        folder = Path(self.folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for kind in ("CACHE", "CONFIG", "DATA"):  # wandb would write them to the home folder
            os.environ.setdefault(f"WANDB_{kind}_DIR", str(folder / "wandb" / kind.lower()))
        settings = wandb.Settings(silent=True, console="off")
        return wandb.init(project=self.project, mode=self.mode, dir=str(folder), settings=settings, **options)


def split(summary: dict[str, Any]) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """A summary as W&B shows one: lists of records as tables, and all else under flat names, ``left_out/sdpa``."""
    tables = {key: value for key, value in summary.items() if _is_table(value)}
    rest = {key: value for key, value in summary.items() if key not in tables}
    [numbers] = pd.json_normalize(rest, sep="/").to_dict("records") or [{}]
    frames = {key: pd.DataFrame(rows).astype(object) for key, rows in tables.items()}
    return {key: rows.where(rows.notna(), None) for key, rows in frames.items()}, numbers


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
