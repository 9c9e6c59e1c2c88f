"""What a command line asked for, and which of it is for one experiment among others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

GROUPS = ("profile", "model", "method", "tracker", "launcher")  # that every experiment has


def asked() -> dict[str, Override]:
    """What the command line says, by its words."""
    return parsed(HydraConfig.get().overrides.task)


def parsed(lines: Sequence[str]) -> dict[str, Override]:
    """Settings by their words."""
    return dict(zip(lines, OverridesParser.create().parse_overrides(list(lines)), strict=True))


def those_of(name: str, settings: Mapping[str, Override]) -> list[str]:
    """Of these, the choices between whole groups, and the settings that an experiment has."""
    choices = [line for line, setting in settings.items() if setting.key_or_group in GROUPS]
    config = compose("config", [f"experiment={name}", *choices])
    return [line for line, setting in settings.items() if line in choices or setting.is_add() or _has(config, setting)]


def _has(config: DictConfig, setting: Override) -> bool:
    parent, _, leaf = setting.key_or_group.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return isinstance(node, DictConfig) and leaf in node
