"""Checks of a method's parameters, which may come from a command line: a wrong one is named, with what it may be."""

from __future__ import annotations

import math

from bsfa.errors import InputError


def number(name: str, value: object, *, above: float = -math.inf, least: float = -math.inf, most: float) -> None:
    """Refuse anything but a finite number in (above, most] and [least, most].

    Raises
    ------
    InputError
    """
    if isinstance(value, (int, float)) and above < value <= most and value >= least and math.isfinite(value):
        return
    start = f"above {above:g}" if above > least else f"from {least:g}"
    end = f" up to {most:g}" if most < math.inf else ""
    raise InputError(f"{name}={value} must be a number {start}{end}")


def whole(name: str, value: object, least: int) -> None:
    """Refuse anything but a whole number of at least ``least``.

    Raises
    ------
    InputError
    """
    if not (isinstance(value, int) and value >= least):
        raise InputError(f"{name}={value} must be a whole number from {least}")
