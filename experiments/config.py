"""From Hydra's config nodes to plain values."""

from __future__ import annotations

from typing import Any, cast

from hydra.errors import InstantiationException
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from bsfa.errors import InputError


def plain(node: DictConfig) -> dict[str, Any]:
    """A config node as a resolved dict."""
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))


def members(cfg: DictConfig) -> list[DictConfig]:
    """The methods of ``method=``: one, or those of a group."""
    return list(cfg.method.members.values()) if "members" in cfg.method else [cfg.method]


def call(name: str, cfg: DictConfig) -> Any:
    """Call a function by its name; what a constructor refused below it comes without Hydra's wrap.

    Raises
    ------
    InputError
    """
    try:
        return get_method(name)(cfg)
    except InstantiationException as error:
        if not isinstance(error.__cause__, InputError):
            raise
        raise error.__cause__ from None
