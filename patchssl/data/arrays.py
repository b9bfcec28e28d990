"""Image sets that come as a few files of raw arrays: IDX (MNIST and its likes) and CIFAR's Python layout.

`idx_splits` and `cifar_splits` only look at what is there; the files are read when a split is asked for.
Nothing is unpacked on the disk, and CIFAR's pickles are read as plain data (`runtime.pickles`).
"""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from patchssl.data.archives import BoundedEntry, BoundedStream
from patchssl.data.decode import list_folder
from patchssl.runtime.errors import DataError
from patchssl.runtime.files import open_regular, read_regular
from patchssl.runtime.pickles import load_plain_pickle


class Arrays(NamedTuple):
    """One split: N images of one size."""

    pixels: np.ndarray  # (N, H, W) gray or (N, H, W, 3) RGB, uint8
    labels: np.ndarray | None  # (N,) int64, ids into `classes`
    classes: tuple[str, ...]


class ArraySplits(NamedTuple):
    """What was found at a place: the set's name, its kind in words, and what reads each split."""

    name: str
    kind: str
    readers: Mapping[str, Callable[[], Arrays]]  # by "train" and "val", in this order


_IDX_NAME = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
_MOST_PACKED = 100  # bytes that one byte of a .gz may unpack to: images take 2 to 10, zeros 1,000
_SMALL = 2**26  # bytes that any .gz may unpack to
_MOST_SIZES = 8  # of an IDX array
_IdxFiles = dict[tuple[str, str], Path]  # by (split, "images" or "labels")


def idx_splits(root: Path) -> ArraySplits | None:
    """The IDX files in `root`, in `root`/raw or in a `root`/NAME/raw (torchvision's layout).

    None without any, DataError when several sets lie below `root`.
    """
    for folders in ([root], [root / "raw"], sorted(root.glob("*/raw"))):
        found = {folder: files for folder in folders if (files := _idx_files(folder))}
        if len(found) > 1:
            raise DataError(f"{root} holds several sets: choose one of {', '.join(map(str, found))}")
        for folder, files in found.items():
            home = folder.resolve().parent if folder.name == "raw" else folder.resolve()
            splits = [split for split in ("train", "val") if (split, "images") in files]
            readers = {split: partial(_read_idx_split, files, split) for split in splits}
            return ArraySplits(home.name, "IDX files", readers)
    return None


def _idx_files(folder: Path) -> _IdxFiles:
    """IDX files by split and kind, unpacked ones before packed ones; nothing without images."""
    if not folder.is_dir():
        return {}
    files: _IdxFiles = {}
    for name in sorted(entry.name for entry in list_folder(folder)):
        if match := _IDX_NAME.fullmatch(name):
            files.setdefault(("train" if match[1] == "train" else "val", match[2]), folder / name)
    return files if any(kind == "images" for _, kind in files) else {}


