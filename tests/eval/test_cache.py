"""Features that are kept: found again under the same facts only, never damaged, never more than allowed."""

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import each

from patchssl.data.images import ArrayImages
from patchssl.eval import features
from patchssl.eval.cache import FeatureCache
from patchssl.eval.features import extract_features, extract_outputs
from patchssl.eval.pooling import compute_outputs, gem
from patchssl.eval.protocols import knn_protocol
from patchssl.eval.transforms import ImageTransform, normalize_images
from patchssl.models.load import load_backbone
from patchssl.runtime.errors import DataError, UnreadableImage, UsageError
from patchssl.runtime.files import default_folder

SMALL = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=48&depth=3&num_heads=3"
FACTS = {"weights": "ab", "block": [0, 3]}


def images_of(count, side=32, seed=0):
    array = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return ArrayImages(name="made", split="val", source="arrays of the test", array=array, ids=np.arange(count))


class Counting:
    """An image set that counts how many of its images are decoded; the rest it hands on."""

    def __init__(self, images, broken=()):
        self.images, self.broken, self.decoded = images, broken, 0

    def __getattr__(self, name):
        return getattr(self.images, name)

    def __len__(self):
        return len(self.images)

    def pixels(self, index):
        self.decoded += 1
        if index in self.broken:
            raise UnreadableImage(self.item_name(index), "planted")
        return self.images.pixels(index)


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path / "cache")


# entries

def test_what_is_stored_comes_back_bit_by_bit(cache):
    stored = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    cache.store(FACTS, stored)
    assert torch.equal(cache.load(FACTS), stored)
    assert cache.load({"block": [0, 3], "weights": "ab"}) is not None  # the order of facts is no fact
    assert cache.load(FACTS | {"block": [3, 6]}) is None


def test_a_damaged_entry_is_not_used(cache, caplog):
    for damage in (lambda content: content[:-1], lambda content: content[:-1] + b"!", lambda content: b""):
        cache.store(FACTS, torch.ones(3, 5))
        (array,) = cache.folder.glob("*.f32")
        array.write_bytes(damage(array.read_bytes()))
        with caplog.at_level(logging.WARNING):
            assert cache.load(FACTS) is None
        assert "is damaged" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"blake2b": 3, "shape": "x"}'])
def test_damaged_facts_are_not_used(cache, text):
    cache.store(FACTS, torch.ones(3, 5))
    (facts,) = cache.folder.glob("*.json")
    facts.write_text(text)
    assert cache.load(FACTS) is None


def test_the_longest_unused_go_when_the_limit_is_reached(tmp_path):
    cache = FeatureCache(tmp_path, limit=3 * 400)
    for number in range(3):
        cache.store({"n": number}, torch.full((10, 10), float(number)))
        os.utime(cache._files({"n": number})[0], (number, number))
    assert cache.load({"n": 0}) is not None  # used now
    cache.store({"n": 3}, torch.zeros(10, 10))
    assert [cache.load({"n": number}) is not None for number in range(4)] == [True, False, True, True]
    assert len(list(cache.folder.iterdir())) == 6


def test_entries_of_a_pass_are_never_removed_for_others_of_it(tmp_path):
    cache = FeatureCache(tmp_path, limit=3 * 400)
    old, own = {"n": -1}, [{"n": number} for number in range(4)]
    keep = {cache.path(facts) for facts in own}
    assert cache.store(old, torch.zeros(10, 10))
    assert [cache.store(facts, torch.zeros(10, 10), keep=keep) for facts in own] == [True, True, True, False]
    assert [cache.load(facts) is not None for facts in (old, *own)] == [False, True, True, True, False]
    assert not FeatureCache(tmp_path / "none", limit=399).store(old, torch.zeros(10, 10))


def test_the_folder_is_not_looked_through_at_every_store(tmp_path, monkeypatch):
    looks = []
    real = FeatureCache._look
    monkeypatch.setattr(FeatureCache, "_look", lambda self: looks.append(1) or real(self))
    cache = FeatureCache(tmp_path, limit=160 * 400)
    for number in range(320):
        cache.store({"n": number}, torch.zeros(10, 10))
    assert len(cache.entries()) == 160
    assert len(looks) <= 2 * 16 + 2


def test_several_processes_keep_the_limit_together(tmp_path):
    caches = [FeatureCache(tmp_path, limit=160 * 400) for _ in range(3)]
    for number in range(300):
        for process, cache in enumerate(caches):
            cache.store({"n": number, "process": process}, torch.zeros(10, 10))
    assert len(caches[0].entries()) <= 160 * (1 + 3 / 16)


