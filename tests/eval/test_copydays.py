"""The Copydays benchmark: beside DINO's own script, by hand, and with everything that can be missing or damaged."""

import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import each
from PIL import Image
from sklearn.decomposition import PCA
from told import Told
from torch import nn
from torchvision import transforms

from patchssl.data.images import FileImages
from patchssl.eval import features
from patchssl.eval.cache import FeatureCache
from patchssl.eval.copydays import copydays_protocol, dataset_name, evaluate_copydays
from patchssl.eval.features import extract_outputs
from patchssl.eval.metrics import average_precision
from patchssl.eval.records import read_result
from patchssl.eval.tasks import ComputeOptions
from patchssl.models.backbone import Backbone
from patchssl.models.load import load_backbone
from patchssl.models.pixels import RawPixels
from patchssl.runtime.console import LOOK
from patchssl.runtime.errors import DataError, PatchSSLError, UsageError
from patchssl.sets.copydays import BLOCKS, open_copydays

recorder = runpy.run_path(str(Path(__file__).parents[1] / "record_copydays.py"))
OFFICIAL = json.loads(recorder["OUTPUT"].read_text())
PROTOCOLS = ["dino", "dino-nodistractors", "dino-nowhitening", "dino-plain", "sscd", "sscd-224", "native"]
RED, GREEN, BLUE, YELLOW, GRAY = (200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 160, 0), (90, 90, 90)


