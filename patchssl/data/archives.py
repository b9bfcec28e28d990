"""Archives of images read in place: what a zip or an uncompressed tar holds, and where each member lies.

Nothing is unpacked and nothing is written but the index of a large archive, into this package's own cache. An archive
may be crafted, so it is refused whole, by the name of the member, for names that lead elsewhere, links and devices,
encryption, two members of one name, members that claim more than `MOST_BYTES`, and where it ends early. A .tar.gz is
refused too: each image would cost unpacking everything before it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from patchssl.data.decode import is_hidden
from patchssl.data.images import Names
from patchssl.data.members import DEFLATED, PLACE, PLAIN, ZIPPED
from patchssl.runtime.errors import DataError
from patchssl.runtime.files import index_folder, keep_newest, open_regular, read_regular, replacing

_LARGEST_INDEX = 2**32  # bytes: of some forty million members
MOST_BYTES = 2**28  # of one member: far more than a photograph has
_LABEL_BYTES = 256  # of a .cls member, which holds a number or a word
_JSON_BYTES = 2**16  # of a .json member; a longer one is not looked into
_JSON_LABELS = ("label", "cls", "class_id", "class", "class_name")  # fields that hold it, the first that is there
_MANY = 1000  # members from which on an index is kept: reading it is ten times as fast as making it
_VERSION = 3  # of the kept index
_DIGEST = 32  # bytes in front of a kept index: the checksum of what follows
_LONGEST_HEADER = 2**20  # bytes of a long name in a tar
_OF_WINDOWS = (0, 6, 10, 11, 14)  # FAT, HPFS, NTFS: programs there write \\ between the parts of a name

log = logging.getLogger(__name__)


class Members(NamedTuple):
    """Plain files in archives, in their order; hidden ones are skipped."""

    names: Names  # "/" between the parts, no ./ in front
    places: np.ndarray  # (len,) PLACE
    labels: Names  # what .cls members hold, and .json members have as their label; "" for the others


class _Member(NamedTuple):
    name: str
    offset: int
    stored: int
    size: int
    crc: int
    packing: int
    label: str


def is_archive_name(name: str) -> bool:
    """Whether a file of this name is taken for an archive."""
    return name.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))


def index_archive(archive: Path, *, keep_from: int = _MANY) -> Members:
    """What `archive` holds. An index of `keep_from` members or more is kept in the cache folder.

    DataError for an archive that is damaged, compressed as a whole, or that holds what is refused (see above).
    """
    status = archive.stat()
    # the status change, too: a copy can keep size and modification time of what it replaces
    state = (str(archive.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    kept = index_folder() / f"{hashlib.sha256(os.fsencode(state[0])).hexdigest()[:40]}.index"
    if (members := _load_index(kept, state)) is not None:
        return members
    members = _scan(archive)
    if len(members.names) >= keep_from:
        _store_index(kept, state, members)
    return members


def _scan(archive: Path) -> Members:
    """The members of an archive, from its headers or its directory alone."""
    names, labels, rows = [], [], []
    seen: set[str] = set()
    try:
        for member in _zip_members(archive) if archive.suffix.lower() == ".zip" else _tar_members(archive):
            if member.name in seen:
                raise DataError(f"it holds two files called {member.name}")
            seen.add(member.name)
            if (most := max(member.size, member.stored)) > MOST_BYTES:
                raise DataError(f"'{member.name}' claims {most:,} bytes, more than the {MOST_BYTES:,} that "
                                "an image may have")
            if not any(map(is_hidden, member.name.split("/"))):
                names.append(member.name)
                labels.append(member.label)
                rows.append((0, *member[1:-1]))
    except DataError as error:
        raise DataError(f"the archive {archive} is refused: {error}") from None
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError,
            OSError) as error:
        raise DataError(f"the archive {archive} is damaged: {error or type(error).__name__}") from error
    return Members(Names(names), np.array(rows, dtype=PLACE), Names(labels))


def _tar_members(archive: Path) -> Iterator[_Member]:
    with open_regular(archive) as file:
        _refuse_compressed(file.read(6))
        file.seek(0)
        size = archive.stat().st_size
        with tarfile.open(fileobj=file, mode="r:", tarinfo=BoundedEntry) as tar:
            for entry in tar:
                tar.members = []  # type: ignore[attr-defined]  # else all of them stay in memory
                if not (name := _checked(entry.name)) or entry.isdir():
                    continue
                if not entry.isreg() or entry.issparse():
                    kind = "a link" if entry.issym() or entry.islnk() else "neither a file nor a folder"
                    raise DataError(f"'{entry.name}' is {kind}; only plain files are read")
                if entry.offset_data + entry.size > size:
                    raise DataError(f"it ends within '{entry.name}': it was not copied whole")
                label = ""
                if most := _label_bytes(name, entry.size):
                    label = _label(_at(file, entry.offset_data, min(entry.size, most)), name)
                yield _Member(name, entry.offset_data, entry.size, entry.size, 0, PLAIN, label)
            # tarfile takes a damaged header for the end
            rest = _at(file, tar.offset, 2**20)
            if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
                raise DataError(f"no end mark lies after {tar.offset:,} of its {size:,} bytes: it was not copied "
                                "whole, it is damaged, or several were joined")


def _at(file: BinaryIO, offset: int, size: int) -> bytes:
    """Up to `size` bytes at `offset`; the position in the file stays."""
    before = file.tell()
    file.seek(offset)
    content = file.read(size)
    file.seek(before)
    return content


def _label_bytes(name: str, size: int) -> int:
    """How many bytes of the member `name` to read for its label: one more than it may have; 0 for what has none."""
    if name.lower().endswith(".cls"):
        return _LABEL_BYTES + 1
    return _JSON_BYTES if name.lower().endswith(".json") and size < _JSON_BYTES else 0


def _label(content: bytes, name: str) -> str:
    if name.lower().endswith(".json"):
        return _json_label(content)
    if len(content) > _LABEL_BYTES:
        raise DataError(f"'{name}' is no label: it has more than {_LABEL_BYTES} bytes")
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise DataError(f"'{name}' is no label: it begins with {content[:12]!r}") from None


def _json_label(content: bytes) -> str:
    """The label in a sample's JSON object, "" where it has none that is a number or a word."""
    try:
        about = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    found = next((about[field] for field in _JSON_LABELS if field in about), "") if isinstance(about, dict) else ""
    return str(found).strip() if isinstance(found, int | str) and not isinstance(found, bool) else ""


