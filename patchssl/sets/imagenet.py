"""ImageNet and its subsets on the disk: counted, and of which release they are.

ImageNet was published twice: as it was collected, and in 2021 with faces blurred. Most published numbers are of the
first release.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from patchssl.data.decode import is_folder, is_image_name, list_folder
from patchssl.runtime.findings import Finding
from patchssl.runtime.progress import Progress
from patchssl.runtime.text import shortened
from patchssl.sets.imagenet100 import class_list, known_lists

IMAGENET = {"train": 1_281_167, "val": 50_000}
# 101 and 3 fewer: github.com/princetonvisualai/imagenet-face-obfuscation, issue 4
IMAGENET_BLURRED = {"train": 1_281_066, "val": 49_997}
IMAGENET100_TRAIN = {"cmc": 126_689, "kaggle": 130_000}
# github.com/fastai/imagenette, noisy_imagenette.csv lists them: the split of December 2019, at any size of the images
IMAGENETTE = {"train": 9469, "val": 3925}
IMAGENETTE_CLASSES = frozenset({"n01440764", "n02102040", "n02979186", "n03000684", "n03028079", "n03394916",
                                "n03417042", "n03425413", "n03445777", "n03888257"})
_LOOKED_AT = 1000  # images whose headers are read for the release they belong to
_ENOUGH = 100  # images that must look alike to say something
_PILLOW_75 = (1858, 2780)  # sums of JPEG's standard quantization tables (luminance, chrominance) at quality 75
_MOST_LISTED = 10


def check_imagenet(root: Path, progress: Progress | None = None) -> Iterator[Finding]:
    """The thousand classes in `root`/train and `root`/val."""
    counts = _count_classes(root, progress)
    totals = {split: sum(classes.values()) for split, classes in counts.items()}
    blurred = totals == IMAGENET_BLURRED
    yield from _split_findings(root, counts, {split: (IMAGENET[split], 1000) for split in IMAGENET}, blurred)
    if blurred:
        yield Finding("counts", "101 and 3 images fewer than ImageNet has: as many as others counted in the release "
                                "with blurred faces", "note")
    yield from _faces(root, counts)


def check_imagenet100(root: Path, progress: Progress | None = None) -> Iterator[Finding]:
    """A hundred classes or fewer, by the list they are from."""
    counts = _count_classes(root, progress)
    present = set(counts.get("train") or counts.get("val") or {})
    known = next((name for name in known_lists() if set(class_list(name)) == present), None)
    if known is None:
        near = max(known_lists(), key=lambda name: len(present & set(class_list(name))))
        yield Finding("classes", f"{len(present)}; {len(present & set(class_list(near)))} of them are in the list "
                                 f"{near}", "note", "there are several ImageNet-100: scores on different lists do not "
                                                    "compare; see patchssl data imagenet100 --help")
        yield from _split_findings(root, counts, {"val": (50 * len(present), len(present))})
    else:
        yield Finding("classes", f"the 100 of the list {known}")
        yield from _split_findings(root, counts, {"train": (IMAGENET100_TRAIN[known], 100), "val": (5000, 100)})
    yield from _faces(root, counts)


def check_imagenette(root: Path, progress: Progress | None = None) -> Iterator[Finding]:
    """The ten classes of Imagenette, in the split of December 2019."""
    counts = _count_classes(root, progress)
    for split, right in IMAGENETTE.items():
        found = counts.get(split, {})
        value = f"{sum(found.values()):,} images in {len(found)} classes"
        if set(found) == IMAGENETTE_CLASSES and sum(found.values()) == right:
            yield Finding(split, value)
        else:
            yield Finding(split, f"{value} instead of {right:,} in the ten of Imagenette", "problem",
                          "fetch it anew: patchssl data get imagenette ROOT")


def _count_classes(root: Path, progress: Progress | None) -> dict[str, dict[str, int]]:
    """Images by class folder, for each of train and val that is there."""
    folders = {split: sorted(entry.name for entry in list_folder(root / split) if is_folder(entry))
               for split in ("train", "val") if (root / split).is_dir()}
    total, done = sum(map(len, folders.values())), 0
    counts: dict[str, dict[str, int]] = {split: {} for split in folders}
    for split, names in folders.items():
        for name in names:
            counts[split][name] = sum(is_image_name(entry.name) for entry in list_folder(root / split / name))
            done += 1
            if progress:
                progress(done, total)
    return counts


def _split_findings(root: Path, counts: Mapping[str, Mapping[str, int]], right: Mapping[str, tuple[int, int]],
                    blurred: bool = False) -> Iterator[Finding]:
    """Images and classes of each split against (images, classes) in `right`, and classes that only one has."""
    for split, (images, classes) in right.items():
        if split not in counts:
            yield Finding(split, f"no folder {root / split}", "problem",
                          "get ImageNet from image-net.org, and unpack it to train/<wnid>/ and val/<wnid>/")
            continue
        total = sum(counts[split].values())
        value = f"{total:,} images in {len(counts[split]):,} classes"
        if (total == images or blurred) and len(counts[split]) == classes:
            yield Finding(split, value)
        else:
            yield Finding(split, f"{value} instead of {images:,} in {classes:,}", "problem",
                          _why_wrong(root / split, counts[split], split))
    if len(counts) == 2:
        for split, other in (("train", "val"), ("val", "train")):
            if lacking := sorted(set(counts[other]) - set(counts[split])):
                yield Finding(split, f"without {len(lacking):,} classes of {other}: {shortened(lacking, _MOST_LISTED)}",
                              "problem", "both splits need the same class folders")


def _why_wrong(folder: Path, counts: Mapping[str, int], split: str) -> str:
    """The likely reason for a wrong number of images."""
    names = [entry.name for entry in list_folder(folder)]
    if loose := sum(is_image_name(name) for name in names):
        return f"{loose:,} images lie right in {folder}: sort them into class folders"
    if packed := [name for name in names if name.lower().endswith(".tar")]:
        return f"{len(packed):,} archives such as {packed[0]} are not unpacked"
    if empty := sorted(name for name, count in counts.items() if not count):
        return f"no images in {shortened(empty, _MOST_LISTED)}"
    if split == "val" and (odd := sorted(name for name, count in counts.items() if count != 50)):
        return f"not 50 images in {shortened([f'{name} ({counts[name]})' for name in odd], _MOST_LISTED)}"
    return "unpack the archives anew, and compare their md5 with image-net.org's"


def _faces(root: Path, counts: Mapping[str, Mapping[str, int]]) -> Iterator[Finding]:
    """Whether these are ImageNet's images as they were published, or those with blurred faces.

    The release with blurred faces was written by Pillow, every image as RGB at its usual quality of 75
    (princetonvisualai/imagenet-face-obfuscation, experiments/blurring.py); among the images as published, one in
    fifty is gray, and qualities vary.
    """
    split = "val" if counts.get("val") else "train"
    names = [f"{name}/{entry.name}" for name in counts.get(split, {}) for entry in list_folder(root / split / name)
             if is_image_name(entry.name)]
    looked_at = names[:: max(1, len(names) // _LOOKED_AT)][:_LOOKED_AT]
    headers = Counter(map(partial(_header, root / split), looked_at))
    if bad := headers.pop("unreadable", 0):
        yield Finding("headers", f"{bad:,} of {len(looked_at):,} images looked at cannot be opened", "problem",
                      "they are damaged: unpack the archives anew")
    if headers["not RGB"]:
        yield Finding("faces", f"as first published: {headers['not RGB']:,} of {len(looked_at):,} images are no RGB "
                               "JPEG, and the release with blurred faces has only those")
    elif headers["Pillow's"] >= _ENOUGH and headers.total() == headers["Pillow's"]:
        yield Finding("faces", "blurred, by how the images were saved (or a copy of ImageNet that was saved anew)",
                      "note", "published numbers are mostly of the images as first published")
    else:
        yield Finding("faces", "blurred or not, cannot be told from how the images were saved", "note")


def _header(root: Path, name: str) -> str:
    """How an image was saved, from its first bytes: "not RGB", "Pillow's", "other", "unreadable"."""
    try:
        with Image.open(root / name, formats=("JPEG", "PNG")) as image:
            if image.format != "JPEG" or image.mode != "RGB":
                return "not RGB"
            tables: Mapping[int, Sequence[int]] = getattr(image, "quantization", {})
            return "Pillow's" if tuple(sum(tables[key]) for key in sorted(tables)) == _PILLOW_75 else "other"
    except (OSError, SyntaxError, ValueError):
        return "unreadable"
