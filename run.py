"""The one entry: ``python run.py experiment=NAME key=value ...``."""

from __future__ import annotations

import sys
from typing import NoReturn

import hydra
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from transformers.utils import logging as transformers_logging

from bsfa import InputError

OmegaConf.register_new_resolver("default_profile", lambda: "gpu" if torch.cuda.is_available() else "quick")
OmegaConf.register_new_resolver("longest", max)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    transformers_logging.set_verbosity_error()
    try:
        get_method(cfg.experiment.runner)(cfg)
    except (InputError, NotImplementedError) as error:
        _refuse(error)
    except InstantiationException as error:  # Hydra's wrap around what a constructor raised
        if not isinstance(error.__cause__, InputError):
            raise
        _refuse(error.__cause__)


def _refuse(error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
