import hashlib
import importlib
import sys

import numpy as np
import pytest
import torch
from cases import each
from PIL import Image
from torch import nn

from patchssl.data.images import ArrayImages
from patchssl.data.open import open_images
from patchssl.eval.cache import FeatureCache
from patchssl.eval.features import extract_features
from patchssl.eval.protocols import knn_protocol
from patchssl.eval.records import network_of
from patchssl.eval.transforms import crop_image, normalize_images
from patchssl.models.backbone import Backbone
from patchssl.models.load import load_backbone
from patchssl.models.pixels import RawPixels
from patchssl.runtime.errors import DataError, PatchSSLError, UsageError


def images_of(array):
    return ArrayImages(
        name="made",
        split="val",
        source="arrays of the test",
        array=array,
        ids=np.arange(len(array)),
        classes=("a", "b"),
        labels=np.arange(len(array)) % 2,
    )


@pytest.fixture
def images():
    return images_of(np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3), dtype=np.uint8))


class MeanColor(nn.Module):
    """Tokens (B, 1 + 1, 3): class token = mean color of the normalized image, so that features are known."""

    def forward(self, images):
        means = images.mean(dim=(2, 3)).unsqueeze(1)
        return torch.cat([means, 0 * means], dim=1)


def mean_color(**options):
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    return Backbone.from_module(MeanColor(), mean=mean, std=std, patch_size=16, image_size=16, **options)


def write_jpegs(folder, count):
    for index in range(count):
        (folder / "class").mkdir(parents=True, exist_ok=True)
        (folder / "other").mkdir(parents=True, exist_ok=True)
        name = folder / ("class" if index % 2 else "other") / f"{index:02}.png"
        Image.fromarray(np.full((20, 30, 3), 20 * index, np.uint8)).save(name)
    return folder


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 0), (4, 2), (11, 0), (64, 3)])
def test_features_come_in_the_order_of_the_images_normalized_by_the_networks_mean_and_std(images, batch_size, workers):
    features = extract_features(
        mean_color(), images, knn_protocol("native", 16), batch_size=batch_size, workers=workers
    )
    colors = images.array.reshape(11, -1, 3).astype(np.float64).mean(axis=1) / 255
    expected = (colors - [0.1, 0.2, 0.3]) / [0.5, 1.0, 2.0]
    assert features.dtype == torch.float32
    assert np.allclose(features, expected, atol=1e-6)
    assert not features.requires_grad


def test_a_transform_that_gives_floats_has_normalized_already(images):
    def transform(pixels):
        cut = crop_image(pixels, knn_protocol("native", 16).settings)
        return normalize_images(cut, (0.1, 0.2, 0.3), (0.5, 1.0, 2.0))

    ours = extract_features(mean_color(), images, transform)
    assert torch.equal(ours, extract_features(mean_color(), images, knn_protocol("native", 16)))


def test_a_real_network_gives_its_final_class_token(images):
    backbone = load_backbone("random:vit_tiny_patch16_224?img_size=16&patch_size=8&embed_dim=48&depth=2")
    protocol = knn_protocol("native", 16)
    cut = torch.stack([crop_image(images.pixels(i), protocol.settings) for i in range(11)])
    batch = normalize_images(cut, backbone.mean, backbone.std)
    with torch.no_grad():
        expected = backbone.tokens(batch)[:, 0]
    features = extract_features(backbone, images, protocol, batch_size=4)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def test_progress_is_told_after_every_batch_and_ends_at_the_total(images):
    calls = []
    extract_features(
        mean_color(),
        images,
        knn_protocol("native", 16),
        batch_size=4,
        progress=lambda *call: calls.append(call),
    )
    assert calls == [(4, 11), (8, 11), (11, 11)]


