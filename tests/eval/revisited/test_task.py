"""Revisited retrieval: the numbers of DINO's and revisitop's code, whatever the order, cache and distractors."""

import json
import os
import pickle
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from told import Told

from patchssl.data.images import FileImages, Names
from patchssl.eval import features
from patchssl.eval.cache import FeatureCache
from patchssl.eval.revisited import images as revisited_images
from patchssl.eval.revisited import task as module
from patchssl.eval.revisited.ranking import levels_of_similarity
from patchssl.eval.revisited.task import evaluate_revisited, revisited_protocol
from patchssl.eval.tasks import ComputeOptions
from patchssl.models.load import load_backbone
from patchssl.runtime.errors import DataError, UsageError
from patchssl.sets.revisited import find_ground_truth

recorder = runpy.run_path(str(Path(__file__).parents[2] / "record_revisited.py"))
OFFICIAL = json.loads(recorder["RECORD"].read_text())
SMALL = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=48&depth=2&num_heads=3"
QUERIES, DATABASE = 3, 12
LABELS = {"easy": [[5, 1], [2], [7]], "hard": [[9], [0, 11], [3]], "junk": [[2], [], [8, 4]]}


def write_image(path, seed, size=(60, 40)):
    colors = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colors).resize(size, Image.Resampling.NEAREST).save(path, "PNG")


def truth_of(labels=LABELS):
    gnd = [{"bbx": [10.0, 5.0, 45.0, 38.0], **{label: lists[query] for label, lists in labels.items()}}
           for query in range(QUERIES)]
    return {"imlist": [f"image_{i}" for i in range(DATABASE)], "qimlist": [f"query_{i}" for i in range(QUERIES)],
            "gnd": gnd}


def write_truth(root, truth, name="own"):
    (root / f"gnd_{name}.pkl").write_bytes(pickle.dumps(truth))


@pytest.fixture
def small_set(tmp_path):
    """A set of one's own: gnd_own.pkl beside jpg/, its images small and of two sizes."""
    root = tmp_path / "own"
    for seed, name in enumerate(truth_of()["imlist"] + truth_of()["qimlist"]):
        write_image(root / "jpg" / f"{name}.jpg", seed, (60, 40) if seed % 3 else (40, 60))
    for number in range(QUERIES):
        write_image(root / "jpg" / f"query_{number}.jpg", 100 + number)
    write_truth(root, truth_of())
    return root


@pytest.fixture
def distractors(tmp_path):
    folder = tmp_path / "others"
    for number in range(10):
        write_image(folder / "deep" / f"{number}.png", 500 + number)
    return folder


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(SMALL)


@pytest.fixture
def similarity(monkeypatch):
    """What was scored: a list that every evaluation appends its similarities to."""
    seen = []

    def scoring(table, truth):
        seen.append(table)
        return levels_of_similarity(table, truth)

    monkeypatch.setattr(module, "levels_of_similarity", scoring)
    return seen


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that were decoded."""
    names = []
    decode = revisited_images.decode_image

    def counting(path, **options):
        names.append(Path(path).name)
        return decode(path, **options)

    monkeypatch.setattr(revisited_images, "decode_image", counting)
    return names


# parity

@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The set and the network that the official code was run on."""
    root = tmp_path_factory.mktemp("official")
    recorder["make_sets"](root)
    return root, load_backbone(str(recorder["save_weights"](root / "small.pth")))


@pytest.mark.parametrize(("recorded", "set_name", "protocol"), [
    ("roxford5k", "roxford5k", "dino"), ("rparis6k", "rparis6k", "dino"), ("rparis6k", "roxford5k", "ibot"),
    ("revisitop", "rparis6k", "revisitop")])
