"""Ground truth of revisited Oxford and Paris, and of sets in their layout: `gnd_NAME.pkl` beside a folder `jpg`.

The file names the database images and the queries, and says for every query which database images are easy,
hard and junk. It is read as plain data and checked before anything is computed.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from patchssl.data.decode import is_image_name, list_folder
from patchssl.runtime.errors import DataError, UsageError
from patchssl.runtime.pickles import load_plain_pickle

LABELS = ("easy", "hard", "junk")
_LARGEST_BYTES = 64 * 2**20  # the official files have less than one
_MOST_LISTED = 20
_LONGEST_NAME = 1024  # letters, with folders


@dataclass(frozen=True, eq=False)
class QueryTruth:
    """Database images of one query, by index, int64; the box to crop, (left, top, right, bottom) in pixels."""

    name: str  # what errors call it: number and name
    easy: np.ndarray
    hard: np.ndarray
    junk: np.ndarray
    bbx: np.ndarray | None = None  # (4,) float64

    @property
    def labeled(self) -> np.ndarray:
        """All images that have a label: easy, then hard, then junk."""
        return np.concatenate([self.easy, self.hard, self.junk])


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Names of database images and queries, as in the file, and a `QueryTruth` for every query."""

    imlist: tuple[str, ...]
    qimlist: tuple[str, ...]
    gnd: tuple[QueryTruth, ...]

    def image_names(self) -> tuple[str, ...]:
        """Files below `jpg` that are needed, each once: the database's, then queries that are not in it."""
        return tuple(dict.fromkeys(file_name(name) for name in self.imlist + self.qimlist))


# the file's `gnd` as the official code has it is taken too: mappings with easy, hard and junk
Truth = GroundTruth | Sequence[QueryTruth | Mapping[str, Any]]


class RevisitedPaths(NamedTuple):
    """Where a set lies."""

    ground_truth: Path
    images: Path  # the folder `jpg`


def find_ground_truth(root: Path, set_name: str) -> RevisitedPaths:
    """The set `set_name` in `root` itself, in its folder or in `datasets/`, as the official downloads lie.

    UsageError for a name that is no plain name, DataError where no ground truth or no `jpg` is found.
    """
    if not set_name or set_name != Path(set_name).name or set_name in (".", ".."):
        raise UsageError(f"'{set_name}' is no name of a set; it is the NAME in gnd_NAME.pkl, such as roxford5k")
    root = Path(root)
    folders = [root, root / set_name, root / "datasets" / set_name]
    found = next((folder for folder in folders if (folder / f"gnd_{set_name}.pkl").is_file()), None)
    if found is None:
        tried = ", ".join(str(folder / f"gnd_{set_name}.pkl") for folder in folders)
        others = sorted({path.name for levels in ("", "*/", "datasets/*/") for path in root.glob(f"{levels}gnd_*.pkl")})
        hint = f"; there is {', '.join(others[:5])}" if others else ""
        raise DataError(f"no ground truth of {set_name} in {root}: looked for {tried}{hint}")
    if not (found / "jpg").is_dir():
        raise DataError(f"{found} has gnd_{set_name}.pkl but no folder jpg; put the images of {set_name} into it")
    return RevisitedPaths(found / f"gnd_{set_name}.pkl", found / "jpg")


def read_ground_truth(path: Path) -> GroundTruth:
    """The ground truth in the pickle `path`, of Python 2 or 3; nothing in it is executed.

    DataError, naming the query, for whatever would make a wrong number: a missing key or box, an index
    outside the database, in two lists or twice in one; a database image named twice; counts that differ.
    """
    path = Path(path)
    try:
        if not path.is_file():  # a pipe would never end
            raise DataError(f"{path} is not a file; it should be the ground truth gnd_NAME.pkl")
        if path.stat().st_size > _LARGEST_BYTES:
            raise DataError(f"{path} is larger than {_LARGEST_BYTES // 2**20} MiB: no ground truth of retrieval")
        with path.open("rb") as file:
            content = load_plain_pickle(file, str(path))
    except OSError as error:
        raise DataError(f"the ground truth {path} cannot be read: {error.strerror or error}") from error
    try:
        return _ground_truth(content)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def as_truths(gnd: Truth, num_images: int) -> list[QueryTruth]:
    """`gnd` in any form as checked labels of a database of `num_images`; DataError names the query."""
    entries = gnd.gnd if isinstance(gnd, GroundTruth) else gnd
    if isinstance(gnd, GroundTruth) and num_images < len(gnd.imlist):
        raise DataError(f"{num_images} images were ranked; the database of the ground truth has {len(gnd.imlist)}")
    if isinstance(entries, Mapping) or not len(entries):
        raise DataError("the ground truth has no list of queries; give `gnd`, or what read_ground_truth returns")
    truths = []
    for number, entry in enumerate(entries):
        truth = entry if isinstance(entry, QueryTruth) else _labels(entry, f"query {number}")
        _require_sound(truth, num_images)
        truths.append(truth)
    return truths


def file_name(name: str) -> str:
    """The file of an image in `jpg`: names in the official files have no extension.

    >>> file_name("all_souls_000013"), file_name("mine.png")
    ('all_souls_000013.jpg', 'mine.png')
    """
    return name if is_image_name(name) else f"{name}.jpg"


def present_names(names: Sequence[str], images: Path) -> list[str | None]:
    """The file in the folder `images` for each of `names`, in whatever capitals it is written there; None: absent.

    DataError where two files differ in capitals alone and neither is written as the name.
    """
    found: list[str | None] = [name if (images / name).is_file() else None for name in names]
    if None not in found:
        return found
    written: dict[str, list[str]] = {}
    for folder in {PurePosixPath(name).parent for name, there in zip(names, found, strict=True) if there is None}:
        for entry in list_folder(images / folder) if (images / folder).is_dir() else ():
            name = str(folder / entry.name)
            written.setdefault(name.lower(), []).append(name)
    return [there or _only(written.get(name.lower(), []), name, images)
            for name, there in zip(names, found, strict=True)]


