"""Matches by nearest tokens, beside slow loops and beside the record of patch correspondence."""

import numpy as np
import pytest
import torch
from PIL import Image

from patchssl.data.images import FileImages, Names
from patchssl.eval.patches import evaluate_patches
from patchssl.models.load import load_backbone
from patchssl.models.pixels import PixelPatches
from patchssl.report.figures.nearest import NEIGHBOR, RIGHT, WRONG, match_images, match_views, mutual_matches
from patchssl.runtime.errors import PatchSSLError, UsageError

SMALL = "random:vit_tiny_patch16_224?img_size=32&patch_size=4&depth=1&embed_dim=24"


def slow_mutual(first, second):
    """(i, j, cosine) of pairs that are each other's best, by every single product."""
    table = [[float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for b in second] for a in first]
    found = []
    for i, row in enumerate(table):
        j = int(np.argmax(row))
        if int(np.argmax([table[k][j] for k in range(len(first))])) == i:
            found.append((i, j, row[j]))
    return sorted(found, key=lambda match: -match[2])


def test_mutual_matches_are_those_of_a_double_loop_best_first():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(23, 5)), rng.normal(size=(17, 5))
    found = mutual_matches(torch.from_numpy(first), torch.from_numpy(second))
    slow = slow_mutual(first, second)
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == [match[:2] for match in slow]
    assert found.similarity == pytest.approx([match[2] for match in slow])
    assert 3 < len(slow) < 17 and (np.diff(found.similarity) <= 0).all()


def test_maps_are_matched_row_by_row_and_channels_must_fit():
    tokens = np.eye(6).reshape(2, 3, 6)
    found = match_images(tokens, tokens[:, ::-1])
    assert found.first.tolist() == list(range(6)) and found.second.tolist() == [2, 1, 0, 5, 4, 3]
    with pytest.raises(UsageError, match="6 and 5 channels"):
        match_images(tokens, tokens[..., :5])


def test_tokens_that_are_not_finite_are_refused():
    with pytest.raises(PatchSSLError, match="NaN or infinity"):
        mutual_matches(torch.full((2, 3), torch.nan), torch.ones(2, 3))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of three smooth random images of different shapes."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(1)
    for name, size in (("a", (120, 90)), ("b", (80, 80)), ("c", (64, 110))):
        coarse = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("network", ["small", "pixels"])
def test_the_shares_are_those_in_the_record_of_patch_correspondence(photographs, network):
    backbone = load_backbone(SMALL) if network == "small" else PixelPatches(32, 4)
    names = ["a.png", "b.png", "c.png"]
    images = FileImages(name="photographs", split="all", source="", root=photographs, names=Names(names))
    record = evaluate_patches(backbone, images, seed=3)
    found = [match_views(backbone, images.pixels(i), name, seed=3) for i, name in enumerate(names)]
    for metric in ("exact", "within1"):
        shares = [getattr(one, metric) for one in found]
        assert shares == pytest.approx(record.detail["shares"][metric], abs=1e-6)
        assert 0 < np.mean(shares) < 1
    assert sum(one.num_patches for one in found) == record.detail["num_patches"]


def test_a_match_is_right_where_either_center_lies_in_the_other_patch(photographs):
    pixels = np.array(Image.open(photographs / "a.png"))
    found = [match_views(PixelPatches(32, 4), pixels, "a.png", seed=seed) for seed in range(4)]
    seen = set()
    for one in found:
        for first, second, verdict in zip(one.matches.first, one.matches.second, one.verdicts, strict=True):
            squares = [square(view, patch, 8) for view, patch in zip(one.views, (first, second), strict=True)]
            steps = [distance(squares[0], center(squares[1])), distance(squares[1], center(squares[0]))]
            inside = [holds(view, center(squares[1 - i])) for i, view in enumerate(one.views)]
            near = min((step for step, known in zip(steps, inside, strict=True) if known), default=9)
            assert verdict == (RIGHT if near == 0 else NEIGHBOR if near == 1 else WRONG)
            seen.add(int(verdict))
    assert seen == {RIGHT, NEIGHBOR, WRONG}


def square(view, patch, side):
    """Top, left, height and width in source pixels of a patch of a view."""
    row, column = divmod(int(patch), side)
    column = side - 1 - column if view.mirrored else column
    height, width = view.height / side, view.width / side
    return view.top + row * height, view.left + column * width, height, width


def center(square):
    return square[0] + square[2] / 2, square[1] + square[3] / 2


def holds(view, point):
    return 0 <= point[0] - view.top < view.height and 0 <= point[1] - view.left < view.width


def distance(square, point):
    """How many patches of its size `point` lies away from a square, along the longer axis."""
    return max(abs(np.floor((point[axis] - square[axis]) / square[2 + axis] + 1e-9)) for axis in (0, 1))
