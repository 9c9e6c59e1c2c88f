"""From Hydra's config nodes to plain values."""

from __future__ import annotations

from typing import Any, cast

from omegaconf import DictConfig, OmegaConf


def plain(node: DictConfig) -> dict[str, Any]:
    """A config node as a resolved dict."""
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))


def members(cfg: DictConfig) -> list[DictConfig]:
    """The methods of ``method=``: one, or those of a group."""
    return list(cfg.method.members.values()) if "members" in cfg.method else [cfg.method]
