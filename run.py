"""The one entry: ``python run.py experiment=NAME key=value ...``."""

from __future__ import annotations

import logging
import sys
from typing import NoReturn

import hydra
import torch
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf
from transformers.utils import logging as transformers_logging

from bsfa import InputError
from experiments import checks, launchers
from experiments.config import call
from experiments.records import Busy
from experiments.unavailable import reason

log = logging.getLogger(__name__)

OmegaConf.register_new_resolver("default_profile", lambda: "gpu" if torch.cuda.is_available() else "quick")
OmegaConf.register_new_resolver("longest", max)
OmegaConf.register_new_resolver("gpus", lambda: max(1, torch.cuda.device_count()))


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def job(cfg: DictConfig) -> None:
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings are of each retry
    try:
        launchers.check_mode()
        checks.text("results", cfg.results)
        checks.switch("own_gpu", cfg.own_gpu)
        if cfg.own_gpu:
            launchers.own_gpu()
        call(cfg.experiment.runner, cfg)
    except Busy as error:  # in a sweep the other jobs go on, and so does the process that has the run
        if not launchers.in_sweep():
            _refuse(error)
        log.warning("left to the process that has it: %s", error)
    except (InputError, NotImplementedError) as error:
        _refuse(error)
    except torch.OutOfMemoryError as error:
        _refuse(
            InputError(
                f"{reason(error)} What was recorded is safe. Less memory: batch=1, which goes on with the same runs; "
                "prefill.chunk=8192 or shorter lengths, which are others"
            )
        )


def main() -> None:
    try:
        launchers.check(sys.argv[1:])
    except InputError as error:
        _refuse(error)
    job()


def _refuse(error: Exception) -> NoReturn:
    if launchers.in_sweep():
        raise CompactHydraException(f"error: {error}")  # travels to the process that launched the job
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
