import dataclasses

import numpy as np
import pytest
from cases import each
from scipy.stats import binomtest, bootstrap, permutation_test

from patchssl.eval.records import Result, pack_bits
from patchssl.report.tables.stats import clearly_better, paired_difference, per_query
from patchssl.runtime.errors import DataError

BASE = Result(model="m", method="other", arch="vit", weights_sha256="a" * 64, task="knn", dataset="d",
              dataset_fingerprint="d" * 64, protocol="native", protocol_version=1, protocol_settings={},
              protocol_fingerprint="1" * 16, metrics={"top1@20": 0.6}, versions={}, device="cpu", duration=1.0)


def answers(seed: int, num: int = 200) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (rng.random(num) < 0.5).astype(float), (rng.random(num) < 0.62).astype(float)


def precisions(seed: int, num: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    first = rng.random(num)
    return first, np.clip(first + rng.normal(0.04, 0.1, num), 0, 1)


@each("make", [answers, precisions])
@each("seed", [1, 2])
def test_interval_and_p_are_those_of_scipy(make, seed):
    first, second = make(seed)
    found = paired_difference(first, second)
    drawn = bootstrap((second - first,), np.mean, method="percentile", n_resamples=9999,
                      random_state=np.random.default_rng(5)).confidence_interval
    tested = permutation_test((first, second), lambda a, b, axis: (b - a).mean(axis=axis), permutation_type="samples",
                              vectorized=True, n_resamples=9999, random_state=np.random.default_rng(6))
    assert found.mean == pytest.approx(second.mean() - first.mean())
    width = found.high - found.low
    assert (found.low, found.high) == pytest.approx((drawn.low, drawn.high), abs=width / 25)
    assert found.p == pytest.approx(tested.pvalue, abs=0.02)
    assert found.num == len(first)


def test_of_right_and_wrong_the_p_value_is_mcnemars():
    # 30 images only the second gets right, 14 only the first: binomial of 30 in 44
    first = np.repeat([1.0, 0, 1, 0], [14, 30, 100, 56])
    second = np.repeat([0.0, 1, 1, 0], [14, 30, 100, 56])
    found = paired_difference(first, second)
    assert found.mean == pytest.approx(16 / 200)
    assert found.p == pytest.approx(binomtest(30, 44).pvalue, abs=0.006)
    # normal approximation of the interval: deviation of a gap sqrt(44/200 - 0.08^2)
    half = 1.96 * np.sqrt((44 / 200 - 0.08**2) / 200)
    assert (found.low, found.high) == pytest.approx((0.08 - half, 0.08 + half), abs=0.006)


def test_what_few_queries_can_say():
    """All of five queries better: 2 of 32 sign patterns are as far from 0, however large the gaps."""
    assert paired_difference(np.zeros(5), np.array([0.5, 0.6, 0.7, 0.8, 0.9])).p == pytest.approx(2 / 32, abs=0.008)
    one = paired_difference(np.zeros(1), np.ones(1))
    assert one.p == 1 and not one.significant


def test_no_difference_is_none():
    same = np.array([0.0, 1, 1, 0.25])
    assert paired_difference(same, same) == (0, 0, 0, 1, 4)
    assert not clearly_better(same, same)


def test_the_seed_fixes_what_is_drawn_and_the_order_of_models_only_turns_the_sign():
    first, second = precisions(3)
    one, other = paired_difference(first, second, seed=4), paired_difference(second, first, seed=4)
    assert one == paired_difference(first, second, seed=4)
    assert one != paired_difference(first, second, seed=5)
    assert other.mean == -one.mean
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low), abs=0.005)


def test_queries_without_a_value_are_left_out_and_must_be_the_same():
    first, second = np.array([0.1, np.nan, 0.3]), np.array([0.2, np.nan, 0.5])
    found = paired_difference(first, second)
    assert (found.num, found.mean) == (2, pytest.approx(0.15))
    for wrong in (np.array([0.2, 0.4, 0.5]), np.array([0.2, np.nan])):
        with pytest.raises(DataError, match="not of the same queries"):
            paired_difference(first, wrong)
    with pytest.raises(DataError, match="no query"):
        paired_difference(np.array([np.nan]), np.array([np.nan]))


def test_under_no_difference_five_in_a_hundred_are_significant():
    rng = np.random.default_rng(0)
    hits = sum(paired_difference(*(rng.random((2, 300)) < 0.5).astype(float), resamples=999).significant
               for _ in range(400))
    assert 0.02 < hits / 400 < 0.08


@each("seed", range(4))
def test_what_is_clear_needs_no_resampling_to_be_significant(seed):
    rng = np.random.default_rng(seed)
    first = rng.random(150)
    second = first + rng.normal(0.08, 0.1, 150)
    assert clearly_better(first, second)
    assert paired_difference(first, second).p == pytest.approx(1e-4)
    assert not clearly_better(second, first)
    assert not clearly_better(first, first + rng.normal(0.01, 0.1, 150))


def test_values_are_read_from_the_detail_of_every_task():
    bits = np.array([True, False, True, True, False])
    knn = dataclasses.replace(BASE, detail={"num_test": 5, "correct": {"top1@20": pack_bits(bits)}})
    assert per_query(knn, "top1@20").tolist() == bits.tolist()
    ranked = dataclasses.replace(BASE, metrics={"hard/map": 0.4, "jpegqual/3/map": 0.25},
                                 detail={"aps": {"hard": [0.5, None, 0.3], "jpegqual/3": [0, 0.5]}})
    assert np.array_equal(per_query(ranked, "hard/map"), [0.5, np.nan, 0.3], equal_nan=True)
    assert per_query(ranked, "jpegqual/3/map").tolist() == [0, 0.5]
    patches = dataclasses.replace(BASE, metrics={"exact": 0.25}, detail={"shares": {"exact": [0.5, None, 0.0]}})
    assert np.array_equal(per_query(patches, "exact"), [0.5, np.nan, 0.0], equal_nan=True)


@each("detail", [
    {}, {"correct": {"top1@20": "98"}}, {"num_test": 5, "correct": {"top1@20": "zz"}},
    {"num_test": 5, "correct": {"top1@20": 7}}, {"num_test": "5", "correct": {"top1@20": "98"}},
    {"num_test": 10**30, "correct": {"top1@20": "98"}}, {"num_test": -1, "correct": {"top1@20": ""}},
    {"num_test": 8, "correct": {"top1@20": "98"}},  # 3 of 8 is not the 0.6 of the metric
    {"correct": ["98"]},
])
def test_detail_that_is_missing_damaged_or_contradicts_the_metric_is_none(detail):
    assert per_query(dataclasses.replace(BASE, detail=detail), "top1@20") is None


@each("aps", [[], [[0.4]], ["a"], [None], "0.4", [0.4, 3.0, -2.2], {"a": 1}, None])
def test_precisions_that_are_none_are_none(aps):
    record = dataclasses.replace(BASE, metrics={"hard/map": 0.4}, detail={"aps": {"hard": aps}})
    assert per_query(record, "hard/map") is None
