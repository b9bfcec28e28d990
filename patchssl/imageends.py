"""Whether an image file looks whole, by its first and last bytes: a look that costs no decoding.

It says nothing about the pixels. What does not look whole is decoded before anything is said about it: files with
something behind their end are fine, and so are formats that have no end to look at.
"""

from __future__ import annotations

import os
from pathlib import Path

START, END = 16, 12  # bytes of a file that are looked at
_ENDS = (
    (b"\xff\xd8\xff", b"\xff\xd9"),  # JPEG: the marker EOI
    (b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"),
    (b"GIF8", b"\x00\x3b"),  # the end of the last block, and the trailer
)


def file_looks_whole(path: Path) -> bool:
    """`quick_check` of a file; False for one that cannot be read."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(START)
            file.seek(max(0, size - END))
            return quick_check(start, file.read(END), size)
    except OSError:
        return False


def quick_check(start: bytes, end: bytes, size: int) -> bool:
    """Whether a file of `size` bytes begins like a JPEG, PNG, GIF, WebP or BMP image and ends like one.

    >>> [quick_check(b"GIF89a", end, size=500) for end in (b"\\x00;", b"\\x1b\\x07")]
    [True, False]
    """
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return 8 + int.from_bytes(start[4:8], "little") <= size
    if start[:2] == b"BM":
        return 0 < int.from_bytes(start[2:6], "little") <= size
    return any(start.startswith(beginning) and end.endswith(ending) for beginning, ending in _ENDS)
