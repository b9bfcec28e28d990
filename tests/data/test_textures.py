import hashlib
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from patchssl.data.textures import CLASSES, sine_table, textures
from patchssl.runtime.errors import UsageError

SHA256 = {
    ("train", 32): "ef540066e7f29e153e0c5966cbbe478ee0231ea1830557d480b0f82f74254d92",
    ("val", 32): "99e53ba1469b1d8dec3851f68751633c0b05cb28e2612f094a74181844305f63",
    ("train", 64): "19ca6cf34e406acf68b611d7327e683128a106de579c560eae607f4b031069f0",
    ("val", 64): "b8cd4b05b0add394d85bb089a2f6bef65e984256ac4e1079c9aa6fa773d632af",
}


@pytest.fixture(scope="module", params=[32, 64])
def splits(request):
    """Both splits at one size: ((images, labels) to train, (images, labels) to test)."""
    return textures("train", request.param), textures("val", request.param)


@pytest.fixture(scope="module")
def small():
    """Both splits at 32 px."""
    return textures("train", 32), textures("val", 32)


def neighbors_accuracy(train, train_labels, test, test_labels):
    """Top-1 of DINO's vote of 20 neighbors, one test image at a time, in double precision."""
    length, test_length = (np.sqrt(np.einsum("nd,nd->n", x, x)) for x in (train, test))
    cosine = test @ train.T / length / test_length[:, None]
    right = 0
    for similarity, label in zip(cosine, test_labels, strict=True):
        nearest = np.argpartition(-similarity, 20)[:20]
        weights = np.exp(similarity[nearest].astype(float) / 0.07)
        votes = np.bincount(train_labels[nearest], weights, len(CLASSES))
        right += votes.argmax() == label
    return right / len(test)


def flat(images):
    return images.reshape(len(images), -1).astype(np.float32)


def test_the_bytes_are_the_same_on_every_machine(splits):
    for split, (images, labels) in zip(("train", "val"), splits, strict=True):
        digest = hashlib.sha256(images)
        digest.update(labels.astype("<i8"))
        assert digest.hexdigest() == SHA256[split, images.shape[1]]


def test_shape_type_and_balance(splits):
    for count, (images, labels) in zip((6000, 1500), splits, strict=True):
        size = images.shape[1]
        assert images.shape == (count, size, size, 3)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
        assert np.bincount(labels).tolist() == [count // 10] * 10
    assert len(set(CLASSES)) == 10


def test_no_image_comes_twice(splits):
    seen = {hashlib.sha256(image).digest() for images, _ in splits for image in images}
    assert len(seen) == 7500


def test_raw_pixels_do_not_tell_the_classes(splits):
    (train, train_labels), (test, test_labels) = splits
    tested = 1500 * 32 // train.shape[1]  # half of the test split at 64 px: any run of images is balanced
    assert neighbors_accuracy(flat(train), train_labels, flat(test[:tested]), test_labels[:tested]) <= 0.18


def test_mean_and_spread_of_color_do_not_tell_the_classes(small):
    (train, train_labels), (test, test_labels) = small
    pixels = [x.reshape(len(x), -1, 3).astype(np.float32) for x in (train, test)]
    colors = [np.hstack([x.mean(1), x.std(1)]) for x in pixels]
    assert neighbors_accuracy(colors[0], train_labels, colors[1], test_labels) <= 0.18


def test_an_untrained_network_does_not_tell_the_classes(small):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=96, depth=3,
                                    num_heads=3, num_classes=0).eval()  # fmt: skip

    @torch.inference_mode()
    def features(images):
        normalized = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
        return torch.cat([network(batch) for batch in normalized.split(250)]).numpy()

    (train, train_labels), (test, test_labels) = small
    assert neighbors_accuracy(features(train), train_labels, features(test), test_labels) <= 0.16


def local_shapes(images, filters):
    """How often the filters (F, 1, 7, 7) are met in gray images (N, 1, S, S), whatever the local contrast."""
    ones = torch.ones_like(filters[:1]) / filters[0].numel()
    feature = []
    for batch in images.split(100):
        mean, power = F.conv2d(batch, ones, stride=2), F.conv2d(batch**2, ones, stride=2)
        met = F.conv2d(batch, filters, stride=2).abs_() / (power - mean**2).clamp(min=9).sqrt()
        feature.append(torch.cat([(met - t).relu_().mean((2, 3)) for t in (2.0, 4.0)], 1))
    return torch.cat(feature)


def test_the_shape_of_the_pattern_tells_the_classes(small):
    """A linear classifier over counts of local shapes of gray, whatever their sign: no color, no place."""
    (train, train_labels), (test, test_labels) = small
    train, test = (torch.from_numpy(x).float().mean(3).unsqueeze(1) for x in (train, test))
    row, column = np.random.default_rng(0).integers(0, 26, (2, 128))
    corners = enumerate(zip(row, column, strict=True))
    patches = torch.stack([train[i, :, r : r + 7, c : c + 7] for i, (r, c) in corners])
    patches = patches - patches.mean((1, 2, 3), keepdim=True)
    filters = patches / torch.linalg.vector_norm(patches, dim=(1, 2, 3), keepdim=True)
    a, b = local_shapes(train, filters), local_shapes(test, filters)
    mean, std = a.mean(0), a.std(0)
    a, b = (F.pad((x - mean) / std, (0, 1), value=1.0).double() for x in (a, b))
    targets = F.one_hot(torch.from_numpy(train_labels)).double()
    weights = torch.linalg.solve(a.T @ a + 10 * torch.eye(a.shape[1], dtype=torch.float64), a.T @ targets)
    accuracy = ((b @ weights).argmax(1).numpy() == test_labels).mean()
    assert accuracy >= 0.85


def test_global_random_state_is_neither_used_nor_moved():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first, _ = textures("val")
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(2)
    assert (textures("val")[0] == first).all()


def test_the_integer_sine_is_the_sine_rounded():
    table = sine_table()
    exact = [math.sin(2 * math.pi * i / 1024) * (1 << 14) for i in range(1024)]
    assert table.tolist() == [round(x) for x in exact]


@pytest.mark.parametrize(("arguments", "words"), [
    (("vla", 32), r"split .*'vla' is unknown; did you mean 'val'\? Choose one of: train, val"),
    (("train", 48), r"size .*'48' is unknown; .*32, 64"),
])  # fmt: skip
def test_an_unknown_split_or_size_is_refused(arguments, words):
    with pytest.raises(UsageError, match=words):
        textures(*arguments)
