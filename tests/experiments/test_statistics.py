from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.statistics import mean_interval, paired_interval, quartiles, summarise

BINARY = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60)
GRADED = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [  # Wilson's interval, by its formula
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (15, 16, 0.7167, 0.9889),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_scores_of_0_and_1_have_wilsons_interval(hits, n, low, high):
    assert mean_interval([1.0] * hits + [0.0] * (n - hits)) == pytest.approx((low, high), abs=1e-4)


@given(BINARY | GRADED)
def test_an_interval_holds_its_mean_within_0_and_1(scores):
    low, high = mean_interval(scores)
    mean = sum(scores) / len(scores)
    assert 0.0 <= low <= mean + 1e-12
    assert mean - 1e-12 <= high <= 1.0


@given(GRADED)
def test_the_interval_of_a_record_is_the_same_in_every_report(scores):
    assert mean_interval(scores) == mean_interval(list(scores))


def test_more_samples_narrow_the_interval():
    few, many = ([0.2, 0.5, 0.9] * n for n in (3, 30))
    assert mean_interval(few)[0] < mean_interval(many)[0] < mean_interval(many)[1] < mean_interval(few)[1]


def test_pairing_sees_what_two_intervals_apart_would_hide():
    dense = [0.0, 1.0] * 10
    assert paired_interval(dense, dense) == (0.0, 0.0)
    worse = [score - 0.1 for score in dense]
    assert paired_interval(worse, dense) == pytest.approx((-0.1, -0.1))


def test_a_loss_on_some_samples_has_an_interval_below_zero_only_if_it_is_sure():
    dense = [1.0] * 20
    low, high = paired_interval([0.0] * 10 + [1.0] * 10, dense)
    assert low < -0.5 < high < 0.0
    low, high = paired_interval([0.0] + [1.0] * 19, dense)
    assert low < -0.05 < high == 0.0


def test_one_sample_has_no_spread():
    assert paired_interval([0.0], [1.0]) == (-1.0, -1.0)
    assert mean_interval([0.5]) == (0.5, 0.5)
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)


def test_a_summary_has_every_cell_and_all_of_them_together():
    samples = [
        {"haystack": haystack, "length": length, "score": score, "skip_ratio": 0.5, "ttft_s": 1.0 * length}
        for haystack, score in (("noise", 1.0), ("prose", 0.0))
        for length in (1, 2)
    ]
    summary = summarise(samples)
    assert (summary["n"], summary["score"], summary["ttft_median_s"]) == (4, 0.5, 1.5)
    assert [(cell["haystack"], cell["length"], cell["n"], cell["score"]) for cell in summary["cells"]] == [
        ("noise", 1, 1, 1.0),
        ("noise", 2, 1, 1.0),
        ("prose", 1, 1, 0.0),
        ("prose", 2, 1, 0.0),
    ]
