"""Checks of what a user typed."""

from __future__ import annotations

from collections.abc import Sequence

from bsfa.errors import InputError


def counts(setting: str, values: object) -> None:
    """Refuse anything but a list of whole numbers from 1, at least one of them and none twice: what they count, such
    as lengths, is in the ids of samples.

    Raises
    ------
    InputError
    """
    if not (isinstance(values, Sequence) and values and all(isinstance(x, int) and x > 0 for x in values)):
        raise InputError(f"{setting}={values} must be a list of whole numbers from 1, such as [1,2]")
    if len(set(values)) < len(values):
        raise InputError(f"{setting}={values} holds a number twice")


def shares(setting: str, values: object, least: int) -> None:
    """Refuse anything but a list of at least ``least`` shares from 0 to below 1.

    Raises
    ------
    InputError
    """
    if not (
        isinstance(values, Sequence)
        and len(values) >= least
        and all(isinstance(x, (int, float)) and 0 <= x < 1 for x in values)
    ):
        raise InputError(f"{setting}={values} must be shares from 0 to below 1, such as [0.5,0.8]")


def count(setting: str, value: object) -> None:
    """Refuse anything but a whole number from 1.

    Raises
    ------
    InputError
    """
    if not (isinstance(value, int) and value > 0):
        raise InputError(f"{setting}={value} must be a whole number from 1")


def seed(setting: str, value: object) -> None:
    """Refuse anything but a whole number from 0.

    Raises
    ------
    InputError
    """
    if not (isinstance(value, int) and value >= 0):
        raise InputError(f"{setting}={value} must be a whole number from 0")
