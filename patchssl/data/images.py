"""Kinds of image sets: files below a folder, and arrays in memory. `data.open` makes them."""

from __future__ import annotations

import hashlib
import itertools
import operator
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from patchssl.data.decode import decode_image, left_out, quick_check_file
from patchssl.data.fingerprints import Known, content_sums, file_states, known_files, labeled, names_fingerprint
from patchssl.runtime.errors import DataError
from patchssl.runtime.text import shortened

_NEGATIVE = re.compile(r"-\d+")
_MOST_CLASSES = 1_000_000


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ImageSet(ABC):
    """Images by index; safe to hand to DataLoader workers.

    `split` is "train", "val", or "all" where nothing is split. `labels` (len,) int64 are ids into `classes`;
    unlabeled sets have None and (). `fingerprint` depends on the content alone (see `data.fingerprints`): not on where
    it lies, nor on the order of listing.
    """

    name: str
    split: str
    source: str  # in words, with the place
    classes: tuple[str, ...] = ()
    labels: np.ndarray | None = None
    note: str = ""  # in words, what lies beside and is no part of it

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pixels(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB, the caller's own; UnreadableImage when image `index` cannot be decoded."""

    def quick_check(self, index: int) -> bool:
        """Whether a look that costs no decoding finds image `index` whole; False: decoding it tells (see `decode`).

        Sets without a cheap look say True.
        """
        return True

    @abstractmethod
    def item_name(self, index: int) -> str:
        """The name of image `index` within the set."""

    @abstractmethod
    def subset(self, indices: Sequence[int] | np.ndarray) -> ImageSet:
        """The images at `indices` (0 to len - 1), in this order, with the same classes."""

    @property
    @abstractmethod
    def known(self) -> Known:
        """What the set is known by, computed when first asked for."""

    def settle(self, known: Known) -> None:
        """Take over what another process found these images to be."""
        vars(self).setdefault("known", known)

    @property
    def fingerprint(self) -> str:
        """sha256 in hex of what the images are."""
        return self.known.fingerprint

    @property
    def first_fingerprint(self) -> str:
        """The fingerprint in what older versions wrote: of files by their names and sizes alone."""
        return self.fingerprint

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
        note = f"; {self.note}" if self.note else ""
        return f"{self.source}: {len(self):,} {kind}image{'s' * (len(self) != 1)} {labels}{note}"

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
        image = self.array[self.ids[inside(index, len(self))]]
        return image.copy() if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)

    def item_name(self, index: int) -> str:
        return f"{self.split}/{self.ids[inside(index, len(self))]:05d}"

    def subset(self, indices: Sequence[int] | np.ndarray) -> ArrayImages:
        chosen = self._chosen(indices)
        return replace(self, ids=self.ids[chosen], labels=self._labels_at(chosen), source=part_of(self.source))

    @cached_property
    def known(self) -> Known:
        order = np.argsort(self.ids, kind="stable")
        digest = hashlib.sha256(f"arrays {self.array.shape[1:]} {len(self)}\n".encode())
        for numbers in (self.ids, self.labels):
            if numbers is not None:
                digest.update(numbers[order].astype("<i8").tobytes())
        for start in range(0, len(order), 1024):  # in parts, so that a large set is not copied whole
            digest.update(self.array[self.ids[order[start : start + 1024]]].tobytes())
        return Known(digest.hexdigest(), "all pixels", digest.hexdigest())

    def with_classes(self, classes: tuple[str, ...]) -> ArrayImages:
        if self.labels is None or classes == self.classes:
            return self
        return replace(self, classes=classes, labels=translated(self, self.classes, self.labels, classes))


class Names(Sequence[str]):
    """Strings in one block of bytes: workers share a million of them, where each string of a list is copied
    as soon as its reference count changes."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._block = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    @classmethod
    def from_arrays(cls, block: np.ndarray, ends: np.ndarray) -> Names:
        """From what `as_arrays` gave; ValueError for arrays that do not fit."""
        if ends.ndim != 1 or ends[:1].tolist() != [0] or ends[-1] != block.size or (np.diff(ends) < 0).any():
            raise ValueError("the ends of names do not fit their bytes")
        names = cls([])
        names._block, names._ends = block.tobytes(), ends
        return names

    def as_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All bytes (uint8), and where the names end in them, after a 0 (len + 1,) int64."""
        return np.frombuffer(self._block, dtype=np.uint8), self._ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        ends = self._ends.tolist()
        return (os.fsdecode(self._block[begin:end]) for begin, end in itertools.pairwise(ends))

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        at = inside(index, len(self))
        return os.fsdecode(self._block[self._ends[at] : self._ends[at + 1]])


