"""WebDataset's layout: members of a tar whose names are equal up to the first dot of the base name are one sample.

`a/0001.jpg` and `a/0001.cls` are image and label of sample `a/0001`. The library streams through shards; here a set of
shards is map-style: its index, read from the tars' headers, gives any sample by its number, so that the exact shuffle,
the split over ranks and workers and the exact resume work as for any other set, every sample once per epoch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from patchssl.errors import DataError
from patchssl.imagefile import EXTENSIONS, extension_of, is_image_name
from patchssl.imageset import shortened

_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_ABOUT_THE_SHARD = re.compile(r"__[^/]*__($|/)")  # names that the library skips
_FIRST_CHOICE = ("jpg", "jpeg", "png", "webp")  # of several images in a sample
_LABEL = "cls"


class Samples(NamedTuple):
    """Images of shards, in the shards' order, each with its label."""

    images: np.ndarray  # (len,) int64, which members are the images
    words: list[str] | None  # what the .cls members say, None without any
    others: Mapping[str, int]  # members left out, by extension


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
    return _LABEL in beside or (bool(beside) and not any("/" in name for name in images))


def find_samples(names: Sequence[str], archives: np.ndarray, labels: Sequence[str], where: str) -> Samples:
    """Samples among the members `names` of shards; `archives` (len,) tells the shard, `labels` what .cls members hold.

    DataError where some samples have a label and others none, for a label without an image, and two of one kind.
    """
    parts: dict[tuple[int, str], dict[str, int]] = {}
    others: Counter[str] = Counter()
    for index, (name, archive) in enumerate(zip(names, archives.tolist(), strict=True)):
        key, extension = split_key(name)
        if not key:
            others[extension_of(name)] += 1
            continue
        sample = parts.setdefault((archive, key), {})
        if extension in sample:
            raise DataError(f"{where}: sample {key} has two members .{extension}")
        sample[extension] = index
    chosen, words, incomplete = [], [], []
    for (_, key), sample in parts.items():
        found = sorted((extension for extension in sample if f".{extension}" in EXTENSIONS), key=_preference)
        others.update(f".{extension}" for extension in sample if extension != _LABEL and extension not in found[:1])
        if found:
            chosen.append(sample[found[0]])
            words.append(labels[sample[_LABEL]] if _LABEL in sample else None)
        elif _LABEL in sample:
            incomplete.append(key)
    if incomplete:
        raise DataError(f"{where}: {len(incomplete):,} samples have a .cls and no image: {shortened(incomplete, 5)}; "
                        f"images are: {', '.join(sorted(EXTENSIONS))}")
    return Samples(np.array(chosen, dtype=np.int64), _all_or_none(words, [names[i] for i in chosen], where), others)


def _preference(extension: str) -> tuple[int, str]:
    return (_FIRST_CHOICE.index(extension) if extension in _FIRST_CHOICE else len(_FIRST_CHOICE), extension)


def _all_or_none(words: Sequence[str | None], names: Sequence[str], where: str) -> list[str] | None:
    without = [name for name, word in zip(names, words, strict=True) if word is None]
    if without and len(without) < len(words):
        raise DataError(f"{where}: {len(without):,} of {len(words):,} samples have no .cls: {shortened(without, 5)}")
    return None if without else [word for word in words if word is not None]