def test_the_numbers_of_the_official_code(official, similarity, recorded, set_name, protocol):
    root, network = official
    result = evaluate_revisited(network, root, protocol, set_name=set_name, compute=ComputeOptions(batch_size=4))
    expected = OFFICIAL[recorded]
    np.testing.assert_allclose(similarity[0], expected["similarity"], atol=5e-6)
    for level in ("easy", "medium", "hard"):
        if level not in expected:  # DINO's script has no easy level
            continue
        for name, value in zip(("map", "mp@1", "mp@5", "mp@10"), [expected[level]["map"], *expected[level]["mp"]],
                               strict=True):
            assert result.metrics[f"{level}/{name}"] == pytest.approx(value, abs=1e-9)
        assert result.detail["aps"][level] == pytest.approx(expected[level]["aps"], abs=1e-6)
    assert (result.task, result.dataset, result.protocol) == (set_name, set_name, protocol)


def test_a_smaller_batch_and_workers_change_nothing(official, similarity):
    root, network = official
    for options in ({"batch_size": 1}, {"batch_size": 7, "workers": 2}):
        evaluate_revisited(network, root, "dino", ComputeOptions(**options), set_name="roxford5k")
    torch.testing.assert_close(*similarity, atol=2e-6, rtol=0)


# protocols

THREE = (1.0, 2**-0.5, 0.5)


@pytest.mark.parametrize(("name", "set_name", "longest", "scales", "whole"), [
    ("dino", "roxford5k", 224, (1.0,), True), ("dino", "rparis6k", 512, THREE, True),
    ("dino", "mine", 512, THREE, True), ("ibot", "roxford5k", 512, THREE, True),
    ("ibot", "rparis6k", 512, THREE, True), ("ibot", "mine", 512, THREE, True),
    ("revisitop", "roxford5k", 1024, THREE, False), ("revisitop", "rparis6k", 1024, THREE, False)])
def test_sizes_scales_and_queries_of_the_protocols(backbone, name, set_name, longest, scales, whole):
    plan = revisited_protocol(name, backbone, set_name)
    assert (plan.settings["longest"], plan.settings["scales"]) == (longest, pytest.approx(scales))
    assert (plan.settings["queries"] == "whole") is whole
    assert plan.task == (set_name if set_name != "mine" else "revisited")
    assert plan.transform().settings.keys() == {"interpolation"}  # the image set has resized already


def test_native_is_one_crop_of_the_networks_size(backbone):
    plan = revisited_protocol(None, backbone, "roxford5k")
    assert plan.name == "native"
    assert (plan.settings["resize"], plan.settings["crop"], plan.settings["scales"]) == (32, 32, (1.0,))
    large = load_backbone(SMALL.replace("img_size=32", "img_size=224"))
    assert revisited_protocol(None, large, "roxford5k").name == "dino"


def test_an_unknown_protocol_is_refused(backbone, small_set):
    with pytest.raises(UsageError, match="revisitop"):
        evaluate_revisited(backbone, small_set, "revistop", set_name="own")


def test_equal_settings_are_told_apart_from_others_by_their_fingerprint(backbone):
    plans = {name: revisited_protocol(name, backbone, "roxford5k") for name in ("dino", "ibot", "revisitop", "native")}
    assert len({plan.fingerprint for plan in plans.values()}) == 4


# what is compared

def test_what_lies_around_the_box_matters_only_where_queries_are_whole(backbone, small_set, similarity):
    def scores(protocol):
        evaluate_revisited(backbone, small_set, protocol, set_name="own")
        return similarity.pop()

    before = {protocol: scores(protocol) for protocol in ("revisitop", "native", "dino")}
    path = small_set / "jpg" / "query_1.jpg"
    pixels = np.array(Image.open(path))
    painted = np.full_like(pixels, 200)
    painted[5:38, 10:45] = pixels[5:38, 10:45]
    Image.fromarray(painted).save(path, "PNG")
    for protocol in ("revisitop", "native"):
        assert torch.equal(scores(protocol), before[protocol])
    changed = scores("dino") != before["dino"]
    assert changed[1].all()
    assert not changed[[0, 2]].any()