def _read_idx_split(files: _IdxFiles, split: str) -> Arrays:
    """Images of one split; classes are the digits up to the largest label of any split."""
    pixels = read_idx(files[split, "images"])
    if pixels.ndim != 3 or not pixels.size:
        raise DataError(f"{files[split, 'images']} holds an array of shape {pixels.shape}, not images")
    if (split, "labels") not in files:
        return Arrays(pixels, None, ())
    labels = {part: read_idx(path) for (part, kind), path in files.items() if kind == "labels"}
    if labels[split].shape != (len(pixels),):
        where, shape = files[split, "labels"], labels[split].shape
        raise DataError(f"{where} holds labels of shape {shape} for {len(pixels)} images")
    classes = tuple(str(i) for i in range(1 + max(int(part.max(initial=0)) for part in labels.values())))
    return Arrays(pixels, labels[split].astype(np.int64), classes)


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in an IDX file, plain or .gz: 0, 0, 8 (uint8), rank, big-endian sizes, content."""
    try:
        with open_regular(path) as packed:
            size = os.fstat(packed.fileno()).st_size
            if path.suffix.lower() != ".gz":
                return _idx_array(packed, size, path)
            with gzip.GzipFile(fileobj=packed) as file:
                return _idx_array(cast(BinaryIO, file), max(_SMALL, size * _MOST_PACKED), path)
    except (OSError, EOFError, ValueError, MemoryError, zlib.error) as error:  # sizes beside a 0 may be too large
        raise DataError(f"{path} cannot be read: {error}") from error


def _idx_array(file: BinaryIO, most: int, path: Path) -> np.ndarray:
    """As `read_idx`; no more is read than the sizes promise, and that is at most `most` bytes."""
    start = file.read(4)
    rank = start[3] if len(start) == 4 else 0
    start += file.read(4 * rank)
    if start[:3] != b"\0\0\x08" or len(start) < 4 + 4 * rank:
        raise DataError(f"{path} is no IDX file of bytes: it begins with {start[:8]!r}")
    shape = struct.unpack_from(f">{rank}I", start, 4)
    promised = math.prod(shape)
    if rank > _MOST_SIZES or promised > most:
        raise DataError(f"{path} is damaged: it promises {promised:,} bytes of data, more than a file of its size can "
                        "hold")
    content = np.frombuffer(file.read(promised + 1), np.uint8)
    if content.size != promised:
        held = f"{content.size:,}" if content.size < promised else "more"
        raise DataError(f"{path} is damaged: it promises {promised:,} bytes of data and holds {held}")
    return content.reshape(shape)


@dataclass(frozen=True)
class _Cifar:
    """How one of the two CIFAR sets is laid out: names of folders, files and of the keys inside."""

    name: str
    folder: str
    archive: str
    batches: Mapping[str, tuple[str, ...]]
    meta: str
    label_key: str
    names_key: str


_CIFARS = (
    _Cifar(
        name="cifar10",
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        batches={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "val": ("test_batch",)},
        meta="batches.meta",
        label_key="labels",
        names_key="label_names",
    ),
    _Cifar(
        name="cifar100",
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        batches={"train": ("train",), "val": ("test",)},
        meta="meta",
        label_key="fine_labels",
        names_key="fine_label_names",
    ),
)
_MEMBER_LIMIT = 1 << 28  # bytes; the largest official file has 155 MB
_MOST_UNPACKED = 1 << 29  # bytes of an archive; the official ones have 186 MB


def cifar_splits(root: Path) -> ArraySplits | None:
    """CIFAR-10 or CIFAR-100 in its official layout: its folder, the folder above, or the archive.

    None without either, DataError when both lie in `root`.
    """
    found = {}
    for cifar in _CIFARS:
        for place in (root, root / cifar.folder, root / cifar.archive):
            if splits := _cifar_at(cifar, place):
                found[place] = splits
                break
    if len(found) > 1:
        places = ", ".join(map(str, found))
        raise DataError(f"{root} holds several sets: choose one of {places}")
    return next(iter(found.values()), None)


def _cifar_at(cifar: _Cifar, place: Path) -> ArraySplits | None:
    """The set `cifar` if `place` is its folder or an archive of it."""
    if place.is_dir():
        splits = [s for s, names in cifar.batches.items() if any((place / name).is_file() for name in names)]
        if not (splits and (place / cifar.meta).is_file()):
            return None
        kind = "CIFAR's files"
    elif (
        place.name.lower().endswith((".tar.gz", ".tgz", ".tar")) and place.is_file() and _is_archive_of(cifar, place)
    ):
        splits, kind = list(cifar.batches), "CIFAR's archive"
    else:
        return None
    return ArraySplits(
        cifar.name, kind, {split: partial(_read_cifar, cifar, place, split) for split in splits}
    )


@contextmanager
def _opened_tar(archive: Path) -> Iterator[tarfile.TarFile]:
    """The archive from its beginning, packed or not; DataError once it has given more than a set of CIFAR has."""
    with open_regular(archive) as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        content = cast(BinaryIO, BoundedStream(gzip.GzipFile(fileobj=file) if packed else file, _MOST_UNPACKED))
        try:
            with tarfile.open(fileobj=content, mode="r|", tarinfo=BoundedEntry) as tar:
                yield tar
        except DataError as error:
            raise DataError(f"the archive {archive} is refused: {error}") from None


def _is_archive_of(cifar: _Cifar, archive: Path) -> bool:
    """Whether the archive's first entry lies in the set's folder."""
    try:
        with _opened_tar(archive) as tar:
            first = tar.next()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"the archive {archive} cannot be read: {error}") from error
    return first is not None and cifar.folder in PurePosixPath(first.name).parts


def _read_cifar(cifar: _Cifar, place: Path, split: str) -> Arrays:
    """One split from a folder or an archive."""
    wanted = (*cifar.batches[split], cifar.meta)
    files = _files_of(place, wanted) if place.is_dir() else _members_of(place, cifar.folder, wanted)
    if missing := [name for name in wanted if name not in files]:
        raise DataError(f"{place} lacks {', '.join(missing)}: the set is not complete")
    loaded = {name: load_plain_pickle(BytesIO(files.pop(name)), f"{place}: {name}") for name in wanted}
    classes = _value(loaded[cifar.meta], cifar.names_key, f"{place}: {cifar.meta}")
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise DataError(f"{place}: {cifar.meta} holds no list of class names")
    parts = [
        _batch(loaded[name], cifar.label_key, len(classes), f"{place}: {name}")
        for name in cifar.batches[split]
    ]
    rows = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([labels for _, labels in parts])
    return Arrays(np.ascontiguousarray(rows.transpose(0, 2, 3, 1)), labels, tuple(classes))


def _files_of(folder: Path, wanted: tuple[str, ...]) -> dict[str, bytes]:
    try:
        return {name: read_regular(folder / name, _MEMBER_LIMIT) for name in wanted if (folder / name).is_file()}
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error}") from error


def _members_of(archive: Path, folder: str, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """Content of the wanted files of a tar archive, read in place."""
    files = {}
    try:
        with _opened_tar(archive) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else all of them stay in memory
                *above, name = PurePosixPath(member.name).parts or ("",)
                if name in wanted and above[-1:] == [folder] and member.isfile():
                    if member.size > _MEMBER_LIMIT:
                        raise DataError(f"{member.name} has {member.size:,} bytes: not CIFAR's")
                    content = tar.extractfile(member)
                    files[name] = content.read() if content else b""
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"the archive {archive} cannot be read: {error}") from error
    return files


def _batch(batch: Any, label_key: str, num_classes: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, 3072) uint8 and labels (N,) int64 of one batch."""
    pixels = _value(batch, "data", where)
    labels = np.asarray(_value(batch, label_key, where))
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[1:] == (3072,)):
        raise DataError(f"{where} holds no rows of 3072 bytes")
    if labels.shape != (len(pixels),) or labels.dtype.kind not in "iu":
        raise DataError(f"{where} holds {labels.size} labels for {len(pixels)} images")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise DataError(f"{where} holds labels outside 0 to {num_classes - 1}")
    return pixels, labels.astype(np.int64)


def _value(mapping: Any, key: str, where: str) -> Any:
    if not isinstance(mapping, dict) or key not in mapping:
        raise DataError(f"{where} has no '{key}': not a file of CIFAR's Python version")
    return mapping[key]
