import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from patchssl.eval.protocols import Protocol, knn_protocol, resolve
from patchssl.eval.transforms import crop_image, native_resize, normalize_images
from patchssl.runtime.errors import UsageError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def torchvision_pipeline(pixels, resize, crop):
    steps = [
        transforms.Resize(resize, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(crop),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    return transforms.Compose(steps)(Image.fromarray(pixels))


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(1, 130),
    width=st.integers(1, 130),
    sizes=st.sampled_from([(32, 32), (37, 32), (73, 64), (40, 33), (40, 40)]),
    seed=st.integers(0, 9),
)
def test_images_are_cut_as_torchvision_cuts_pil_images(height, width, sizes, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    resize, crop = sizes
    cut = crop_image(pixels, {"resize": resize, "crop": crop, "interpolation": "bicubic"})
    ours = normalize_images(cut, MEAN, STD)
    assert torch.equal(ours, torchvision_pipeline(pixels, resize, crop))


def test_the_dino_protocol_cuts_photographs_as_dinos_script_does():
    pixels = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    protocol = knn_protocol("dino", 96)
    ours = normalize_images(protocol.transform()(pixels), MEAN, STD)
    assert torch.equal(ours, torchvision_pipeline(pixels, 256, 224))
    assert protocol.transform()(pixels).dtype == torch.uint8


def test_a_crop_larger_than_the_short_side_is_refused():
    with pytest.raises(ValueError, match="64 pixels does not fit"):
        crop_image(np.zeros((9, 9, 3), np.uint8), {"resize": 32, "crop": 64, "interpolation": "bicubic"})


@each(("size", "resize"), [(28, 28), (32, 32), (63, 63), (64, 73), (96, 110), (224, 256)])
def test_native_resizes_by_256_over_224_from_64_pixels_on(size, resize):
    assert native_resize(size) == resize
    assert knn_protocol("native", size).settings["resize"] == resize
    assert knn_protocol("native", size).settings["crop"] == size


def test_the_default_is_native_unless_the_network_was_trained_at_224():
    assert knn_protocol(None, 224).name == "dino"
    assert knn_protocol(None, 32).name == "native"
    assert knn_protocol(None, 384).name == "native"


def test_an_unknown_protocol_or_task_answers_with_the_right_ones():
    with pytest.raises(UsageError, match=r"did you mean 'native'.*dino, native"):
        knn_protocol("nativ", 224)
    with pytest.raises(UsageError, match="knn"):
        resolve("kn", None, 224)


def test_a_training_size_below_one_pixel_is_refused():
    with pytest.raises(UsageError, match="0 pixels"):
        knn_protocol("native", 0)


def test_the_fingerprint_is_a_hash_of_canonical_json_and_of_nothing_else():
    text = '{"name":"p","settings":{"a":[1,2],"b":0.5},"task":"t","version":3}'
    expected = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert Protocol("t", "p", 3, {"b": 0.5, "a": (1, 2)}).fingerprint == expected
    assert Protocol("t", "p", 3, {"a": [1, 2], "b": 0.5}).fingerprint == expected


def test_everything_that_moves_the_number_moves_the_fingerprint():
    base = knn_protocol("dino", 224)
    others = [
        Protocol("linear", "dino", 1, base.settings),
        Protocol("knn", "native", 1, base.settings),
        Protocol("knn", "dino", 2, base.settings),
        *(Protocol("knn", "dino", 1, {**base.settings, name: "changed"}) for name in base.settings),
        knn_protocol("native", 32),
        knn_protocol("native", 64),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == len(others) + 1
    assert knn_protocol("dino", 32) == base  # dino's numbers do not depend on the training size


def test_a_protocol_cannot_be_changed_and_survives_pickling_and_json():
    ks = [10, 20]
    protocol = Protocol("knn", "mine", 1, {"ks": ks})
    ks.append(30)
    assert protocol.settings["ks"] == (10, 20)
    with pytest.raises(TypeError):
        protocol.settings["ks"] = (5,)
    assert pickle.loads(pickle.dumps(protocol)) == protocol
    assert json.loads(json.dumps(protocol.plain_settings())) == {"ks": [10, 20]} == protocol.plain_settings()
    assert hash(protocol) == hash(Protocol("knn", "mine", 1, {"ks": (10, 20)}))


def test_settings_that_are_no_plain_values_are_refused():
    with pytest.raises(TypeError):
        Protocol("knn", "mine", 1, {"f": len})
    with pytest.raises(ValueError, match="JSON"):
        Protocol("knn", "mine", 1, {"t": float("nan")})
