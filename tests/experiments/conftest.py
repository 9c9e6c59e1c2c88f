"""The command line in this process, and one finished results folder for the tests that only read."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import absl.logging
import pytest
from filelock import FileLock

import run

# rouge-score's logger closes the stream it was made with when Hydra sets logging up: here pytest's in stderr's place
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

CALIBRATION = ("profile=quick", "calibration.samples=2", "calibration.k_values=[1,2]")
SMALL = (*CALIBRATION, "task.lengths=[800,900]", "task.depths=2", "task.samples=1")  # on 2 haystacks
KS = "method.k=[1,2]"
FIDELITY = (
    "experiment=fidelity",
    *CALIBRATION,
    "streams.lengths=[900]",
    "streams.samples=2",
    "streams.tail=16",
    KS,
)
FRONTIER = (  # every method, of strengths no more than a curve wants
    *FIDELITY,
    "method.members.streaming_llm.local_blocks=[2,8]",
    "method.members.minference.ratio=0.01",
    "method.members.flexprefill.gamma=0.9",
    "method.members.xattention.threshold=0.9",
    "method.members.spargeattn.cdf=0.9",
    "method.members.spargeattn_topk.share=0.5",
    "method.members.flashprefill.alpha=0.12",
    "method.members.blasst.factor=[8,128]",
    "method.members.row_share.share=[0.003,0.03]",
    "method.members.late_share.share=0.2",
    "method.members.fisher_share.kl=0.006",
)
SUITES = (  # two answers at a time
    ("experiment=ruler", "task.tasks=[vt,fwe]"),
    ("experiment=reasoning", "task.tasks=[one_fact]"),
)
SUITE = (*CALIBRATION, "task.lengths=[1200]", "task.samples=2", "batch=2", "method.k=[1]")
QUIET = "tracker=none"


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a refused command leaves on stderr beside its progress bars."""
        assert self.status != 0
        assert "Traceback" not in self.out + self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


def run_here(*arguments: str) -> Ended:
    """``python run.py ...`` without the seconds that a new process takes to import."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("sys.argv", ["run.py", *arguments])
        patch.setenv("HYDRA_MAIN_MODULE", "__main__")  # find conf/ beside run.py, as for a script
        try:
            run.main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    return Ended(status, out.getvalue(), err.getvalue())


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Runs the command in an empty folder."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return run_here


def reported(factory: pytest.TempPathFactory, name: str, *commands: tuple[str, ...]) -> Path:
    """A folder with the records of some commands and their report, made once for all processes of pytest-xdist."""
    session = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    results, made = session / name / "results", session / name / "made"
    results.mkdir(parents=True, exist_ok=True)
    with FileLock(session / name / ".lock"):
        for arguments in () if made.exists() else (*commands, ("experiment=report",)):
            ended = run_here(*arguments, QUIET, f"results={results}")
            assert ended.status == 0, ended.err
        made.touch()
    return results


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A results folder with every method's records and a report. Read only: `finished_copy` is for writing."""
    return reported(tmp_path_factory, "finished", ("experiment=niah", f"model.path={model_folder}", *SMALL, KS))


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A results folder with every method's fidelity to dense attention and a report. Read only."""
    return reported(tmp_path_factory, "compared", (*FRONTIER, f"model.path={model_folder}"))


@pytest.fixture(scope="session")
def suites_finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A results folder with every method's records of the suites and a report. Read only."""
    return reported(tmp_path_factory, "suites", *((*suite, *SUITE, f"model.path={model_folder}") for suite in SUITES))


@pytest.fixture
def finished_copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def written(folder: Path) -> dict[Path, int]:
    """When every file below a folder was last written, but for locks."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.name != ".lock"}
