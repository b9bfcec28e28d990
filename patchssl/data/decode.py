"""Image files: which files are images, whether one looks whole, and its pixels as 8-bit RGB.

What Pillow decides and we keep: alpha and palette transparency are dropped, not composited; CMYK is converted
without a color profile; of several frames or pages the first one is read; color with 16 bits a channel keeps
its high byte. What is decided here: EXIF orientation is applied, 16-bit gray is scaled (not clipped) to 8
bits, and what has no agreed range (32-bit integers, floating point) is refused. Data of fewer bits in 16-bit files is
not guessed at image by image, which would be no fixed scale: `depth` says what to do. AVIF, JPEG 2000, HEIC and
JPEG XL are read where Pillow or a plugin of it does.

A look at the first and last bytes (`quick_check_file`) costs no decoding and says nothing about the pixels. What does
not look whole is decoded before anything is said about it: files with something behind their end are fine, and so are
formats that have no end to look at.
"""

from __future__ import annotations

import importlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError, features

from patchssl.data.depth import note_brightest
from patchssl.runtime.errors import DataError, PatchSSLError, UnreadableImage, UsageError
from patchssl.runtime.files import open_regular, read_regular
from patchssl.runtime.text import counted

_USUAL = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
_OPTIONAL: Mapping[str, tuple[str, tuple[str, ...]]] = {  # format: what reads it, and how its files are called
    "AVIF": ("Pillow 11.3 or newer", (".avif", ".avifs")),
    "JPEG2000": ("a Pillow with OpenJPEG", (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c")),
    "HEIF": ("pip install pillow-heif", (".heic", ".heif", ".hif")),
    "JXL": ("pip install pillow-jxl-plugin", (".jxl",)),
}


def _readable_formats() -> tuple[str, ...]:
    """Those of `_OPTIONAL` that this installation reads."""
    found = [name for name, feature in (("AVIF", "avif"), ("JPEG2000", "jpg_2000"))
             if feature in features.get_supported()]
    for name, plugin, register in (("HEIF", "pillow_heif", "register_heif_opener"), ("JXL", "pillow_jxl", "")):
        with suppress(Exception):  # not there, or not made for this Pillow
            module = importlib.import_module(plugin)
            if register:
                getattr(module, register)()
            found.append(name)
    return tuple(found)


# named, so that a file that only pretends to be a picture cannot reach an interpreter such as PostScript's
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", *_readable_formats())
EXTENSIONS = _USUAL.union(*(extensions for name, (_, extensions) in _OPTIONAL.items() if name in _FORMATS))
_SYSTEM = frozenset({"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"})
_MOST_PIXELS = "PATCHSSL_MAX_PIXELS"
_LARGEST_FILE = 2**29  # bytes: more than a picture has
START, END = 16, 12  # bytes of a file that are looked at
_ENDS = (
    (b"\xff\xd8\xff", b"\xff\xd9"),  # JPEG: the marker EOI
    (b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"),
    (b"GIF8", b"\x00\x3b"),  # the end of the last block, and the trailer
)

# EXIF orientation -> from stored pixels to upright ones
_UPRIGHT: Mapping[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}


class Listing(NamedTuple):
    """What a folder tree holds: image files, and how many others by extension."""

    names: list[str]  # relative to the root, "/" between the parts, sorted
    others: Mapping[str, int]


class Walk(NamedTuple):
    """A `Listing`, and what tells whether it still holds."""

    names: list[str]
    others: Mapping[str, int]
    folders: list[tuple[str, tuple[int, int, int, int]]]  # relative to the root, each with its `folder_state`
    lasting: bool  # whether every change of the names is one of these states


def list_images(root: Path) -> Listing:
    """All image files below `root`, at any depth, known by their extensions in any case.

    Names that begin with a dot are skipped, and what systems leave (`is_hidden`). Links are followed, except into a
    folder that holds the link itself. What is called like an image and is a pipe, a device or a link that leads
    nowhere is listed: reading it says what is wrong.
    DataError when a folder cannot be entered: a part of a dataset must not be missing unnoticed.
    """
    walk = walk_images(root)
    return Listing(walk.names, walk.others)


def walk_images(root: Path) -> Walk:
    """As `list_images`, with the folders that were entered."""
    names: list[str] = []
    others: Counter[str] = Counter()
    folders: list[tuple[str, tuple[int, int, int, int]]] = []
    lasting = True
    pending = [(os.fspath(root), "", root.stat(), frozenset[tuple[int, int]]())]
    while pending:
        folder, prefix, status, above = pending.pop()
        above |= {(status.st_dev, status.st_ino)}
        folders.append((prefix, folder_state(status)))
        for entry in list_folder(folder):
            name = entry.name
            if is_folder(entry):
                place = entry.stat()
                if (place.st_dev, place.st_ino) not in above:
                    pending.append((entry.path, f"{prefix}{name}/", place, above))
            elif (extension := extension_of(name)) in EXTENSIONS:
                names.append(prefix + name)
            else:
                others[extension] += 1
                lasting &= not entry.is_symlink()  # which may lead to a folder one day
    return Walk(sorted(names), dict(sorted(others.items())), folders, lasting)


def folder_state(status: os.stat_result) -> tuple[int, int, int, int]:
    """What changes when a name comes into a folder or goes: two times (ns), and which folder it is."""
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino & (2**63 - 1), status.st_dev


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return extension_of(name) in EXTENSIONS


def extension_of(name: str) -> str:
    """Lower-case extension with its dot, or the words for a name without one."""
    _, dot, extension = name.rpartition("/")[2].rpartition(".")
    return dot + extension.lower() if dot else "no extension"


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is passed over: hidden, or left by a system and not by a person.

    >>> is_hidden(".DS_Store"), is_hidden("__MACOSX"), is_hidden("cat")
    (True, True, False)
    """
    return name.startswith(".") or name in _SYSTEM


def left_out(others: Mapping[str, int]) -> str:
    """How many files by extension are no images, and what would read those that are.

    >>> left_out({".txt": 1})
    '1 file with other extensions (.txt 1)'
    """
    needs = [f"{extension} needs {reader}" for _, (reader, extensions) in sorted(_OPTIONAL.items())
             for extension in extensions if extension in others and extension not in EXTENSIONS]
    return "; ".join([counted(others), *needs])


def list_folder(folder: str | Path) -> list[os.DirEntry[str]]:
    """What a folder holds, without hidden names; DataError when it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be listed: {error.strerror}") from error


def decode_image(path: str | Path, *, allow_truncated: bool = False, upright: bool = True) -> np.ndarray:
    """Pixels (H, W, 3) uint8 RGB of an image file, upright; UnreadableImage says why there are none.

    With `allow_truncated` the missing part of a file that ends early is black or gray, as Pillow leaves it. Not
    `upright`: as stored, whatever the EXIF orientation says, for boxes that were measured in stored pixels.
    """
    try:
        data = read_regular(path, _LARGEST_FILE)
    except OSError as error:
        raise UnreadableImage(str(path), error.strerror or str(error)) from error
    return decode_bytes(data, str(path), allow_truncated=allow_truncated, upright=upright)


def decode_bytes(data: bytes, name: str, *, allow_truncated: bool = False, upright: bool = True) -> np.ndarray:
    """As `decode_image`, of a file's content; `name` is what an error calls it."""
    if not data:
        raise UnreadableImage(name, "the file is empty")
    if allow_truncated and data.startswith(b"\xff\xd8"):
        data += b"\xff\xd9"  # JPEG's end marker: the decoder gives out the rows it holds back
    try:
        with strict_pillow(), Image.open(BytesIO(data), formats=_FORMATS) as image:
            _load(image, allow_truncated)
            deep = data[24:25] == b"\x10" if image.format == "PNG" else _bits_per_sample(image) == (16, 16, 16)
            return _upright(_rgb(image, deep), _orientation(image) if upright else 1)
    except (PatchSSLError, MemoryError):
        raise  # an interruption or an exhausted machine says nothing about the image
    except Image.DecompressionBombError as error:
        raise UnreadableImage(name, f"{str(error).rstrip('.')}; where you trust it, {_MOST_PIXELS}=N in the "
                                    "environment reads up to N pixels") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(name, f"no known image format (the file begins with {data[:12]!r})") from error
    except Exception as error:  # damaged files make decoders raise anything
        raise UnreadableImage(name, str(error) or type(error).__name__) from error


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Truncated files are errors inside, even where other code of the process told Pillow to accept them.

    So are images of more pixels than PATCHSSL_MAX_PIXELS, by default Pillow's own limit, against decompression bombs.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    if os.environ.get(_MOST_PIXELS):
        Image.MAX_IMAGE_PIXELS = _most_pixels() // 2  # Pillow refuses twice that
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before


def _most_pixels() -> int:
    """What PATCHSSL_MAX_PIXELS says, the most pixels of an image; UsageError where that is no number."""
    asked = os.environ[_MOST_PIXELS]
    if not re.fullmatch("[1-9][0-9]{0,14}", asked):
        raise UsageError(f"{_MOST_PIXELS} is '{asked}': give the most pixels an image may have, such as 500000000")
    return int(asked)


def _load(image: Image.Image, allow_truncated: bool) -> None:
    """Decode the pixels in place."""
    try:
        image.load()
    except OSError:
        if not allow_truncated:
            raise
        # with nothing left to decode, what came so far is kept; Pillow's own switch is the whole process's
        image.tile = []  # type: ignore[attr-defined]
        image.load()


def _orientation(image: Image.Image) -> int:
    """EXIF orientation of a loaded image, 1 (upright) when nothing readable says otherwise."""
    try:
        # asked after decoding: a TIFF is turned by then, a PNG may carry its EXIF behind the pixels
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata do not spoil the pixels
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels turned as the EXIF orientation says, contiguous."""
    return np.ascontiguousarray(_UPRIGHT[orientation](pixels)) if orientation in _UPRIGHT else pixels


def _rgb(image: Image.Image, deep: bool) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of a loaded image of any mode; ValueError for a mode without an agreed range.

    `deep`: it is color with 16 bits a channel.
    """
    # Pillow holds gray PGM with 16 bits (older versions PNG too) in its 32-bit mode
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        white = 4095 if _bits_per_sample(image) == (12,) else 65535
        values = np.asarray(image).astype(np.uint32)
        if white == 65535:
            note_brightest(int(values.max()))
        gray = (values * 255 + white // 2) // white
        return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        kind = {"I": "32-bit integers", "F": "floating-point numbers"}[image.mode]
        raise ValueError(f"its pixels are {kind}, which have no agreed range; save it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about every such file
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    if deep:
        note_brightest(int(pixels.max()) * 257)
    return pixels


def _bits_per_sample(image: Image.Image) -> tuple[int, ...] | None:
    """What a TIFF says about its samples, None for other formats."""
    tags = getattr(image, "tag_v2", None)
    return None if tags is None else tags.get(ExifTags.Base.BitsPerSample)


def quick_check_file(path: Path) -> bool:
    """`quick_check` of a file; False for one that cannot be read."""
    try:
        with open_regular(path, buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(START)
            file.seek(max(0, size - END))
            return quick_check(start, file.read(END), size)
    except OSError:
        return False


def quick_check(start: bytes, end: bytes | None, size: int) -> bool:
    """Whether a file of `size` bytes begins like a JPEG, PNG, GIF, WebP or BMP image and ends like one.

    Without an `end`, which costs unpacking a file to have, the beginning and the size are all that is asked.

    >>> [quick_check(b"GIF89a", end, size=500) for end in (b"\\x00;", b"\\x1b\\x07")]
    [True, False]
    """
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return 8 + int.from_bytes(start[4:8], "little") <= size
    if start[:2] == b"BM":
        return 0 < int.from_bytes(start[2:6], "little") <= size
    return any(start.startswith(beginning) and (end is None or end.endswith(ending)) for beginning, ending in _ENDS)
