"""The file of cuts: what is chosen from it, what is refused."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsfa import Cuts, InputError
from bsfa.distance import class_rows, classes
from bsfa.model import ModelInfo
from bsfa.provenance import Provenance

SHARES = (0.0, 0.1, 0.5)
TAIL = 8


def cuts(kept: list, cost: list, shares=SHARES, edges=(2,), **changes) -> Cuts:
    """From tables (shares, heads * classes) of one layer, in which every cell changes a sample of its own."""
    shape = (len(shares), 1, -1, len(edges) + 1)
    cost = torch.tensor(cost)
    cells = cost.shape[1]
    change = (2 * TAIL * cells * cost).sqrt()[..., None] * torch.eye(cells)
    return Cuts(torch.tensor(kept).view(shape), change.view(*shape, cells), TAIL, shares, edges, **changes)


def ladder(seed: int) -> Cuts:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(6, 2, 3, 4, generator=generator).sort(0, descending=True).values * 100
    change = torch.rand(6, 2, 3, 4, 1, generator=generator).sort(0).values ** 2 * torch.randn(5, generator=generator)
    change[0] = 0
    return Cuts(kept, change, 1, (0.0, 0.01, 0.03, 0.1, 0.3, 1e30), (2, 4, 8))


def test_the_cheapest_blocks_are_dropped_first():
    found = cuts([[10.0, 10.0], [5.0, 5.0], [1.0, 1.0]], [[0.0, 0.0], [0.125, 0.25], [2.0, 0.75]])
    for kl, levels in ((0.1, [0, 0]), (0.2, [1, 0]), (0.4, [1, 1]), (0.9, [1, 2]), (3.0, [2, 2])):
        expected = torch.tensor([math.log(SHARES[n]) if n else -math.inf for n in levels])
        assert torch.equal(found.select(kl).flatten(), expected), kl
    assert found.skip_ratio(0.4) == pytest.approx(0.5)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.lists(st.floats(1e-6, 10), min_size=2, max_size=5))
def test_a_larger_budget_never_lowers_a_cut_and_is_never_overrun(seed, budgets):
    found = ladder(seed)
    ladders = torch.tensor([-math.inf, *map(math.log, found.shares[1:])])
    tables = [found.select(kl) for kl in sorted(budgets)]
    assert all((low <= high).all() for low, high in itertools.pairwise(tables))
    for kl, table in zip(sorted(budgets), tables, strict=True):
        level = torch.searchsorted(ladders, table)[None]
        assert found.cost.gather(0, level).sum() <= kl * (1 + 1e-6)


def test_errors_that_cancel_cost_less_together_and_those_that_agree_more():
    kept = torch.tensor([2.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 3, 1)
    change = torch.zeros(2, 1, 3, 1, 2)
    change[1, 0, :, 0] = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.9]])
    found = Cuts(kept, change, 1, (0.0, 0.5), ())
    skipped = {coupling: found.select(0.21, coupling=coupling).isfinite().flatten().tolist() for coupling in (0, 1)}
    assert skipped == {0: [False, False, True], 1: [True, True, True]}
    agreeing = Cuts(kept, change.abs(), 1, (0.0, 0.5), ())
    assert agreeing.skip_ratio(0.71) == pytest.approx(1 / 2)
    assert agreeing.skip_ratio(0.71, coupling=1.0) == pytest.approx(1 / 3)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.floats(1e-4, 3), st.floats(0, 1), st.sampled_from([math.inf, 0.1]))
def test_a_budget_is_not_overrun_together(seed, kl, coupling, most):
    found = ladder(seed)
    ladders = torch.tensor([-math.inf, *map(math.log, found.shares[1:])])
    level = torch.searchsorted(ladders, found.select(kl, most=most, coupling=coupling))[None]
    alone = found.cost.gather(0, level).sum()
    together = found.change.gather(0, level[..., None].expand(1, *found.change.shape[1:])).sum((0, 1, 2, 3))
    loss = (1 - coupling) * alone + coupling * together.square().mean() / 2
    assert loss <= kl * (1 + 1e-5)
    kept = found.kept.gather(0, level).sum() / found.kept[0].sum()
    assert found.skip_ratio(kl, most=most, coupling=coupling) == pytest.approx(1 - float(kept), abs=1e-6)


@pytest.mark.parametrize(("shared", "axes"), [(["layers"], [0]), (["heads", "layers"], [0, 1]), (["positions"], [2])])
def test_shared_axes_have_one_cut_and_skip_no_more(shared, axes):
    found = ladder(3)
    table = found.select(0.5, shared)
    for axis in axes:
        assert (table == table.narrow(axis, 0, 1)).all()
    assert table.unique().numel() > 1 or len(shared) == 2
    assert found.skip_ratio(0.5, shared) <= found.skip_ratio(0.5)


def test_a_class_that_no_text_reached_is_cut_as_the_one_before():
    found = cuts([[10.0, 0.0], [5.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.1, 0.0], [2.0, 0.0]])
    assert torch.equal(found.select(0.5), torch.full((1, 1, 2), math.log(0.1)))


@given(st.integers(1, 40), st.lists(st.integers(1, 30), unique=True).map(sorted), st.integers(0, 127))
def test_the_rows_of_a_class_are_its_blocks(n, edges, missing):
    seqlen = 128 * n - missing
    by_block = classes(n, edges).tolist()
    distance = [n - 1 - i for i in range(n)]
    assert by_block == [sum(d >= edge for edge in edges) for d in distance]
    for c, rows in enumerate(class_rows(seqlen, edges)):
        own = [i for i in range(n) if by_block[i] == c]
        assert list(range(rows.start // 128, -(-rows.stop // 128))) == own
    assert sum(rows.stop - rows.start for rows in class_rows(seqlen, edges)) == seqlen


def test_a_saved_file_is_read_as_it_was(tmp_path):
    origin = Provenance("m", "f", 1024, 4, data="prose")
    written = replace(ladder(0), provenance=origin)
    written.save(tmp_path / "new" / "cuts.safetensors")
    read = Cuts.load(tmp_path / "new" / "cuts.safetensors")
    assert torch.equal(read.kept, written.kept)
    assert torch.equal(read.change, written.change)
    assert (read.tail, read.shares, read.edges, read.provenance) == (1, written.shares, written.edges, origin)
    assert read.digest() == written.digest() != ladder(1).digest()


def test_what_is_no_file_of_cuts_is_refused(tmp_path):
    with pytest.raises(InputError, match="no file of cuts at"):
        Cuts.load(tmp_path / "none")
    (tmp_path / "torn").write_bytes(b"\x10\x00")
    with pytest.raises(InputError, match="not a cuts file, or is damaged"):
        Cuts.load(tmp_path / "torn")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cuts(torch.zeros(3, 2), torch.zeros(3, 2), TAIL, SHARES, ()), "kept and change must be tables"),
        (lambda: cuts([[1.0] * 2] * 3, [[0.0] * 2] * 3, edges=()), None),
        (lambda: cuts([[1.0] * 2] * 2, [[0.0] * 2] * 2, shares=(0.1, 0.2)), "must rise from 0"),
        (lambda: cuts([[1.0] * 2] * 3, [[0.0] * 2] * 3, edges=(0,)), "edges=.* must rise, from 1"),
        (lambda: cuts([[1.0] * 2] * 3, [[math.nan] * 2] * 3), "NaN"),
        (lambda: ladder(0).select(0.1, most=1e-6), "most=1e-06 is under .*, the lowest cut there is"),
        (lambda: ladder(0).select(0.1, ["rows"]), "shared=rows is none of layers, heads, positions"),
    ],
)
def test_tables_without_sense_are_refused(make, message):
    if message is None:
        make()
        return
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelInfo("m", "f", 4, 4, 16, (torch.device("cpu"),) * 2), "2 layers and 3 heads"),
        (ModelInfo("m", "g", 3, 3, 16, (torch.device("cpu"),) * 2), "the weights differ"),
    ],
)
def test_another_model_is_refused(model, message):
    with pytest.raises(InputError, match=message):
        replace(ladder(0), provenance=Provenance("m", "f")).check(model)


def test_no_cut_is_above_the_most_that_a_head_may_drop():
    found = ladder(0)
    assert found.select(1e9, most=0.1).exp().max() == pytest.approx(0.1)
    assert found.skip_ratio(1e9, most=0.1) < found.skip_ratio(1e9)