def test_all_unreadable_images_of_the_whole_pass_are_listed_and_no_number_is_given(tmp_path):
    folder = write_jpegs(tmp_path / "set", 9)
    (folder / "class" / "01.png").write_text("this is no image")
    whole = (folder / "other" / "08.png").read_bytes()
    (folder / "other" / "08.png").write_bytes(whole[: len(whole) // 2])
    calls = []
    with pytest.raises(DataError) as caught:
        extract_features(
            mean_color(),
            open_images(folder),
            knn_protocol("native", 16),
            batch_size=2,
            workers=2,
            progress=lambda *call: calls.append(call),
        )
    assert "2 of 9 images cannot be read" in str(caught.value)
    assert "01.png" in str(caught.value)
    assert "08.png" in str(caught.value)
    assert calls[-1] == (9, 9)  # it went on to the end


def test_features_that_are_not_finite_name_their_images(images):
    class Broken(MeanColor):
        def forward(self, images):
            tokens = super().forward(images)
            return torch.where(tokens > 0.9, float("nan"), tokens)

    array = images.array.copy()
    array[[2, 7]] = 255
    backbone = Backbone.from_module(Broken(), mean=(0, 0, 0), std=(1, 1, 1), patch_size=16, name="mine")
    with pytest.raises(PatchSSLError, match=r"mine gives for 2 of 11 images .*val/00002, val/00007"):
        extract_features(backbone, images_of(array), knn_protocol("native", 16))


@each("scale, largest", [(1e25, "1.0e[+]25"), (1e-20, "1.0e-20")])
def test_features_whose_length_float32_cannot_hold_are_refused(images, scale, largest):
    """Normalized they would all be 0, and every image as near as any other."""
    class Far(MeanColor):
        def forward(self, images):
            return scale * (0 * super().forward(images) + 1)

    backbone = Backbone.from_module(Far(), patch_size=16, name="far")
    with pytest.raises(DataError, match=f"11 of the 11 features that far gives cannot be normalized.*{largest}"):
        extract_features(backbone, images, knn_protocol("native", 16))


TOKENS = """
import torch
from torch import nn
from patchssl import Backbone

SCALE = 1.0

def tokens(images):
    patches = nn.functional.avg_pool2d(images, 16).flatten(2).transpose(1, 2)
    return SCALE * torch.cat([patches, patches], dim=1)

def make():
    return Backbone.from_module(nn.Identity(), tokens=tokens, patch_size=16, image_size=16)
"""


def test_features_of_other_code_over_the_same_weights_are_not_taken_from_the_cache(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    cache, found = FeatureCache(tmp_path / "cache"), []
    for text in (TOKENS, TOKENS.replace("SCALE *", "-SCALE *"), TOKENS.replace("1.0", "3.0"), TOKENS):
        (tmp_path / "tokens_of_test.py").write_text(text)
        sys.modules.pop("tokens_of_test", None)
        importlib.invalidate_caches()
        backbone = load_backbone("py:tokens_of_test:make")
        found.append(extract_features(backbone, images, knn_protocol("native", 16), cache=cache))
    sys.modules.pop("tokens_of_test")
    assert torch.equal(found[1], -found[0]) and torch.equal(found[2], 3 * found[0]) and torch.equal(found[3], found[0])
    assert len(cache.entries()) == 3


def test_features_of_a_network_that_cannot_be_told_are_not_kept(images, tmp_path):
    cache = FeatureCache(tmp_path)
    backbone = Backbone.from_module(torch.jit.trace(MeanColor(), torch.zeros(1, 3, 16, 16)), patch_size=16,
                                    image_size=16)
    extract_features(backbone, images, knn_protocol("native", 16), cache=cache)
    assert not cache.entries()
    assert network_of(backbone).unknown == ("the network.module: compiled TorchScript",)


def test_what_is_no_vector_per_image_is_refused(images):
    class Tokens(Backbone):
        def features(self, images):
            return self.tokens(images)

    backbone = mean_color(name="all-tokens")
    backbone.__class__ = Tokens
    with pytest.raises(PatchSSLError, match=r"all-tokens gave features of shape \(11, 2, 3\) for 11 images"):
        extract_features(backbone, images, knn_protocol("native", 16))


def test_nothing_to_look_at_and_empty_batches_are_refused(images):
    with pytest.raises(DataError, match="made holds no val images"):
        extract_features(mean_color(), images.subset([]), knn_protocol("native", 16))
    with pytest.raises(UsageError, match="a batch of 0"):
        extract_features(mean_color(), images, knn_protocol("native", 16), batch_size=0)


def test_a_pass_leaves_the_networks_mode_and_the_global_generator_as_they_were(images):
    class Modes(MeanColor):
        seen = ()

        def forward(self, images):
            self.seen = (*self.seen, self.training)
            return super().forward(images)

    backbone = Backbone.from_module(Modes(), patch_size=16).train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    extract_features(backbone, images, knn_protocol("native", 16), workers=1)
    assert torch.equal(torch.rand(3), expected)
    assert backbone.module.seen == (False,)
    assert backbone.training
    assert backbone.module.training


def test_raw_pixels_are_the_flattened_images_in_0_to_1(images):
    features = extract_features(RawPixels(16), images, knn_protocol("native", 16))
    expected = images.array.transpose(0, 3, 1, 2).reshape(11, -1) / np.float32(255)
    assert np.array_equal(features.numpy(), expected)


def test_raw_pixels_pass_for_a_backbone_without_weights():
    pixels = RawPixels(32)
    assert (pixels.method, pixels.image_size, pixels.seed) == ("pixels", 32, None)
    assert pixels.weights_sha256 == hashlib.sha256(b"").hexdigest()
