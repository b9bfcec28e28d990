"""One member of an archive, by its place: its bytes, its two ends, its checksum.

No file stays open: a read opens, reads and closes, which costs microseconds beside the milliseconds of decoding and
is safe in threads and in processes, forked or spawned.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from patchssl.data.fingerprints import file_states, remembered
from patchssl.runtime.errors import UnreadableImage
from patchssl.runtime.files import open_regular

PLAIN, ZIPPED, DEFLATED = 0, 1, 2  # content as it is, behind a zip's local header, and deflated as well
PLACE = np.dtype([("archive", "<i4"), ("offset", "<i8"), ("stored", "<i8"), ("size", "<i8"), ("crc", "<u4"),
                  ("packing", "u1")])  # sizes in bytes, in the archive and unpacked
_PREFIX = 512  # bytes of a deflated member that its first bytes are unpacked from
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


def read_member(archive: Path, place: np.void, name: str) -> bytes:
    """Content of one member; UnreadableImage, which calls it `name`, where the archive does not hold it any more."""
    offset, stored, size, packing = (int(place[field]) for field in ("offset", "stored", "size", "packing"))
    try:
        with open_regular(archive, buffering=0) as file:
            content = _read_at(file, _content_offset(file, offset, packing), stored)
        if packing == DEFLATED:
            unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
            content = unpacker.decompress(content, size + 1)  # no more, whatever it would unpack to
        if len(content) != size:
            raise ValueError(f"it does not unpack to the {size:,} bytes that the archive claims")
        if packing != PLAIN and zlib.crc32(content) != place["crc"]:
            raise ValueError("its checksum is wrong")
    except (OSError, ValueError, zlib.error, struct.error) as error:
        raise UnreadableImage(name, f"the archive {archive} is damaged or has changed: {error}") from error
    return content


def member_ends(archive: Path, place: np.void, start: int, end: int) -> tuple[bytes, bytes | None]:
    """The first `start` and last `end` bytes of a member, or fewer; None for the end of a deflated one.

    Of the archive no more is read. UnreadableImage where it does not hold the member any more.
    """
    offset, stored, size, packing = (int(place[field]) for field in ("offset", "stored", "size", "packing"))
    try:
        with open_regular(archive, buffering=0) as file:
            begin = _content_offset(file, offset, packing)
            if packing == DEFLATED:
                packed = _read_at(file, begin, min(stored, _PREFIX))
                return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, start), None
            return (_read_at(file, begin, min(start, size)),
                    _read_at(file, begin + max(0, size - end), min(end, size)))
    except (OSError, ValueError, zlib.error, struct.error) as error:
        raise UnreadableImage(str(archive), f"the archive is damaged or has changed: {error}") from error


def _content_offset(file: BinaryIO, offset: int, packing: int) -> int:
    """Where the content of a member begins, in a zip behind a header; ValueError where there is none."""
    if packing == PLAIN:
        return offset
    header = _LOCAL_HEADER.unpack(_read_at(file, offset, _LOCAL_HEADER.size))
    if header[0] != b"PK\3\4":
        raise ValueError("its place in the archive holds something else")
    return offset + _LOCAL_HEADER.size + header[-2] + header[-1]


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """`size` bytes at `offset` of an unbuffered file, which may give them in parts."""
    file.seek(offset)
    content = bytearray()
    while len(content) < size:
        block = file.read(size - len(content))
        if not block:
            raise ValueError("it ends early")
        content += block
    return bytes(content)


def archive_states(archives: Sequence[Path]) -> np.ndarray:
    """Size, modification and status change (ns) and inode of archives, (len, 4) int64; see `file_states`."""
    return np.concatenate([file_states(archive.parent, [archive.name]) for archive in archives])


def member_sums(archives: Sequence[Path], places: np.ndarray) -> np.ndarray:
    """CRC-32 (len,) int64 of members: a zip's own, of a tar read and remembered; -1 of what cannot be read."""
    sums = places["crc"].astype(np.int64)
    plain = np.flatnonzero(places["packing"] == PLAIN)
    if not len(plain):
        return sums
    whole, found = archive_states(archives), places[plain]
    states = np.column_stack((found["size"], whole[found["archive"], 1:3], found["offset"]))

    def read(chosen: np.ndarray) -> np.ndarray:
        wanted = found[chosen]
        result = np.full(len(wanted), -1, dtype=np.int64)
        for at in np.lexsort((wanted["offset"], wanted["archive"])).tolist():
            with contextlib.suppress(UnreadableImage):
                result[at] = zlib.crc32(read_member(archives[wanted["archive"][at]], wanted[at], ""))
        return result

    paths = "\0".join(os.path.realpath(archive) for archive in archives)
    sums[plain] = remembered(hashlib.sha256(os.fsencode(paths)).hexdigest(), states, read)
    return sums