def test_what_a_killed_process_had_begun_is_counted_and_goes(tmp_path):
    cache = FeatureCache(tmp_path, limit=3 * 400)
    cache.store({"n": 0}, torch.zeros(10, 10))
    left, begun = cache.folder / ".old.f32.1.ab.partial", cache.folder / ".new.f32.2.cd.partial"
    for path in (left, begun):
        path.write_bytes(bytes(500))
    assert cache.begun_bytes() == 1000
    os.utime(left, (1, 1))
    other = FeatureCache(tmp_path, limit=3 * 400)
    other.store({"n": 1}, torch.zeros(10, 10))  # 400 + 500 that another may be writing + 400
    assert (left.exists(), begun.exists(), other.holds({"n": 0}), other.holds({"n": 1})) == (False, True, False, True)
    assert other.clear() == 900 and not begun.exists()


def test_two_that_store_one_entry_at_once_both_succeed(tmp_path, caplog):
    def store(number):
        return [FeatureCache(tmp_path).store(FACTS, torch.ones(300, 50)) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool, caplog.at_level(logging.WARNING):
        assert all(all(stored) for stored in pool.map(store, range(4)))
    assert caplog.text == "" and torch.equal(FeatureCache(tmp_path).load(FACTS), torch.ones(300, 50))
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_entries_are_listed_and_cleared(cache):
    assert cache.entries() == []
    cache.store(FACTS, torch.ones(3, 5))
    (entry,) = cache.entries()
    assert (entry.size, dict(entry.facts)) == (60, FACTS)
    assert cache.clear() == 60
    assert cache.entries() == []
    assert cache.clear() == 0


def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    with caplog.at_level(logging.WARNING):
        FeatureCache(tmp_path / "file").store(FACTS, torch.ones(1, 1))
    assert "not cached" in caplog.text


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("PATCHSSL_CACHE", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
    monkeypatch.delenv("PATCHSSL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "patchssl"


# passes

def run(images, cache, outputs=("features",), uri=SMALL, **options):
    return extract_outputs(load_backbone(uri), images, knn_protocol("native", 32), outputs, cache=cache, **options)


def test_the_second_pass_decodes_nothing(cache):
    images = Counting(images_of(7))
    first = run(images, cache, ("class:2", "gem:3"))
    assert images.decoded == 7
    second = run(images, cache, ("gem:3", "class:2"))
    assert images.decoded == 7
    assert all(torch.equal(first[output], second[output]) for output in first)
    run(images, cache, ("gem:3", "mean_patch"))  # one of them is new
    assert images.decoded == 14


@pytest.mark.parametrize("change", ["weights", "images", "order", "transform", "scales"])
def test_whatever_moves_a_number_makes_another_entry(cache, change):
    images = images_of(5)
    run(images, cache)
    options = {"scales": (1.0, 0.5)} if change == "scales" else {}
    other = {"images": images_of(5, seed=1), "order": images.subset([1, 0, 2, 3, 4])}.get(change, images)
    counted = Counting(other)
    if change == "transform":
        extract_outputs(load_backbone(SMALL), counted, ImageTransform({"square": 16, "interpolation": "bicubic"}),
                        ("features",), cache=cache)
    else:
        run(counted, cache, uri=SMALL + "&seed=1" if change == "weights" else SMALL, **options)
    assert counted.decoded == 5


def test_a_subset_in_another_order_gets_its_own_features(cache):
    images, backwards = images_of(6), [5, 3, 1, 0, 2, 4]
    whole = run(images, cache)["features"]
    torch.testing.assert_close(run(images.subset(backwards), cache)["features"], whole[backwards])


def test_a_pass_that_fails_goes_on_from_its_whole_blocks(cache, monkeypatch):
    monkeypatch.setattr(features, "BLOCK", 4)
    with pytest.raises(DataError, match="1 of 10 images cannot be read"):
        run(Counting(images_of(10), broken={9}), cache, batch_size=3)
    healed = Counting(images_of(10))
    found = run(healed, cache, batch_size=3)["features"]
    assert healed.decoded == 2  # the last block of three
    assert torch.equal(found, run(images_of(10), None, batch_size=3)["features"])


def test_a_cache_smaller_than_the_set_says_so_and_keeps_the_first_blocks(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(features, "BLOCK", 4)
    cache = FeatureCache(tmp_path, limit=2 * 4 * 48 * 4 + 10)  # two blocks of four
    cache.store({"other": 1}, torch.ones(4, 48))
    decoded = []
    for _ in range(3):
        images = Counting(images_of(18))
        with caplog.at_level(logging.WARNING):
            found = run(images, cache, batch_size=3)["features"]
        decoded.append(images.decoded)
        assert torch.equal(found, run(images_of(18), None, batch_size=3)["features"])
    assert decoded == [18, 10, 10]
    assert "the last 55 % of them will be computed again next time; PATCHSSL_CACHE_GIB=1 keeps all" in caplog.text


def test_a_transform_that_says_nothing_of_itself_is_not_cached(cache):
    images, step = Counting(images_of(3)), knn_protocol("native", 32).transform()
    for _ in range(2):
        extract_features(load_backbone(SMALL), images, step.__call__, cache=cache)
    assert (images.decoded, cache.entries()) == (6, [])


# outputs

@each("uri", [SMALL, "random:resnet18", "random:vit_small_patch14_reg4_dinov2?depth=2&embed_dim=24"
                                        "&num_heads=3&img_size=56"])
def test_all_outputs_come_from_one_pass_and_equal_the_networks_own(uri):
    backbone = load_backbone(uri)
    images = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    vit = backbone.has_class_token
    found = compute_outputs(backbone, images, ["features", "mean_patch", "gem:4", *(["class:1", "class:2"] * vit)])
    patches = backbone.patch_tokens(images)
    torch.testing.assert_close(found["features"], backbone.features(images))
    torch.testing.assert_close(found["mean_patch"], patches.mean(1))
    torch.testing.assert_close(found["gem:4"], gem(patches, 4))
    if vit:
        torch.testing.assert_close(found["class:2"], backbone.class_tokens(images, last=2))
        torch.testing.assert_close(found["class:1"], backbone.features(images))
    else:
        with pytest.raises(UsageError, match="has no class token"):
            compute_outputs(backbone, images, ["class:1", "gem:4"])


def test_outputs_over_scales_are_the_mean_over_the_resized_images(cache):
    backbone, images = load_backbone(SMALL), images_of(4)
    found = run(images, None, ("class:1",), scales=(1.0, 2**-0.5, 0.5))["class:1"]
    batch = normalize_images(torch.from_numpy(images.array).permute(0, 3, 1, 2), backbone.mean, backbone.std)
    parts = [backbone.features(batch), *(backbone.features(torch.nn.functional.interpolate(
        batch, scale_factor=scale, mode="bilinear", align_corners=False)) for scale in (2**-0.5, 0.5))]
    torch.testing.assert_close(found, torch.stack(parts).mean(0))


def test_images_of_several_sizes_keep_their_places():
    class Sizes(ArrayImages):
        def pixels(self, index):
            side = (16, 24, 32)[index % 3]
            return super().pixels(index)[:side, : side + 8 * (index % 2)]

    base = images_of(9, side=40)
    images = Sizes(**{name: getattr(base, name) for name in ("name", "split", "source", "array", "ids")})
    backbone = load_backbone(SMALL)
    found = extract_outputs(backbone, images, ImageTransform({}), ("class:2",), batch_size=5)["class:2"]
    for index in range(9):
        one = normalize_images(torch.from_numpy(images.pixels(index).copy()).permute(2, 0, 1)[None], backbone.mean,
                               backbone.std)
        torch.testing.assert_close(found[index : index + 1], backbone.class_tokens(one, last=2), atol=1e-5, rtol=1e-5)


@each("output", ["token", "class:0", "class:1.5", "gem:", "gem:x", "gem:0.5", "gem:nan"])
def test_wrong_outputs(output):
    if output == "gem:":
        assert compute_outputs(load_backbone(SMALL), torch.zeros(1, 3, 32, 32), [output])[output].shape == (1, 48)
        return
    with pytest.raises(UsageError, match="output"):
        run(images_of(1), None, (output,))


def test_a_square_keeps_no_aspect():
    pixels = np.zeros((10, 40, 3), np.uint8)
    pixels[:, 20:] = 255
    square = ImageTransform({"square": 20, "interpolation": "bilinear"})(pixels)
    assert square.shape == (3, 20, 20)
    assert square[:, :, :8].max() == 0
    assert square[:, :, 12:].min() == 255


RANKS = """
import atexit, os, sys
from pathlib import Path
import torch
sys.path[:0] = sys.argv[2:]
from test_cache import SMALL, Counting, images_of
from patchssl.eval import features
from patchssl.runtime.distributed import end_launched, join_launched, rank
from test_cache import run
def keep_threads():
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    Path(sys.argv[1], "threads-" + os.environ["RANK"]).write_text(" ".join(names))
atexit.register(keep_threads)  # runs after the process group is left
join_launched()
features.BLOCK = 4
images = Counting(images_of(18))
found = run(images, None, ("class:2", "gem:3"), batch_size=3)
torch.save(found | {"decoded": images.decoded}, f"{sys.argv[1]}/{rank()}.pth")
try:
    run(Counting(images_of(18), broken={0, 13}), None, batch_size=3)
except Exception as error:
    assert "2 of 18 images cannot be read" in str(error), error
else:
    raise AssertionError("broken images went unnoticed")
end_launched(0)
"""


@pytest.mark.slow
def test_two_processes_give_the_same_bits_and_share_the_work(tmp_path, monkeypatch):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    here = str(Path(__file__).parent)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(script), str(tmp_path), here, str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setattr(features, "BLOCK", 4)
    alone = run(images_of(18), None, ("class:2", "gem:3"), batch_size=3)
    ranks = [torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1)]
    threads = [(tmp_path / f"threads-{rank}").read_text() for rank in (0, 1)]
    assert all("python" in names and "gloo" not in names for names in threads)  # those of the group have ended with it
    assert [found["decoded"] for found in ranks] == [10, 8]  # blocks of 4, 4, 4, 4 and 2 images
    for together in ranks:
        assert all(torch.equal(together[output], alone[output]) for output in alone)
