"""A share of train in the place of val: disjoint, the same every time, the test images left alone."""

import shutil

import numpy as np
import pytest
from cases import each

from patchssl.data.open import absolute_name, open_images, open_pair, split_names
from patchssl.runtime.errors import DataError, UsageError


@pytest.mark.slow
@pytest.mark.parametrize("data", ["textures", "folder"])
def test_both_parts_together_are_train_and_share_nothing(colors, data):
    inner = "textures" if data == "textures" else str(colors)
    train, val = open_pair(f"holdout:0.25:{inner}")
    whole = open_images(inner, "train")
    assert len(val) == len(whole) // 4 and len(train) + len(val) == len(whole)
    assert (train.split, val.split, train.classes) == ("train", "val", whole.classes)
    pixels = [{images.pixels(index).tobytes() for index in range(len(images))} for images in (train, val)]
    assert not pixels[0] & pixels[1] and list(map(len, pixels)) == [len(train), len(val)]
    assert train.fingerprint != val.fingerprint and train.name == f"{whole.name}-holdout"
    assert np.bincount(np.concatenate([train.labels, val.labels])).tolist() == np.bincount(whole.labels).tolist()


def test_the_val_images_are_not_needed(colors, tmp_path):
    shutil.copytree(colors / "train", tmp_path / "set" / "train")
    shutil.copytree(colors / "val", tmp_path / "set" / "val")
    before = [images.fingerprint for images in open_pair(f"holdout:0.5:{tmp_path / 'set'}")]
    for path in (tmp_path / "set" / "val").rglob("*.png"):
        path.write_bytes(b"no image")
    assert [images.fingerprint for images in open_pair(f"holdout:0.5:{tmp_path / 'set'}")] == before


def test_it_has_a_lasting_name(colors, monkeypatch):
    monkeypatch.chdir(colors.parent)
    assert absolute_name("holdout:0.50:colors") == f"holdout:0.5:{colors}"
    assert split_names("holdout:0.5:colors") == ("train", "val")


@each("wrong", ["holdout:textures", "holdout:1:textures", "holdout:0:textures", "holdout:x:textures",
                "holdout:0.2:"])
def test_what_is_not_understood_is_said(wrong):
    with pytest.raises(UsageError, match="holdout:SHARE:DATA"):
        open_pair(wrong)


def test_a_part_without_images_is_refused(colors):
    with pytest.raises(DataError, match="leaves one part empty"):
        open_pair(f"holdout:0.001:{colors}")
