"""Reasoning over a long text: one to three facts hidden in prose, and RULER's variable tracking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from experiments.tasks.facts import Facts
from experiments.tasks.suite import Kind, Suite
from experiments.tasks.variables import VariableTracking


@dataclass(frozen=True)
class Reasoning(Suite):
    """Facts and variables; see `Suite`."""

    name: ClassVar[str] = "reasoning"
    kinds: ClassVar[Mapping[str, Kind]] = {
        "one_fact": Facts(1),
        "two_facts": Facts(2),
        "three_facts": Facts(3),
        "vt": VariableTracking(),
    }
