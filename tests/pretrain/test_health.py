"""Measures of collapse against values known by hand, and the words for the collapses that were met."""

import math
import re

import numpy as np
import pytest
import torch

from patchssl.pretrain.config import recipe_keys
from patchssl.pretrain.health import (
    collapse_warnings,
    effective_rank,
    entropy,
    feature_spread,
    marginal_entropy,
)


def test_entropy_of_uniform_of_one_hot_and_of_their_mix():
    uniform, one_hot = torch.full((7,), 1 / 7), torch.eye(7)[3]
    assert float(entropy(uniform.expand(2, 3, 7))) == pytest.approx(math.log(7))
    assert float(entropy(one_hot[None])) == 0
    assert float(entropy(torch.stack([uniform, one_hot]))) == pytest.approx(math.log(7) / 2)


def test_marginal_entropy_counts_the_prototypes_in_use():
    assert float(marginal_entropy(torch.eye(4))) == pytest.approx(math.log(4))
    assert float(marginal_entropy(torch.eye(4)[2].expand(2, 2, 4))) == 0
    quarters = torch.eye(4)[[0, 0, 0, 1]]  # mean 3/4, 1/4
    assert float(marginal_entropy(quarters)) == pytest.approx(0.5623351)


def with_singular_values(values, rows=12, columns=8):
    """Centered features with these singular values."""
    rng = np.random.default_rng(0)
    left = rng.normal(size=(rows, len(values)))
    left, _ = np.linalg.qr(left - left.mean(0))  # orthonormal columns that still sum to 0
    right, _ = np.linalg.qr(rng.normal(size=(columns, len(values))))
    return torch.from_numpy(left @ np.diag(values) @ right.T).float()


@pytest.mark.parametrize(("values", "rank"), [
    ([3.0], 1.0),
    ([5.0, 5.0, 5.0], 3.0),
    ([2.0, 1.0, 1.0], 2**1.5),  # shares 1/2, 1/4, 1/4: entropy 1.5 bits
    ([7.0, 0.0, 0.0], 1.0),
])
def test_effective_rank_of_known_singular_values(values, rank):
    features = with_singular_values(values)
    assert float(effective_rank(features)) == pytest.approx(rank, rel=1e-3)
    assert float(effective_rank(features + 40)) == pytest.approx(rank, rel=1e-2)  # the mean does not count
    assert float(effective_rank(1000 * features)) == pytest.approx(rank, rel=1e-3)


def test_effective_rank_of_identical_features_is_one():
    assert float(effective_rank(torch.tensor([[0.5, -2.0, 1.0]]).expand(6, 3))) == pytest.approx(1.0)


def test_spread_of_identical_opposite_and_orthogonal_features():
    assert float(feature_spread(torch.tensor([[3.0, 4.0]]).expand(5, 2))) == pytest.approx(0, abs=1e-6)
    assert float(feature_spread(torch.tensor([[3.0, 4.0], [-3.0, -4.0]]))) == pytest.approx(1)
    # unit vectors e1, e2 are each sqrt(1/2) from their mean, whatever their lengths were
    assert float(feature_spread(torch.tensor([[9.0, 0.0], [0.0, 0.1]]))) == pytest.approx(0.5**0.5)


HEALTHY = {"teacher_entropy": 2.0, "marginal_entropy": 4.0, "effective_rank": 20.0, "feature_spread": 0.6}


def test_a_healthy_row_says_nothing():
    assert collapse_warnings(HEALTHY, num_prototypes=1000) == []


@pytest.mark.parametrize(("change", "words"), [
    ({"teacher_entropy": 6.9, "marginal_entropy": 6.9}, ["almost uniform", "loss.teacher_temp"]),
    ({"teacher_entropy": 0.0, "marginal_entropy": 0.01}, ["same few prototypes", "loss.centering=sinkhorn"]),
    ({"effective_rank": 1.2}, ["class tokens hardly differ", "effective rank 1.2", "collapsed"]),
    ({"feature_spread": 0.01}, ["class tokens hardly differ", "spread 0.01", "collapsed"]),
])
def test_each_collapse_has_its_words(change, words):
    (warning,) = collapse_warnings(HEALTHY | change, num_prototypes=1000)
    assert [word for word in words if word not in warning] == []


def test_advice_names_settings_that_exist():
    ill = {"teacher_entropy": 6.9, "marginal_entropy": 0.0, "effective_rank": 1.0, "feature_spread": 0.0}
    named = set(re.findall(r"(?:loss|optim|head|views)\.\w+", " ".join(collapse_warnings(ill, 1000))))
    assert named
    assert named <= set(recipe_keys())
