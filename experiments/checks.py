"""Checks of what a user typed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import TypeVar

from bsfa.errors import InputError

H = TypeVar("H", bound=Hashable)


def twice(values: Iterable[H]) -> list[H]:
    """What is there more than once, in the order in which it first comes."""
    return [value for value, times in Counter(values).items() if times > 1]


def counts(setting: str, values: object) -> None:
    """Refuse anything but a list of whole numbers from 1, at least one of them and none twice: what they count, such
    as lengths, is in the ids of samples.

    Raises
    ------
    InputError
    """
    if not (isinstance(values, Sequence) and values and all(type(x) is int and x > 0 for x in values)):
        raise InputError(f"{setting}={values} must be a list of whole numbers from 1, such as [1,2]")
    if twice(values):
        raise InputError(f"{setting}={values} holds a number twice")


def names(setting: str, values: object, known: Collection[object], least: int = 1) -> None:
    """Refuse anything but a list of at least ``least`` of the known names, none twice: they are in the ids of samples.

    Raises
    ------
    InputError
    """
    if not (
        isinstance(values, Sequence)
        and not isinstance(values, str)
        and len(values) >= least
        and all(value in known for value in values)
    ):
        raise InputError(f"{setting}={values} must hold some of {', '.join(map(str, known))}, in a list")
    if repeated := twice(values):
        raise InputError(f"{setting} holds {', '.join(map(str, repeated))} twice")


def choice(setting: str, value: object, known: Collection[object]) -> None:
    """Refuse anything but one of the known values.

    Raises
    ------
    InputError
    """
    if value not in known:
        raise InputError(f"{setting}={value} is none of {', '.join(map(str, known))}")


def text(setting: str, value: object) -> None:
    """Refuse anything but text that is not empty.

    Raises
    ------
    InputError
    """
    if not (isinstance(value, str) and value):
        raise InputError(f"{setting}={value} must be text and not empty")


def switch(setting: str, value: object) -> None:
    """Refuse anything but true and false.

    Raises
    ------
    InputError
    """
    if not isinstance(value, bool):
        raise InputError(f"{setting}={value} must be true or false")


def amounts(setting: str, values: object) -> None:
    """Refuse anything but a list of numbers above 0, at least one of them and none twice.

    Raises
    ------
    InputError
    """
    if not (isinstance(values, Sequence) and values and all(type(x) in (int, float) and x > 0 for x in values)):
        raise InputError(f"{setting}={values} must be numbers above 0, such as [0.005,0.02]")
    if twice(values):
        raise InputError(f"{setting}={values} holds a number twice")


def screens(setting: str, values: object) -> None:
    """Refuse anything but a list of shares above 0 of a screen's bound, see `bsfa.screen`.

    Raises
    ------
    InputError
    """
    if not (isinstance(values, Sequence) and all(type(x) in (int, float) and 0 < x < math.inf for x in values)):
        raise InputError(f"{setting}={values} must be shares above 0 of a screen's bound, such as [0.25,1.0]")
    if twice(values):
        raise InputError(f"{setting}={values} holds a share twice")


def shares(setting: str, values: object, least: int) -> None:
    """Refuse anything but a list of at least ``least`` shares from 0 to below 1.

    Raises
    ------
    InputError
    """
    if not (
        isinstance(values, Sequence)
        and len(values) >= least
        and all(type(x) in (int, float) and 0 <= x < 1 for x in values)
    ):
        raise InputError(f"{setting}={values} must be shares from 0 to below 1, such as [0.5,0.8]")
    if twice(values):
        raise InputError(f"{setting}={values} holds a share twice")


def count(setting: str, value: object) -> None:
    """Refuse anything but a whole number from 1.

    Raises
    ------
    InputError
    """
    if not (type(value) is int and value > 0):
        raise InputError(f"{setting}={value} must be a whole number from 1")


def seed(setting: str, value: object) -> None:
    """Refuse anything but a whole number from 0.

    Raises
    ------
    InputError
    """
    if not (type(value) is int and value >= 0):
        raise InputError(f"{setting}={value} must be a whole number from 0")
