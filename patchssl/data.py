"""Image sets: what the user names becomes images by index, with labels where there are any.

`open_images` understands a named set, a folder with train/ and val/, class folders, an unlabeled folder
tree, IDX files and CIFAR's official layout. `open_pair` gives train and val with the same id for the same
class. Training skips unreadable images within `UnreadableBudget`; evaluation reads no number past one: it
lists them all and fails (`check_readable`, `raise_unreadable`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from patchssl.arrayfile import Arrays, ArraySplits, cifar_splits, idx_splits
from patchssl.errors import DataError, UnreadableImage, UsageError, one_of
from patchssl.imagefile import (
    EXTENSIONS,
    Listing,
    is_folder,
    is_image_name,
    list_folder,
    list_images,
    strict_pillow,
)
from patchssl.imageset import ArrayImages, FileImages, ImageSet, Names, class_folders, counted

__all__ = [
    "NAMED_SETS",
    "ImageSet",
    "Split",
    "UnreadableBudget",
    "check_readable",
    "find_unreadable",
    "listing_unreadable",
    "open_images",
    "open_pair",
    "raise_unreadable",
    "split_names",
]

Split = Literal["train", "val"]
NAMED_SETS: Mapping[str, int] = {"textures": 32, "textures-64": 64}  # name -> side in pixels
_SPLIT_FOLDERS: Mapping[str, tuple[str, ...]] = {"train": ("train",), "val": ("val", "valid", "test")}
_LIKE_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
_MOST_LISTED = 20
_BLOCK = 256  # images a worker checks before it reports


def open_images(data: str | Path, split: Split | None = None, *, allow_truncated: bool = False) -> ImageSet:
    """The images that `data` names: a set's name (`textures`, `textures-64`) or a path.

    A path is a folder with train/ and val/ (or valid/, test/), a folder of class folders, any tree of
    unlabeled images, IDX files or CIFAR's official layout; a folder that is called like a set is written
    ./textures. Without `split`: train where images are split, else all.
    With `allow_truncated`, files that end early count as readable; this is part of the fingerprint.
    UsageError for an unknown name, DataError for what is missing on the disk, an absent split included.
    """
    openers = _splits(data, allow_truncated)
    if split is None:
        return next(iter(openers.values()))()
    if split not in openers:
        there = (
            "it is not split: that would be a train/ and a val/ folder, side by side"
            if "all" in openers
            else f"it has only {', '.join(openers)}"
        )
        raise DataError(f"{data} has no {split} images: {there}")
    return openers[split]()


def split_names(data: str | Path) -> tuple[str, ...]:
    """The splits of `data`: those of "train" and "val" that are there, or "all" where nothing is split."""
    return tuple(_splits(data, allow_truncated=False))


def open_pair(data: str | Path, *, allow_truncated: bool = False) -> tuple[ImageSet, ImageSet]:
    """Train and val, labels of both being ids into train's classes.

    DataError names the classes of val that train does not have; the other way round does no harm.
    """
    train = open_images(data, "train", allow_truncated=allow_truncated)
    val = open_images(data, "val", allow_truncated=allow_truncated)
    return train, (val if train.labels is None else val.with_classes(train.classes))


_Openers = dict[str, Callable[[], ImageSet]]  # by split, train first


def _splits(data: str | Path, allow_truncated: bool) -> _Openers:
    """What `data` names, by split, not read yet."""
    if isinstance(data, str) and data in NAMED_SETS:
        return {split: partial(_open_textures, data, split) for split in ("train", "val")}
    root = _existing(data)
    if splits := cifar_splits(root) or idx_splits(root):
        return {split: partial(_open_arrays, root, splits, split) for split in splits.readers}
    if not root.is_dir():
        raise DataError(f"{root} is a file; images are read from a folder, or from an archive of CIFAR")
    folders = _split_folders(root) or {"all": root}
    return {split: partial(_open_folder, folder, split, allow_truncated) for split, folder in folders.items()}


def _existing(data: str | Path) -> Path:
    """`data` as a path that is there."""
    path = Path(data)
    if path.parts[:1] == ("~",):
        path = path.expanduser()
    if str(data) and os.access(path, os.F_OK):
        if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
            raise DataError(f"the folder {path} is there, but you may not read it")
        return path
    if isinstance(data, str) and "/" not in data:
        raise UsageError(f"no file or folder is called '{data}', and {one_of('the set', data, NAMED_SETS)}")
    raise DataError(f"{data} does not exist, and is not the name of a set: {', '.join(NAMED_SETS)}")


def _split_folders(root: Path) -> dict[str, Path]:
    """train/ and val/ (or what val is called) below `root`; nothing if `root` holds classes or images."""
    entries = list_folder(root)
    present = {entry.name for entry in entries if is_folder(entry)}
    found = {split: [name for name in names if name in present] for split, names in _SPLIT_FOLDERS.items()}
    folders = {split: root / names[0] for split, names in found.items() if names}
    if len(folders) == 2:
        return folders
    if len(alike := sorted(name for name in present if name.lower() in _LIKE_SPLITS)) > 1:
        raise DataError(f"{root} holds {'/, '.join(alike)}/; call what to train on train/ and the rest val/")
    # a lone train/ among others may be a class, the vehicle: as a split it has folders of its own
    if "train" in folders and any(is_folder(entry) for entry in list_folder(folders["train"])):
        return folders
    alone = len(present) == 1 and not any(is_image_name(entry.name) for entry in entries)
    return folders if alone else {}


def _open_folder(root: Path, split: str, allow_truncated: bool) -> FileImages:
    """All images below `root`, labeled if they lie in two or more class folders."""
    listing = list_images(root)
    if not listing.names:
        raise DataError(_no_images(root, listing))
    found = class_folders(listing.names)
    classes, labels = found if found is not None and len(found[0]) > 1 else ((), None)
    place = root.resolve()
    above = any(place.name in names for names in _SPLIT_FOLDERS.values())
    return FileImages(
        name=place.parent.name if above else place.name,
        split=split,
        source=f"folder {root}",
        classes=classes,
        labels=labels,
        root=root,
        names=Names(listing.names),
        allow_truncated=allow_truncated,
        others=listing.others,
    )


def _no_images(root: Path, listing: Listing) -> str:
    held = f"it holds {counted(listing.others)}" if listing.others else "it holds no files at all"
    return f"0 images in {root}; {held}. Images are: {', '.join(sorted(EXTENSIONS))}"


def _open_arrays(root: Path, splits: ArraySplits, split: str) -> ArrayImages:
    return _array_images(splits.readers[split](), splits.name, split, f"{splits.kind} in {root}")


def _open_textures(name: str, split: str) -> ArrayImages:
    from patchssl.textures import CLASSES, textures

    pixels, labels = textures(split, NAMED_SETS[name])
    return _array_images(Arrays(pixels, labels, CLASSES), name, split, f"the embedded set {name}")


def _array_images(arrays: Arrays, name: str, split: str, source: str) -> ArrayImages:
    high, wide = arrays.pixels.shape[1:3]
    return ArrayImages(
        name=name,
        split=split,
        source=f"{source} ({high} x {wide} px)",
        classes=arrays.classes,
        labels=arrays.labels,
        array=arrays.pixels,
        ids=np.arange(len(arrays.pixels)),
    )


def find_unreadable(
    images: ImageSet, workers: int = 0, progress: Callable[[int, int], None] | None = None
) -> list[tuple[str, str]]:
    """(name, reason) of every image that cannot be decoded, in the set's order.

    Decodes all files, in `workers` threads; arrays are readable as they are. `progress` is called with the
    number of images looked at and of all.
    """
    if isinstance(images, ArrayImages):
        return []
    blocks = [range(at, min(at + _BLOCK, len(images))) for at in range(0, len(images), _BLOCK)]
    bad: list[tuple[str, str]] = []
    check = partial(_unreadable_among, images)
    with strict_pillow(), ThreadPoolExecutor(max(workers, 1)) as pool:
        found = pool.map(check, blocks) if workers else map(check, blocks)
        try:
            for block in blocks:
                bad += next(found)
                if progress:
                    progress(block.stop, len(images))
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, the rest is not worth waiting for
    return bad


def _unreadable_among(images: ImageSet, indices: range) -> list[tuple[str, str]]:
    bad = []
    for index in indices:
        try:
            images.pixels(index)
        except UnreadableImage as error:
            bad.append((error.name, error.reason))
    return bad


def check_readable(
    images: ImageSet, workers: int = 0, progress: Callable[[int, int], None] | None = None
) -> None:
    """DataError that lists the images that cannot be decoded, if there are any."""
    bad = find_unreadable(images, workers, progress)
    raise_unreadable([UnreadableImage(name, reason) for name, reason in bad], len(images))


def raise_unreadable(bad: Sequence[UnreadableImage], total: int) -> None:
    """DataError that lists `bad` out of `total` images; nothing happens when `bad` is empty.

    For a pass over the images that decodes them once and collects what it met.
    """
    if bad:
        raise DataError(
            f"{len(bad):,} of {total:,} images cannot be read, so no number is given; repair or remove them "
            f"(eval revisited can allow truncated ones):\n{_listed({error.name: error.reason for error in bad})}"
        )


@contextlib.contextmanager
def listing_unreadable(sets: Sequence[ImageSet], workers: int = 0) -> Iterator[None]:
    """A pass over some of `sets` that fails for its data names the images of all that cannot be decoded."""
    try:
        yield
    except DataError:
        bad = [UnreadableImage(*found) for images in sets for found in find_unreadable(images, workers)]
        raise_unreadable(bad, sum(len(images) for images in sets))
        raise


class UnreadableBudget:
    """Counts the images that training has to skip, and ends it when they are more than 1 % of all.

    An image counts once, however often it is met.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.bad: dict[str, str] = {}  # name -> reason

    @property
    def count(self) -> int:
        """How many images were unreadable so far."""
        return len(self.bad)

    def add(self, name: str, reason: str = "") -> None:
        """Count the image `name`; DataError with the list when that is too many."""
        self.bad[name] = reason
        if 100 * self.count > self.total:
            raise DataError(
                f"training stopped: {self.count:,} of {self.total:,} images cannot be read, more than 1 %; "
                f"repair or remove them:\n{_listed(self.bad)}"
            )


def _listed(bad: Mapping[str, str]) -> str:
    """One line for each bad image, up to a limit."""
    lines = [f"  {name}: {reason}" if reason else f"  {name}" for name, reason in bad.items()]
    more = [f"  and {len(lines) - _MOST_LISTED:,} more"] if len(lines) > _MOST_LISTED else []
    return "\n".join(lines[:_MOST_LISTED] + more)
