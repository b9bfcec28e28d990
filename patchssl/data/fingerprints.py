"""What a set of files is known by: names, sizes and content, and in the cache of features their times too.

A fingerprint stands in records and runs, so it is equal wherever the files lie, in a folder, a zip or a tar. It covers
count, names, sizes and the CRC-32 of whole files: of all where they are at most `MOST_FILES` of together at most
`MOST_BYTES`, else of a sample of `SAMPLE` that their names choose, as many of them as have `MOST_BYTES` together.
`Known.content` says which. A zip holds these checksums; elsewhere files are read, and what was read is remembered with
size, times and inode of each file, as git does.

Of a sampled set a single file may change unseen by the fingerprint. What is kept of such a set is therefore under a
`Known.key` that knows size, modification and status change of every file: a change of any of them costs a computation
and never a wrong number.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import stat
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from patchssl.runtime.files import index_folder, keep_newest, open_regular, read_regular, replacing

VERSION = 2  # of the formula; 1 is `names_fingerprint`
MOST_BYTES, MOST_FILES, SAMPLE = 2**30, 200_000, 4096
_WORTH_KEEPING = 1000, 2**26  # files, bytes: reading fewer again is as fast as looking up what they held
RACY = 2 * 10**9  # ns: the coarsest clock of a file system; what changed within may change again unseen
_BLOCK = 2048  # files a thread takes at a time
_SLOW = 2e-5  # seconds for a file
_THREADS = 8
_PIECE = 2**20  # bytes read at a time
_DIGEST = 32
_ABSENT = (-1, 0, 0, 0)
_INODE = 2**63 - 1  # some have 64 bits
T = TypeVar("T")

log = logging.getLogger(__name__)


class Known(NamedTuple):
    """What an image set is known by."""

    fingerprint: str  # sha256 in hex, in records
    content: str  # which content it covers, in words
    key: str  # sha256 in hex, in caches of this machine


def known_files(names: Sequence[str], sizes: np.ndarray, allow_truncated: bool,
                read: Callable[[np.ndarray], np.ndarray], state: Callable[[], bytes]) -> Known:
    """What files are known by: `names`, sorted, and `sizes` (len,) in bytes, -1 of what cannot be found.

    `read` gives the CRC-32 of the content of some of them, -1 of what cannot be read, int64, and `state` what changes
    whenever any file does, times for example.
    """
    chosen = choose_content(names, sizes)
    count, sums = len(names), read(chosen)
    digest = hashlib.sha256(f"files version={VERSION} {count} truncated={allow_truncated} {len(chosen)}\n".encode())
    _add_names(digest, zip(names, sizes.tolist(), strict=True))
    digest.update(np.asarray(sums, dtype="<i8").tobytes())
    found = digest.hexdigest()
    if len(chosen) == count:
        return Known(found, f"all {count:,} files", found)
    key = hashlib.sha256(f"{found}\n".encode() + state()).hexdigest()
    return Known(found, f"a sample of {len(chosen):,} of {count:,} files", key)


def choose_content(names: Sequence[str], sizes: np.ndarray) -> np.ndarray:
    """Of which files the content counts, ids in ascending order: all, or a sample that depends on names and sizes."""
    if len(names) <= MOST_FILES and sizes.clip(0).sum() <= MOST_BYTES:
        return np.arange(len(names))
    draws = np.fromiter((zlib.crc32(os.fsencode(name)) for name in names), dtype=np.uint32, count=len(names))
    order = np.argsort(draws, kind="stable")[:SAMPLE]
    fitting = int(np.searchsorted(np.cumsum(sizes[order].clip(0)), MOST_BYTES, side="right"))
    return np.sort(order[: max(1, fitting)])


def names_fingerprint(count: int, allow_truncated: bool, entries: Iterable[tuple[str, int]]) -> str:
    """The first version: sha256 in hex of `count` files by names, in sorted order, and sizes in bytes."""
    digest = hashlib.sha256(f"files {count} truncated={allow_truncated}\n".encode())
    _add_names(digest, entries)
    return digest.hexdigest()


def _add_names(digest: hashlib._Hash, entries: Iterable[tuple[str, int]]) -> None:
    lines = iter(f"{name}\0{size}\n" for name, size in entries)
    while block := "".join(itertools.islice(lines, _BLOCK)):
        digest.update(os.fsencode(block))


def labeled(fingerprint: str, words: Iterable[str]) -> str:
    """`fingerprint`, made to depend on the class of each image too, in this order."""
    digest = hashlib.sha256(fingerprint.encode())
    for word in words:
        digest.update(f"\n{word}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def file_states(root: Path, names: Sequence[str]) -> np.ndarray:
    """Size, modification and status change (ns) and inode of files below `root`, (len, 4) int64.

    The size is -1 of what cannot be found, and of what is no regular file.
    """
    home, regular, names = os.fspath(root), stat.S_IFREG, list(names)

    def states(ids: range) -> array[int]:
        rows = array("q")
        for name in names[ids.start : ids.stop]:
            try:
                found = os.stat(f"{home}/{name}")  # noqa: PTH116  # a Path takes three times as long
            except (OSError, ValueError):
                found = None
            if found is None or stat.S_IFMT(found.st_mode) != regular:
                rows.extend(_ABSENT)
            else:
                rows.extend((found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino & _INODE))
        return rows

    return np.concatenate([np.zeros(0, np.int64), *_in_blocks(len(names), states)]).reshape(-1, 4)


def content_sums(root: Path, names: Sequence[str], states: np.ndarray) -> np.ndarray:
    """CRC-32 of files below `root` in these states (`file_states`), -1 of what cannot be read; remembered."""
    home, sizes = os.fspath(root), states[:, 0].tolist()

    def read(wanted: np.ndarray) -> np.ndarray:
        ids = wanted.tolist()
        sums = _in_blocks(len(ids), lambda part: [file_sum(f"{home}/{names[at]}", sizes[at])
                                                  for at in ids[part.start : part.stop]])
        return np.array([found for part in sums for found in part], dtype=np.int64)

    place = hashlib.sha256(os.fsencode(os.path.realpath(root)))
    for name in names:
        place.update(os.fsencode(name) + b"\0")
    return remembered(place.hexdigest(), states, read)


def file_sum(path: str, size: int | None = None) -> int:
    """CRC-32 of a regular file, of its first `size` bytes (-1: there is no file); -1 where it cannot be read."""
    found, left = 0, file_states(Path("/"), [path])[0, 0].item() if size is None else size
    if left < 0:
        return -1
    try:
        with open_regular(path, buffering=0) as file:
            while left > 0 and (block := file.read(min(left, _PIECE))):
                found, left = zlib.crc32(block, found), left - len(block)
    except OSError:
        return -1
    return found


def _in_blocks(count: int, work: Callable[[range], T]) -> list[T]:
    """What `work` gives for all of `count`, block by block; by threads from the first block on that takes long.

    A cold disk and a network answer several at once, what is in memory comes faster without.
    """
    blocks = [range(at, min(at + _BLOCK, count)) for at in range(0, count, _BLOCK)]
    found: list[T] = []
    while len(found) < len(blocks):
        began = time.perf_counter()
        found.append(work(blocks[len(found)]))
        if time.perf_counter() - began > _SLOW * _BLOCK:
            with ThreadPoolExecutor(_THREADS) as pool:
                found += pool.map(work, blocks[len(found) :])
    return found


def remembered(place: str, states: np.ndarray, read: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Checksums (len,) of what has these `states` (len, 4): rows of size, two times (ns) and what else tells it apart.

    Those that were kept under `place` in the same states are not asked of `read`. What changed just before it was read
    is not kept: the clock may be too coarse to show another change.
    """
    few, small = _WORTH_KEEPING
    if len(states) < few and states[:, 0].clip(0).sum() < small:
        return read(np.arange(len(states)))
    file = index_folder("content") / f"{place[:40]}.sums"
    kept = load_numbers(file, 5 * len(states))
    rows = np.full((len(states), 5), -1, dtype=np.int64) if kept is None else kept.reshape(-1, 5)
    known = (rows[:, :4] == states).all(axis=1) & (rows[:, 4] >= 0)
    sums, now = np.where(known, rows[:, 4], -1), time.time_ns()
    if not known.all():
        sums[~known] = read(np.flatnonzero(~known))
        lasting = known | (states[:, 2] < now - RACY)
        store_numbers(file, np.column_stack((states, np.where(lasting, sums, -1))))
    return sums


def load_numbers(file: Path, count: int | None, most: int = 2**31) -> np.ndarray | None:
    """The `count` int64 that `store_numbers` kept in `file`, None: all, in at most so many bytes.

    None where there are none, other ones or damaged ones.
    """
    try:
        size = file.stat().st_size
        if size > most or size != (size - size % 8 if count is None else _DIGEST + 8 * count):
            return None
        content = read_regular(file)
    except OSError:
        return None
    if len(content) != size or hashlib.sha256(content[_DIGEST:]).digest() != content[:_DIGEST]:
        log.warning("%s is damaged and is made again", file)
        return None
    return np.frombuffer(content, dtype="<i8", offset=_DIGEST).astype(np.int64)


def store_numbers(file: Path, numbers: np.ndarray) -> None:
    """Keep int64 numbers for the next time; a disk that does not take them costs that only."""
    content = np.ascontiguousarray(numbers, dtype="<i8").tobytes()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            partial.write_bytes(hashlib.sha256(content).digest() + content)
        keep_newest(file.parent)
    except OSError as error:
        log.warning("what files hold is not remembered in %s: %s", file, error)
