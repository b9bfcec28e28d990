"""Images in zip and tar archives and in WebDataset shards, by index, without unpacking.

An archive of files is understood as the same files in a folder: train/ and val/, class folders, or neither, with the
same names, order and fingerprint; a folder that holds all the rest is looked through. Shards are told apart from
archives by `shards`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from patchssl.data.archives import index_archive
from patchssl.data.decode import (
    END,
    EXTENSIONS,
    START,
    decode_bytes,
    extension_of,
    is_image_name,
    left_out,
    quick_check,
)
from patchssl.data.fingerprints import Known, known_files, names_fingerprint
from patchssl.data.images import (
    ImageSet,
    Names,
    Openers,
    class_folders,
    inside,
    labeled_fingerprint,
    labeled_known,
    part_of,
    translated,
    written_labels,
)
from patchssl.data.members import archive_states, member_ends, member_sums, read_member
from patchssl.data.shards import are_samples, find_samples
from patchssl.data.splits import apart_from_strays, choose_splits, is_split_word, split_files, unused_note
from patchssl.runtime.errors import DataError, UnreadableImage


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PackedImages(ImageSet):
    """Images in archives, read and decoded when asked for."""

    archives: tuple[Path, ...]
    names: Names  # of the members, relative to the set
    places: np.ndarray  # (len,) archive.PLACE
    by_folder: bool  # classes are folders, if there are any
    allow_truncated: bool = False
    others: Mapping[str, int] = field(default_factory=dict)  # members skipped, by extension

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, index: int) -> np.ndarray:
        name, content = self._content(index)
        return decode_bytes(content, name, allow_truncated=self.allow_truncated)

    def quick_check(self, index: int) -> bool:
        place = self.places[inside(index, len(self))]
        try:
            start, end = member_ends(self.archives[place["archive"]], place, START, END)
        except UnreadableImage:
            return False
        return quick_check(start, end, int(place["size"]))

    def _content(self, index: int) -> tuple[str, bytes]:
        """What errors call image `index`, and the bytes of its file."""
        place = self.places[inside(index, len(self))]
        archive = self.archives[place["archive"]]
        name = f"{archive}: {self.names[index]}"
        return name, read_member(archive, place, name)

    def item_name(self, index: int) -> str:
        """The member's name, after that of its archive where there are several."""
        name = self.names[index]
        return name if len(self.archives) == 1 else f"{self.archives[self.places[index]['archive']].name}/{name}"

    def subset(self, indices: Sequence[int] | np.ndarray) -> PackedImages:
        chosen = self._chosen(indices)
        return replace(self, names=Names(self.names[index] for index in chosen), places=self.places[chosen],
                       labels=self._labels_at(chosen), others={}, source=part_of(self.source))

    @cached_property
    def known(self) -> Known:
        """As of the unpacked files; of shards from the labels too."""
        names, order = list(self.names), self._order()
        places = self.places[order]

        def state() -> bytes:
            return archive_states(self.archives).tobytes() + places.tobytes()

        found = known_files([names[index] for index in order], places["size"], self.allow_truncated,
                            lambda chosen: member_sums(self.archives, places[chosen]), state)
        return found if self.by_folder else labeled_known(found, order, self)

    @property
    def first_fingerprint(self) -> str:
        order, sizes = self._order(), self.places["size"].tolist()
        entries = ((self.names[index], sizes[index]) for index in order)
        found = names_fingerprint(len(self), self.allow_truncated, entries)
        return found if self.by_folder else labeled_fingerprint(found, order, self)

    def _order(self) -> list[int]:
        names, sizes = list(self.names), self.places["size"].tolist()
        return sorted(range(len(names)), key=lambda index: (names[index], sizes[index]))

    def with_classes(self, classes: tuple[str, ...]) -> PackedImages:
        names, labels = self.classes, self.labels
        if self.by_folder and (found := class_folders(self.names)) is not None:
            names, labels = found
        if labels is None:
            return self
        return replace(self, classes=classes, labels=translated(self, names, labels, classes))

    def describe(self) -> str:
        return super().describe() + (f"; skipped {left_out(self.others)}" if self.others else "")


class _Contents(NamedTuple):
    """The images in archives."""

    archives: tuple[Path, ...]
    names: list[str]
    places: np.ndarray
    words: list[str] | None  # labels of shards
    are_shards: bool
    others: Mapping[str, int]


def packed_splits(archives: Sequence[Path], allow_truncated: bool) -> Openers:
    """The splits of archives: by their names where there are several, else by the folders in them.

    Reads the index of what is not told apart by name. DataError as from `index_archive`, and for no image at all.
    """
    by_name = split_files(archives) if len(archives) > 1 else {"all": list(archives)}
    if "all" not in by_name:
        return {split: partial(open_packed, paths, split, allow_truncated) for split, paths in by_name.items()}
    contents = _read(archives)
    folders, note = _split_folders(contents)
    return {split: partial(_images, contents, folder, split, allow_truncated, note)
            for split, folder in folders.items()}


