"""Downloaded tar archives: every file lands inside the folder meant for it, and nothing but files and folders is made.

An archive from the web may be crafted. Names that lead elsewhere, links, devices and sparse files are refused, and an
archive that holds more bytes than its set can have ends as soon as it passes them.
"""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from patchssl.data.archives import BoundedEntry, BoundedStream
from patchssl.runtime.errors import DataError
from patchssl.runtime.files import open_regular
from patchssl.runtime.progress import Progress

_BLOCK = 2**16  # larger ones are copied back and forth by tarfile
_STEP = 2**20  # bytes between two calls of progress


def unpack(
    archive: Path, folder: Path, *, most_bytes: int, keep: int | None = None, progress: Progress | None = None
) -> list[str]:
    """Unpack the files of a .tar.gz into `folder`; their names there, in the archive's order.

    Of a file's path the last `keep` parts are kept, all of them by default: 1 leaves the folders of the archive out.
    Hidden files are skipped, a file that is there is replaced. DataError for an archive that is damaged, that holds
    what is refused (see above), two files of one name, more than `most_bytes`, or no file at all.
    """
    names: list[str] = []
    seen: set[str] = set()
    try:
        with open_regular(archive) as file, gzip.GzipFile(fileobj=_Watched(file, archive, progress)) as content:
            bounded = cast(BinaryIO, BoundedStream(content, most_bytes))
            with tarfile.open(fileobj=bounded, mode="r|", bufsize=_BLOCK, tarinfo=BoundedEntry) as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # else all of them stay in memory
                    if (name := _place(member, keep)) is None:
                        continue
                    if name.casefold() in seen:  # one file of two on some disks
                        raise DataError(f"it holds two files called {name}")
                    seen.add(name.casefold())
                    _write(tar, member, folder / name)
                    names.append(name)
            while bounded.read(_BLOCK):  # up to the checksum at the end
                pass
        if not names:
            raise DataError("it holds no files")
    except DataError as error:
        raise DataError(f"the archive {archive} is refused: {error}") from None
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"the archive {archive} is damaged: {error or type(error).__name__}; remove it and get it "
                        "anew") from error
    except OSError as error:
        raise DataError(f"the archive {archive} cannot be unpacked into {folder}: {error.strerror or error}") from error
    return names


def _place(member: tarfile.TarInfo, keep: int | None) -> str | None:
    """Where a member belongs, relative to the folder; None for folders and hidden files, DataError for the rest."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or any(sign in member.name for sign in "\\:\0"):
        raise DataError(f"'{member.name}' leads out of the folder")
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        kind = "a link" if member.issym() or member.islnk() else "neither a file nor a folder"
        raise DataError(f"'{member.name}' is {kind}; only plain files are unpacked")
    if not path.parts:
        raise DataError("a file in it has no name")
    if any(part.startswith(".") for part in path.parts):
        return None
    return str(PurePosixPath(*path.parts[-keep:] if keep else path.parts))


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """One file's content; permissions, owners and times of the archive are not taken over."""
    source = tar.extractfile(member)
    assert source is not None  # it is a plain file
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        shutil.copyfileobj(source, file, _BLOCK)
    if target.stat().st_size != member.size:
        raise DataError(f"'{member.name}' ends after {target.stat().st_size:,} of {member.size:,} bytes")


class _Watched(io.RawIOBase):
    """The archive, telling `progress` how much of it was read."""

    def __init__(self, file: BinaryIO, archive: Path, progress: Progress | None) -> None:
        self._file, self._progress = file, progress
        self._total, self._told = archive.stat().st_size, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        done = self._file.tell()
        if self._progress and (done - self._told >= _STEP or done == self._total > self._told):
            self._progress(done, self._total)
            self._told = done
        return block
