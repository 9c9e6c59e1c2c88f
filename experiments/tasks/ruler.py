"""RULER's tasks that need no question-answering set (arXiv 2404.06654): its parameters, our own words and texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from experiments.tasks.common_words import CommonWords
from experiments.tasks.frequent_words import FrequentWords
from experiments.tasks.needles import Needles
from experiments.tasks.suite import Kind, Suite
from experiments.tasks.variables import VariableTracking


@dataclass(frozen=True)
class Ruler(Suite):
    """Eleven tasks of thirteen; see `Suite`."""

    name: ClassVar[str] = "ruler"
    kinds: ClassVar[Mapping[str, Kind]] = {
        "niah_single_1": Needles("noise"),
        "niah_single_2": Needles("prose"),
        "niah_single_3": Needles("prose", value="uuid"),
        "niah_multikey_1": Needles("prose", keys=4),
        "niah_multikey_2": Needles("needles"),
        "niah_multikey_3": Needles("needles", key="uuid", value="uuid"),
        "niah_multivalue": Needles("prose", values=4),
        "niah_multiquery": Needles("prose", keys=4, asked=4),
        "vt": VariableTracking(),
        "cwe": CommonWords(),
        "fwe": FrequentWords(),
    }