def open_packed(archives: Sequence[Path], split: str, allow_truncated: bool) -> PackedImages:
    """All images of `archives` as one split."""
    contents = _read(archives)
    folders, note = _split_folders(contents)
    if len(folders) > 1:
        raise DataError(f"{_described(contents)} is named as {split} and holds {' and '.join(folders)} images")
    return replace(_images(contents, next(iter(folders.values())), split, allow_truncated, note),
                   name=_home_name(contents.archives))


def _read(archives: Sequence[Path]) -> _Contents:
    names: list[str] = []
    labels: list[str] = []
    parts = []
    for number, archive in enumerate(archives):
        members = index_archive(archive)
        names += members.names
        labels += members.labels
        parts.append(members.places.copy())
        parts[-1]["archive"] = number
    places = np.concatenate(parts)
    where = str(archives[0]) if len(archives) == 1 else str(_home(archives))
    if sharded := are_samples(names):
        chosen, words, others = find_samples(names, places["archive"], labels, where)
    else:
        kept = [index for index, name in enumerate(names) if is_image_name(name)]
        chosen = np.array(sorted(kept, key=names.__getitem__), dtype=np.int64)
        words, others = None, Counter(extension_of(name) for name in names if not is_image_name(name))
    if not len(chosen):
        held = f"holds {left_out(others)}" if others else "holds no files at all"
        raise DataError(f"0 images in {where}; it {held}. Images are: {', '.join(sorted(EXTENSIONS))}")
    return _Contents(tuple(archives), [names[i] for i in chosen], places[chosen], words, sharded, others)


def _split_folders(contents: _Contents) -> tuple[dict[str, str], str]:
    """The folder of each split in archives, "" or with a "/" at its end, "all" where nothing is split; and a note."""
    if contents.are_shards:
        return {"all": ""}, ""
    prefix, names = "", contents.names
    while True:
        tops = {name.partition("/")[0] for name in names if "/" in name}
        has_images = any("/" not in name for name in names)
        deep = {name.partition("/")[0] for name in names if name.count("/") > 1}
        if found := choose_splits(_described(contents), tops, has_images, deep.__contains__):
            beside = sum("/" not in name for name in names)
            notes = [unused_note(found, tops, "unpack it to choose another"),
                     f"left out {beside:,} image{'s' * (beside != 1)} beside them" if beside else ""]
            return {split: f"{prefix}{folder}/" for split, folder in found.items()}, "; ".join(filter(None, notes))
        only = next(iter(tops), "") + "/"
        if has_images or len(tops) != 1 or not all(name.count("/") > 1 for name in names):
            return {"all": prefix}, ""
        prefix, names = prefix + only, [name.removeprefix(only) for name in names]


def _images(contents: _Contents, folder: str, split: str, allow_truncated: bool, note: str) -> PackedImages:
    chosen = [index for index, name in enumerate(contents.names) if name.startswith(folder)]
    names, strays = [contents.names[index].removeprefix(folder) for index in chosen], ""
    if not contents.are_shards:
        kept, strays = apart_from_strays(names)
        if len(kept) < len(names):
            chosen = [index for index, name in zip(chosen, names, strict=True) if "/" in name]
            names = list(kept)
    classes: tuple[str, ...] = ()
    labels = None
    source = _described(contents)
    if contents.words is not None:
        classes, labels = written_labels(contents.words, source)
    elif not contents.are_shards and (found := class_folders(names)) is not None and len(found[0]) > 1:
        classes, labels = found
    return PackedImages(name=_name(contents.archives), split=split, source=source, classes=classes, labels=labels,
                        archives=contents.archives, names=Names(names), places=contents.places[chosen],
                        by_folder=not contents.are_shards, allow_truncated=allow_truncated, others=contents.others,
                        note="; ".join(filter(None, (note, strays))))


def _described(contents: _Contents) -> str:
    kind = "shard" if contents.are_shards else "archive"
    if len(contents.archives) == 1:
        return f"{kind} {contents.archives[0]}"
    return f"{len(contents.archives):,} {kind}s in {_home(contents.archives)}"


def _home(archives: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([path.parent for path in archives]))


def _name(archives: Sequence[Path]) -> str:
    """What the set is called: as its only archive, unless that is called train or val, else as its folder."""
    only = archives[0].name.partition(".")[0] if len(archives) == 1 else "train"
    return _home_name(archives) if is_split_word(only) else only


def _home_name(archives: Sequence[Path]) -> str:
    """The name of the folder that holds the archives, or of the one above if it is called train or val."""
    home = _home(archives).resolve()
    return home.parent.name if is_split_word(home.name) else home.name