def _refuse_compressed(start: bytes) -> None:
    """DataError for what holds a tar that is compressed as a whole."""
    packed = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
    for magic, command in packed.items():
        if start.startswith(magic):
            raise DataError("it is compressed as a whole, so that every image would cost unpacking all before it; "
                            f"unpack it once to a plain .tar: {command} --keep FILE")


def _zip_members(archive: Path) -> Iterator[_Member]:
    size = archive.stat().st_size
    with open_regular(archive) as file, zipfile.ZipFile(file) as packed:
        for entry in packed.infolist():
            written = _written_name(entry)
            if not (name := _checked(written)) or written.endswith("/"):
                continue
            if entry.create_system == 3 and (kind := stat.S_IFMT(entry.external_attr >> 16)) not in (0, stat.S_IFREG):
                what = "a link" if kind == stat.S_IFLNK else "neither a file nor a folder"
                raise DataError(f"'{name}' is {what}; only plain files are read")
            if entry.flag_bits & 1:
                raise DataError(f"'{name}' is encrypted")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(f"'{name}' is packed by method {entry.compress_type}; only stored and deflated "
                                "members are read: zip -0 -r makes such an archive")
            if not 0 <= entry.header_offset <= size - entry.compress_size:
                raise DataError(f"'{name}' would lie outside of it: it was not copied whole")
            packing = DEFLATED if entry.compress_type else ZIPPED
            label = ""
            if most := _label_bytes(name, entry.file_size):
                with packed.open(entry) as content:
                    label = _label(content.read(most), name)
            yield _Member(name, entry.header_offset, entry.compress_size, entry.file_size, entry.CRC, packing, label)


