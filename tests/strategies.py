"""Hypothesis strategies: attention calls of odd shapes, and gates for them."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from bsfa.blocks import ORDERS, BlockGrid
from bsfa.gates import RELATIVE_TO, Gate

WINDOWS = st.sampled_from([(-1, -1), (-1, -1), (50, -1), (100, 3), (-1, 20), (0, 0)])


@st.composite
def calls(draw, max_q: int = 300, max_k: int = 400):
    """q, k, v and their grid: GQA groups, chunk offsets of either sign, ragged ends, windows."""
    seqlen_q, seqlen_k = draw(st.integers(1, max_q)), draw(st.integers(1, max_k))
    batch, n_kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    q = torch.randn(batch, seqlen_q, n_kv * group, 16, generator=generator)
    k, v = (torch.randn(batch, seqlen_k, n_kv, 16, generator=generator) for _ in range(2))
    return q, k, v, BlockGrid(seqlen_q, seqlen_k, draw(st.booleans()), draw(WINDOWS))


@st.composite
def gates(draw, n_heads: int):
    """Gates that cut about half the blocks of unit-variance scores, absolute, relative, and both."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    table = torch.randn(n_heads, draw(st.integers(1, 6)), generator=generator) * 0.5 + 2.2
    return Gate(
        threshold=draw(st.sampled_from([-math.inf, 2.5, table[:, 0], table])),
        relative=draw(st.sampled_from([-math.inf, -0.5, table[:, 0] - 3.0, table - 3.0])),
        relative_to=draw(st.sampled_from(RELATIVE_TO)),
        order=draw(st.sampled_from(ORDERS)),
        keep_diagonal=draw(st.booleans()),
        keep_first=draw(st.booleans()),
    )
