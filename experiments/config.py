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
    """The methods of ``method=``: one, or those of a group.

    Raises
    ------
    InputError
        A group of none, or a member that is none.
    """
    if "members" not in cfg.method:
        return [cfg.method]
    found = cfg.method.members
    if not found:
        raise InputError("method.members holds no method")
    for name, member in found.items():
        if not isinstance(member, DictConfig):
            raise InputError(f"method.members.{name}={member} is no method; ~method.members.{name} leaves it out")
    return list(found.values())


def call(name: str, cfg: DictConfig, *more: Any) -> Any:
    """Call a function of a configuration, and what ``more`` it takes, by its name; what a constructor refused below it
    comes without Hydra's wrap, and a value of a type that a constructor cannot do with by the constructor's name.

    Raises
    ------
    InputError
    """
    try:
        return get_method(name)(cfg, *more)
    except InstantiationException as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, TypeError):
            raise InputError(f"a setting is of the wrong type: {' '.join(str(error).split())}") from error
        raise
