import math

import numpy as np
import pytest
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from patchssl.eval.metrics import average_precision, micro_average_precision, precision_at, wilson_interval
from patchssl.runtime.errors import DataError, UsageError

RELEVANCE = st.lists(st.booleans(), max_size=60)


def area_under_precision_recall(relevant, num_positives):
    """Trapezoids between all prefixes of the ranking, the empty one with precision 1."""
    found = np.concatenate([[0], np.cumsum(relevant, dtype=float)])
    precision = np.concatenate([[1.0], found[1:] / np.arange(1, len(found))])
    return float((np.diff(found / num_positives) * (precision[1:] + precision[:-1]) / 2).sum())


@each(("ranks", "num_positives", "expected"), [
    ([0, 1, 2], 3, 1),
    ([0], 4, 1 / 4),  # three were never found
    ([1], 1, (0 + 1 / 2) / 2),
    ([0, 2], 2, (1 + (1 / 2 + 2 / 3) / 2) / 2),
    ([], 2, 0),
])
def test_average_precision_by_hand(ranks, num_positives, expected):
    assert average_precision(ranks, num_positives) == pytest.approx(expected, abs=1e-15)


@given(RELEVANCE, st.integers(0, 5))
def test_average_precision_is_the_area_between_all_prefixes(relevant, num_missed):
    positives = sum(relevant) + num_missed
    if positives:
        expected = area_under_precision_recall(relevant, positives)
        assert average_precision(np.flatnonzero(relevant), positives) == pytest.approx(expected, abs=1e-12)


def test_precision_at_divides_by_the_last_positives_place_when_that_is_before_k():
    assert precision_at([1, 3], ks=(1, 2, 3, 4, 10)) == {1: 0, 2: 1 / 2, 3: 1 / 3, 4: 2 / 4, 10: 2 / 4}
    assert precision_at([0], ks=(1, 5, 10)) == {1: 1, 5: 1, 10: 1}
    assert precision_at([], ks=(5,)) == {5: 0}


@given(RELEVANCE.filter(any), st.integers(1, 70))
def test_precision_at_counts_down_to_k_or_to_the_last_positive(relevant, k):
    while not relevant[-1]:
        relevant = relevant[:-1]
    shown = relevant[:k]
    assert precision_at(np.flatnonzero(relevant), ks=(k,)) == {k: pytest.approx(sum(shown) / len(shown))}


@each(("ranks", "num_positives"), [
    ([], 0), ([0, 1], 1), ([1, 0], 2), ([0, 0], 2), ([-1], 1), ([0.5], 1), ([[0]], 1),
])
def test_ranks_that_cannot_be_are_refused(ranks, num_positives):
    with pytest.raises(UsageError):
        average_precision(ranks, num_positives)


def test_a_precision_at_zero_is_refused():
    with pytest.raises(UsageError, match="every k is 1 or more"):
        precision_at([0], ks=(1, 0))


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=12), st.randoms())
def test_pooled_queries_make_one_curve(correct, random):
    correct = np.array(correct)
    scores = np.arange(correct.size, dtype=float)
    random.shuffle(scores)
    scores = scores.reshape(correct.shape)
    pooled = [c for _, c in sorted(zip(scores.ravel(), correct.ravel(), strict=True), reverse=True)]
    positives = int(correct.sum()) + 1
    expected = area_under_precision_recall(pooled, positives)
    assert micro_average_precision(scores, correct, positives) == pytest.approx(expected, abs=1e-12)


def test_one_threshold_must_do_for_all_queries():
    """Either query is ranked perfectly; pooled, the wrong result of the first comes before the second's right one."""
    scores, correct = np.array([[0.9, 0.8], [0.5, 0.1]]), np.array([[True, False], [True, False]])
    assert micro_average_precision(scores, correct, 2) == pytest.approx(average_precision([0, 2], 2))
    scores[1] += 0.35
    assert micro_average_precision(scores, correct, 2) == 1


def test_equal_scores_earn_nothing_in_any_order():
    correct = np.array([True] + [False] * 9)
    for order in (correct, correct[::-1]):
        assert micro_average_precision(np.zeros(10), order, 1) == pytest.approx(average_precision([9], 1))


def test_pooled_scores_that_cannot_be_sorted_are_refused():
    with pytest.raises(DataError, match="1 of 2 scores are NaN"):
        micro_average_precision(np.array([0.1, np.nan]), np.array([True, False]), 1)
    with pytest.raises(UsageError, match="3 scores and 2 judgments"):
        micro_average_precision(np.zeros(3), np.zeros(2), 1)


@each(("num_correct", "total"), [(8, 10), (1, 1), (0, 7), (6_721, 10_000)])
def test_wilsons_bounds_are_where_the_score_test_turns(num_correct, total):
    """Both solve (share - p)^2 = z^2 p (1 - p) / total."""
    low, high = wilson_interval(num_correct, total)
    share = num_correct / total
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        if bound not in (0, 1):
            assert abs(share - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / total), rel=1e-5)
    assert wilson_interval(num_correct, total, confidence=0.99)[1] >= high


@settings(max_examples=60, deadline=None)
@given(total=st.integers(1, 5000), data=st.data())
def test_wilsons_bounds_are_scipys(total, data):
    num_correct = data.draw(st.integers(0, total))
    expected = binomtest(num_correct, total).proportion_ci(0.9, method="wilson")
    low, high = wilson_interval(num_correct, total, confidence=0.9)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= num_correct / total <= high <= 1


@each(("num_correct", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_no_interval_for_what_is_no_accuracy(num_correct, total):
    with pytest.raises(UsageError, match="no accuracy"):
        wilson_interval(num_correct, total)