class MeanColor(nn.Module):
    """The mean color of the image, then for each patch of 4 pixels that of the quarter of the image it lies in."""

    def forward(self, images):
        quarters = nn.functional.adaptive_avg_pool2d(images, 2)
        patches = nn.functional.interpolate(quarters, size=[side // 4 for side in images.shape[-2:]])
        return torch.cat([images.mean(dim=(2, 3)).unsqueeze(1), patches.flatten(2).transpose(1, 2)], dim=1)


def mean_color(module=None, size=16):
    return Backbone.from_module(module or MeanColor(), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), patch_size=4,
                                image_size=size)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(pixels, tuple):
        pixels = np.full((20, 28, 3), pixels, np.uint8)
    Image.fromarray(pixels).save(path)


def colored(root, originals, copies=None, **extra):
    """A set whose images have one color each: `originals`, and by block `copies` that are not like them.

    `extra` folders are lists of colors.
    """
    for block in BLOCKS:
        for number, pixels in enumerate((copies or {}).get(block, originals)):
            save(root / block / f"{3000 + number}0{int(block == 'strong')}.png", pixels)
    for kind, colors in extra.items():
        for number, color in enumerate(colors):
            save(root / kind / f"{number:03}.png", color)
    return root


def noise(kind, number, shape=(20, 28, 3)):
    return np.random.default_rng([kind, number, 1]).integers(0, 256, shape, dtype=np.uint8)


def random_set(root, originals=4, distractors=5, whitening=9):
    """Every image is noise of its own, so that scores are about chance."""
    return colored(root, [noise(0, number) for number in range(originals)],
                   {block: [noise(place, number) for number in range(originals)] for place, block in enumerate(BLOCKS)},
                   distractors=[noise(30, number) for number in range(distractors)],
                   whitening=[noise(31, number) for number in range(whitening)])


def scored(backbone, root, protocol=None, **options):
    """The record of a set that may be smaller than the protocol's ranks: all of its database is ranked then."""
    settings = copydays_protocol(protocol, backbone).settings
    folders = [root / "original", options.get("distractors", root / "distractors")][:1 + settings["distractors"]]
    size = sum(len(list(folder.iterdir())) for folder in folders if folder.is_dir())
    compute = {name: options.pop(name) for name in ("batch_size", "workers", "cache", "progress") if name in options}
    return evaluate_copydays(backbone, root, protocol, ComputeOptions(**compute), **options,
                             ranks=min(size, settings["num_ranks"]) or None)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return random_set(tmp_path_factory.mktemp("data") / "small")


@pytest.fixture(scope="module")
def official_set(tmp_path_factory):
    return recorder["write_set"](tmp_path_factory.mktemp("data") / "official")


@pytest.fixture(scope="module")
def official_network(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    weights = {name: recorder["weight"](name, shape) for name, shape in OFFICIAL["shapes"].items()}
    torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, path)
    return load_backbone(f"{path}?heads={recorder['ARCHITECTURE']['num_heads']}")


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return FeatureCache(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("protocol", OFFICIAL["variants"])
def test_scores_are_those_of_dinos_own_script(official_set, official_network, shared_cache, protocol):
    expected = OFFICIAL["variants"][protocol]
    result = scored(official_network, official_set, protocol, cache=shared_cache)
    assert set(expected["maps"]) == set(BLOCKS)
    found = {block: result.metrics[f"{block}/map"] for block in BLOCKS}
    assert found == pytest.approx(expected["maps"], abs=0.002)  # 0.2 points; printed with three digits
    aps = [1.0 if place == 0 else 0.5 / (place + 1) if place > 0 else 0.0 for place in expected["places"]]
    differing = np.abs(np.concatenate([result.detail["aps"][block] for block in BLOCKS]) - aps) > 1e-5
    assert differing.mean() < 0.01  # DINO whitens in single precision: near ties may turn


def test_the_comparison_with_dino_can_fail(official_set, official_network, shared_cache):
    """The recorded numbers tell the protocols apart, and `strong` is neither solved nor hopeless."""
    maps = [variant["maps"] for variant in OFFICIAL["variants"].values()]
    for one, other in itertools.combinations(maps, 2):
        assert max(abs(one[block] - other[block]) for block in BLOCKS) > 0.05
    assert all(0.05 < found["strong"] < 0.5 for found in maps)


@pytest.mark.slow
def test_identical_copies_are_all_found(tmp_path):
    pictures = [noise(0, number) for number in range(5)]
    root = colored(tmp_path / "set", pictures, distractors=[noise(1, number) for number in range(7)],
                   whitening=[noise(2, number) for number in range(20)])
    for protocol in PROTOCOLS:
        metrics = scored(mean_color(), root, protocol).metrics
        assert set(metrics) == {f"{block}/map" for block in BLOCKS} | {"overall/muap"}
        assert metrics == pytest.approx(dict.fromkeys(metrics, 1.0)), protocol


def test_scores_by_hand(tmp_path):
    """Cosines of colors: the yellow copy of green is nearer to red; the gray one of blue is as near to all three."""
    copies = {"strong": [RED, YELLOW, (90, 90, 95)], "crops/80": [BLUE, GREEN, RED]}
    root = colored(tmp_path / "set", [RED, GREEN, BLUE], copies)
    result = scored(mean_color(), root, "native")
    assert result.detail["aps"]["strong"] == [1.0, 0.25, 1.0]
    # blue for a red original: as far from red as from green, and the lower id comes first
    assert result.detail["aps"]["crops/80"] == [0.25, 1.0, pytest.approx(1 / 6, abs=1e-6)]
    assert result.metrics["strong/map"] == pytest.approx(0.75)
    assert result.metrics["jpegqual/3/map"] == 1
    assert result.metrics["crops/80/map"] == pytest.approx((0.25 + 1 + 1 / 6) / 3)
    assert {ap for block, aps in result.detail["aps"].items() if block not in copies for ap in aps} == {1.0}


def test_distractors_join_the_database(tmp_path):
    """A distractor in the color of the strong copies comes before their originals."""
    root = colored(tmp_path / "set", [RED, GREEN], {"strong": [YELLOW, YELLOW]}, distractors=[YELLOW, BLUE, BLUE])
    without = scored(mean_color(), root, "dino-plain")
    joined = scored(mean_color(), root, "dino-nowhitening")
    assert without.detail["aps"]["strong"] == [1.0, 0.25]
    assert joined.detail["aps"]["strong"] == [0.25, pytest.approx(1 / 6, abs=1e-6)]
    assert (without.detail["num_distractors"], joined.detail["num_distractors"]) == (0, 3)
    assert joined.metrics["original/map"] == 1


def expected_by_slow_means(backbone, root, transform, pooled):
    """Metrics from the images on, among the first 100 results, by torchvision, scikit-learn and a full sort."""
    def vectors(*folders):
        found = []
        for path in (path for folder in folders for path in sorted((root / folder).iterdir())):
            tokens = backbone.tokens(transform(Image.open(path).convert("RGB"))[None])[0].double()
            found.append(torch.cat([tokens[0], pooled(tokens[1:])]))
        return torch.stack(found).detach().numpy()

    whitener = PCA(whiten=True).fit(vectors("whitening"))
    database = whitener.transform(vectors("original", "distractors"))
    maps, pool = {}, []
    for block in BLOCKS:
        queries = whitener.transform(vectors(block))
        cosines = (queries @ database.T) / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(database, axis=1)
        order = np.argsort(-cosines, axis=1)[:, :100]
        hits = order == np.arange(len(queries))[:, None]
        maps[f"{block}/map"] = np.mean([average_precision(np.flatnonzero(row), 1) for row in hits])
        pool += list(zip(np.take_along_axis(cosines, order, 1).ravel(), hits.ravel(), strict=True))
    pool.sort(key=lambda item: -item[0])
    ranks = [rank for rank, (_, hit) in enumerate(pool) if hit]
    return maps | {"overall/muap": average_precision(ranks, 20 * len(list((root / "original").iterdir())))}


@pytest.mark.parametrize(("protocol", "size"), [("sscd", 288), ("sscd-224", (224, 224))], ids=str)
def test_sscd_equals_torchvision_scikit_learn_and_a_full_sort(tmp_path, protocol, size):
    root = random_set(tmp_path / "set", whitening=30)
    backbone = mean_color()
    transform = transforms.Compose([transforms.Resize(size), transforms.ToTensor()])
    expected = expected_by_slow_means(backbone, root, transform, lambda x: x.clamp(min=1e-6).pow(4).mean(0) ** 0.25)
    assert 0.1 < expected["strong/map"] < 0.9
    assert scored(backbone, root, protocol).metrics == pytest.approx(expected, abs=1e-4)  # near ties


def test_sscd_keeps_the_aspect(tmp_path):
    """Whole images of any shape reach the network, with a short side of 288 pixels."""
    shapes = set()

    class Watching(MeanColor):
        def forward(self, images):
            shapes.add(tuple(images.shape[-2:]))
            return super().forward(images)

    pictures = [noise(0, number, shape) for number, shape in enumerate([(20, 40, 3), (60, 30, 3), (100, 77, 3)])]
    root = colored(tmp_path / "set", pictures, distractors=[noise(1, 0, (31, 31, 3))],
                   whitening=[noise(2, number, (9, 9, 3)) for number in range(9)])
    metrics = scored(mean_color(Watching(), size=4), root, "sscd").metrics
    assert shapes == {(288, 576), (576, 288), (288, 288), (int(288 * 100 / 77) // 4 * 4, 288)}  # of whole patches
    assert metrics["strong/map"] == 1


def nets():
    tiny = "img_size=32&embed_dim=24&depth=1&num_heads=3"
    return {"patch 16": load_backbone(f"random:vit_tiny_patch16_224?{tiny}&patch_size=16"),
            "patch 8": load_backbone(f"random:vit_tiny_patch16_224?{tiny}&patch_size=8"),
            "resnet": load_backbone("random:resnet18")}


def test_protocols_have_fingerprints_of_their_own():
    """One for each protocol; networks without class token, and the small patches of DINO, are other protocols."""
    networks = nets()
    protocols = {(name, net): copydays_protocol(name, networks[net]) for name in PROTOCOLS for net in networks}
    assert all(protocol.name == name and protocol.task == "copydays" for (name, _), protocol in protocols.items())
    alike = {}
    for key, protocol in protocols.items():
        alike.setdefault(protocol.fingerprint, []).append(key)
    # size decides in `native`, tokens in SSCD's, both in DINO's
    shared = {("sscd", "patch 16"): ("sscd", "patch 8"), ("sscd-224", "patch 16"): ("sscd-224", "patch 8"),
              ("native", "patch 16"): ("native", "patch 8")}
    assert sorted(keys for keys in alike.values() if len(keys) > 1) == sorted(map(list, shared.items()))


def test_settings_are_those_of_the_published_code():
    networks = nets()
    dino = copydays_protocol("dino", networks["patch 16"]).plain_settings()
    assert dino == {"square": 224, "interpolation": "bicubic", "outputs": ["class:1", "gem:4"], "whitening": "dino",
                    "distractors": True, "normalization": "l2", "similarity": "cosine", "num_ranks": 20,
                    "headline": "strong/map"}
    assert copydays_protocol("dino", networks["patch 8"]).settings["square"] == 320
    resnet = copydays_protocol("dino-plain", networks["resnet"]).plain_settings()
    assert (resnet["outputs"], resnet["whitening"], resnet["distractors"]) == (["features", "gem:4"], None, False)
    sscd = copydays_protocol("sscd", networks["resnet"]).plain_settings()
    assert (sscd["outputs"], sscd["resize"], sscd["interpolation"], sscd["whitening"], sscd["num_ranks"],
            sscd["headline"]) == (["gem:3"], 288, "bilinear", "pca", 100, "overall/muap")
    native = copydays_protocol("native", networks["patch 16"]).plain_settings()
    assert (native["resize"], native["crop"], native["outputs"]) == (32, 32, ["features"])


def test_the_default_is_native_except_at_224_pixels():
    networks = nets()
    assert copydays_protocol(None, networks["patch 16"]).name == "native"
    assert copydays_protocol(None, networks["resnet"]).name == "dino"
    with pytest.raises(UsageError, match="sscd-224"):
        copydays_protocol("disc", networks["resnet"])


def test_raw_pixels_have_the_native_protocol_only(small):
    assert copydays_protocol(None, RawPixels(224)).name == "native"
    with pytest.raises(UsageError, match="native, not dino"):
        copydays_protocol("dino", RawPixels(224))
    assert scored(RawPixels(8), small).metrics["original/map"] == 1


@pytest.mark.slow
def test_a_network_without_class_token(tmp_path):
    """A ResNet: the mean over places and their generalized mean, side by side."""
    root = random_set(tmp_path / "set", originals=2)
    result = scored(load_backbone("random:resnet18"), root, "dino-plain")
    assert result.metrics["original/map"] == 1
    assert result.protocol_settings["outputs"] == ["features", "gem:4"]
    assert (result.arch, len(result.detail["aps"]["strong"])) == ("resnet18", 2)


def test_the_record_says_what_was_compared(small, tmp_path):
    told = Told()
    result = scored(mean_color(), small, "dino", progress=told)
    said = told.said
    detail = result.detail
    assert (detail["num_originals"], detail["num_queries"], detail["num_distractors"], detail["num_whitening"]) \
        == (4, 80, 5, 9)
    assert (result.task, result.dataset, result.protocol) == ("copydays", "small", "dino-9-ranks")
    assert list(detail["aps"]) == list(BLOCKS)
    assert all(result.metrics[f"{block}/map"] == pytest.approx(np.mean(aps), abs=1e-6)
               for block, aps in detail["aps"].items())
    assert result.protocol_fingerprint == copydays_protocol("dino", mean_color(), 9).fingerprint
    assert read_result(result.write(tmp_path)).metrics == result.metrics
    assert [found.split(": ", 1)[1] for found in said] == ["4 originals, 76 copies, 5 in distractors, 9 in whitening"]


@each(("protocol", "size", "what", "ranks"), [
    ("native", 4, "originals", 20), ("dino-nowhitening", 9, "originals and distractors", 20),
    ("sscd", 9, "originals and distractors", 100)])
def test_a_database_smaller_than_the_ranks_is_refused_before_an_image_is_read(small, monkeypatch, protocol, size, what,
                                                                                ranks):
    monkeypatch.setattr(FileImages, "pixels", lambda images, index: pytest.fail("an image was read"))
    with pytest.raises(DataError, match=rf"a database of {size} images \({what}\), fewer than the first {ranks} ranks "
                                        rf"of {protocol}: add photographs, or score it with --ranks {size}"):
        evaluate_copydays(mean_color(), small, protocol)
    with pytest.raises(DataError, match=f"fewer than the first {size + 1} ranks of {protocol}-{size + 1}-ranks"):
        evaluate_copydays(mean_color(), small, protocol, ranks=size + 1)


def test_other_ranks_are_another_protocol(small, tmp_path):
    usual, fewer, one = (copydays_protocol("dino", mean_color(), ranks) for ranks in (20, 9, 1))
    assert usual == copydays_protocol("dino", mean_color())
    assert (fewer.name, fewer.settings["num_ranks"]) == ("dino-9-ranks", 9)
    assert {**fewer.settings, "num_ranks": 20} == usual.settings
    assert len({plan.fingerprint for plan in (usual, fewer, one)}) == 3
    with pytest.raises(UsageError, match="the first 0 ranks hold no image"):
        copydays_protocol("dino", mean_color(), 0)
    record = evaluate_copydays(mean_color(), small, "native", ranks=2)
    assert (record.protocol, record.protocol_fingerprint) \
        == ("native-2-ranks", copydays_protocol("native", mean_color(), 2).fingerprint)
    assert evaluate_copydays(mean_color(), small, "native", ranks=4).metrics["strong/map"] \
        > record.metrics["strong/map"]  # what is found at ranks 3 and 4 counts there alone


def test_the_fingerprint_of_the_data_covers_the_images_that_take_part_alone(small, tmp_path):
    joined, plain = (scored(mean_color(), small, name) for name in ("dino-nowhitening", "dino-plain"))
    other = colored(tmp_path / "others", [RED], distractors=[RED, GREEN])
    again = scored(mean_color(), small, "dino-nowhitening", distractors=other / "distractors")
    assert len({joined.dataset_fingerprint, plain.dataset_fingerprint, again.dataset_fingerprint}) == 3
    assert again.detail["num_distractors"] == 2
    assert again.detail["fingerprints"]["copies"] == joined.detail["fingerprints"]["copies"]


def test_only_copydays_itself_is_called_so(tmp_path):
    root = colored(tmp_path / "copydays", [RED])
    assert dataset_name(open_copydays(root, needs_distractors=False, needs_whitening=False)) == "own copydays"
    for block in BLOCKS:
        stems = [f"{2000 + number}{int(block == 'strong'):02}" for number in range(157)]
        stems += [f"{2000 + number}02" for number in range(72)] if block == "strong" else []
        for path in (root / block).iterdir():
            path.unlink()
        for stem in stems:
            (root / block / f"{stem}.jpg").touch()
    renamed = root.rename(tmp_path / "anything")
    assert dataset_name(open_copydays(renamed, needs_distractors=False, needs_whitening=False)) == "copydays"


def never(*_):
    raise AssertionError("an image was read")


@pytest.fixture
def no_decoding(monkeypatch):
    monkeypatch.setattr(FileImages, "pixels", never)


@pytest.mark.usefixtures("no_decoding")
@each("block", ["original", "strong", "crops/80"])
def test_missing_blocks_and_files_are_named_before_an_image_is_read(tmp_path, block):
    root = random_set(tmp_path / "set")
    gone = sorted((root / block).iterdir())[0]
    (root / block).rename(tmp_path / "gone")
    with pytest.raises(DataError, match=f"lacks 1 of Copydays' 20 blocks: {block}"):
        scored(mean_color(), root, "dino")
    (tmp_path / "gone").rename(root / block)
    gone.unlink()
    if block != "strong":
        with pytest.raises(DataError, match=r"3000"):
            scored(mean_color(), root, "dino")


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("kind", ["distractors", "whitening"])
def test_missing_extra_images_name_the_protocols_without(tmp_path, kind):
    root = random_set(tmp_path / "set")
    (root / kind).rename(tmp_path / "gone")
    for protocol in ("dino", "sscd"):
        with pytest.raises(DataError, match=rf"no folder .*{kind}.*dino-no{kind} .*dino-plain"):
            scored(mean_color(), root, protocol)
    with pytest.raises(UsageError, match=f"--{kind}"):
        scored(mean_color(), root, "dino-plain", **{kind: tmp_path / "gone"})


@pytest.mark.usefixtures("no_decoding")
def test_too_few_whitening_images_are_counted_before_one_is_read(small, tmp_path):
    colored(tmp_path / "few", [RED], whitening=[GREEN] * 5)
    with pytest.raises(DataError, match=r"few.whitening holds 5 .*features of 6 dimensions: at least 6 .*dino-plain"):
        scored(mean_color(), small, "dino", whitening=tmp_path / "few" / "whitening")
    save(tmp_path / "few" / "whitening" / "sixth.png", GREEN)
    with pytest.raises(DataError, match=r"holds 6 .*at least 7"):  # centered, six images vary along five dimensions
        scored(mean_color(), small, "sscd", whitening=tmp_path / "few" / "whitening")


def test_unreadable_images_of_all_folders_are_listed_together(tmp_path):
    root = random_set(tmp_path / "set")
    bad = [sorted((root / folder).iterdir())[1] for folder in ("strong", "crops/80", "distractors", "whitening")]
    for path in bad:
        path.write_text("no image")
    with pytest.raises(DataError) as caught:
        scored(mean_color(), root, "dino")
    assert "4 of 94 images cannot be read" in str(caught.value)
    assert all(str(path) in str(caught.value) for path in bad)
    for path in bad[:2]:
        save(path, noise(5, 5))
    with pytest.raises(DataError, match="2 of 94 images cannot be read"):
        scored(mean_color(), root, "dino")


def test_truncated_images_are_let_in_only_when_asked_for(tmp_path):
    root = random_set(tmp_path / "set")
    path = sorted((root / "strong").iterdir())[0]
    Image.fromarray(noise(7, 7, (64, 64, 3))).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(DataError, match="1 of 80 images cannot be read"):
        scored(mean_color(), root, "native")
    result = scored(mean_color(), root, "native", allow_truncated=True)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="1 of 80"):
        scored(mean_color(), root, "native", allow_truncated=True)
    save(path, noise(7, 7))
    assert scored(mean_color(), root, "native").dataset_fingerprint != result.dataset_fingerprint


def test_features_that_are_not_finite_are_named(tmp_path):
    class Broken(MeanColor):
        def forward(self, images):
            tokens = super().forward(images)
            return torch.where(tokens[:, :1, :1] > 0.9, torch.nan, tokens)

    root = colored(tmp_path / "set", [RED, GREEN, GRAY], {"crops/30": [RED, (200, 9, 9), GRAY]})
    assert scored(mean_color(Broken()), root, "native").metrics["original/map"] == 1
    save(root / "crops/30" / "300200.png", (255, 255, 255))
    with pytest.raises(PatchSSLError, match=r"1 of 60 images hold NaN or infinity \(crops/30/300200.png\)"):
        scored(mean_color(Broken()), root, "native")


@pytest.mark.parametrize("protocol", ["dino", "dino-plain"])
def test_progress_counts_all_images_of_all_folders(small, protocol):
    told = Told()
    scored(mean_color(), small, protocol, batch_size=16, progress=told)
    calls, looks = told.counts["features"], told.counts[LOOK]
    total = 94 if protocol == "dino" else 80
    assert looks[-1] == (total, total) and {of for _, of in looks} == {total}
    assert calls[-1] == (total, total)
    assert {total for _, total in calls} == {calls[-1][1]}
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_batches_and_workers_do_not_show(small):
    options = [{"batch_size": 64}, {"batch_size": 7}, {"batch_size": 16, "workers": 2}]
    one, *others = (scored(mean_color(), small, "dino", **option) for option in options)
    for other in others:
        assert other.metrics == one.metrics
        assert other.detail == one.detail


def test_a_second_run_and_other_protocols_of_the_same_images_decode_nothing(small, tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path)
    first = scored(mean_color(), small, "dino", cache=cache)
    plain = scored(mean_color(), small, "dino-plain")
    monkeypatch.setattr(FileImages, "pixels", never)
    told = Told()
    second = scored(mean_color(), small, "dino", cache=cache, progress=told)
    calls = told.counts["features"]
    assert (second.metrics, second.detail) == (first.metrics, first.detail)
    assert calls[-1] == (94, 94)
    assert scored(mean_color(), small, "dino-plain", cache=cache).metrics == plain.metrics
    with pytest.raises(AssertionError, match="an image was read"):
        scored(mean_color(), small, "sscd", cache=cache)


def test_the_features_are_those_of_one_pass_over_the_blocks(small):
    """Class token and GeM side by side, as `extract_outputs` gives them for a block alone."""
    block = open_copydays(small).blocks[1]
    plan = copydays_protocol("dino-plain", mean_color())
    outputs = extract_outputs(mean_color(), block.images, plan, ("class:1", "gem:4"))
    originals = extract_outputs(mean_color(), open_copydays(small).originals, plan, ("class:1", "gem:4"))
    asked, database = (nn.functional.normalize(torch.cat(list(part.values()), dim=1)) for part in (outputs, originals))
    similarity = (asked @ database.T).numpy()
    places = (similarity > similarity.diagonal()[:, None]).sum(axis=1)
    expected = np.where(places == 0, 1.0, 0.5 / (places + 1))
    assert scored(mean_color(), small, "dino-plain").detail["aps"]["strong"] \
        == pytest.approx(expected, abs=1e-6)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[2]).parents[1])]