def test_the_order_of_the_database_does_not_matter(backbone, small_set):
    first = evaluate_revisited(backbone, small_set, "dino", set_name="own", compute=ComputeOptions(batch_size=5))
    truth, order = truth_of(), np.random.default_rng(1).permutation(DATABASE)
    places = np.argsort(order)
    truth["imlist"] = [truth["imlist"][i] for i in order]
    for entry in truth["gnd"]:
        entry |= {label: places[entry[label]].tolist() for label in LABELS if entry[label]}
    write_truth(small_set, truth)
    second = evaluate_revisited(backbone, small_set, "dino", set_name="own", compute=ComputeOptions(batch_size=5))
    assert second.metrics == pytest.approx(first.metrics, abs=1e-12)
    assert second.dataset_fingerprint == first.dataset_fingerprint


def test_files_in_capitals_give_the_same_numbers(backbone, small_set, distractors):
    (distractors / "others.txt").write_text("deep/1.png\ndeep/2.png\n")
    before = evaluate_revisited(backbone, small_set, set_name="own", distractors=distractors)
    for path in (*(small_set / "jpg").iterdir(), *(distractors / "deep").iterdir()):
        path.rename(path.with_suffix(path.suffix.upper()))
    after = evaluate_revisited(backbone, small_set, set_name="own", distractors=distractors)
    assert after.metrics == before.metrics


def test_the_fingerprint_knows_labels_boxes_and_images(backbone, small_set, distractors):
    def fingerprint(**options):
        return evaluate_revisited(backbone, small_set, "native", set_name="own", **options).dataset_fingerprint

    found = {fingerprint(), fingerprint(distractors=distractors), fingerprint(allow_truncated=True)}
    truth = truth_of()
    truth["gnd"][0]["bbx"] = [10, 5, 45, 39]
    write_truth(small_set, truth)
    found.add(fingerprint())
    truth["gnd"][0]["junk"] = []
    write_truth(small_set, truth)
    found.add(fingerprint())
    write_image(small_set / "jpg" / "image_3.jpg", 77, (80, 40))
    found.add(fingerprint())
    assert len(found) == 6


def test_a_network_without_class_token_gives_its_own_vector(small_set):
    result = evaluate_revisited(load_backbone("random:resnet18"), small_set, "dino", set_name="own")
    assert result.detail["output"] == "features"
    assert 0 < result.metrics["medium/map"] <= 1


# distractors

def test_distractors_block_by_block_equal_a_database_that_holds_them(backbone, small_set, distractors, similarity,
                                                                     monkeypatch):
    monkeypatch.setattr(features, "BLOCK", 4)
    told = Told()
    streamed = evaluate_revisited(backbone, small_set, "dino", ComputeOptions(batch_size=3, progress=told),
                                  set_name="own", distractors=distractors)
    calls = told.counts["features"]
    assert calls[-1] == (25, 25)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    truth = truth_of()
    for number in range(10):
        (small_set / "jpg" / f"more_{number}.png").write_bytes((distractors / "deep" / f"{number}.png").read_bytes())
        truth["imlist"].append(f"more_{number}.png")
    write_truth(small_set, truth)
    joined = evaluate_revisited(backbone, small_set, "dino", set_name="own")
    torch.testing.assert_close(*similarity, atol=1e-6, rtol=0)
    assert streamed.metrics == pytest.approx(joined.metrics, abs=1e-12)
    assert (streamed.dataset, joined.dataset) == ("own+others", "own")
    assert (streamed.detail["num_database"], streamed.detail["num_distractors"]) == (12, 10)
    assert joined.detail["num_distractors"] == 0


