"""BSFA: block-sparse FlashAttention by exact scores (arXiv 2512.07011), training-free, a drop-in for flash-attn."""

from bsfa.attention import SkipStats
from bsfa.calibration import calibrate
from bsfa.errors import InputError
from bsfa.functional import flash_attn_func, flash_attn_varlen_func
from bsfa.gates import Gate
from bsfa.thresholds import Thresholds
from bsfa.transformers import apply

__all__ = [
    "Gate",
    "InputError",
    "SkipStats",
    "Thresholds",
    "apply",
    "calibrate",
    "flash_attn_func",
    "flash_attn_varlen_func",
]