import runpy
test = runpy.run_path(sys.argv[2])
test["features"].BLOCK = 16
class Killer:
    def counter(self, what):
        return lambda done, total: what == "features" and done >= 60 and os.kill(os.getpid(), signal.SIGKILL)
    def say(self, sentence):
        pass
test["scored"](test["mean_color"](), Path(sys.argv[3]), "dino", cache=test["FeatureCache"](Path(sys.argv[4])),
               batch_size=4, progress=Killer())
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_block(small, tmp_path, monkeypatch):
    package = Path(features.__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(package), __file__, str(small), str(tmp_path)]
    assert subprocess.run(command, check=False, env=os.environ | {"CI": ""}).returncode == -signal.SIGKILL
    cache = FeatureCache(tmp_path)
    stored = {path.suffix for path in cache.folder.iterdir()}
    assert stored == {".f32", ".json"}
    assert len(cache.entries()) == 2 * 3  # two outputs of three blocks of 16 images
    decoded = []
    pixels = FileImages.pixels
    monkeypatch.setattr(features, "BLOCK", 16)
    monkeypatch.setattr(FileImages, "pixels", lambda images, index: decoded.append(index) or pixels(images, index))
    result = scored(mean_color(), small, "dino", cache=cache)
    assert len(decoded) == 94 - 3 * 16
    monkeypatch.undo()
    assert result.detail == scored(mean_color(), small, "dino").detail


