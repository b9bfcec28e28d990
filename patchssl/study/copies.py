"""The synthetic copy detection set of a study, made once from the images it scores on."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from patchssl.data.images import ImageSet
from patchssl.data.open import open_pair
from patchssl.runtime.console import Console
from patchssl.sets.make import make_copydays
from patchssl.sets.photos import LEAST_SIDE
from patchssl.study.folder import StudyFolder


def synthetic_copydays(folder: StudyFolder, console: Console) -> Path:
    """The set in Copydays' layout in the study's folder; whoever comes first makes it, others wait for it."""
    with folder.claimed("copydays", wait=True):
        if not folder.copydays.exists():
            wanted = folder.study.copydays
            images = open_pair(folder.data)[1]
            folder.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.root, prefix=".originals-") as scratch:
                write_originals(images, Path(scratch) / "originals", wanted.originals, wanted.seed)
                made = make_copydays(Path(scratch) / "originals", folder.copydays, seed=wanted.seed,
                                     progress=console.counter("making copies"))
            console.say(made.describe())
    return folder.copydays


def write_originals(images: ImageSet, folder: Path, count: int, seed: int) -> None:
    """Write `count` of `images`, drawn by `seed`, as PNG files; sides too short for copies are enlarged, in whole."""
    folder.mkdir(parents=True)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(images))
    for number, index in enumerate(np.sort(order[:count])):
        image = Image.fromarray(images.pixels(int(index)))
        if (factor := -(-LEAST_SIDE // min(image.size))) > 1:
            image = image.resize((factor * image.width, factor * image.height), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:05d}.png")