def labels_of_both(train: ImageSet, val: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) and (Q,) int64 that mean the same in both sets; DataError where there are none, or two meanings."""
    labels = train.require_labels(), val.require_labels()
    for found, images in zip(labels, (train, val), strict=True):
        if found.dtype.kind not in "iu" or found.shape != (len(images),):
            raise DataError(f"the labels of {images.source} are {found.dtype} of shape {found.shape}; {len(images)} "
                            "integers are needed, which are places in its `classes`")
    if train.classes != val.classes:
        raise DataError(f"the {len(train.classes)} classes of {train.source} are not the {len(val.classes)} of "
                        f"{val.source}, so their labels mean different things; open both with patchssl.data.open_pair")
    return labels


Openers = dict[str, Callable[[], ImageSet]]  # by split, train first


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FileImages(ImageSet):
    """Image files below a folder, decoded when asked for."""

    root: Path
    names: Names  # relative to `root`
    allow_truncated: bool = False
    others: Mapping[str, int] = field(default_factory=dict)  # files skipped, by extension

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Where image `index` lies."""
        return self.root / self.names[index]

    def pixels(self, index: int) -> np.ndarray:
        return decode_image(self.path(index), allow_truncated=self.allow_truncated)

    def quick_check(self, index: int) -> bool:
        return quick_check_file(self.path(index))

    def item_name(self, index: int) -> str:
        return self.names[index]

    def subset(self, indices: Sequence[int] | np.ndarray) -> FileImages:
        chosen = self._chosen(indices)
        names = Names(self.names[index] for index in chosen)
        return replace(
            self, names=names, labels=self._labels_at(chosen), others={}, source=part_of(self.source)
        )

    @cached_property
    def known(self) -> Known:
        names = sorted(self.names)
        states = file_states(self.root, names)

        def read(chosen: np.ndarray) -> np.ndarray:
            return content_sums(self.root, [names[index] for index in chosen.tolist()], states[chosen])

        return known_files(names, states[:, 0], self.allow_truncated, read, states[:, :3].tobytes)

    @property
    def first_fingerprint(self) -> str:
        return names_fingerprint(len(self), self.allow_truncated, self._entries())

    def _entries(self) -> Iterator[tuple[str, int]]:
        for name in sorted(self.names):
            try:
                yield name, (self.root / name).stat().st_size
            except OSError:
                yield name, -1

    def with_classes(self, classes: tuple[str, ...]) -> FileImages:
        if (found := class_folders(self.names)) is None:
            return self
        return replace(self, classes=classes, labels=translated(self, *found, classes))

    def describe(self) -> str:
        skipped = f"; skipped {left_out(self.others)}" if self.others else ""
        return super().describe() + skipped


def labeled_fingerprint(fingerprint: str, order: Iterable[int], images: ImageSet) -> str:
    """`fingerprint`, made to depend on the class of each image too, in this order, where there are classes."""
    labels = images.labels
    return fingerprint if labels is None else labeled(fingerprint, (images.classes[labels[index]] for index in order))


def labeled_known(known: Known, order: Sequence[int], images: ImageSet) -> Known:
    """`known` with the labels of `labeled_fingerprint`."""
    return known._replace(fingerprint=labeled_fingerprint(known.fingerprint, order, images),
                          key=labeled_fingerprint(known.key, order, images))


def written_labels(words: Sequence[str], where: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Classes and labels that are written down: numbers from 0 on, all of them, or names.

    Numbers name the classes "0" to the largest; names are sorted. DataError for a label that is empty or negative.
    """
    distinct = set(words)
    if wrong := sorted(word for word in distinct if not word or _NEGATIVE.fullmatch(word)):
        raise DataError(f"{where} holds the label '{wrong[0]}'; labels are numbers from 0 on, or names of classes")
    if all(word.isascii() and word.isdecimal() for word in distinct):
        largest = max((int(word) for word in distinct if len(word) < 20), default=-1)
        if largest >= _MOST_CLASSES or any(len(word) >= 20 for word in distinct):
            raise DataError(f"{where} holds labels of {_MOST_CLASSES:,} or more: those are no numbers of classes")
        return tuple(map(str, range(largest + 1))), np.array([int(word) for word in words], dtype=np.int64)
    classes = tuple(sorted(distinct))
    ids = {name: i for i, name in enumerate(classes)}
    return classes, np.array([ids[word] for word in words], dtype=np.int64)


def translated(
    images: ImageSet, names: tuple[str, ...], labels: np.ndarray, classes: tuple[str, ...]
) -> np.ndarray:
    """Labels, ids into `names`, as ids into `classes`; DataError for names that `classes` lacks."""
    ids = {name: i for i, name in enumerate(classes)}
    if unknown := [name for name in names if name not in ids]:
        raise DataError(
            f"{len(unknown):,} of the {len(names):,} classes in {images.source} are unknown to the training "
            f"images: {shortened(unknown, 10)}; give both the same classes"
        )
    return np.array([ids[name] for name in names], dtype=np.int64)[labels]


def inside(index: int, length: int) -> int:
    if not 0 <= (at := operator.index(index)) < length:
        raise IndexError(f"index {at} of {length}")
    return at


def part_of(source: str) -> str:
    return source if source.startswith("part of ") else f"part of {source}"


def class_folders(names: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray] | None:
    """Folders right below the root, sorted, and the one of each image; None if an image lies in none."""
    folders = [name.partition("/")[0] if "/" in name else "" for name in names]
    classes = tuple(sorted(set(folders)))
    if "" in classes:
        return None
    ids = {name: i for i, name in enumerate(classes)}
    return classes, np.array([ids[folder] for folder in folders], dtype=np.int64)
