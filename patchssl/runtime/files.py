"""Files of this package on the disk: how they are written, and where what was computed once is kept.

A file is whole at every moment: it is written beside its place and moved there at the end, so that a kill leaves the
old one or the new one. The cache folder holds features, and indexes of archives and of folders; `PATCHSSL_CACHE`
names it, and `PATCHSSL_CACHE_GIB` bounds its features.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from patchssl.runtime.errors import DataError, UsageError

_USUAL_GIB = 20.0
INDEXES = ("archives", "content", "trees")  # of large archives, checksums of files, and the names in large folders
MOST_INDEXES = 500  # of each kind


def open_regular(path: str | Path, *, buffering: int = -1) -> BinaryIO:
    """A regular file to read bytes from; OSError for a pipe, a device, a socket or a link to one: they may never end.

    No open waits for a writer, and none makes a terminal this process's own.
    """
    return open(path, "rb", buffering, opener=_open_at_once)  # the caller closes it


def read_regular(path: str | Path, most: int | None = None) -> bytes:
    """The bytes of a regular file; OSError, as of `open_regular`, and where it has more than `most` bytes."""
    with open_regular(path) as file:
        if most is not None and os.fstat(file.fileno()).st_size > most:  # a read of `most` would make room for all
            raise OSError(errno.EINVAL, f"it has more than the {most:,} bytes that such a file may have", str(path))
        return file.read()


def _open_at_once(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # of a folder Python itself says so
            kind = "a pipe" if stat.S_ISFIFO(mode) else "a device"
            raise OSError(errno.EINVAL, f"it is {kind}; only regular files are read", path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, this process's own, which becomes `path` when all went well, and is gone otherwise."""
    # several threads, and processes of several machines, may write one file
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path, what: str) -> Iterator[Path]:
    """As `replacing`, in folders made for it.

    After an error or Ctrl-C an earlier file stays as it was. DataError, that calls the file `what`, where the disk
    does not take it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            yield partial
    except OSError as error:
        raise DataError(f"the {what} could not be written to {path}: {error.strerror or error}") from error


def write_text(path: Path, text: str, what: str) -> None:
    """Write or replace `path` so that even a power cut leaves the old text or the new; DataError as of `whole_file`."""
    with whole_file(path, what) as partial:
        write_through(partial, text)


def write_through(path: Path, text: str) -> None:
    """Write `text` in UTF-8, and wait until it is on the disk."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def is_utf8(path: Path) -> bool:
    """Whether libraries that hand names on in UTF-8 can open `path`, as torch's own and safetensors do.

    >>> is_utf8(Path("café")), is_utf8(Path("caf\udce9"))
    (True, False)
    """
    return not any("\ud800" <= letter <= "\udfff" for letter in str(path))


def default_folder() -> Path:
    """PATCHSSL_CACHE, or patchssl in the user's cache folder."""
    if named := os.environ.get("PATCHSSL_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchssl"


def default_limit() -> int:
    """How many bytes of features are kept: PATCHSSL_CACHE_GIB, or 20 GiB; UsageError for what is no such number."""
    asked = os.environ.get("PATCHSSL_CACHE_GIB")
    try:
        gib = float(asked) if asked else _USUAL_GIB
        limit = round(gib * 2**30)
    except (ValueError, OverflowError):
        limit = -1
    if limit < 0:
        raise UsageError(f"PATCHSSL_CACHE_GIB is '{asked}': give the GiB of features to keep, such as 100 or 0.5")
    return limit


def index_folder(kind: str = "archives") -> Path:
    """Where one of `INDEXES` is kept."""
    return default_folder() / kind


def index_bytes() -> int:
    """How large the kept indexes are together."""
    folders = [folder for folder in map(index_folder, INDEXES) if folder.is_dir()]
    return sum(path.stat().st_size for folder in folders for path in folder.iterdir())


def keep_newest(folder: Path, count: int = MOST_INDEXES) -> None:
    """Remove the oldest files of `folder` past `count`."""
    with contextlib.suppress(OSError):  # another process may remove them, too
        files = list(folder.iterdir())
        if len(files) > count:
            for old in sorted(files, key=lambda path: path.stat().st_mtime)[: len(files) - count]:
                old.unlink(missing_ok=True)


def clear_indexes() -> None:
    """Remove the kept indexes; they are made again when needed."""
    for kind in INDEXES:
        shutil.rmtree(index_folder(kind), ignore_errors=True)