@pytest.mark.slow
def test_only_a_million_distractors_are_called_a_million(small_set, distractors, monkeypatch):
    def named(folder, count):
        images = FileImages(name=folder, split="all", source="test", root=distractors, names=Names(["x"] * count))
        monkeypatch.setattr(module, "open_distractors", lambda *rest: images)
        return module.open_revisited(small_set, "own", distractors).name

    assert named("revisitop1m", 1_001_001) == "own+1m"
    assert named("revisitop1m", 9) == "own+revisitop1m"
    assert named("others", 1_001_001) == "own+others"


# the cache

def test_a_second_run_decodes_nothing(backbone, small_set, distractors, decoded, tmp_path, similarity):
    cache = FeatureCache(tmp_path / "cache")
    told, options = Told(), {"set_name": "own", "distractors": distractors}
    first = evaluate_revisited(backbone, small_set, "dino", ComputeOptions(cache=cache), **options)
    assert len(decoded) == QUERIES + DATABASE + 10
    second = evaluate_revisited(backbone, small_set, "dino", ComputeOptions(cache=cache, progress=told), **options)
    calls = told.counts["features"]
    assert len(decoded) == QUERIES + DATABASE + 10
    assert second.metrics == first.metrics
    assert torch.equal(*similarity)
    assert calls[-1] == (25, 25)
    evaluate_revisited(backbone, small_set, "ibot", set_name="own",
                       compute=ComputeOptions(cache=cache))  # the same pixels and scales
    assert len(decoded) == QUERIES + DATABASE + 10


@pytest.mark.parametrize("change", ["box", "protocol", "truncated"])
def test_whatever_moves_a_pixel_is_computed_anew(backbone, small_set, decoded, tmp_path, change):
    cache = FeatureCache(tmp_path / "cache")
    evaluate_revisited(backbone, small_set, "revisitop", set_name="own", compute=ComputeOptions(cache=cache))
    truth = truth_of()
    truth["gnd"][0]["bbx"] = [10, 5, 44, 38]
    if change == "box":
        write_truth(small_set, truth)
    evaluate_revisited(backbone, small_set, "dino" if change == "protocol" else "revisitop", set_name="own",
                       compute=ComputeOptions(cache=cache),
                       allow_truncated=change == "truncated")
    assert len(decoded) == 2 * (QUERIES + DATABASE)


# the record

def test_a_level_without_positives_is_left_out_and_said(backbone, small_set):
    labels = LABELS | {"hard": [[9], [], [3]], "easy": [[], [], []], "junk": [[2], [5, 1], []]}
    write_truth(small_set, truth_of(labels))
    result = evaluate_revisited(backbone, small_set, "dino", set_name="own")
    assert {name.split("/")[0] for name in result.metrics} == {"medium", "hard"}
    assert result.detail["left_out"] == {"easy": "no query has easy images"}
    assert result.detail["queries_used"] == {"easy": 0, "medium": 2, "hard": 2}
    assert result.detail["aps"]["hard"][1] is None
    used = [ap for ap in result.detail["aps"]["hard"] if ap is not None]
    assert result.metrics["hard/map"] == pytest.approx(np.mean(used), abs=1e-6)


def test_the_record(backbone, small_set):
    result = evaluate_revisited(backbone, small_set, "dino", set_name="own")
    assert (result.task, result.dataset, result.protocol) == ("revisited", "own", "dino")
    assert set(result.metrics) == {f"{level}/{name}" for level in ("easy", "medium", "hard")
                                   for name in ("map", "mp@1", "mp@5", "mp@10")}
    assert result.detail["queries"] == ["query_0", "query_1", "query_2"]
    assert not result.detail["official"]
    assert result.detail["queries_used"] == {"easy": 3, "medium": 3, "hard": 3}


# what is refused

def refused(backbone, root, match, kind=DataError, **options):
    with pytest.raises(kind, match=match):
        evaluate_revisited(backbone, root, "dino", set_name="own", **options)


def test_every_absent_image_is_named_before_one_is_read(backbone, small_set, decoded):
    for name in ("image_4.jpg", "query_2.jpg"):
        (small_set / "jpg" / name).unlink()
    refused(backbone, small_set, r"2 of 15 images are not in(.|\n)*image_4\.jpg(.|\n)*query_2\.jpg")
    assert decoded == []


