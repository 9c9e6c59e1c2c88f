"""BSFA: block-sparse FlashAttention by exact scores (arXiv 2512.07011), training-free, a drop-in for flash-attn."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bsfa.attention import SkipStats
from bsfa.cuts import Cuts
from bsfa.errors import InputError
from bsfa.functional import flash_attn_func, flash_attn_varlen_func
from bsfa.gates import Gate
from bsfa.thresholds import Thresholds

if TYPE_CHECKING:
    from bsfa.calibration import calibrate
    from bsfa.fisher import calibrate_cuts
    from bsfa.transformers import apply

__all__ = [
    "Cuts",
    "Gate",
    "InputError",
    "SkipStats",
    "Thresholds",
    "apply",
    "calibrate",
    "calibrate_cuts",
    "flash_attn_func",
    "flash_attn_varlen_func",
]

_OF_MODELS = {"apply": "bsfa.transformers", "calibrate": "bsfa.calibration", "calibrate_cuts": "bsfa.fisher"}


def __getattr__(name: str) -> Any:
    """What works on a model brings transformers, which takes seconds to import: not before it is asked for."""
    if name not in _OF_MODELS:
        raise AttributeError(f"module 'bsfa' has no attribute {name!r}")
    return getattr(import_module(_OF_MODELS[name]), name)
