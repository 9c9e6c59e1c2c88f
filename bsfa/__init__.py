"""BSFA: block-sparse FlashAttention by exact scores (arXiv 2512.07011), training-free, a drop-in for flash-attn."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bsfa.attention import SkipStats
    from bsfa.calibration import calibrate
    from bsfa.cuts import Cuts
    from bsfa.errors import InputError
    from bsfa.fisher import calibrate_cuts
    from bsfa.functional import flash_attn_func, flash_attn_varlen_func
    from bsfa.gates import Gate
    from bsfa.thresholds import Thresholds
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

_HOMES = {
    "Cuts": "cuts",
    "Gate": "gates",
    "InputError": "errors",
    "SkipStats": "attention",
    "Thresholds": "thresholds",
    "apply": "transformers",
    "calibrate": "calibration",
    "calibrate_cuts": "fisher",
    "flash_attn_func": "functional",
    "flash_attn_varlen_func": "functional",
}


def __getattr__(name: str) -> Any:
    """torch and transformers take seconds to import: not before what needs them is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bsfa' has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"bsfa.{_HOMES[name]}"), name)  # asked once: a call is not to pay for it
    return globals()[name]