def test_every_unreadable_image_is_named(backbone, small_set, distractors, decoded):
    whole = (small_set / "jpg" / "image_4.jpg").read_bytes()
    (small_set / "jpg" / "image_4.jpg").write_bytes(whole[: len(whole) // 2])
    (small_set / "jpg" / "query_2.jpg").write_text("no image")
    refused(backbone, small_set, r"2 of 15 images cannot be read(.|\n)*image_4\.jpg(.|\n)*query_2\.jpg")
    refused(backbone, small_set, r"1 of 15 images cannot be read(.|\n)*query_2\.jpg", allow_truncated=True)
    write_image(small_set / "jpg" / "query_2.jpg", 3)
    evaluate_revisited(backbone, small_set, "dino", set_name="own", allow_truncated=True)
    (distractors / "deep" / "6.png").write_text("no image")
    refused(backbone, small_set, r"1 of 25 images cannot be read(.|\n)*6\.png", allow_truncated=True,
            distractors=distractors)


def test_an_image_too_small_for_a_patch_is_named(backbone, small_set):
    write_image(small_set / "jpg" / "image_7.jpg", 1, (60, 15))
    refused(backbone, small_set, r"1 of 15 images(.|\n)*image_7\.jpg: it has 60 x 15 pixels.*needs 16 on the shorter")
    write_image(small_set / "jpg" / "image_7.jpg", 1, (60, 16))
    evaluate_revisited(backbone, small_set, "dino", set_name="own")
    truth = truth_of()
    truth["gnd"][1]["bbx"] = [10, 5, 25, 30]
    write_truth(small_set, truth)
    with pytest.raises(DataError, match=r"query_1\.jpg: its box \(10, 5, 25, 30\) has 15 x 25 pixels"):
        evaluate_revisited(backbone, small_set, "revisitop", set_name="own")
    evaluate_revisited(backbone, small_set, "native", set_name="own")


def test_a_query_without_box(backbone, small_set):
    truth = truth_of()
    del truth["gnd"][1]["bbx"]
    write_truth(small_set, truth)
    refused(backbone, small_set, r"query 1 \('query_1'\) has no bbx")


def test_a_box_outside_its_image(backbone, small_set):
    truth = truth_of()
    truth["gnd"][2]["bbx"] = [70, 5, 90, 30]
    write_truth(small_set, truth)
    with pytest.raises(DataError, match=r"query_2\.jpg: its box \(70, 5, 90, 30\) does not fit the 60 x 40 pixels"):
        evaluate_revisited(backbone, small_set, "revisitop", set_name="own")


def test_a_database_smaller_than_the_ranks_asked_for(backbone, small_set, distractors, decoded):
    truth = truth_of({"easy": [[0]] * 3, "hard": [[1]] * 3, "junk": [[]] * 3})
    truth["imlist"] = truth["imlist"][:9]
    write_truth(small_set, truth)
    refused(backbone, small_set, "a database of 9 images; precision at 10")
    assert decoded == []
    evaluate_revisited(backbone, small_set, "native", set_name="own", distractors=distractors)


def test_nothing_to_find(backbone, small_set):
    write_truth(small_set, truth_of({"easy": [[]] * 3, "hard": [[]] * 3, "junk": [[1]] * 3}))
    refused(backbone, small_set, "no query in .* has an easy or hard image")


def test_an_evil_pickle_is_not_executed(backbone, small_set, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    write_truth(small_set, truth_of() | {"more": Evil()})
    refused(backbone, small_set, "gnd_own.pkl")
    assert not (tmp_path / "owned").exists()


def test_a_set_that_is_not_there(backbone, small_set):
    with pytest.raises(DataError, match=r"no ground truth of roxford5k.*gnd_own\.pkl"):
        evaluate_revisited(backbone, small_set, set_name="roxford5k")


# folders of distractors

def opened(folder, small_set):
    return revisited_images.open_distractors(folder, find_ground_truth(small_set, "own"))


def test_distractors_by_their_list(small_set, tmp_path):
    folder = tmp_path / "revisitop1m"
    for name in ("b/2.jpg", "a/1.jpg", "a/3"):
        write_image(folder / "jpg" / name, 1)
    assert list(opened(folder, small_set).names) == ["a/1.jpg", "b/2.jpg"]
    (folder / "revisitop1m.txt").write_text("b/2.jpg\r\n\na/3\n")
    for named in (folder, folder / "jpg"):
        images = opened(named, small_set)
        assert list(images.names) == ["b/2.jpg", "a/3"]
        assert images.name == "revisitop1m"
        assert images.pixels(1).shape == (40, 60, 3)


@pytest.mark.parametrize(("text", "match"), [
    ("1.png\n2.png\n1.png\n", "1 images more than once, first 1.png"),
    ("1.png\nx/y.jpg\nz.jpg", r"2 of the 3 distractors(.|\n)*x/y.jpg(.|\n)*z.jpg"),
    ("../secret.png\n", "which is no file below"), ("/etc/passwd\n", "which is no file below"),
    ("a\0b.png\n", "which is no file below"), ("\n\n", "names no distractors")])
def test_a_list_that_cannot_be_used(small_set, tmp_path, text, match):
    folder = tmp_path / "others"
    for number in (1, 2):
        write_image(folder / f"{number}.png", number)
    write_image(tmp_path / "secret.png", 3)
    (folder / "others.txt").write_text(text)
    with pytest.raises(DataError, match=match):
        opened(folder, small_set)


def test_folders_that_hold_no_distractors(small_set, tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        opened(tmp_path / "absent", small_set)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="not one image"):
        opened(tmp_path / "empty", small_set)
    for folder in (small_set, small_set / "jpg", tmp_path):
        with pytest.raises(UsageError, match="holds the images of the set"):
            opened(folder, small_set)


# galleries of the worst and best queries

def test_galleries_say_what_every_first_result_is(backbone, small_set, distractors, similarity):
    result = evaluate_revisited(backbone, small_set, "dino", set_name="own", distractors=distractors)
    truth, table = truth_of(), similarity[0].numpy()
    assert set(result.detail["galleries"]) == {"medium", "hard"}
    others = [f"deep/{number}.png" for number in range(10)]
    for level, labels in (("medium", ("easy", "hard")), ("hard", ("hard",))):
        shown = result.detail["galleries"][level]
        assert sorted(entry["query"]["name"] for entry in shown) == [f"query_{i}.jpg" for i in range(QUERIES)]
        for entry in shown:
            query = int(entry["query"]["name"][6])
            labeled = truth["gnd"][query]
            positives = {image for label in labels for image in labeled[label]}
            junk = {image for label in LABELS for image in labeled[label]} - positives
            order = np.argsort(-table[query], kind="stable").tolist()
            names = [others[i - DATABASE] if i >= DATABASE else f"image_{i}.jpg" for i in order]
            roles = ["distractor" if i >= DATABASE else "positive" if i in positives else "junk" if i in junk
                     else "error" for i in order]
            first = [(found["name"], found["role"]) for found in entry["results"]]
            assert first == list(zip(names, roles, strict=True))[:10]
            late = [(name, rank) for rank, (name, role) in enumerate(zip(names, roles, strict=True), 1)
                    if rank > 10 and role == "positive"]
            assert [(found["name"], found["rank"]) for found in entry["late"]] == late[-4:]
            assert entry["num_positives"] == len(positives)
            assert entry["ap"] == result.detail["aps"][level][query]
    entry = result.detail["galleries"]["hard"][0]["query"]
    assert entry["bytes"] == (small_set / "jpg" / entry["name"]).stat().st_size
