"""Features block by block: the whole pass in order, never held together, whatever the cache has of it."""

import weakref

import numpy as np
import pytest
import torch

from patchssl.data.images import ArrayImages
from patchssl.eval import features
from patchssl.eval.cache import FeatureCache
from patchssl.eval.features import extract_outputs, iter_outputs
from patchssl.eval.protocols import knn_protocol
from patchssl.models.load import load_backbone
from patchssl.runtime.errors import DataError, PatchSSLError, UnreadableImage

SMALL = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=48&depth=1&num_heads=3"


class Watched(ArrayImages):
    """Images that write down which of them were decoded; those in `broken` cannot be."""

    decoded: list
    broken: frozenset = frozenset()

    def pixels(self, index):
        self.decoded.append(index)
        if index in self.broken:
            raise UnreadableImage(self.item_name(index), "planted")
        return super().pixels(index)


def watched(count, broken=()):
    array = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    images = Watched(name="made", split="val", source="arrays of the test", array=array, ids=np.arange(count))
    object.__setattr__(images, "decoded", [])
    object.__setattr__(images, "broken", frozenset(broken))
    return images


@pytest.fixture(autouse=True)
def blocks_of_four(monkeypatch):
    monkeypatch.setattr(features, "BLOCK", 4)


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path / "cache")


def blocks(images, cache=None, **options):
    return iter_outputs(load_backbone(SMALL), images, knn_protocol("native", 32), ("class:1", "gem:3"), batch_size=3,
                        cache=cache, **options)


def whole(images):
    return extract_outputs(load_backbone(SMALL), images, knn_protocol("native", 32), ("class:1", "gem:3"),
                           batch_size=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_blocks_side_by_side_are_the_whole_pass(workers):
    images = watched(10)
    found = list(blocks(images, workers=workers))
    assert [part for part, _ in found] == [range(4), range(4, 8), range(8, 10)]
    for output, expected in whole(images).items():
        assert torch.equal(torch.cat([block[output] for _, block in found]), expected)


def test_a_block_is_not_computed_before_the_one_ahead_is_taken_nor_kept_after_it():
    images = watched(10)
    passing = blocks(images)
    _, block = next(passing)
    assert max(images.decoded) == 3
    gone = weakref.ref(block["class:1"])
    next(passing)
    assert max(images.decoded) == 7
    del block
    assert gone() is None


@pytest.mark.parametrize("held", [{0}, {1}, {2}, {0, 2}, {0, 1, 2}])
def test_whatever_blocks_the_cache_holds_the_stream_is_the_same(cache, held):
    expected = whole(watched(10))
    list(blocks(watched(10), cache))
    for entry in cache.entries():
        if entry.facts["block"][0] // 4 not in held:
            entry.path.unlink()
    images = watched(10)
    found = list(blocks(images, cache))
    assert sorted(images.decoded) == [index for index in range(10) if index // 4 not in held]
    for output in expected:
        assert torch.equal(torch.cat([block[output] for _, block in found]), expected[output])


def test_a_block_damaged_in_the_cache_is_computed_again_and_healed(cache):
    expected = whole(watched(10))
    list(blocks(watched(10), cache))
    (entry,) = (entry for entry in cache.entries() if entry.facts["block"] == [4, 8]
                and entry.facts["output"] == "gem:3")
    entry.path.write_bytes(b"damage")
    images = watched(10)
    found = list(blocks(images, cache))
    assert images.decoded == [4, 5, 6, 7]
    assert torch.equal(torch.cat([block["gem:3"] for _, block in found]), expected["gem:3"])
    images = watched(10)
    list(blocks(images, cache))
    assert images.decoded == []


def test_after_an_unreadable_image_no_block_comes_but_all_of_them_are_listed():
    images = watched(14, broken={5, 13})
    passing = blocks(images)
    assert next(passing)[0] == range(4)
    with pytest.raises(DataError, match=r"2 of 14 images cannot be read(.|\n)*val/00005(.|\n)*val/00013"):
        next(passing)
    assert sorted(images.decoded) == list(range(14))


def test_the_first_block_that_is_not_finite_ends_the_pass():
    backbone = load_backbone(SMALL)
    with torch.no_grad():
        backbone.module.norm.weight.fill_(float("nan"))
    images = watched(10)
    with pytest.raises(PatchSSLError, match=r"gives for 4 of 4 images hold NaN or infinity \(val/00000, .*val/00003\)"):
        list(iter_outputs(backbone, images, knn_protocol("native", 32), ("class:1",)))
    assert max(images.decoded) == 3


def test_progress_counts_what_is_computed_and_ends_at_its_total(cache):
    calls = []
    list(blocks(watched(10), cache, progress=lambda *call: calls.append(call)))
    assert calls == [(3, 10), (4, 10), (7, 10), (8, 10), (10, 10)]
    calls.clear()
    list(blocks(watched(10), cache, progress=lambda *call: calls.append(call)))
    assert calls == [(10, 10)]
