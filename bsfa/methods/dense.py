"""Exact attention through the shared kernels: the line every sparse method is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bsfa.methods.base import Attend, Method
from bsfa.model import ModelInfo


@dataclass(frozen=True)
class Dense(Method):
    """Every visible block, no gate."""

    name: ClassVar[str] = "dense"
    packs: ClassVar[bool] = True

    def bind(self, model: ModelInfo) -> Attend:
        return lambda call: call.attend()
