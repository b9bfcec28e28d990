import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from told import Told

from patchssl.data.images import FileImages
from patchssl.data.open import open_pair
from patchssl.eval import knn
from patchssl.eval.cache import FeatureCache
from patchssl.eval.faiss import IndexPlan
from patchssl.eval.knn import knn_accuracy, knn_scores
from patchssl.eval.knn import task as knn_task
from patchssl.eval.knn.fewshot import FewShot
from patchssl.eval.knn.task import evaluate_knn, evaluate_pixels, score_knn
from patchssl.eval.protocols import knn_protocol
from patchssl.eval.records import read_results, unpack_bits
from patchssl.eval.search import Neighbors
from patchssl.eval.tasks import ComputeOptions
from patchssl.models.load import load_backbone
from patchssl.runtime.errors import DataError, UsageError


def clusters(num_train, num_test, num_classes, d=12, spread=1.3, seed=0):
    """Features and labels of overlapping classes: neither all right nor all wrong."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(num_classes, d))

    def draw(count):
        labels = rng.integers(0, num_classes, count)
        return centers[labels] + spread * rng.normal(size=(count, d)), labels

    return (*draw(num_train), *draw(num_test))


def slow_accuracy(train, train_labels, test, test_labels, k, temperature, num_classes):
    """The vote written out, one image and one neighbor at a time, with Python floats."""
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    hits = {"top1": 0, "top5": 0}
    for feature, label in zip(test, test_labels, strict=True):
        cosines = train @ (feature / np.linalg.norm(feature))
        nearest = sorted(range(len(train)), key=lambda i: (-cosines[i], i))[:k]
        votes = [0.0] * num_classes
        for i in nearest:
            votes[train_labels[i]] += float(np.exp(cosines[i] / temperature))
        order = sorted(range(num_classes), key=lambda c: (-votes[c], c))
        hits["top1"] += order[0] == label
        hits["top5"] += label in order[: min(5, len(nearest))]
    shares = {name: count / len(test) for name, count in hits.items()}
    return shares if num_classes > 5 else {"top1": shares["top1"]}


@settings(deadline=None, max_examples=60)
@given(
    num_train=st.integers(1, 60),
    num_classes=st.integers(1, 12),
    k=st.integers(1, 80),
    temperature=st.sampled_from([0.07, 0.5, 0.01]),
    seed=st.integers(0, 10_000),
)
def test_the_vote_equals_one_written_out_for_any_k_and_any_number_of_classes(
    num_train, num_classes, k, temperature, seed
):
    train, train_labels, test, test_labels = clusters(num_train, 25, num_classes, seed=seed)
    train_labels = np.concatenate([train_labels, np.arange(num_classes)])  # every class has an image
    train = np.concatenate([train, np.random.default_rng(seed).normal(size=(num_classes, 12))])
    ours = knn_accuracy(train, train_labels, test, test_labels, num_neighbors=k, temperature=temperature)
    assert ours == pytest.approx(slow_accuracy(train, train_labels, test, test_labels, k, temperature, num_classes))


@each("k", [1, 10, 20, 200])
def test_top1_equals_scikit_learns_classifier_with_the_same_weights(k):
    train, train_labels, test, test_labels = clusters(700, 300, 9)

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    # on the sphere, squared distance = 2 - 2 * cosine
    oracle = KNeighborsClassifier(k, weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.07), algorithm="brute")
    expected = oracle.fit(unit(train), train_labels).score(unit(test), test_labels)
    assert 0.2 < expected < 0.95
    assert knn_accuracy(train, train_labels, test, test_labels, num_neighbors=k)["top1"] == pytest.approx(expected)


def test_nearer_neighbors_weigh_more_than_many_far_ones():
    """One neighbor at cosine 1 weighs exp(0.4 / 0.07) = 303 times one at cosine 0.6, so 302 of them lose."""
    far = [[0.6, 0.8]]
    for count, winner in ((302, 1.0), (304, 0.0)):
        features = np.array([[1.0, 0.0], *far * count])
        labels = np.array([0] + [1] * count)
        scores = knn_accuracy(features, labels, np.array([[2.0, 0]]), np.array([0]), num_neighbors=1000)
        assert scores == {"top1": winner}


def test_a_tiny_temperature_neither_overflows_nor_loses_the_nearest():
    train = np.array([[1.0, 0.1], [1.0, 0.0], [0.9, 0.1]])
    test = np.array([[1.0, 0.0]])
    assert knn_accuracy(train, [0, 1, 0], test, [1], num_neighbors=3, temperature=1e-5)["top1"] == 1


def test_sets_smaller_than_k_use_all_and_keep_the_name_of_k():
    train, train_labels, test, test_labels = clusters(30, 40, 7)
    scores = knn_scores(train, train_labels, test, test_labels)
    assert sorted(scores.metrics) == sorted(f"top{n}@{k}" for n in (1, 5) for k in (10, 20, 100, 200))
    assert scores.metrics["top1@100"] == scores.metrics["top1@200"]
    assert scores.metrics["top1@100"] == knn_accuracy(train, train_labels, test, test_labels, num_neighbors=30)["top1"]


@each("num_classes, names", [(2, {"top1"}), (5, {"top1"}), (6, {"top1", "top5"})])
def test_of_five_classes_or_fewer_there_is_no_top5_which_could_not_be_wrong(num_classes, names):
    train, train_labels, test, test_labels = clusters(60, 40, num_classes, spread=5)
    train_labels[:num_classes] = range(num_classes)
    scores = knn_accuracy(train, train_labels, test, test_labels, num_neighbors=20)
    assert scores.keys() == names and all(share < 1 for share in scores.values())


def test_all_k_of_one_search_equal_one_search_each_in_any_order():
    train, train_labels, test, test_labels = clusters(400, 150, 8)
    scores = knn_scores(train, train_labels, test, test_labels, ks=(50, 3, 20), headline_k=3)
    for k in (3, 20, 50):
        alone = knn_accuracy(train, train_labels, test, test_labels, num_neighbors=k)
        assert {name: scores.metrics[f"{name}@{k}"] for name in alone} == alone
    assert scores.correct.mean() == pytest.approx(scores.metrics["top1@3"])


def test_detail_of_the_headline_k_adds_up_to_its_accuracy():
    train, train_labels, test, test_labels = clusters(300, 200, 5)
    scores = knn_scores(train, train_labels, test, test_labels, headline_k=20)
    for label, share in scores.class_accuracy.items():
        assert share == pytest.approx(scores.correct[test_labels == label].mean())
    counts = np.bincount(test_labels, minlength=5)
    total = sum(share * counts[label] for label, share in scores.class_accuracy.items()) / 200
    assert total == pytest.approx(scores.metrics["top1@20"])


def test_the_blocks_of_the_vote_do_not_show(monkeypatch):
    train, train_labels, test, test_labels = clusters(200, 60, 6)
    whole = knn_scores(train, train_labels, test, test_labels)
    monkeypatch.setattr(knn, "_VOTES_AT_A_TIME", 6 * 7)
    blocks = knn_scores(train, train_labels, test, test_labels)
    assert whole.metrics == blocks.metrics
    assert np.array_equal(whole.correct, blocks.correct)


def test_any_integers_are_labels_and_a_class_without_training_images_is_never_right():
    features = np.eye(4)
    labels = np.array([1_000_000_000, -7, 1_000_000_000, 3])
    assert knn_accuracy(features, labels, features, labels, num_neighbors=1) == {"top1": 1.0}
    unknown = np.array([5, -8, 2_000_000_000, 3])
    scores = knn_scores(features, labels, features, unknown, ks=(4,))
    assert scores.metrics == {"top1@4": 0.25}
    assert scores.class_accuracy == {5: 0.0, -8: 0.0, 2_000_000_000: 0.0, 3: 1.0}


def test_torch_tensors_numpy_arrays_and_lists_give_the_same():
    train, train_labels, test, test_labels = clusters(100, 50, 4)
    expected = knn_accuracy(train, train_labels, test, test_labels, num_neighbors=5)
    tensors = (torch.tensor(part) for part in (train, train_labels, test, test_labels))
    assert knn_accuracy(*tensors, num_neighbors=5) == expected
    assert knn_accuracy(train, train_labels.tolist(), test, list(test_labels), num_neighbors=5) == expected


def test_an_index_that_looks_everywhere_gives_the_exact_vote_and_says_its_recall():
    train, train_labels, test, test_labels = clusters(400, 150, 8)
    exact = knn_scores(train, train_labels, test, test_labels, ks=(1, 20))
    scores = knn_scores(train, train_labels, test, test_labels, ks=(20, 1), index="IVF8,Flat",
                        search_params="nprobe=8")
    assert scores.metrics == exact.metrics
    assert scores.neighbors.recall.shares == {1: 1.0, 20: 1.0}
    assert exact.neighbors.recall is None


def test_neighbors_that_were_not_found_have_no_vote(monkeypatch):
    train, train_labels, test, test_labels = clusters(300, 100, 4)
    scores = knn_scores(train, train_labels, test, test_labels, ks=(60,), index="IVF20,Flat")
    found = scores.neighbors
    assert 0 < (found.ids < 0).float().mean() < 0.9
    hits = 0
    for near, ids, label in zip(found.similarities.tolist(), found.ids.tolist(), test_labels, strict=True):
        votes = [0.0] * 4
        for similarity, i in zip(near, ids, strict=True):
            if i >= 0:
                votes[train_labels[i]] += np.exp(similarity / 0.07)
        hits += int(np.argmax(votes)) == label
    assert scores.metrics["top1@60"] == hits / 100
    nothing = Neighbors(torch.full((100, 60), -torch.inf), torch.full((100, 60), -1), "none", None)
    monkeypatch.setattr(knn, "find_neighbors", lambda *_, **__: nothing)
    assert knn_scores(train, train_labels, test, test_labels, ks=(60,)).metrics == {"top1@60": 0}


def test_arrays_of_any_strides_and_order_of_bytes_are_understood():
    train, train_labels, test, test_labels = clusters(100, 50, 4)
    expected = knn_accuracy(train, train_labels, test, test_labels, num_neighbors=5)
    turned = train[::-1].copy()[::-1], train_labels[::-1].copy()[::-1], test.astype(">f8"), test_labels.astype(">i4")
    assert turned[0].strides[0] < 0 and turned[1].strides[0] < 0
    assert knn_accuracy(*turned, num_neighbors=5) == expected


@each("labels", [["cat", "dog"], np.array(["cat", "dog"]), np.array([b"cat", b"dog"]), [None, None]])
def test_labels_that_are_words_are_refused_in_words(labels):
    with pytest.raises(DataError, match=r"the training labels are words or objects, \[.*2 integers are needed"):
        knn_accuracy(np.eye(2), labels, np.eye(2), [0, 1], num_neighbors=1)


@each("scale", [1e30, 1e-30])
def test_features_that_cannot_be_normalized_are_refused(scale):
    with pytest.raises(DataError, match="2 of the 2 training features cannot be normalized, first in row 0"):
        knn_accuracy(scale * np.eye(2), [0, 1], np.eye(2), [0, 1], num_neighbors=1)
    assert knn_accuracy(np.eye(2), [0, 1], 0 * np.eye(2), [0, 1], num_neighbors=1)["top1"] >= 0  # a dead network's


def test_wrong_input_is_refused_in_words():
    train, train_labels, test, test_labels = clusters(20, 10, 3)
    with pytest.raises(DataError, match=r"training labels are .* \(19,\); 20 integers"):
        knn_accuracy(train, train_labels[1:], test, test_labels, num_neighbors=1)
    with pytest.raises(DataError, match=r"test labels are torch\.float64"):
        knn_accuracy(train, train_labels, test, test_labels + 0.5, num_neighbors=1)
    with pytest.raises(UsageError, match="temperature of 0"):
        knn_accuracy(train, train_labels, test, test_labels, num_neighbors=1, temperature=0)
    for ks, headline in (((), None), ((0,), None), ((5, 10), 7)):
        with pytest.raises(UsageError, match="every k is 1 or more"):
            knn_scores(train, train_labels, test, test_labels, ks=ks, headline_k=headline)
    train[3] = np.nan
    with pytest.raises(DataError, match="training features hold NaN"):
        knn_accuracy(train, train_labels, test, test_labels, num_neighbors=1)


@pytest.fixture
def folders(tmp_path):
    """Two classes told apart by color, a third whose validation images look like the first."""
    rng = np.random.default_rng(0)
    shades = {"blue": (40, 60, 220), "green": (30, 200, 60), "mock": (210, 40, 40)}
    for split, count in (("train", 12), ("val", 5)):
        for name, shade in shades.items():
            folder = tmp_path / "colors" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                color = shades["blue"] if (split, name) == ("val", "mock") else shade
                noise = rng.integers(-20, 20, (24, 20, 3))
                pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "colors"


def tiny(seed=0):
    return load_backbone(
        f"random:vit_tiny_patch16_224?img_size=16&patch_size=8&embed_dim=48&depth=2&num_heads=3&seed={seed}"
    )


def test_a_record_says_everything_about_the_number(folders, tmp_path):
    train, val = open_pair(folders)
    told = Told()
    backbone = tiny(seed=3)
    result = evaluate_knn(backbone, train, val, compute=ComputeOptions(batch_size=8, progress=told))
    calls = told.counts["features"]
    protocol = knn_protocol("native", 16)
    assert (result.task, result.dataset, result.protocol) == ("knn", "colors", "native")
    assert result.protocol_fingerprint == protocol.fingerprint
    assert result.protocol_settings == {**protocol.settings, "ks": [10, 20, 100, 200]}
    assert (result.method, result.seed, result.pretrain_epochs) == ("random", 3, 0)
    assert result.weights_sha256 == backbone.weights_sha256
    assert (result.detail["num_train"], result.detail["num_test"]) == (36, 15)
    assert result.versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert result.versions["faiss"]
    assert result.device.startswith("cpu")
    assert calls[-1] == (51, 51)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert {total for _, total in calls} == {51}


def test_per_class_and_per_image_detail_show_which_images_were_right(folders):
    train, val = open_pair(folders)
    result = evaluate_pixels(train, val)
    # colors are far apart: blue and green are always right, the mock ones always taken for blue
    assert result.detail["class_accuracy"] == {"blue": 1.0, "green": 1.0, "mock": 0.0}
    correct = unpack_bits(result.detail["correct"]["top1@20"], 15)
    assert correct.tolist() == [val.classes[label] != "mock" for label in val.labels]
    assert result.metrics["top1@20"] == pytest.approx(2 / 3)
    assert "top5@20" not in result.metrics  # of three classes
    assert (result.model, result.method, result.protocol) == ("pixels-20", "pixels", "native")


def test_pixels_meet_a_network_of_their_size_under_one_fingerprint(folders):
    train, val = open_pair(folders)
    pixels, network = evaluate_pixels(train, val, 16), evaluate_knn(tiny(), train, val)
    assert pixels.protocol_fingerprint == network.protocol_fingerprint
    assert pixels.dataset_fingerprint == network.dataset_fingerprint


def test_images_replaced_by_noise_of_equal_size_are_scored_anew(folders, tmp_path):
    for path in list(folders.rglob("*.png")):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    compute, data = ComputeOptions(cache=FeatureCache(tmp_path / "cache")), str(folders)
    clean = score_knn(tiny(), data, "native", compute)
    assert clean.detail["fingerprints_cover"] == {"version": 2, "train": "all 36 files", "test": "all 15 files"}
    rng = np.random.default_rng(0)
    for path in folders.rglob("val/*/*.bmp"):
        then, content = path.stat(), path.read_bytes()
        path.write_bytes(content[:54] + rng.bytes(len(content) - 54))
        os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
    noisy = score_knn(tiny(), data, "native", compute)
    fresh = score_knn(tiny(), data, "native")
    assert noisy.metrics == fresh.metrics != clean.metrics
    assert noisy.dataset_fingerprint == fresh.dataset_fingerprint != clean.dataset_fingerprint


def test_files_whose_features_are_cached_are_not_looked_at(folders, tmp_path, monkeypatch):
    looked, look = [], FileImages.quick_check
    monkeypatch.setattr(FileImages, "quick_check", lambda images, at: looked.append(images.split) or look(images, at))
    compute = ComputeOptions(cache=FeatureCache(tmp_path / "cache"))
    first = score_knn(tiny(), str(folders), "native", compute)
    assert Counter(looked) == {"train": 36, "val": 15}
    looked.clear()
    assert score_knn(tiny(), str(folders), "native", compute).metrics == first.metrics
    assert looked == []
    Image.new("RGB", (24, 20)).save(folders / "val/blue/more.png")
    score_knn(tiny(), str(folders), "native", compute)
    assert Counter(looked) == {"val": 16}
    looked.clear()
    score_knn(tiny(), str(folders), "native")
    assert Counter(looked) == {"train": 36, "val": 16}


def test_the_fingerprint_of_a_record_covers_both_splits(folders):
    train, val = open_pair(folders)
    base = evaluate_pixels(train, val, 16).dataset_fingerprint
    assert evaluate_pixels(train.subset(range(1, 36)), val, 16).dataset_fingerprint != base
    assert evaluate_pixels(train, val.subset(range(14)), 16).dataset_fingerprint != base


def test_sets_that_cannot_be_scored_are_refused_before_any_image_is_read(folders, monkeypatch):
    train, val = open_pair(folders)
    monkeypatch.setattr(knn_task, "extract_features", None)
    unlabeled = val.with_classes(val.classes)
    object.__setattr__(unlabeled, "labels", None)
    with pytest.raises(DataError, match="needs labels: put every image into a folder named after its class"):
        evaluate_knn(tiny(), train, unlabeled)
    renamed = open_pair(folders)[1]
    object.__setattr__(renamed, "classes", ("blue", "green"))
    with pytest.raises(DataError, match=r"3 classes of .* are not the 2 of .*open_pair"):
        evaluate_knn(tiny(), train, renamed)
    with pytest.raises(UsageError, match="protocol 'dinno' is unknown; did you mean 'dino'"):
        evaluate_knn(tiny(), train, val, "dinno")


def test_the_same_pass_twice_gives_the_same_record(folders):
    train, val = open_pair(folders)
    first, second = (evaluate_knn(tiny(), train, val, compute=ComputeOptions(batch_size=size, workers=w)) for size,
                     w in ((7, 0), (7, 2)))
    assert first.metrics == second.metrics
    assert first.detail == second.detail


def test_an_approximate_index_is_in_the_record_and_changes_its_protocol(folders, tmp_path):
    train, val = open_pair(folders)
    plain = evaluate_knn(tiny(), train, val)
    settings = {"index": "IVF3,Flat", "search_params": "nprobe=3", "seed": 5}
    told = Told()
    result = evaluate_knn(tiny(), train, val, compute=ComputeOptions(progress=told), **settings)
    calls = told.counts["search"]
    assert result.metrics == plain.metrics
    assert result.protocol == "native-IVF3,Flat-nprobe=3"
    assert result.protocol_settings == {**plain.protocol_settings, "index": "IVF3,Flat", "search_params": "nprobe=3",
                                        "index_seed": 5}
    assert result.protocol_fingerprint != plain.protocol_fingerprint
    search = result.detail.pop("search")
    assert result.detail == plain.detail
    # 36 training images: all of them are the 100 and 200 nearest
    assert search == {"backend": "faiss-cpu", "index": "IVF3,Flat", "search_params": "nprobe=3", "seed": 5,
                      "recall": {"recall@10": 1.0, "recall@20": 1.0, "recall@36": 1.0}, "recall_queries": 15,
                      "in_words": "found 100.0% of the 10 nearest, 100.0% of the 20 nearest, 100.0% of the 36 nearest, "
                                  "measured against exact search on 15 queries"}
    assert calls == [(36, 66), (51, 66), (66, 66)]
    assert plain.write(tmp_path) != result.write(tmp_path)
    assert read_results(tmp_path)[1] == []


def test_an_index_that_does_not_suit_is_refused_before_any_image_is_read(folders, monkeypatch):
    train, val = open_pair(folders)
    monkeypatch.setattr(type(train), "pixels", None)
    for index, words in (("IVF40,Flat", "40 clusters, and 36 are there"), ("IVF2,PQ7x4", "48 dimensions"),
                         ("nonsense", "could not parse")):
        with pytest.raises(UsageError, match=words):
            evaluate_knn(tiny(), train, val, index=index)


def test_pixels_can_be_scored_by_an_index_too(folders):
    train, val = open_pair(folders)
    result = evaluate_pixels(train, val, 16, index="HNSW8", shots=[2])
    assert result.protocol == "native-fewshot-HNSW8"
    assert result.detail["search"]["recall"]["recall@20"] > 0.9
    assert "fewshot2/top1@20" in result.metrics


def test_the_plain_protocols_keep_the_fingerprints_of_the_committed_records():
    records, problems = read_results(Path(__file__).parents[2] / "results")
    ours = [record for record in records if record.task == "knn"]
    assert len(ours) > 5
    assert problems == []
    for record in ours:
        plan = knn_protocol(record.protocol, record.protocol_settings["crop"])
        assert plan.fingerprint == record.protocol_fingerprint
        assert knn_task.variant(plan, FewShot(), IndexPlan(gpus="shard", seed=3)) is plan