def test_the_record_names_its_queries_and_shows_the_worst_and_the_best(tmp_path):
    """Sixteen hues among others: what a strong copy finds is checked against a plain sort of its cosines."""
    rng = np.random.default_rng(0)
    originals = [tuple(int(value) for value in rng.integers(30, 220, 3)) for _ in range(16)]
    strong = [tuple(int(value) for value in rng.integers(30, 220, 3)) for _ in range(16)]
    root = colored(tmp_path / "set", originals, {"strong": strong}, distractors=[(9 * i, 40, 90) for i in range(9)])
    result = evaluate_copydays(mean_color(), root, "dino-nowhitening")
    stems = [f"{3000 + number}0" for number in range(16)]
    assert result.detail["queries"] == {"original": [f"{stem}0" for stem in stems],
                                        "strong": [f"{stem}1" for stem in stems]}
    entries = result.detail["galleries"]["strong"]
    assert [entry["end"] for entry in entries] == ["worst"] * 8 + ["best"] * 8
    aps = dict(zip(result.detail["queries"]["strong"], result.detail["aps"]["strong"], strict=True))
    assert {Path(entry["query"]["name"]).stem: entry["ap"] for entry in entries} == aps
    assert [entry["ap"] for entry in entries[:8]] == sorted(aps.values())[:8]
    colors = np.array([*originals, *((9 * i, 40, 90) for i in range(9))], dtype=float)
    colors /= np.linalg.norm(colors, axis=1, keepdims=True)
    names = [f"original/{stem}0.png" for stem in stems] + [f"{i:03}.png" for i in range(9)]
    for entry in entries:
        number = int(Path(entry["query"]["name"]).stem[:4]) - 3000
        order = np.argsort(-colors @ np.array(strong[number]), kind="stable").tolist()
        assert [found["name"] for found in entry["results"]] == [names[i] for i in order[:10]]
        assert [found["role"] for found in entry["results"]] == [
            "positive" if i == number else "error" if i < 16 else "distractor" for i in order[:10]]
        rank = order.index(number) + 1
        late = [{"name": names[number], "rank": rank}] if rank > 10 else []
        assert [{key: found[key] for key in ("name", "rank")} for found in entry["late"]] == late
    assert any(entry["late"] and entry["late"][0]["rank"] > 20 for entry in entries)  # beyond what was searched
