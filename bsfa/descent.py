"""Choices that cost least when their errors are taken together.

A cell's choice o makes an error ``a[o]`` in every sample, and a selection's loss is the mean over samples of the
squared sum of its cells' errors: errors that cancel cost less together than apart, errors that agree cost more. With
few samples the cross terms are mostly noise, so a share of them is believed, as covariances are shrunk towards their
diagonal (Ledoit and Wolf 2004). Weights have been pruned by the whole of such a form, too (Hassibi and Stork 1993,
Optimal Brain Surgeon).
"""

from __future__ import annotations

import numpy as np

SWEEPS = 4  # few choices change after two


class Together:
    """Cells whose errors count together.

    Parameters
    ----------
    errors : fp32 (cells, options, samples)
        In units in which the loss is their mean square.
    own : (cells, options)
        The loss of each choice by itself.
    coupling : float
        The share of the cross terms that is believed; with 0 the losses are added up.
    """

    def __init__(self, errors: np.ndarray, own: np.ndarray, coupling: float) -> None:
        self._errors, self._own, self._coupling = errors, own, coupling
        self._alone = (1 - coupling) * own + coupling * np.square(errors).mean(-1) if coupling else own

    def descend(self, start: np.ndarray, price: np.ndarray) -> np.ndarray:
        """Improve a selection, int (cells,), until no single choice does. ``price`` (cells, options) comes on top."""
        if not self._coupling:
            return start
        chosen = start.copy()
        together, alone = self._sum(chosen), self._alone + price
        weight = 2 * self._coupling / self._errors.shape[-1]
        for _ in range(SWEEPS):
            before = chosen.copy()
            for cell, error in enumerate(self._errors):
                others = together - error[chosen[cell]]
                chosen[cell] = (alone[cell] + weight * (error @ others)).argmin()
                together = others + error[chosen[cell]]
            if (chosen == before).all():
                break
        return chosen

    def loss(self, chosen: np.ndarray) -> float:
        """Of a selection."""
        apart = float(self._own[np.arange(len(chosen)), chosen].sum())
        if not self._coupling:
            return apart
        return (1 - self._coupling) * apart + self._coupling * float(np.square(self._sum(chosen)).mean())

    def _sum(self, chosen: np.ndarray) -> np.ndarray:
        """The errors of a selection, (samples,)."""
        return self._errors[np.arange(len(chosen)), chosen].sum(0)
