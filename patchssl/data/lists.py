"""Text lists of images: one path a line, optionally with a label.

    # comments and blank lines are skipped
    images/a.jpg<TAB>cat        a label after a tab, a number or a name
    images/b.jpg 3              or a last column that is a whole number

Paths are relative to the list's folder, or absolute. Either every line has a label or none has; without labels, folders
are classes as they are below a folder of images.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from patchssl.data.fingerprints import Known
from patchssl.data.images import (
    FileImages,
    Names,
    class_folders,
    labeled_fingerprint,
    labeled_known,
    translated,
    written_labels,
)
from patchssl.data.splits import apart_from_strays, is_split_word, require_files
from patchssl.runtime.errors import DataError
from patchssl.runtime.files import read_regular

_EXTENSIONS = frozenset({".txt", ".lst", ".list", ".tsv"})
_NUMBERED = re.compile(r"(.*\S)[ ]+(-?\d+)")
_LARGEST_BYTES = 2**31  # of a list: some twenty million lines


class _ListEntry(NamedTuple):
    number: int  # from 1
    path: str
    label: str | None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ListedImages(FileImages):
    """Image files that a list names with their labels."""

    @cached_property
    def known(self) -> Known:
        """As of files below a folder, and from the labels."""
        return labeled_known(FileImages.known.func(self), self._order(), self)  # type: ignore[attr-defined]

    @property
    def first_fingerprint(self) -> str:
        return labeled_fingerprint(super().first_fingerprint, self._order(), self)

    def _order(self) -> list[int]:
        names = list(self.names)
        return sorted(range(len(names)), key=names.__getitem__)

    def with_classes(self, classes: tuple[str, ...]) -> ListedImages:
        assert self.labels is not None
        return replace(self, classes=classes, labels=translated(self, self.classes, self.labels, classes))


def is_list_name(name: str) -> bool:
    """Whether a file of this name is taken for a list of images."""
    return Path(name).suffix.lower() in _EXTENSIONS


def open_list(path: Path, split: str, allow_truncated: bool) -> FileImages:
    """The images that the list `path` names, in its order.

    DataError with the line's number for what is not understood, and with the list of all files that are missing.
    """
    lines = _read(path)
    root, names = _below_one_folder(path.absolute().parent, [line.path for line in lines])
    require_files([root / name for name in names], f"the list {path}")
    known: dict[str, int] = {}
    for line, name in zip(lines, map(os.path.normpath, names), strict=True):
        if (first := known.setdefault(name, line.number)) != line.number:
            raise DataError(f"{path}, line {line.number}: {line.path} is in line {first} already")
    labeled, note = lines[0].label is not None, ""
    if labeled:
        found = written_labels([line.label or "" for line in lines], f"the list {path}")
    else:
        kept, note = apart_from_strays(names)
        names = list(kept)
        folders = class_folders(names)
        found = folders if folders is not None and len(folders[0]) > 1 else ((), None)  # type: ignore[assignment]
    kind = ListedImages if labeled else FileImages
    own = path.absolute()
    of_a_pair = split != "all" or is_split_word(own.stem)
    return kind(name=own.parent.name if of_a_pair else own.stem, split=split, source=f"list {path}", classes=found[0],
                labels=found[1], root=root, names=Names(names), allow_truncated=allow_truncated, note=note)


def _read(path: Path) -> list[_ListEntry]:
    """The lines that name an image; DataError for none, and where some have a label and some have none."""
    try:
        content = read_regular(path, _LARGEST_BYTES)
    except OSError as error:
        raise DataError(f"the list {path} cannot be read: {error.strerror}") from error
    if b"\0" in content:
        raise DataError(f"{path} is no list of images: it is no text")
    text = os.fsdecode(content.removeprefix(b"\xef\xbb\xbf"))
    lines = [_line(number, line.strip("\r ")) for number, line in enumerate(text.split("\n"), 1)
             if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise DataError(f"the list {path} names no image: it needs one path a line")
    labeled = sum(line.label is not None for line in lines)
    if 0 < labeled < len(lines):
        few_have_one = 2 * labeled < len(lines)
        odd = next(line for line in lines if (line.label is not None) == few_have_one)
        raise DataError(f"{path}, line {odd.number}: it has {'a' if few_have_one else 'no'} label, unlike most lines; "
                        "write the path, a tab and the label in every line or in none")
    for line in lines:
        if not line.path or line.label == "":
            raise DataError(f"{path}, line {line.number}: a {'label' if line.path else 'path'} is missing")
    return lines


def _line(number: int, line: str) -> _ListEntry:
    if "\t" in line:
        name, _, label = line.rpartition("\t")
        return _ListEntry(number, name.strip(), label.strip())
    if match := _NUMBERED.fullmatch(line):
        return _ListEntry(number, match[1], match[2])
    return _ListEntry(number, line, None)


def _below_one_folder(home: Path, paths: Sequence[str]) -> tuple[Path, list[str]]:
    """A folder and the paths relative to it: the list's own, or the one above all where any path is absolute."""
    if not any(Path(path).is_absolute() for path in paths):
        return home, [path.removeprefix("./") for path in paths]
    full = [os.path.normpath(home / path) for path in paths]
    root = os.path.commonpath([Path(path).parent for path in full])
    return Path(root), [os.path.relpath(path, root) for path in full]
