import math

import numpy as np
import pytest
import torch
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import top_k_accuracy_score
from sklearn.preprocessing import StandardScaler

from patchssl.eval.linear import scores as linear_scores
from patchssl.eval.linear.scores import Scaling, best_of, epoch_order, hold_out, score_logits, true_ranks
from patchssl.eval.metrics import wilson_interval
from patchssl.runtime.errors import DataError, NotFiniteError

NAMES = tuple("abcdefghij")


def drawn(count, num_classes, seed=0):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(count, num_classes)), rng.integers(0, num_classes, count)
    return torch.from_numpy(logits), torch.from_numpy(labels)


def test_accuracies_equal_scikit_learns():
    logits, labels = drawn(300, 9)
    scores = score_logits(logits, labels)
    for name, k in (("top1", 1), ("top5", 5)):
        expected = top_k_accuracy_score(labels, logits, k=k, labels=range(9))
        assert 0 < expected < 1
        assert scores.metrics[name] == pytest.approx(expected)
        assert scores.intervals[name] == wilson_interval(round(300 * expected), 300)
    assert scores.correct.mean() == scores.metrics["top1"]
    for label, share in scores.class_accuracy.items():
        assert share == pytest.approx(scores.correct[labels.numpy() == label].mean())


def test_the_interval_is_wilsons():
    """8 of 10: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), with z = 1.96."""
    logits = torch.zeros(10, 2)
    logits[:8, 1] = 1
    low, high = score_logits(logits, torch.ones(10, dtype=torch.int64)).intervals["top1"]
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)


@each(("num_classes", "expected"), [(2, {}), (4, {}), (5, {}), (6, {"top5": 0.0})])
def test_of_five_classes_or_fewer_there_is_no_top5(num_classes, expected):
    logits = -torch.eye(num_classes)[torch.zeros(3, dtype=torch.int64)]  # the true class, 0, comes last
    without_images = torch.full((3, 4), -torch.inf)
    for shown in (logits, torch.cat([logits, without_images], dim=1)):
        scores = score_logits(shown, torch.zeros(3, dtype=torch.int64))
        assert scores.metrics == {"top1": 0.0, **expected} and scores.intervals.keys() == scores.metrics.keys()


def test_classes_of_equal_logits_follow_in_ascending_order_so_that_a_constant_earns_chance():
    logits, labels = torch.zeros(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    assert true_ranks(logits, labels).tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused_and_never_count_as_right(value):
    logits, labels = drawn(5, 3)
    logits[2, 1] = value
    with pytest.raises(NotFiniteError, match="diverged"):
        score_logits(logits, labels)


def test_a_class_without_training_images_is_never_right():
    logits = torch.tensor([[-math.inf, 1.0, 0.0]] * 2)
    assert true_ranks(logits, torch.tensor([0, 1])).tolist() == [2, 0]


def test_the_blocks_of_scoring_do_not_show(monkeypatch):
    logits, labels = drawn(50, 4)
    whole = true_ranks(logits, labels)
    monkeypatch.setattr(linear_scores, "_ROWS", 7)
    assert torch.equal(whole, true_ranks(logits, labels))


@settings(deadline=None, max_examples=40)
@given(counts=st.lists(st.one_of(st.just(0), st.integers(2, 40)), min_size=1, max_size=8),
       share=st.sampled_from([0.1, 0.3, 0.9]), seed=st.integers(0, 1000))
def test_held_out_images_are_a_share_of_every_class_and_disjoint_from_the_rest(counts, share, seed):
    labels = torch.from_numpy(np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts)))
    fit, held = hold_out(labels, share, seed, NAMES[: len(counts)])
    assert sorted([*fit.tolist(), *held.tolist()]) == list(range(sum(counts)))
    assert fit.tolist() == sorted(fit.tolist())
    for label, count in enumerate(counts):
        taken = int((labels[held] == label).sum())
        assert taken == (min(max(1, round(share * count)), count - 1) if count else 0)


def test_the_split_is_fixed_by_the_seed():
    labels = torch.arange(200) % 10
    split = hold_out(labels, 0.1, 3, NAMES)
    assert all(torch.equal(a, b) for a, b in zip(split, hold_out(labels, 0.1, 3, NAMES), strict=True))
    assert not torch.equal(split[1], hold_out(labels, 0.1, 4, NAMES)[1])


def test_every_image_of_a_class_is_held_out_about_equally_often():
    labels = torch.zeros(40, dtype=torch.int64)
    times = torch.bincount(torch.cat([hold_out(labels, 0.25, seed, ("a",))[1] for seed in range(400)]), minlength=40)
    assert 60 < times.min() <= times.max() < 140  # 100 expected, 5 standard deviations are 43


def test_classes_with_one_image_are_named():
    labels = torch.tensor([0, 0, 1, 2, 2, 3])
    with pytest.raises(DataError, match=r"2 of 4 classes have one training image only: b, d; .* two"):
        hold_out(labels, 0.1, 0, NAMES[:4])


def test_the_order_of_an_epoch_is_a_permutation_of_its_own():
    orders = [epoch_order(seed, epoch, 30).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_scaling_equals_scikit_learns(monkeypatch):
    monkeypatch.setattr(linear_scores, "_ROWS", 13)
    features = torch.from_numpy(np.random.default_rng(0).normal(5, 3, (60, 7)).astype(np.float32)) * torch.arange(1, 8)
    rows = torch.arange(10, 50)
    expected = StandardScaler().fit(features[rows].numpy().astype(np.float64)).transform(features.numpy())
    np.testing.assert_allclose(Scaling.fit(features, rows)(features), expected, atol=2e-5)


def test_what_is_constant_becomes_zero():
    features = torch.tensor([[1e8, 0.1, 0.0, 1.0], [1e8, 0.1, 0.0, 2.0]])
    scaled = Scaling.fit(features, torch.arange(2))(features)
    assert scaled[:, :3].abs().max() < 1e-6
    assert scaled[:, 3].tolist() == [-1, 1]


def test_the_best_is_the_most_accurate_then_the_one_of_least_loss_then_the_first():
    loss = torch.tensor([0.1, 0.5, 0.4, 0.4])
    assert best_of(torch.tensor([0.7, 0.9, 0.9, 0.9]), loss) == 2
    assert best_of(torch.tensor([0.9, 0.7, 0.7, 0.8]), loss) == 0


def test_a_probe_that_diverged_is_never_the_best():
    loss = torch.tensor([math.nan, math.inf, 3.0])
    assert best_of(torch.tensor([1.0, 0.9, 0.0]), loss) == 2
    with pytest.raises(NotFiniteError, match="all of them diverged"):
        best_of(torch.tensor([1.0, 1.0]), loss[:2])