def _only(candidates: Sequence[str], name: str, images: Path) -> str | None:
    if len(candidates) > 1:
        raise DataError(f"{images} has {' and '.join(candidates)} for {name}; remove all but one")
    return candidates[0] if candidates and (images / candidates[0]).is_file() else None


def absent_images(truth: GroundTruth, images: Path) -> list[str]:
    """Files that the ground truth names and the folder `images` lacks, in any capitals."""
    names = truth.image_names()
    return [name for name, there in zip(names, present_names(names, images), strict=True) if there is None]


def require_images(truth: GroundTruth, images: Path) -> None:
    """DataError that counts the absent images and names the first 20, if there are any."""
    if absent := absent_images(truth, images):
        more = f"\n  and {len(absent) - _MOST_LISTED:,} more" if len(absent) > _MOST_LISTED else ""
        listed = "".join(f"\n  {name}" for name in absent[:_MOST_LISTED])
        raise DataError(
            f"{len(absent):,} of {len(truth.image_names()):,} images are not in {images}, so no number is given; "
            f"download them again:{listed}{more}"
        )


def _ground_truth(content: Any) -> GroundTruth:
    if not isinstance(content, dict) or (lacking := {"imlist", "qimlist", "gnd"} - content.keys()):
        there = f"it lacks {', '.join(sorted(lacking))}" if isinstance(content, dict) else "it is no dictionary"
        raise DataError(f"a ground truth has imlist, qimlist and gnd; {there}")
    imlist, qimlist = (_names(content[key], key) for key in ("imlist", "qimlist"))
    entries = content["gnd"]
    if not isinstance(entries, (list, tuple)) or len(entries) != len(qimlist):
        count = len(entries) if isinstance(entries, (list, tuple)) else "no list of"
        raise DataError(f"qimlist names {len(qimlist)} queries, gnd has {count} entries; they must be as many")
    if twice := [name for name, count in Counter(imlist).items() if count > 1]:
        raise DataError(f"{len(twice)} images are in imlist more than once, first '{twice[0]}'")
    gnd = []
    for number, (name, entry) in enumerate(zip(qimlist, entries, strict=True)):
        query = f"query {number} ('{name}')"
        truth = _labels(entry, query, _box(entry, query))
        _require_sound(truth, len(imlist))
        gnd.append(truth)
    return GroundTruth(imlist, qimlist, tuple(gnd))


def _names(value: Any, key: str) -> tuple[str, ...]:
    """Names of image files below one folder; DataError for others, as a hostile file may hold them."""
    if not isinstance(value, (list, tuple, np.ndarray)) or not len(value):
        raise DataError(f"{key} is no list of image names")
    for name in value:
        if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME or {"\0", "\\"} & set(name):
            raise DataError(f"{key} holds {reprlib.repr(name)}, which is no name of an image")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"{key} holds '{name}', which lies outside the folder of the images")
    return tuple(str(name) for name in value)


def _box(entry: Any, query: str) -> np.ndarray:
    """(4,) float64; DataError unless it has an area."""
    if not isinstance(entry, Mapping) or "bbx" not in entry:
        raise DataError(f"{query} has no bbx, the box (left, top, right, bottom) that the query image is cropped to")
    try:
        box = np.asarray(entry["bbx"], dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        box = np.empty(0)
    if box.shape != (4,) or not np.isfinite(box).all() or not (box[:2] < box[2:]).all():
        raise DataError(f"the bbx of {query} is {reprlib.repr(entry['bbx'])}; it needs four numbers, left < right and "
                        "top < bottom")
    return box


def _labels(entry: Any, query: str, bbx: np.ndarray | None = None) -> QueryTruth:
    if not isinstance(entry, Mapping):
        raise DataError(f"the labels of {query} are {type(entry).__name__}, no dictionary with easy, hard and junk")
    if lacking := [key for key in LABELS if key not in entry]:
        if "ok" in entry:
            raise DataError(
                f"{query} is labeled ok and junk: the ground truth of the original Oxford or Paris, which is scored "
                "otherwise; the revisited one has easy, hard and junk"
            )
        raise DataError(f"{query} lacks {', '.join(lacking)}; every query has easy, hard and junk")
    easy, hard, junk = (_indices(entry[key], key, query) for key in LABELS)
    return QueryTruth(query, easy, hard, junk, bbx)


def _indices(value: Any, key: str, query: str) -> np.ndarray:
    """(n,) int64; an empty list of any type is one."""
    try:
        array = np.asarray(value)
        whole = array.ndim == 1 and (not array.size or array.dtype.kind in "iu")
        if whole:
            return array.astype(np.int64)
    except (TypeError, ValueError, OverflowError):
        pass
    raise DataError(f"'{key}' of {query} is no list of whole numbers, the indices of database images")


def _require_sound(truth: QueryTruth, num_images: int) -> None:
    """DataError for an index outside the database, in two lists or twice in one."""
    labeled = truth.labeled
    outside = labeled[(labeled < 0) | (labeled >= num_images)]
    if len(outside):
        raise DataError(f"{truth.name} labels image {outside[0]}; the database has {num_images}, counted from 0")
    values, counts = np.unique(labeled, return_counts=True)
    if (counts > 1).any():
        twice = values[counts > 1][0]
        lists = [key for key in LABELS for index in getattr(truth, key) if index == twice]
        raise DataError(f"{truth.name} labels image {twice} twice, as {' and '.join(lists)}; one label is right")
