"""The definition against one written again, entry by entry, from the contract's words."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsfa import reference
from bsfa.blocks import BlockGrid
from bsfa.gates import Gate
from tests.strategies import calls, gates


def kept_blocks(scores: torch.Tensor, grid: BlockGrid, i: int, gate: Gate, head: int) -> set[int]:
    """Decide the blocks of one query block from its scores (rows, Sk), by plain Python."""
    first = grid.seqlen_k - grid.seqlen_q + 128 * i
    causal = grid.causal or grid.window_size[1] == 0
    entries = grid.entry_mask(i, range(grid.n_k))
    threshold, relative = (at_position(cut, head, first // 128) for cut in (gate.threshold, gate.relative))
    seen: list[list[float]] = [[] for _ in scores]
    kept = set()
    for j in grid.visit(i, gate.order):
        columns = range(64 * j, min(64 * (j + 1), grid.seqlen_k))
        block = [(r, scores[r, c].item()) for r in range(len(scores)) for c in columns if entries[r, c]]
        keep = (gate.keep_diagonal and causal and columns[-1] >= first) or (gate.keep_first and j == 0)
        statistic = max if gate.relative_to == "max" else log_sum_exp
        running = [statistic(row) if row else -math.inf for row in seen]
        if keep or any(s >= max(threshold, running[r] + relative) for r, s in block):
            kept.add(j)
            for r, s in block:
                seen[r].append(s)
    return kept


def at_position(cut: float | torch.Tensor, head: int, position: int) -> float:
    if not isinstance(cut, torch.Tensor):
        return cut
    row = cut[head].reshape(-1)
    return row[min(max(position, 0), len(row) - 1)].item()


def log_sum_exp(scores: list[float]) -> float:
    return math.log(sum(map(math.exp, scores)))


@settings(max_examples=15)
@given(st.data())
def test_the_kept_blocks_are_those_of_the_contract(data):
    q, k, v, grid = data.draw(calls(max_q=140, max_k=260))
    gate = data.draw(gates(q.shape[2]))
    resolved = gate.resolve(grid, q.shape[2], q.device)
    _, _, keep = reference.attention(q, k, v, grid, softmax_scale=0.25, gate=resolved)
    head, i = q.shape[2] - 1, grid.n_q - 1
    scores = 0.25 * (q[0, :, head] @ k[0, :, -1].T)
    expected = kept_blocks(scores[grid.rows(i)], grid, i, gate, head)
    assert set(keep[0, head, i].nonzero().flatten().tolist()) == expected


def test_without_a_gate_it_is_dense_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 150, 4, 16), torch.randn(2, 150, 2, 16), torch.randn(2, 150, 2, 16)
    out, _, _ = reference.attention(q, k, v, BlockGrid(150, 150, causal=True), softmax_scale=0.25)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))