def _written_name(entry: zipfile.ZipInfo) -> str:
    """The name of a zip's member as its files are called where it is unpacked, "/" between the parts."""
    if entry.create_system in _OF_WINDOWS:
        return entry.orig_filename.replace("\\", "/")
    # macOS and other Unix write the bytes of a name without the flag that says UTF-8; zipfile takes them for cp437
    return entry.orig_filename if entry.flag_bits & 0x800 else os.fsdecode(entry.orig_filename.encode("cp437"))


def _checked(name: str) -> str:
    """A member's name without ./ in front, "" for the root itself; DataError for one that leads elsewhere."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or re.match("[A-Za-z]:/", name):
        raise DataError(f"'{name}' leads out of the archive")
    return "/".join(parts)


def _load_index(kept: Path, state: tuple[str, int, int, int, int]) -> Members | None:
    """The kept index of an archive in this state."""
    try:
        if kept.stat().st_size > _LARGEST_INDEX:
            raise ValueError(f"it has more than {_LARGEST_INDEX:,} bytes")
        content = read_regular(kept, _LARGEST_INDEX)
        if hashlib.sha256(content[_DIGEST:]).digest() != content[:_DIGEST]:
            raise ValueError("its bytes have changed")  # before numpy makes room for what its headers claim
        with np.load(io.BytesIO(content[_DIGEST:]), allow_pickle=False) as stored:
            if stored["state"].tolist() != _as_array(state).tolist():
                return None  # the archive has changed
            places = stored["places"]
            names, labels = (Names.from_arrays(stored[f"{kind}_block"], stored[f"{kind}_ends"])
                             for kind in ("names", "labels"))
            end = (places["offset"] + places["stored"]).max(initial=0)
            fitting = len(names) == len(places) == len(labels) and end <= state[1]
            if not fitting or places.dtype != PLACE or places["archive"].any():
                raise ValueError("its parts do not fit")
            return Members(names, places, labels)
    except FileNotFoundError:
        return None
    except Exception as error:  # which one depends on what is wrong
        log.warning("the kept index %s is damaged (%s) and is made again", kept, error)
        return None


def _store_index(kept: Path, state: tuple[str, int, int, int, int], members: Members) -> None:
    """Keep an index; where that is not possible, a warning says so and all goes on."""
    blocks = {f"{kind}_{part}": array for kind, names in (("names", members.names), ("labels", members.labels))
              for part, array in zip(("block", "ends"), names.as_arrays(), strict=True)}
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        packed = io.BytesIO()
        np.savez(packed, allow_pickle=False, state=_as_array(state), places=members.places, **blocks)
        with replacing(kept) as partial, partial.open("wb") as file:
            file.write(hashlib.sha256(packed.getbuffer()).digest())
            file.write(packed.getbuffer())
        keep_newest(kept.parent)
    except OSError as error:
        log.warning("the index of %s is not kept: %s", state[0], error)


def _as_array(state: tuple[str, int, int, int, int]) -> np.ndarray:
    return np.frombuffer(os.fsencode("\0".join(map(str, (_VERSION, *state)))), dtype=np.uint8)


class BoundedEntry(tarfile.TarInfo):
    """A member; long names and the like, which tarfile reads into memory, must be short."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: Any, errors: str) -> BoundedEntry:
        entry = super().frombuf(buf, encoding, errors)
        if not (entry.isreg() or entry.isdir()) and entry.size > _LONGEST_HEADER:
            raise DataError(f"it holds a header of {entry.size:,} bytes")
        if entry.type == tarfile.GNUTYPE_SPARSE:  # its map is read into memory, however long
            raise DataError(f"'{entry.name}' is neither a file nor a folder but sparse; only plain files are read")
        return entry

    def _proc_gnusparse_10(self, *_: Any) -> None:
        raise DataError(f"'{self.name}' is neither a file nor a folder but sparse; only plain files are read")


class BoundedStream:
    """A stream that may give so many bytes and no more: DataError behind them."""

    def __init__(self, stream: gzip.GzipFile | BinaryIO, most: int) -> None:
        self._stream, self._left, self._most = stream, most, most

    def read(self, size: int) -> bytes:
        """Up to `size` bytes."""
        block = self._stream.read(size)
        self._left -= len(block)
        if self._left < 0:
            raise DataError(f"it holds more than {self._most:,} bytes, which is more than this set has")
        return block
