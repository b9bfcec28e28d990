"""WebDataset's samples among the members of archives: which members are images, and what labels they have.

In WebDataset's layout, members of a tar whose names are equal up to the first dot of the base name are one sample:
`a/0001.jpg` and `a/0001.cls` are image and label of sample `a/0001`; without a .cls, the field "label" of
`a/0001.json` is. Where that rule leaves a sample without an image, names count up to their last dot: photo.2024.jpg
and photo.2024.cls are of sample photo.2024. The library streams through shards; here a set of shards is map-style: its
index, read from the tars' headers, gives any sample by its number, so that the exact shuffle, the split over ranks and
workers and the exact resume work as for any other set, every sample once per epoch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from patchssl.data.decode import EXTENSIONS, extension_of, is_image_name
from patchssl.runtime.errors import DataError
from patchssl.runtime.text import shortened

_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_ABOUT_THE_SHARD = re.compile(r"__[^/]*__($|/)")  # names that the library skips
_FIRST_CHOICE = ("jpg", "jpeg", "png", "webp")  # of several images in a sample
_LABELS = ("cls", "json")  # where the label is, the first that is there


class Samples(NamedTuple):
    """Images of shards, in the shards' order, each with its label."""

    images: np.ndarray  # (len,) int64, which members are the images
    words: list[str] | None  # what their labels are, None without any
    others: Mapping[str, int]  # members skipped, by extension


def split_key(name: str) -> tuple[str, str]:
    """Key and lower-case extension, as WebDataset takes a name apart; two empty strings where it skips it.

    >>> split_key("a.b/0001.seg.PNG")
    ('a.b/0001', 'seg.png')
    """
    match = None if _ABOUT_THE_SHARD.match(name) else _NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match else ("", "")


def are_samples(names: Sequence[str]) -> bool:
    """Whether members are WebDataset's samples rather than files in folders of classes.

    They are where an image has a label (.cls) beside it, or anything else unless the images lie in folders.
    """
    images = [name for name in names if is_image_name(name)]
    keys = {split_key(name)[0] for name in images} - {""}
    beside = {extension for name in names if not is_image_name(name)
              for key, extension in [split_key(name)] if key in keys}
    labeled = any(extension.rpartition(".")[2] == _LABELS[0] for extension in beside)
    return labeled or (bool(beside) and not any("/" in name for name in images))


def find_samples(names: Sequence[str], archives: np.ndarray, labels: Sequence[str], where: str) -> Samples:
    """Samples among the members `names` of shards; `archives` (len,) tells the shard, `labels` what labels hold.

    DataError where some samples have a label and others none, for a label without an image, and two of one kind.
    """
    parts, others = _grouped(names, archives, where)
    chosen, words, incomplete = [], [], []
    for (_, key), sample in parts.items():
        found = _image_kinds(sample)
        label = next((kind for kind in _LABELS if kind in sample and labels[sample[kind]]), None)
        used = {label, *found[:1], *_LABELS[:1]}
        others.update(f".{extension}" for extension in sample if extension not in used)
        if found:
            chosen.append(sample[found[0]])
            words.append(labels[sample[label]] if label else "" if _LABELS[0] in sample else None)
        elif _LABELS[0] in sample:
            incomplete.append(key)
    if incomplete:
        raise DataError(f"{where}: {len(incomplete):,} samples have a .cls and no image: {shortened(incomplete, 5)}; "
                        f"images are: {', '.join(sorted(EXTENSIONS))}")
    return Samples(np.array(chosen, dtype=np.int64), _all_or_none(words, [names[i] for i in chosen], where), others)


_Parts = dict[tuple[int, str], dict[str, int]]  # by shard and key, each member by its extension


def _grouped(names: Sequence[str], archives: np.ndarray, where: str) -> tuple[_Parts, Counter[str]]:
    """Members by sample, and those of none by extension."""
    parts: _Parts = {}
    others: Counter[str] = Counter()
    for index, (name, archive) in enumerate(zip(names, archives.tolist(), strict=True)):
        key, extension = split_key(name)
        if key:
            _put(parts, (archive, key), extension, index, where)
        else:
            others[extension_of(name)] += 1
    whole: _Parts = {}
    for (archive, key), sample in parts.items():
        dotted = any("." in extension for extension in sample) and not _image_kinds(sample)
        for extension, index in sample.items():
            more, dot, last = extension.rpartition(".")
            if dotted and dot:
                _put(whole, (archive, f"{key}.{more}"), last, index, where)
            else:
                _put(whole, (archive, key), extension, index, where)
    return whole, others


def _put(parts: _Parts, sample: tuple[int, str], extension: str, index: int, where: str) -> None:
    found = parts.setdefault(sample, {})
    if extension in found:
        raise DataError(f"{where}: sample {sample[1]} has two members .{extension}")
    found[extension] = index


def _image_kinds(sample: Mapping[str, int]) -> list[str]:
    """The extensions of images in a sample, the best first."""
    return sorted((extension for extension in sample if f".{extension}" in EXTENSIONS), key=_preference)


def _preference(extension: str) -> tuple[int, str]:
    return (_FIRST_CHOICE.index(extension) if extension in _FIRST_CHOICE else len(_FIRST_CHOICE), extension)


def _all_or_none(words: Sequence[str | None], names: Sequence[str], where: str) -> list[str] | None:
    without = [name for name, word in zip(names, words, strict=True) if word is None]
    if without and len(without) < len(words):
        raise DataError(f"{where}: {len(without):,} of {len(words):,} samples have no label (.cls, or .json with a "
                        f"field 'label'): {shortened(without, 5)}")
    return None if without else [word for word in words if word is not None]
