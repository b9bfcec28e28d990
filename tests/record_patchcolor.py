"""Record what the patch-wise color of PW-Self's authors gives, and what it drew: data/official_patchcolor.npz.

    python tests/record_patchcolor.py WORKING

The argument is a clone of alijavidani/dino, which may be bare; of its commit 26acb86 the class PatchAugmentation is run
on `picture`, once as it is and once without its shifts of hue: on the PIL images that it works on, hue goes through
PIL's HSV of 8-bit levels, while all else is as on tensors. Strengths and orders are noted while torchvision runs. Tests
read `PATCHCOLOR`, `SIZES`, `STEPS` and `picture` from here; they need no clone.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from record_official import filled, imported
from torchvision import transforms
from torchvision.transforms import functional

PATCHCOLOR = Path(__file__).parent / "data" / "official_patchcolor.npz"
COMMIT, FILE = "26acb86", "image_to_patches.py"  # head of imagenet100-patch_augmentation
SIZES = {16: 112, 8: 56}  # pixels of a patch's side, and of the picture's
STEPS = ("brightness", "hue", "blur", "sharpness", "posterize")


def picture(size):
    """(size, size, 3) uint8: areas of smooth color with edges and grain, some of them at the ends of the range."""
    rows, columns = np.mgrid[:size, :size] / size
    waves = np.stack([np.sin(7 * rows + 5 * columns), np.sin(11 * columns - 3 * rows), np.cos(9 * rows)], axis=-1)
    grain = np.clip(filled("image grain", (size, size, 3)), -2, 2) * 12
    steps = np.sign(filled("image areas", (7, 7, 3))).repeat(size // 7, 0).repeat(size // 7, 1) * 60
    return np.clip(128 + 90 * waves + steps + grain, 0, 255).astype(np.uint8)


def compose(draws):
    """Their copy of torchvision has a Compose that returns pairs; a patch begins here."""

    class Compose(transforms.Compose):
        def __call__(self, image):
            draws.append([])
            return super().__call__(image), None

    return mock.patch.object(transforms, "Compose", Compose)


def jitter(draws, turning):
    drawn = transforms.ColorJitter.get_params

    def get_params(*ranges):
        order, brightness, contrast, saturation, hue = drawn(*ranges)
        assert contrast is saturation is None
        found = {0: ("brightness", brightness), 3: ("hue", hue if turning else 0)}
        draws[-1].extend(found[which] for which in order.tolist() if which in found)
        return order, brightness, None, None, hue if turning else None  # not even converted to HSV and back

    return mock.patch.object(transforms.ColorJitter, "get_params", staticmethod(get_params))


def blur(draws):
    drawn = transforms.GaussianBlur.get_params

    def get_params(low, high):
        draws[-1].append(("blur", drawn(low, high)))
        return draws[-1][-1][1]

    return mock.patch.object(transforms.GaussianBlur, "get_params", staticmethod(get_params))


def by_chance(draws, kind, function, step, asked, neutral):
    """A transform `kind` that calls torchvision's `function` with probability 1/2."""
    forward = kind.forward

    def noting(self, image):
        with mock.patch.object(functional, function, wraps=getattr(functional, function)) as called:
            image = forward(self, image)
        draws[-1].append((step, getattr(self, asked) if called.called else neutral))
        return image

    return mock.patch.object(kind, "forward", noting)


def colored(module, size, turning):
    """The picture as the class gives it, (S, S, 3) uint8, and strengths (P, 5) and orders (P, 5) that it drew."""
    random.seed(size)
    torch.manual_seed(size)
    draws = []
    with (compose(draws), jitter(draws, turning), blur(draws),
          by_chance(draws, transforms.RandomAdjustSharpness, "adjust_sharpness", "sharpness", "sharpness_factor", 1),
          by_chance(draws, transforms.RandomPosterize, "posterize", "posterize", "bits", 8)):
        image = module.PatchAugmentation((size, size), 4)(Image.fromarray(picture(SIZES[size])))
    strengths = [[dict(patch)[step] for step in STEPS] for patch in draws]
    orders = [[STEPS.index(step) for step, _ in patch] for patch in draws]
    return np.asarray(image), np.array(strengths, np.float32), np.array(orders, np.uint8)


def main(clone):
    with tempfile.TemporaryDirectory() as folder:
        text = subprocess.run(["git", "-C", str(clone), "show", f"{COMMIT}:{FILE}"], check=True, stdout=subprocess.PIPE)
        Path(folder, FILE).write_bytes(text.stdout)
        module = imported(Path(folder), FILE)
    record = {}
    for size in SIZES:
        for turning in (True, False):
            found = colored(module, size, turning)
            for name, values in zip(("image", "strengths", "order"), found, strict=True):
                record[f"{size}/{'as it is' if turning else 'hues kept'}/{name}"] = values
    np.savez_compressed(PATCHCOLOR, **record)
    print(f"{PATCHCOLOR}: {len(record)} arrays, {PATCHCOLOR.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
