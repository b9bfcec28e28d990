"""Measures of collapse against values known by hand, and the words for the collapses that were met."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import each

from patchssl.pretrain.health import (
    class_health,
    collapse_warnings,
    effective_rank,
    entropy,
    feature_spread,
    marginal_entropy,
)
from patchssl.pretrain.recipe import recipe_keys


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


@each(("values", "rank"), [
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


HEALTHY = {"teacher_entropy": 2.0, "marginal_entropy": 4.0, "effective_rank": 20.0, "feature_spread": 0.6,
           "matched_share_global": 0.5, "matched_share_local": 0.0, "patch_entropy": 2.0, "patch_marginal_entropy": 4.0}


def test_a_healthy_row_says_nothing():
    assert collapse_warnings(HEALTHY, num_prototypes=1000) == {}


@each(("change", "words"), [
    ({"teacher_entropy": 6.9, "marginal_entropy": 6.9}, ["almost uniform", "loss.teacher_temp"]),
    ({"teacher_entropy": 0.0, "marginal_entropy": 0.01}, ["all images", "same few prototypes", "centering=sinkhorn"]),
    ({"patch_entropy": 6.9, "patch_marginal_entropy": 6.9}, ["of patches are almost uniform"]),
    ({"patch_entropy": 0.0, "patch_marginal_entropy": 0.01}, ["all patches", "same few prototypes"]),
    ({"effective_rank": 1.2}, ["class tokens hardly differ", "effective rank 1.2", "collapsed"]),
    ({"feature_spread": 0.01}, ["class tokens hardly differ", "spread 0.01", "collapsed"]),
])
def test_each_collapse_has_its_words(change, words):
    (warning,) = collapse_warnings(HEALTHY | change, num_prototypes=1000).values()
    assert [word for word in words if word not in warning] == []


def test_without_matches_nothing_is_said_of_patches():
    none = {"matched_share_global": 0.0, "patch_entropy": 0.0, "patch_marginal_entropy": 0.0}
    assert collapse_warnings(HEALTHY | none, num_prototypes=1000) == {}


def test_a_falling_rank_is_noticed_and_few_tokens_say_nothing():
    (warning,) = collapse_warnings(HEALTHY | {"effective_rank": 5.0}, 1000, best_rank=20.0).values()
    assert "has fallen from 20.0 to 5.0" in warning
    assert collapse_warnings(HEALTHY | {"effective_rank": 8.0}, 1000, best_rank=20.0) == {}
    assert collapse_warnings(HEALTHY | {"effective_rank": 1.5}, 1000, num_tokens=4, best_rank=9.0) == {}


def test_kl_is_exact_under_unequal_weights():
    """Three pairs of different weight: the weighted mean of KL(teacher || student) computed pair by pair."""
    rng = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 1, 5, generator=rng).softmax(-1), torch.randn(2, 3, 5, generator=rng)
    weight = torch.tensor([[[0.0, 0.5, 0.1]], [[0.0, 0.2, 0.4]]])
    log_student = student.log_softmax(-1)
    term = -sum(weight[b, 0, v] * (teacher[b, 0] * log_student[b, v]).sum() for b in range(2) for v in range(3))
    pairs = [weight[b, 0, v] * F.kl_div(log_student[b, v], teacher[b, 0], reduction="sum")
             for b in range(2) for v in range(3)]
    found = class_health(teacher, student, weight, term)
    assert float(found["class_kl"]) == pytest.approx(float(sum(pairs) / weight.sum()), rel=1e-5)
    assert float(found["teacher_entropy"]) == pytest.approx(float(-(teacher * teacher.log()).sum(-1).mean()), rel=1e-5)


def test_advice_names_settings_that_exist():
    ill = HEALTHY | {"teacher_entropy": 6.9, "marginal_entropy": 0.0, "effective_rank": 1.0, "feature_spread": 0.0}
    named = set(re.findall(r"(?:loss|optim|head|views)\.\w+", " ".join(collapse_warnings(ill, 1000).values())))
    assert named
    assert named <= set(recipe_keys())
