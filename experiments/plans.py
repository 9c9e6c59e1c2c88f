"""What a command would run, before it runs: nothing is loaded, and no GPU is needed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pandas as pd

from experiments.records import Run


@dataclass(frozen=True)
class Planned:
    """One run of the store.

    Attributes
    ----------
    method, strength : str
        As tables name them.
    calibration : str
        Its texts, how many and how long.
    lengths : sequence of int
        Tokens.
    ids : collection of str
        Its samples, as many at each length.
    readings : int
        How often a model reads each sample.
    run : Run
    """

    method: str
    strength: str
    calibration: str
    lengths: Sequence[int]
    ids: Collection[str]
    readings: int
    run: Run

    @property
    def left(self) -> int:
        """Samples without a record."""
        if self.run.complete:
            return 0
        return len(set(self.ids) - self.run.done())

    @property
    def state(self) -> str:
        if self.run.complete:
            return "complete"
        done = len(self.ids) - self.left
        return f"{done} of {len(self.ids)} done" if done else "to do"


def markdown(plan: Sequence[Planned]) -> str:
    """A row a run."""
    rows = [
        {
            "experiment": one.run.config["experiment"],
            "method": one.method,
            "strength": one.strength,
            "calibration": one.calibration,
            "lengths": ", ".join(map(str, one.lengths)),
            "n": len(one.ids),
            "state": one.state,
        }
        for one in plan
    ]
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
