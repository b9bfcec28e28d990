import statistics

import numpy as np
import pytest
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from told import Told

from patchssl.data.images import ArrayImages
from patchssl.eval.features import extract_features
from patchssl.eval.knn import task as knn_task
from patchssl.eval.knn.fewshot import FewShot
from patchssl.eval.knn.task import evaluate_knn
from patchssl.eval.protocols import knn_protocol
from patchssl.eval.tasks import ComputeOptions
from patchssl.models.load import load_backbone
from patchssl.models.pixels import RawPixels
from patchssl.runtime.errors import DataError, UsageError


@settings(deadline=None, max_examples=80)
@given(
    counts=st.lists(st.integers(3, 9), min_size=1, max_size=6),
    count=st.integers(1, 3),
    draw=st.integers(0, 4),
    seed=st.integers(0, 2**40),
)
def test_a_draw_holds_so_many_images_of_every_class_and_a_larger_one_holds_it(counts, count, draw, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)) * 7 - 3, counts))
    few = FewShot((count,), seed=seed)
    ids = few.images(labels, count, draw)
    assert sorted(set(ids)) == ids.tolist()
    assert all((labels[ids] == label).sum() == count for label in set(labels))
    assert len(ids) == count * len(counts)
    assert set(ids) <= set(few.images(labels, count + 1, draw))
    assert np.array_equal(ids, FewShot((1, 2), draws=9, seed=seed).images(labels.tolist(), count, draw))


def test_every_image_is_drawn_as_often_as_another():
    labels = np.repeat([0, 1], [4, 12])
    drawn = np.zeros(16)
    for seed in range(500):
        drawn[FewShot((1,), seed=seed).images(labels, 1, 0)] += 1
        drawn[FewShot((1,), seed=seed).images(labels, 1, 1)] += 1
    # of 1000 draws: 250 and 83 expected, standard deviations 14 and 9
    assert np.abs(drawn[:4] - 250).max() < 70
    assert np.abs(drawn[4:] - 1000 / 12).max() < 45


def test_draws_and_seeds_differ():
    labels = np.repeat([0, 1, 2], 40)
    draws = [FewShot((5,), seed=seed).images(labels, 5, draw).tolist() for seed in (0, 1) for draw in (0, 1)]
    assert len({tuple(draw) for draw in draws}) == 4


def test_settings_are_sorted_once_each_and_absent_without_shots():
    assert FewShot((5, 1, 5), 3, 7).settings() == {"shots": [1, 5], "draws": 3, "draw_seed": 7}
    assert FewShot().settings() == {}


@each(("shots", "draws", "seed"), [((0,), 5, 0), ((5, -1), 5, 0), ((5,), 0, 0), ((5,), 5, -1)])
def test_what_cannot_be_drawn_is_refused(shots, draws, seed):
    with pytest.raises(UsageError, match="images and draws are 1 or more, the seed 0 or more"):
        FewShot(shots, draws, seed)


