"""The record store: every sample of every run, appended as it finishes, never lost and never written twice.

results/<experiment>/<run_id>/config.yaml    what ran; its hash is the run id
                              env.json       the machines and versions it ran on, in the order they came
                              samples.jsonl  one line a sample
                              lost.jsonl     samples that a process could not record where it ended; see `Run.lose`
                              summary.json   there only when every sample is
                              tracked.txt    where it was shown since; see `experiments.tracking`
                              report.json    what was drawn of it by itself; see `experiments.standing`
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from bsfa.errors import InputError

SCHEMA = 1
ID_DIGITS = 12


class Busy(InputError):
    """Another process is writing a run."""


@dataclass(frozen=True)
class Store:
    """A results folder.

    Raises
    ------
    InputError
        On making one: the folder cannot be written.
    """

    root: Path

    def __post_init__(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(f"cannot write to {self.root.resolve()}: {error.strerror}; use results=DIR") from error

    def run(self, experiment: str, config: dict[str, Any]) -> Run:
        """The run of a configuration; the same configuration is the same run."""
        config = {"schema": SCHEMA, "experiment": experiment, **config}
        text = yaml.safe_dump(config, sort_keys=True)
        run_id = hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS]
        return Run(self.root / experiment / run_id, config)


@dataclass(frozen=True)
class Run:
    """One configuration's folder."""

    path: Path
    config: dict[str, Any]

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def complete(self) -> bool:
        return (self.path / "summary.json").is_file()

    @contextmanager
    def writing(self, environment: dict[str, Any]) -> Iterator[Writer]:
        """Lock the run and take up where it stopped.

        Raises
        ------
        Busy
            Another process is writing it.
        InputError
            A damaged record or configuration, one of another schema, no space left.
        """
        with _full_disk_says_where(self.path), self._locked():
            if (self.path / "config.yaml").is_file():
                _read_config(self.path / "config.yaml")
            write_whole(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
            self._note_environment(environment)
            records = self.path / "samples.jsonl"
            _drop_torn_line(records)
            done = [sample["id"] for sample in read_samples(records)]
            with records.open("a", encoding="utf-8") as file:  # closing writes too, what a full disk refused before
                yield Writer(self, file, done)

    def done(self) -> set[str]:
        """Ids of the samples that are recorded or lost, for a process that takes part and does not record."""
        return {sample["id"] for sample in (*read_samples(self.path / "samples.jsonl"), *self.lost())}

    def lose(self, sample: dict[str, Any]) -> None:
        """Leave a sample that says why there is none to the process that records, which may never come to ask."""
        lost = self.path / "lost.jsonl"
        _drop_torn_line(lost)
        with lost.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"schema": SCHEMA, **sample}) + "\n")

    def lost(self) -> list[dict[str, Any]]:
        """What was left, each sample once."""
        return list({sample["id"]: sample for sample in read_samples(self.path / "lost.jsonl")}.values())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise Busy(f"another process is writing {self.path}; wait for it, or use results=DIR") from error
        try:
            yield
        finally:
            lock.release()

    def _note_environment(self, environment: dict[str, Any]) -> None:
        path = self.path / "env.json"
        try:
            known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        except ValueError as error:
            raise InputError(f"{path} is damaged; move it away, the samples beside it stay") from error
        if environment not in known:
            write_whole(path, json.dumps([*known, environment], indent=1))


@dataclass
class Writer:
    """An open run.

    Attributes
    ----------
    done : list of str
        Ids of the samples that are safe.
    """

    run: Run
    file: Any
    done: list[str] = field(default_factory=list)

    def append(self, record: dict[str, Any]) -> None:
        """Add one sample and force it to disk.

        Raises
        ------
        InputError
            No space left; what was appended before is safe.
        """
        if record["id"] in self.done:
            raise ValueError(f"sample {record['id']} is already recorded in {self.run.path}")
        with _full_disk_says_where(self.run.path):
            self.file.write(json.dumps({"schema": SCHEMA, **record}) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        self.done.append(record["id"])

    def samples(self) -> list[dict[str, Any]]:
        """What is recorded so far."""
        return read_samples(self.run.path / "samples.jsonl")

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run complete."""
        with _full_disk_says_where(self.run.path):
            write_whole(self.run.path / "summary.json", json.dumps(summary, indent=1))


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a samples file; a last line without its end is not one.

    Raises
    ------
    InputError
        A line that is not a record, or a record of another schema, by its number.
    """
    if not path.is_file():
        return []
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], start=1):
        try:
            sample = json.loads(line)
            schema = sample["schema"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number} is not a record; move the folder away to run it again") from error
        if schema != SCHEMA:
            raise InputError(f"{path}, line {number} has schema {schema}, this version reads {SCHEMA}")
        samples.append(sample)
    return samples


def read_runs(root: Path, experiment: str) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Every run of an experiment that has a sample: its configuration and its samples."""
    for path in sorted((root / experiment).glob("*/config.yaml")):
        config = _read_config(path)
        if samples := read_samples(path.parent / "samples.jsonl"):
            yield {"run_id": path.parent.name, **config}, samples


def first_holding(experiments: Collection[str], *roots: Path) -> Path:
    """The first of several results folders that holds a run of one of the experiments; the last where none does."""
    holding = (root for root in roots if any(any((root / name).glob("*/samples.jsonl")) for name in experiments))
    return next(holding, roots[-1])


def _read_config(path: Path) -> dict[str, Any]:
    """A run's configuration; an InputError names one that is damaged or of another schema."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged; move its folder away") from error
    schema = config.get("schema") if isinstance(config, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{path} has schema {schema}, this version reads {SCHEMA}; move its folder away")
    return config


def _drop_torn_line(path: Path) -> None:
    """Cut what a killed process left of its last line."""
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def _full_disk_says_where(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"no space left on the disk of {path.resolve()}; the samples before are safe, "
            "free some and run the same command again"
        ) from error
