"""Whether what was drawn still stands: what it was made from, wrote and said, in a ``report.json``.

That of a whole store lies in the results folder, that of a run's chapter in the run's.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import get_method
from omegaconf import DictConfig

from bsfa.errors import InputError
from experiments.config import call, plain
from experiments.launchers import in_sweep
from experiments.records import Run, write_whole

if TYPE_CHECKING:
    from experiments.chapters import Chapter  # brings matplotlib, which what stands does without

log = logging.getLogger(__name__)
FILE = "report.json"
RECORDS = ("config.yaml", "samples.jsonl", "summary.json")
SOURCES = Path(__file__).parent
PACKAGES = ("jinja2", "matplotlib", "numpy", "pandas", "scipy", "tabulate")


@dataclass(frozen=True)
class Standing:
    """What was drawn, or is to be.

    Attributes
    ----------
    root : Path
        The results folder: the files lie below it.
    folder : Path
        Where ``report.json`` lies.
    origin : str
        A digest of all that it is to be made from, taken before any of that is read.
    """

    root: Path
    folder: Path
    origin: str

    def said(self) -> str | None:
        """What was said of it; None where what was drawn has another origin, or one of its files is gone."""
        try:
            made = json.loads((self.folder / FILE).read_text(encoding="utf-8"))
            stands = made["origin"] == self.origin and all((self.root / name).is_file() for name in made["files"])
            return made["said"] if stands else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def forget(self) -> None:
        """Before it is drawn: what is broken off does not stand."""
        (self.folder / FILE).unlink(missing_ok=True)

    def keep(self, files: Iterable[Path], said: str) -> None:
        """When it is drawn."""
        names = [str(file.relative_to(self.root)) for file in files]
        write_whole(self.folder / FILE, json.dumps({"origin": self.origin, "files": names, "said": said}, indent=1))


def run(cfg: DictConfig) -> None:
    """The report of ``experiment=report``: what was said of it where it stands, or made again.

    Raises
    ------
    InputError
        As `experiments.report.make`.
    """
    standing = of_store(cfg)
    said = standing.said()
    if said is None:
        call("experiments.report.make", cfg, standing)
        return
    log.info("report: nothing has changed since it was made")
    print(said, places(standing.root), sep="\n")


def of_store(cfg: DictConfig) -> Standing:
    """The report of all records, and of who is shown it."""
    root = Path(cfg.results)
    return Standing(root, root, _origin(root, "*/*", plain(cfg.tracker)))


def chapter(run: Run, read: Callable[[Path, str], list[Chapter]], beside: str | None = None) -> str:
    """What a complete run's chapter says, which is drawn where it does not stand.

    Parameters
    ----------
    read : function of a results folder and a run's id
        A list of the one chapter that the run is in.
    beside : str, optional
        A pattern of the folders of the runs that are in it, below the experiment's; by default this run is alone.

    Raises
    ------
    InputError
        It cannot be written.
    """
    experiment = run.path.parent
    root = experiment.parent
    standing = Standing(root, run.path, _origin(root, f"{experiment.name}/{beside or run.id}"))
    if (said := standing.said()) is not None:
        log.info("%s: nothing has changed since it was drawn", experiment.name)
        return said
    [made] = read(root, run.id)
    said = made.main()
    try:
        standing.forget()
        tables, figures = made.write(root)
        standing.keep([*tables, *figures], said)
    except OSError as error:
        raise InputError(f"cannot write tables and figures below {root.resolve()}: {error}") from error
    return said


def section(runs: Sequence[Run]) -> None:
    """Print the chapter that complete runs which may be compared are in, and where its files lie; see `chapter`.

    One job of a sweep has a part of them, and prints nothing.
    """
    if not runs or in_sweep():
        return
    experiment = runs[0].path.parent
    read = get_method("experiments.report.chapters")  # brings matplotlib, which what stands does without
    print(chapter(runs[0], partial(read, experiment.name), beside="*"))
    print(places(experiment.parent))


def _origin(root: Path, runs: str, shown_to: dict[str, Any] | None = None) -> str:
    """Of the records of some runs' folders, this package, the packages that draw, and a tracker's settings."""
    digest = hashlib.sha256(json.dumps([shown_to, *map(version, PACKAGES)], sort_keys=True).encode())
    records = (file for name in RECORDS for file in root.glob(f"{runs}/{name}"))
    sources = (file for file in SOURCES.rglob("*") if file.suffix in (".py", ".html", ".yaml"))
    for folder, files in ((root, records), (SOURCES, sources)):
        for file in sorted(files):
            with file.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            digest.update(f"{file.relative_to(folder)} {found}\n".encode())
    return digest.hexdigest()


def places(root: Path) -> str:
    """Where everything lies that there is."""
    found = {"tables": root / "tables", "figures": root / "figures", "page": root / "report.html"}
    return "\n".join(f"{name}: {place.resolve()}" for name, place in found.items() if place.exists())