def shades(counts, split, seed):
    """Small images whose brightness tells the class, unless noise does."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    noise = rng.normal(0, 50, (len(labels), 8, 8)) * rng.uniform(0, 1, (len(labels), 1, 1))
    patterns = np.random.default_rng(9).uniform(40, 200, (len(counts), 8, 8))
    array = np.clip(patterns[labels] + 2 * noise, 0, 255).astype(np.uint8)
    return ArrayImages(name="shades", split=split, source=f"shades-{split}", classes=tuple("abcd"[: len(counts)]),
                       labels=labels, array=array, ids=np.arange(len(labels)))


def slow_top1(train, train_labels, test, test_labels, k):
    hits = 0
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    for feature, label in zip(test, test_labels, strict=True):
        cosines = train @ (feature / np.linalg.norm(feature))
        votes = dict.fromkeys(range(4), 0.0)
        for i in sorted(range(len(train)), key=lambda i: (-cosines[i], i))[:k]:
            votes[train_labels[i]] += np.exp(cosines[i] / 0.07)
        hits += max(votes, key=lambda label: (votes[label], -label)) == label
    return hits / len(test)


def test_few_shot_accuracy_is_the_mean_of_the_votes_of_the_drawn_images():
    train, val = shades([30, 25, 28, 40], "train", 0), shades([15, 15, 15, 15], "val", 1)
    result = evaluate_knn(RawPixels(8), train, val, "native", shots=(8, 1), draws=3, seed=11)
    features = [extract_features(RawPixels(8), images, knn_protocol("native", 8)).double().numpy()
                for images in (train, val)]
    for count, k in ((1, 4), (8, 20)):
        values = []
        for draw in range(3):
            ids = FewShot((count,), seed=11).images(train.labels, count, draw)
            values.append(slow_top1(features[0][ids], train.labels[ids], features[1], val.labels, k))
        key = f"fewshot{count}/top1@20"
        assert result.metrics[key] == pytest.approx(statistics.mean(values))
        assert 0.3 < result.metrics[key] < 1
        detail = result.detail["fewshot"][key]
        assert detail.pop("values") == pytest.approx(values)
        assert detail.pop("deviation") == pytest.approx(statistics.stdev(values))
        assert detail == {"num_neighbors": k, "draws": 3, "seed": 11}
    assert statistics.stdev(values) > 0
    assert result.protocol == "native-fewshot"


def test_the_variant_adds_to_the_plain_record_and_takes_nothing():
    train, val = shades([10, 12], "train", 0), shades([9, 9], "val", 1)
    plain = evaluate_knn(RawPixels(8), train, val)
    few = evaluate_knn(RawPixels(8), train, val, shots=[10], draws=1)
    assert few.metrics.items() > plain.metrics.items()
    assert few.detail.items() > plain.detail.items()
    assert few.protocol_settings == {**plain.protocol_settings, "shots": [10], "draws": 1, "draw_seed": 0}
    assert few.protocol_fingerprint != plain.protocol_fingerprint
    assert few.detail["fewshot"]["fewshot10/top1@20"]["deviation"] is None
    again = evaluate_knn(RawPixels(8), train, val, shots=[10], draws=1, seed=1)
    assert again.protocol_fingerprint != few.protocol_fingerprint


def test_features_are_computed_once_and_every_network_gets_the_same_images(monkeypatch):
    train, val = shades([10, 12], "train", 0), shades([9, 9], "val", 1)
    passes, drawn = [], []
    extract, images = knn_task.extract_features, FewShot.images
    monkeypatch.setattr(knn_task, "extract_features", lambda *a, **b: passes.append(1) or extract(*a, **b))
    monkeypatch.setattr(FewShot, "images", lambda *a: drawn.append(images(*a).tolist()) or np.array(drawn[-1]))
    network = load_backbone("random:vit_tiny_patch16_224?img_size=8&patch_size=8&embed_dim=48&depth=1&num_heads=3")
    for backbone in (RawPixels(8), network):
        evaluate_knn(backbone, train, val, "native", shots=[2, 5], draws=4)
    assert len(passes) == 4
    assert len(drawn) == 16
    assert drawn[:8] == drawn[8:]


def test_progress_of_the_draws_counts_their_queries():
    train, val = shades([10, 12], "train", 0), shades([9, 9], "val", 1)
    told = Told()
    evaluate_knn(RawPixels(8), train, val, shots=[2, 5], draws=2, compute=ComputeOptions(progress=told))
    assert told.counts["search"] == [(18, 18), (18, 72), (36, 72), (54, 72), (72, 72)]


def test_classes_with_too_few_images_are_named_before_any_image_is_read(monkeypatch):
    train, val = shades([10, 2, 12, 4], "train", 0), shades([3, 3, 3, 3], "val", 1)
    monkeypatch.setattr(ArrayImages, "pixels", None)
    with pytest.raises(DataError, match="5 training images per class are to be drawn, and 2 of the 4 classes of "
                                        "shades-train have fewer: 'b' 2, 'd' 4; ask for fewer shots"):
        evaluate_knn(RawPixels(8), train, val, shots=[1, 5])


def test_of_many_such_classes_a_few_are_named():
    names = tuple(f"class{i}" for i in range(30))
    train = ArrayImages(name="many", split="train", source="many", classes=names, labels=np.arange(29),
                        array=np.zeros((29, 8, 8), np.uint8), ids=np.arange(29))
    with pytest.raises(DataError, match=r"30 of the 30 classes .*'class0' 1, .*'class4' 1 and 25 more; ask"):
        FewShot((2,)).require_images(train)
    with pytest.raises(DataError, match="1 of the 30 classes of many have fewer: 'class29' 0"):
        FewShot((1,)).require_images(train)
