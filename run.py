"""The one entry: ``python run.py experiment=NAME key=value ...``."""

from __future__ import annotations

import logging
import sys

import hydra
import torch
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
        logging.getLogger(__name__).error("error: %s", error)
        sys.exit(2)


if __name__ == "__main__":
    main()
