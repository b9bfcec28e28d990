"""Differences paired by seed, and what equal time makes of training curves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from patchssl.eval.records import Result
from patchssl.report.tables.seeds import (
    EQUAL_IMAGES,
    EQUAL_TIME,
    curve_measures,
    mean_over_seeds,
    measures_of,
    paces_of,
    paired_over_seeds,
)
from patchssl.report.tables.stats import holm


def test_a_paired_difference_is_that_of_scipy():
    rng = np.random.default_rng(0)
    first, second = rng.random(5), rng.random(5)
    found = paired_over_seeds(dict(enumerate(first)), dict(enumerate(second)))
    theirs = ttest_rel(second, first)
    interval = theirs.confidence_interval(0.95)
    assert (found.mean, found.low, found.high, found.p) == pytest.approx(
        ((second - first).mean(), interval.low, interval.high, theirs.pvalue))
    assert found.n == 5


def test_only_seeds_that_both_have_are_compared():
    found = paired_over_seeds({0: 0.5, 1: 0.1}, {1: 0.3, 2: 0.9})
    assert (found.n, found.mean, found.low, found.p) == (1, pytest.approx(0.2), None, None)
    assert paired_over_seeds({0: 0.5}, {1: 0.3}) is None
    assert mean_over_seeds({}) is None and mean_over_seeds({3: 0.5}) == (0.5, None, None, 1)


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_against_its_definition(p_values):
    """Adjusted p-values: the running maximum of (m - i + 1) p_(i), in ascending order."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.maximum.accumulate([(len(order) - i) * p_values[j] for i, j in enumerate(order)] or [0])
    expected = [False] * len(p_values)
    for j, p in zip(order, adjusted, strict=False):
        expected[j] = bool(p < 0.05)
    assert holm(p_values) == expected


def record(variant, seed, value):
    return Result(model=f"{variant}-{seed}", method="pwself", arch="vit_tiny", weights_sha256="a" * 64, task="knn",
                  dataset="textures", dataset_fingerprint="d" * 64, protocol="native", protocol_version=1,
                  protocol_settings={}, protocol_fingerprint="1" * 16, metrics={"top1@20": value, "top1@10": 0.9},
                  seed=seed, variant=variant, versions={}, device="cpu", duration=1.0)


def test_measures_are_by_variant_and_seed_and_pass_by_what_has_none():
    records = [record("dino", 1, 0.2), record("dino", 0, 0.1), record("pwself", 0, 0.3), record(None, 0, 0.5),
               record("dino", None, 0.5)]
    measure, = measures_of(records)
    assert (measure.title, measure.dataset, measure.protocol) == ("20-NN top-1", "textures", "native")
    assert measure.values == {"dino": {0: 0.1, 1: 0.2}, "pwself": {0: 0.3}}


def log(pace, *points, steps=100):
    """Rows of a run of `steps` updates of 10 images at `pace` images a second; `points` are (step, k-NN)."""
    known = dict(points)
    return [{"step": step, "images_per_second": pace} | ({"knn_top1": known[step]} if step in known else {})
            for step in range(10, steps + 1, 10)]


def test_equal_time_by_hand():
    """500 and 400 images a second: the cheaper run takes 2 s, in which the other sees 800 of its 1,000 images."""
    logs = {"cheap": {0: log(500, (50, 0.2), (100, 0.4))},
            "dear": {0: log(400, (50, 0.1), (100, 0.6)), 1: log(400, (50, 0.3), (100, 0.3))}}
    sizes = {"cheap": 10, "dear": 10}
    paces = paces_of(logs, sizes)
    assert [(pace.images, pace.images_in_time, pace.whole) for pace in paces.values()] == [
        (1000, pytest.approx(1000), True), (1000, pytest.approx(800), False)]
    ends, readings = curve_measures(logs, paces, sizes)
    assert (ends.title, readings.title) == (EQUAL_IMAGES, EQUAL_TIME)
    assert ends.values == {"cheap": {0: 0.4}, "dear": {0: 0.6, 1: 0.3}}
    assert readings.values["dear"] == {0: pytest.approx(0.1 + 0.6 * 0.5), 1: pytest.approx(0.3)}
    assert readings.values["cheap"] == {0: pytest.approx(0.4)}


def test_a_stretch_in_which_the_machine_was_busy_moves_no_pace():
    slow = [row | {"images_per_second": 3} if row["step"] == 50 else row for row in log(500)]
    assert paces_of({"a": {0: slow}}, {"a": 10}) == paces_of({"a": {0: log(500)}}, {"a": 10})
    further = paces_of({"a": {0: slow}, "b": {0: log(5000)}}, {"a": 10, "b": 10}, ["b"])  # a further one sets no time
    assert further["a"] == paces_of({"a": {0: slow}}, {"a": 10})["a"] and further["b"].whole
    assert paces_of({}, {}) == {} and paces_of({"a": {0: []}}, {"a": 10}) == {}


def test_before_the_first_point_of_a_curve_there_is_no_value():
    logs = {"quick": {0: log(1000, (100, 0.5))}, "slow": {0: log(100, (50, 0.2), (100, 0.4))}}
    sizes = {"quick": 10, "slow": 10}
    _, readings = curve_measures(logs, paces_of(logs, sizes), sizes)
    assert readings.values == {"quick": {0: pytest.approx(0.5)}}
