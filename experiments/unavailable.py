"""What one of several needs and is not there: the others run, and the command ends by saying which did not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import ClassVar

from bsfa.errors import InputError

log = logging.getLogger(__name__)


class Unavailable(InputError):
    """A model, data, package, GPU or access is missing; the message says which, and the way out. ``what`` that means
    for one of several."""

    what: ClassVar[str] = "not run"


def reason(error: BaseException) -> str:
    """The first line of what an error says; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def each(names: Iterable[str], run: Callable[[str], None], then: Callable[[], None] = lambda: None) -> None:
    """Run one task or experiment after another, ``then`` what is to follow whether or not all were there.

    Raises
    ------
    Unavailable
        Once all have had their turn: those that were, with the reason of each.
    """
    missing: dict[str, list[str]] = {}
    kinds: set[type[Unavailable]] = set()
    for name in names:
        try:
            run(name)
        except Unavailable as error:
            said = str(error)  # the error itself would hold its frames, and with them a model
            kinds.add(type(error))
            missing.setdefault(error.what, []).append(f"{name} ({said})")
            log.info("%s: %s: %s", name, error.what, said)
    then()
    if missing:
        kind = kinds.pop() if len(kinds) == 1 else Unavailable  # one of several experiments may have several tasks
        raise kind("; ".join(f"{what}: {'; '.join(several)}" for what, several in missing.items()))
