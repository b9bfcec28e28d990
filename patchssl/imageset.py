"""Kinds of image sets: files below a folder, and arrays in memory. `data.open_images` makes them."""

from __future__ import annotations

import hashlib
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from patchssl.errors import DataError
from patchssl.imagefile import decode_image


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ImageSet(ABC):
    """Images by index; safe to hand to DataLoader workers.

    `split` is "train", "val", or "all" where nothing is split. `labels` (len,) int64 are ids into `classes`;
    unlabeled sets have None and (). `fingerprint` depends on the content alone: not on where it lies, nor on
    the order of listing.
    """

    name: str
    split: str
    source: str  # in words, with the place
    classes: tuple[str, ...] = ()
    labels: np.ndarray | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pixels(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB, the caller's own; UnreadableImage when image `index` cannot be decoded."""

    @abstractmethod
    def item_name(self, index: int) -> str:
        """The name of image `index` within the set."""

    @abstractmethod
    def subset(self, indices: Sequence[int] | np.ndarray) -> ImageSet:
        """The images at `indices` (0 to len - 1), in this order, with the same classes."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 in hex, computed when first asked for."""

    @abstractmethod
    def with_classes(self, classes: tuple[str, ...]) -> ImageSet:
        """The same images, labels being ids into `classes`; DataError for a class that is not there."""

    def require_labels(self) -> np.ndarray:
        """`labels`; DataError where there are none."""
        if self.labels is None:
            raise DataError(
                f"{self.describe()}; this needs labels: put every image into a folder named after its class"
            )
        return self.labels

    def describe(self) -> str:
        """One line: what it is, where it lies, how many images and classes."""
        kind = "" if self.split == "all" else f"{self.split} "
        labels = f"in {len(self.classes):,} classes" if self.classes else "without labels"
        return f"{self.source}: {len(self):,} {kind}image{'s' * (len(self) != 1)} {labels}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.describe()}>"

    def _labels_at(self, indices: np.ndarray) -> np.ndarray | None:
        return None if self.labels is None else self.labels[indices]

    def _chosen(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """`indices` as an array; IndexError for one that is outside."""
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(f"indices from {chosen.min()} to {chosen.max()} of a set of {len(self)} images")
        return chosen


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ArrayImages(ImageSet):
    """Images of one size that are held in memory; subsets share the array."""

    array: np.ndarray  # (N, H, W) gray or (N, H, W, 3) RGB, uint8
    ids: np.ndarray  # (len,) int64: which of the N

    def __len__(self) -> int:
        return len(self.ids)

    def pixels(self, index: int) -> np.ndarray:
        image = self.array[self.ids[_inside(index, len(self))]]
        return image.copy() if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)

    def item_name(self, index: int) -> str:
        return f"{self.split}/{self.ids[_inside(index, len(self))]:05d}"

    def subset(self, indices: Sequence[int] | np.ndarray) -> ArrayImages:
        chosen = self._chosen(indices)
        return replace(self, ids=self.ids[chosen], labels=self._labels_at(chosen), source=_part(self.source))

    @cached_property
    def fingerprint(self) -> str:
        order = np.argsort(self.ids, kind="stable")
        digest = hashlib.sha256(f"arrays {self.array.shape[1:]} {len(self)}\n".encode())
        for numbers in (self.ids, self.labels):
            if numbers is not None:
                digest.update(numbers[order].astype("<i8").tobytes())
        for start in range(0, len(order), 1024):  # in parts, so that a large set is not copied whole
            digest.update(self.array[self.ids[order[start : start + 1024]]].tobytes())
        return digest.hexdigest()

    def with_classes(self, classes: tuple[str, ...]) -> ArrayImages:
        if self.labels is None or classes == self.classes:
            return self
        return replace(self, classes=classes, labels=_translated(self, self.classes, self.labels, classes))


class Names(Sequence[str]):
    """Strings in one block of bytes: workers share a million of them, where each string of a list is copied
    as soon as its reference count changes."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._block = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        at = _inside(index, len(self))
        return os.fsdecode(self._block[self._ends[at] : self._ends[at + 1]])


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FileImages(ImageSet):
    """Image files below a folder, decoded when asked for."""

    root: Path
    names: Names  # relative to `root`
    allow_truncated: bool = False
    others: Mapping[str, int] = field(default_factory=dict)  # files left out, by extension

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Where image `index` lies."""
        return self.root / self.names[index]

    def pixels(self, index: int) -> np.ndarray:
        return decode_image(self.path(index), allow_truncated=self.allow_truncated)

    def item_name(self, index: int) -> str:
        return self.names[index]

    def subset(self, indices: Sequence[int] | np.ndarray) -> FileImages:
        chosen = self._chosen(indices)
        names = Names(self.names[index] for index in chosen)
        return replace(
            self, names=names, labels=self._labels_at(chosen), others={}, source=_part(self.source)
        )

    @cached_property
    def fingerprint(self) -> str:
        """From count, relative names and sizes in bytes; -1 is the size of what cannot be found."""
        digest = hashlib.sha256(f"files {len(self)} truncated={self.allow_truncated}\n".encode())
        for name in sorted(self.names):
            try:
                size = (self.root / name).stat().st_size
            except OSError:
                size = -1
            digest.update(os.fsencode(name) + f"\0{size}\n".encode())
        return digest.hexdigest()

    def with_classes(self, classes: tuple[str, ...]) -> FileImages:
        if (found := class_folders(self.names)) is None:
            return self
        return replace(self, classes=classes, labels=_translated(self, *found, classes))

    def describe(self) -> str:
        left_out = f"; left out {counted(self.others)}" if self.others else ""
        return super().describe() + left_out


def _inside(index: int, length: int) -> int:
    if not 0 <= (at := operator.index(index)) < length:
        raise IndexError(f"index {at} of {length}")
    return at


def _part(source: str) -> str:
    return source if source.startswith("part of ") else f"part of {source}"


def _translated(
    images: ImageSet, names: tuple[str, ...], labels: np.ndarray, classes: tuple[str, ...]
) -> np.ndarray:
    """Labels, ids into `names`, as ids into `classes`."""
    ids = {name: i for i, name in enumerate(classes)}
    if unknown := [name for name in names if name not in ids]:
        raise DataError(
            f"{len(unknown):,} of the {len(names):,} classes in {images.source} are unknown to the training "
            f"images: {shortened(unknown, 10)}; give both the same class folders"
        )
    return np.array([ids[name] for name in names], dtype=np.int64)[labels]


def class_folders(names: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray] | None:
    """Folders right below the root, sorted, and the one of each image; None if an image lies in none."""
    folders = [name.partition("/")[0] if "/" in name else "" for name in names]
    classes = tuple(sorted(set(folders)))
    if "" in classes:
        return None
    ids = {name: i for i, name in enumerate(classes)}
    return classes, np.array([ids[folder] for folder in folders], dtype=np.int64)


def counted(others: Mapping[str, int]) -> str:
    """
    >>> counted({".heic": 12, ".txt": 1})
    '13 files with other extensions (.heic 12, .txt 1)'
    """
    common = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    listed = shortened([f"{extension} {count:,}" for extension, count in common], 5)
    total = sum(others.values())
    return f"{total:,} file{'s' * (total != 1)} with other extensions ({listed})"


def shortened(items: Sequence[str], most: int) -> str:
    """
    >>> shortened(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
