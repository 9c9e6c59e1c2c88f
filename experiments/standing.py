"""Whether a report still stands: what it was made from, wrote and said, in ``report.json`` beside it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from omegaconf import DictConfig

from experiments.config import call, plain
from experiments.records import write_whole

log = logging.getLogger(__name__)
FILE = "report.json"
RECORDS = ("config.yaml", "samples.jsonl", "summary.json")
SOURCES = Path(__file__).parent
PACKAGES = ("jinja2", "matplotlib", "numpy", "pandas", "scipy", "tabulate")


def run(cfg: DictConfig) -> None:
    """The report of ``experiment=report``: what was said of it where it stands, or made again.

    Raises
    ------
    InputError
        As `experiments.report.make`.
    """
    root = Path(cfg.results)
    wanted = origin(root, cfg.tracker)
    said = read(root, wanted)
    if said is None:
        call("experiments.report.make", cfg, wanted)
        return
    log.info("report: nothing has changed since it was made")
    print(said, places(root), sep="\n")


def origin(root: Path, tracker: DictConfig) -> str:
    """A digest of all that a report is made from: the records, this package, those that draw, and who is shown it."""
    digest = hashlib.sha256(json.dumps([plain(tracker), *map(version, PACKAGES)], sort_keys=True).encode())
    records = (file for name in RECORDS for file in root.glob(f"*/*/{name}"))
    sources = (file for file in SOURCES.rglob("*") if file.suffix in (".py", ".html", ".yaml"))
    for folder, files in ((root, records), (SOURCES, sources)):
        for file in sorted(files):
            with file.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            digest.update(f"{file.relative_to(folder)} {found}\n".encode())
    return digest.hexdigest()


def read(root: Path, wanted: str) -> str | None:
    """What a report of this origin said; None where it has another, or one of its files is gone."""
    try:
        made = json.loads((root / FILE).read_text(encoding="utf-8"))
        stands = made["origin"] == wanted and all((root / name).is_file() for name in made["files"])
        return made["said"] if stands else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget(root: Path) -> None:
    """Before a report is made: one that is broken off does not stand."""
    (root / FILE).unlink(missing_ok=True)


def keep(root: Path, wanted: str, files: Iterable[Path], said: str) -> None:
    """When it is made."""
    names = [str(file.relative_to(root)) for file in files]
    write_whole(root / FILE, json.dumps({"origin": wanted, "files": names, "said": said}, indent=1))


def places(root: Path) -> str:
    """Where everything lies."""
    found = {"tables": root / "tables", "figures": root / "figures", "page": root / "report.html"}
    return "\n".join(f"{name}: {place.resolve()}" for name, place in found.items())
