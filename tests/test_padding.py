"""Padded batches: what attends their real tokens, wherever the padding is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bsfa import attention, cuda
from bsfa.gates import Gate
from bsfa.methods.base import Call
from bsfa.padding import Padding

GATE = Gate(relative=-1.0, relative_to="max", order="sink")

before_and_after = st.tuples(st.integers(0, 200), st.integers(0, 200))


def sides(length: int, sizes: list[tuple[int, int]]) -> torch.Tensor:
    """Padding before and after."""
    place = torch.arange(length)
    return torch.stack([(place >= before) & (place < length - after) for before, after in sizes])


def draw(batch: int, n_q: int, n_k: int) -> Call:
    torch.manual_seed(0)
    shapes = ((batch, n_q, 4, 16), (batch, n_k, 2, 16), (batch, n_k, 2, 16))
    return Call(0, *(torch.randn(shape) for shape in shapes))


def attend(call: Call) -> attention.Attended:
    return call.attend(gate=GATE)


def is_as_alone(mask: torch.Tensor, n_queries: int, packs: bool) -> None:
    written = mask.shape[1]
    call = draw(len(mask), n_queries, written + 5)  # five slots of the cache are not written
    found = Padding.of(mask, n_queries).attend(attend, packs, call)
    for b, row in enumerate(mask):
        rows = row[written - n_queries :]
        keys = torch.nn.functional.pad(row, (0, 5))
        want = attend(Call(0, call.q[b : b + 1, rows], call.k[b : b + 1, keys], call.v[b : b + 1, keys]))
        assert torch.equal(found.out[b, rows], want.out[0])
        assert (found.out[b, ~rows] == 0).all()
        assert torch.equal(found.stats.kept[b], want.stats.kept[0])
        assert torch.equal(found.stats.total[b], want.stats.total[0])


@given(st.lists(before_and_after, min_size=1, max_size=4), st.integers(1, 300), st.booleans())
def test_padding_before_and_after(sizes, n_queries, packs):
    is_as_alone(sides(300, sizes), n_queries, packs)


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3), st.booleans())
def test_padding_between(rows, packs):
    is_as_alone(torch.tensor(rows).repeat_interleave(30, dim=1), 200, packs)


@pytest.mark.parametrize(
    ("n_queries", "queries", "longest"),
    [(300, [[60, 300], [0, 280]], 280), (100, [[0, 100], [0, 80]], 100)],
    ids=["whole", "the last chunk"],
)
@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_one_launch_reads_the_batch_in_place(n_queries, queries, longest, monkeypatch):
    call, seen = draw(2, n_queries, 300), []

    def launch(q, k, v, spans_q, spans_k, *longest, **options):
        assert q is call.q
        assert k is call.k
        assert v is call.v
        seen.append((spans_q.tolist(), spans_k.tolist(), longest))
        return q, None, torch.zeros(2, 4, dtype=torch.int64)

    monkeypatch.setattr(cuda, "attend_varlen", launch)
    Padding.of(sides(300, [(60, 0), (0, 20)]), n_queries).attend(attend, True, call)
    assert seen == [(queries, [[60, 300], [0, 280]], (longest, 280))]
