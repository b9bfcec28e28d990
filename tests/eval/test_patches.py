"""Patch correspondence: by hand, beside a loop over patches, and with networks whose answer is known."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import each
from PIL import Image
from told import Told
from torch import nn

from patchssl.data.images import ArrayImages
from patchssl.data.open import open_images
from patchssl.eval import patches
from patchssl.eval.patches import (
    count_hits,
    cut_view,
    draw_pair,
    evaluate_patches,
    expected_hits,
    nearest_tokens,
    patches_protocol,
)
from patchssl.eval.records import read_result
from patchssl.eval.tasks import ComputeOptions
from patchssl.models.backbone import Backbone
from patchssl.models.load import load_backbone
from patchssl.models.pixels import PixelPatches, RawPixels
from patchssl.runtime.errors import DataError, PatchSSLError, UsageError
from patchssl.views.geometry import Crops, View, patch_centers
from patchssl.views.matching import match_crops

SMALL = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=24&depth=2&num_heads=3"


class Tokens(nn.Module):
    """A class token of zeros, then what `of` makes of images (B, 3, H, W)."""

    def __init__(self, of):
        super().__init__()
        self.of = of

    def forward(self, images):
        tokens = self.of(images)
        return torch.cat([0 * tokens[:, :1], tokens], dim=1)


def backbone(of, patch_size=4, image_size=32):
    return Backbone.from_module(Tokens(of), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), patch_size=patch_size,
                                image_size=image_size)


def angles(values):
    """(..., D) in [0, 1] to (..., 2 D): cosines between them fall with the distance in every dimension."""
    return torch.cat([values.cos(), values.sin()], dim=-1)


def mean_color_code(images):
    return angles(nn.functional.avg_pool2d(images, 4).flatten(2).transpose(1, 2)[..., :2])


def set_of(array):
    return ArrayImages(name="made", split="all", source="arrays of the test", array=array, ids=np.arange(len(array)))


def gradients(count=6, side=128):
    """Images whose red tells the row and green the column."""
    rows, columns = np.mgrid[:side, :side] * 255 // (side - 1)
    return set_of(np.stack([np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)] * count))


def noise(count=8, side=48):
    return set_of(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


@pytest.fixture
def plain(monkeypatch):
    """The protocol without color and without mirrored views; gives the settings to change further."""
    native, changes = patches._native, {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "mirror": 0}
    monkeypatch.setattr(patches, "_native", lambda *sizes: native(*sizes) | changes)
    return changes


def random_pair(seed, size=32, height=90, width=120, mirror=0.5):
    settings = {**patches_protocol(RawPixels(size)).settings, "view_size": size, "mirror": mirror}
    return draw_pair(np.random.default_rng(seed), height, width, settings)


def contains_center(target, query, id_target, id_query, side):
    """By plain arithmetic in source pixels: does the target's patch contain the center of the query's?"""
    def box(view, patch):
        row, column = divmod(patch, side)
        column = side - 1 - column if view.mirrored else column
        return view.top + row * view.height / side, view.left + column * view.width / side, view.height / side

    top, left, tall = box(query, id_query)
    y, x = top + tall / 2, left + tall / 2
    top, left, tall = box(target, id_target)
    return top <= y < top + tall and left <= x < left + tall


@each("seed", range(6))
def test_scores_are_those_of_a_loop_over_patches(seed):
    side, patch = 4, 8
    views = random_pair(seed)
    tokens = torch.randn(2, side**2, 5, generator=torch.Generator().manual_seed(seed))
    for query, target in ((0, 1), (1, 0)):
        exact = within = count = chance = chance_within = 0
        for asked in range(side**2):
            right = [i for i in range(side**2) if contains_center(views[target], views[query], i, asked, side)]
            if not right:
                continue
            near = [i for i in range(side**2) if abs(i // side - right[0] // side) <= 1
                    and abs(i % side - right[0] % side) <= 1]
            cosines = [torch.cosine_similarity(tokens[query, asked], token, dim=0).item() for token in tokens[target]]
            found = cosines.index(max(cosines))
            count, exact, within = count + 1, exact + (found in right), within + (found in near)
            chance, chance_within = chance + 1 / side**2, chance_within + len(near) / side**2
        found = nearest_tokens(tokens[query : query + 1], tokens[target : target + 1])
        right = match_crops(Crops.of([views[target]]), Crops.of([views[query]]), patch)
        assert [value.item() for value in count_hits(found, right, side)] == [exact, within]
        assert [value.item() for value in expected_hits(right, side)] == pytest.approx([chance, chance_within])
        assert (right >= 0).sum() == count > 0


@each("mirror", [0.0, 0.5, 1.0])
def test_codes_of_the_place_in_the_source_find_every_patch(mirror):
    """Also mirrored: the patch nearest to a center is the one that contains it."""
    for seed in range(20):
        pair = random_pair(seed, mirror=mirror)
        crops = [Crops.of([view]) for view in pair]
        places = [torch.stack(patch_centers(one, 4), dim=-1) for one in crops]
        for query, target in ((0, 1), (1, 0)):
            right = match_crops(crops[target], crops[query], 4)
            # centers lie on a grid of 1/16 pixel: so little only moves those on a border into the patch beyond it
            asked, known = angles((places[query] + 0.02) / 40), angles(places[target] / 40)
            exact, within = count_hits(nearest_tokens(asked, known), right, 8)
            assert exact == within == (right >= 0).sum() > 0


@pytest.mark.parametrize("mirror", [0, 0.5])
def test_a_network_that_sees_where_a_patch_was_finds_almost_all(plain, mirror):
    """From the image to the record: its color is the place, up to 256 steps and the resizing of edges."""
    plain["mirror"] = mirror
    result = evaluate_patches(backbone(mean_color_code), gradients())
    assert result.metrics["exact"] > 0.9
    assert result.metrics["within1"] == 1
    assert result.metrics["position/exact"] < 0.2


def test_views_that_are_the_same_are_found_whole(plain):
    plain |= {"wide_area": [1.0, 1.0], "close_area": [1.0, 1.0]}
    result = evaluate_patches(load_backbone(SMALL), noise())
    own = {name: value for name, value in result.metrics.items() if not name.startswith("chance/")}
    assert own == dict.fromkeys(own, 1.0)
    assert result.metrics["chance/exact"] == 1 / 16
    assert result.detail["num_patches"] == 8 * 2 * 16
    neighbors = (4 * 4 + 8 * 6 + 4 * 9) / 16  # of corners, edges and the inside of 4 x 4 patches
    assert result.metrics["chance/within1"] == pytest.approx(neighbors / 16)


def test_views_mirrored_alike_keep_the_place_and_others_do_not(plain):
    plain |= {"wide_area": [1.0, 1.0], "close_area": [1.0, 1.0], "mirror": 1}
    assert evaluate_patches(load_backbone(SMALL), noise()).metrics["position/exact"] == 1
    plain["mirror"] = 0.5  # a column is never its own mirror image in an even grid
    metrics = evaluate_patches(load_backbone(SMALL), noise(40, 32)).metrics
    assert 0.2 < metrics["position/exact"] < 0.8
    flat = backbone(lambda images: images.unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(4, 5)).flatten(2).transpose(1, 2))
    assert evaluate_patches(flat, noise(40, 32)).metrics["exact"] > 0.95  # a mean does not know left from right


def test_tokens_that_are_all_the_same_find_the_first_patch():
    """Only patches whose right one is patch 0 are found: less than twice chance, and the same every time."""
    constant = backbone(lambda images: torch.ones(len(images), 64, 1))
    first, second = (evaluate_patches(constant, noise(40)).metrics for _ in range(2))
    assert first == second
    assert first["exact"] < 2 / 64


def test_chance_is_what_random_tokens_reach():
    generator = torch.Generator().manual_seed(0)
    blind = backbone(lambda images: torch.randn(len(images), 64, 16, generator=generator))
    result = evaluate_patches(blind, noise(60), pairs=4)
    for name in ("exact", "within1"):
        chance = result.metrics[f"chance/{name}"]
        deviation = math.sqrt(chance * (1 - chance) / result.detail["num_patches"])
        assert result.metrics[name] == pytest.approx(chance, abs=5 * deviation)
    assert result.metrics["chance/exact"] == pytest.approx(1 / 64)


def test_pixels_as_a_model_are_the_row_of_pixels_beside_any_other():
    images = noise()
    pixels = evaluate_patches(PixelPatches(32, 8), images)
    network = evaluate_patches(load_backbone(SMALL), images)
    assert pixels.method == "pixels" and network.method == "random"
    assert pixels.protocol_fingerprint == network.protocol_fingerprint
    for name in ("exact", "within1"):
        assert pixels.metrics[name] == pixels.metrics[f"pixels/{name}"] == network.metrics[f"pixels/{name}"]
    assert pixels.metrics["exact"] != network.metrics["exact"]


@each(("size", "patch"), [(32, 4), (64, 8), (224, 16), (28, 2), (7, 1)])
def test_pixels_get_patches_that_leave_a_grid(size, patch):
    assert PixelPatches(size).patch_size == patch
    assert patches_protocol(RawPixels(size)).settings["patch_size"] == patch


def test_pixel_tokens_are_the_pixels_of_the_patch():
    images = torch.arange(2 * 3 * 8 * 12).reshape(2, 3, 8, 12).float()
    tokens = PixelPatches(8, 4).patch_tokens(images)
    assert tokens.shape == (2, 6, 48)
    assert torch.equal(tokens[1, 4], images[1, :, 4:8, 4:8].flatten())


def test_a_network_without_class_token_has_patches_too():
    result = evaluate_patches(load_backbone("random:resnet18"), noise(2))
    assert result.protocol_settings["patch_size"] == 32
    assert result.metrics["chance/exact"] == pytest.approx(1 / 49)


def test_a_network_in_training_mode_is_left_in_it():
    network = load_backbone(SMALL).train()
    evaluate_patches(network, noise(1))
    assert network.training


def test_views_are_crops_of_the_image_with_other_colors(plain):
    settings = patches_protocol(RawPixels(64)).settings
    pixels = torch.from_numpy(gradients(1).pixels(0)).permute(2, 0, 1)
    view = View(10, 30, 40, 40, True, 64)
    seen = cut_view(pixels, view, np.random.default_rng(0), settings).permute(1, 2, 0).numpy()
    cut = Image.fromarray(gradients(1).pixels(0)[10:50, 30:70]).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(seen[:, ::-1].astype(int) - np.asarray(cut)).max() <= 2
    plain |= {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    settings = patches_protocol(RawPixels(64)).settings
    first, second = (cut_view(pixels, view, np.random.default_rng(seed), settings) for seed in (1, 2))
    assert (first.float() - second.float()).abs().mean() > 5


@each(("height", "width"), [(90, 120), (300, 40), (1, 1), (3, 500)])
def test_pairs_differ_in_scale_overlap_and_lie_inside(height, width):
    for seed in range(100):
        wide, close = random_pair(seed, 32, height, width)
        for view in (wide, close):
            assert view.top >= 0 and view.top + view.height <= height
            assert view.left >= 0 and view.left + view.width <= width
            assert view.height == view.width == int(view.height)
        assert close.height < wide.height or min(height, width) < 10
        assert (match_crops(Crops.of([wide]), Crops.of([close]), 4) >= 0).any()


def test_an_image_keeps_its_views_in_another_order_and_batch():
    images, network = noise(7), load_backbone(SMALL)
    whole = evaluate_patches(network, images, compute=ComputeOptions(batch_size=64)).detail["shares"]
    turned = evaluate_patches(network, images.subset(range(6, -1, -1)), compute=ComputeOptions(batch_size=3,
                                                                                               workers=2)).detail["shares"]
    assert {name: values[::-1] for name, values in turned.items()} == whole


@pytest.mark.slow
def test_processes_that_share_the_images_write_the_same_record(colors, tmp_path):
    records = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        place = tmp_path / str(len(launcher))
        command = [sys.executable, *launcher, "-m", "patchssl", "eval", "patches", SMALL, "--data", str(colors),
                   "--results", str(place), "--workers", "0", "--batch-size", "6"]
        ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr
        records.append(read_result(next(place.glob("*/*.json"))))
    alone, together = records
    assert alone.detail["num_images"] == 12  # val alone
    assert (together.metrics, together.detail) == (alone.metrics, alone.detail)


def test_seed_and_pairs_move_the_number_and_the_name():
    images, network = noise(), load_backbone(SMALL)
    results = [evaluate_patches(network, images, **how) for how in ({}, {"seed": 3}, {"pairs": 2})]
    assert [result.protocol for result in results] == ["native", "native-seed-3", "native-2-pairs"]
    assert len({result.protocol_fingerprint for result in results}) == 3
    assert len({result.metrics["exact"] for result in results}) == 3


def test_the_metrics_are_means_of_the_shares_of_the_images():
    result = evaluate_patches(load_backbone(SMALL), noise())
    for name, shares in result.detail["shares"].items():
        assert result.metrics[name] == pytest.approx(np.mean(shares), abs=1e-6)
    assert result.task == "patches" and result.detail["num_images"] == len(result.detail["shares"]["exact"]) == 8


def test_progress_ends_at_the_total():
    told = Told()
    evaluate_patches(load_backbone(SMALL), noise(7), compute=ComputeOptions(batch_size=6, progress=told))
    assert told.counts["patches"] == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize("workers", [0, 2])
def test_all_unreadable_images_are_listed_before_a_number(tmp_path, workers):
    for index in range(6):
        Image.fromarray(noise(1).pixels(0)).save(tmp_path / f"{index}.png")
    for index in (1, 4):
        (tmp_path / f"{index}.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"2 of 6[\s\S]*1\.png[\s\S]*4\.png"):
        evaluate_patches(load_backbone(SMALL), open_images(tmp_path), compute=ComputeOptions(batch_size=2,
                                                                                             workers=workers))


def test_what_cannot_be_scored_is_said():
    images = noise(3)
    with pytest.raises(PatchSSLError, match=r"3 of 3 images hold NaN .*all/00000"):
        evaluate_patches(backbone(lambda images: torch.full((len(images), 64, 2), torch.nan)), images)
    with pytest.raises(PatchSSLError, match=r"3 of 3 images hold .*too large to be normalized"):
        evaluate_patches(backbone(lambda images: torch.full((len(images), 64, 2), 1e25)), images)
    with pytest.raises(UsageError, match="then one for each of the 8 x 8 patches of 4 pixels"):
        evaluate_patches(backbone(lambda images: torch.ones(len(images), 9, 2)), images)
    with pytest.raises(DataError, match="no all images"):
        evaluate_patches(load_backbone(SMALL), images.subset([]))
    with pytest.raises(UsageError, match="patches protocol"):
        evaluate_patches(load_backbone(SMALL), images, "dino")
    with pytest.raises(UsageError, match="1 is the least"):
        evaluate_patches(load_backbone(SMALL), images, pairs=0)
    with pytest.raises(UsageError, match="no whole number of patches"):
        PixelPatches(32, 5)


def test_similarities_in_parts_find_the_same(monkeypatch):
    queries, targets = torch.randn(2, 3, 16, 4).unbind(0)
    whole = nearest_tokens(queries, targets)
    monkeypatch.setattr(patches, "_SIMILARITIES", 100)
    assert torch.equal(nearest_tokens(queries, targets), whole)


def test_the_command_writes_a_record_of_a_folder_without_labels(patchssl, photo, tmp_path):
    ran = patchssl("eval", "patches", SMALL, "--data", photo.parent, "--results", tmp_path, "--workers", 0)
    assert ran.code == 0, ran.err
    [path] = tmp_path.glob("random-*/patches-*@native.json")
    record = read_result(path)
    assert f"exact matches {record.metrics['exact']:.1%}" in ran.out
    assert f"by chance {record.metrics['chance/exact']:.1%}" in ran.out
    pixels = patchssl("eval", "patches", "pixels?img_size=32&patch_size=8", "--data", photo.parent, "--results",
                      tmp_path, "--workers", 0, "--json")
    assert json.loads(pixels.out)["metrics"]["exact"] == record.metrics["pixels/exact"]
    table = patchssl("tables", "--results", tmp_path)
    assert "Patch correspondence" in table.out and "within one patch" in table.out
    assert patchssl("eval", "patches", "pixels?size=3", "--data", photo.parent).code == 2
