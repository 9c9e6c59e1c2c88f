"""Sweeps over processes and machines: Hydra's launchers, what they need, and a GPU for each process."""

from __future__ import annotations

import getpass
import tempfile
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from bsfa.errors import InputError

PACKAGES = {
    "slurm": "hydra-submitit-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "joblib": "hydra-joblib-launcher",
}


def check(arguments: Iterable[str]) -> None:
    """Refuse a launcher whose package is missing, which Hydra says less clearly.

    Raises
    ------
    InputError
    """
    for argument in arguments:
        name = argument.removeprefix("launcher=")
        package = PACKAGES.get(name) if name != argument else None
        if package and find_spec(f"hydra_plugins.{package.replace('-', '_')}") is None:
            raise InputError(f"{argument} needs the package {package}: pip install {package}, or use launcher=local")


def in_sweep() -> bool:
    """Whether this is one job of ``python run.py -m``."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def check_mode() -> None:
    """Refuse a launcher of sweeps for a single run, which Hydra would run here in silence.

    Raises
    ------
    InputError
    """
    name = HydraConfig.get().runtime.choices.get("launcher", "local")
    if name in PACKAGES and not in_sweep():
        raise InputError(f"launcher={name} launches the jobs of a sweep; add -m")


@cache  # the lock is held as long as the process lives
def own_gpu() -> FileLock | None:
    """Make a GPU of this machine the process's own, the first that no other process took in this way.

    Raises
    ------
    InputError
        All of them are taken.
    """
    count = torch.cuda.device_count()
    for number in range(count):
        name = f"bsfa-{getpass.getuser()}-{torch.cuda.get_device_properties(number).uuid}.lock"
        lock = FileLock(Path(tempfile.gettempdir()) / name, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            continue
        torch.cuda.set_device(number)
        return lock
    if count:
        raise InputError(f"all {count} GPUs are taken by other processes of own_gpu=true; lower hydra.launcher.n_jobs")
    return None
