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


def descend(
    errors: np.ndarray, own: np.ndarray, kept: np.ndarray, start: np.ndarray, price: float, coupling: float
) -> np.ndarray:
    """Improve a selection cell by cell until no single choice does.

    Parameters
    ----------
    errors : fp32 (cells, options, samples)
        In units in which the loss is their mean square.
    own : (cells, options)
        The loss of each choice by itself.
    kept : (cells, options)
        The blocks that each choice keeps.
    start : int (cells,)
        The choices to begin with.
    price : float
        Loss that a block less may cost.
    coupling : float
        The share of the cross terms that is believed.

    Returns
    -------
    int (cells,)
    """
    chosen = start.copy()
    together = errors[np.arange(len(chosen)), chosen].sum(0)
    alone = (1 - coupling) * own + coupling * np.square(errors).mean(-1) + price * kept
    weight = 2 * coupling / errors.shape[-1]
    for _ in range(SWEEPS):
        before = chosen.copy()
        for cell, error in enumerate(errors):
            others = together - error[chosen[cell]]
            chosen[cell] = (alone[cell] + weight * (error @ others)).argmin()
            together = others + error[chosen[cell]]
        if (chosen == before).all():
            break
    return chosen
