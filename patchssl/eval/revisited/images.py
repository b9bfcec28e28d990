"""Images of revisited sets as a network gets them: queries cut to their box, the longest side bounded.

Pixels are taken as they are stored, whatever the EXIF orientation says: boxes were measured there, and the official
code looks at no orientation either.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from patchssl.data.decode import decode_image, list_images
from patchssl.data.fingerprints import Known
from patchssl.data.images import FileImages, ImageSet, Names
from patchssl.runtime.errors import DataError, UnreadableImage, UsageError
from patchssl.sets.revisited import GroundTruth, RevisitedPaths, file_name, present_names

CropBox = tuple[float, float, float, float]  # left, top, right, bottom in pixels

_MOST_LISTED = 20
_LARGEST_LIST = 2**30  # bytes; the list of a million distractors has about 50 million


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PreparedImages(ImageSet):
    """`files`, each cut to its box where it has one and made smaller; see `prepare_pixels`.

    `fingerprint` depends on the preparation too: it is that of the pixels which come out.
    """

    files: FileImages
    boxes: tuple[CropBox | None, ...]  # as many as there are files
    longest: int | None = None  # pixels of the longer side of a whole image, None: as it is
    least: int = 1  # pixels that a network needs on the shorter side

    def __len__(self) -> int:
        return len(self.files)

    def pixels(self, index: int) -> np.ndarray:
        path = str(self.files.path(index))
        whole = decode_image(path, allow_truncated=self.files.allow_truncated, upright=False)
        try:
            pixels = prepare_pixels(whole, self.boxes[index], self.longest)
        except (ValueError, Image.DecompressionBombError) as error:
            raise UnreadableImage(path, str(error)) from None
        if min(pixels.shape[:2]) < self.least:
            size = f"{pixels.shape[1]} x {pixels.shape[0]} pixels"
            raise UnreadableImage(path, f"{self._cut(index) or 'it'} has {size} as this protocol resizes it; the "
                                        f"network needs {self.least} on the shorter side")
        return pixels

    def quick_check(self, index: int) -> bool:
        return self.files.quick_check(index)

    def item_name(self, index: int) -> str:
        """The file's name, and the box that is cut from it."""
        return " ".join(part for part in (self.files.item_name(index), self._cut(index)) if part)

    def subset(self, indices: Sequence[int] | np.ndarray) -> PreparedImages:
        files = self.files.subset(indices)
        boxes = tuple(self.boxes[index] for index in self._chosen(indices))
        return replace(self, files=files, boxes=boxes, source=files.source)

    @cached_property
    def known(self) -> Known:
        files = self.files.known
        return Known(self._prepared(files.fingerprint), files.content, self._prepared(files.key))

    def _prepared(self, files: str) -> str:
        digest = hashlib.sha256(f"stored pixels, longest {self.longest}\n{files}\n".encode())
        for name in sorted(self.item_name(index) for index, box in enumerate(self.boxes) if box is not None):
            digest.update(f"{name}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def with_classes(self, classes: tuple[str, ...]) -> PreparedImages:
        """The same images: they have no labels."""
        return self

    def _cut(self, index: int) -> str:
        box = self.boxes[index]
        return "" if box is None else "its box ({}, {}, {}, {})".format(*(f"{float(side):.10g}" for side in box))


def prepare_pixels(pixels: np.ndarray, box: CropBox | None, longest: int | None) -> np.ndarray:
    """(H, W, 3) uint8 to (h, w, 3): cut to `box`, then resized by what brings the whole image to `longest` pixels.

    Pillow's thumbnail with Lanczos, as facebookresearch/dino resizes whole images; sides are rounded, nothing is
    enlarged. A box is rounded to whole pixels; what of it lies outside is black, as Pillow's crop in the official
    code leaves it. ValueError for a box without a pixel of the image, or more than twice its size.
    """
    image = Image.fromarray(pixels)
    side = None if longest is None else float(longest)
    if box is not None:
        bound = max(image.size)
        image = image.crop(_whole_pixels(box, image.width, image.height))
        side = None if side is None else max(1.0, side * max(image.size) / bound)
    if side is not None:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.array(image)


def _whole_pixels(box: CropBox, width: int, height: int) -> tuple[int, int, int, int]:
    if not max(map(abs, box)) < 2**31:
        raise ValueError(f"its box {box} lies outside the {width} x {height} pixels of the image")
    left, top, right, bottom = (round(side) for side in box)
    inside = max(left, 0) < min(right, width) and max(top, 0) < min(bottom, height)
    if not inside or right - left > 2 * width or bottom - top > 2 * height:
        raise ValueError(f"its box ({left}, {top}, {right}, {bottom}) does not fit the {width} x {height} pixels of "
                         "the image")
    return left, top, right, bottom


def queries_and_database(truth: GroundTruth, place: RevisitedPaths, allow_truncated: bool = False) -> FileImages:
    """The query images of a set, then those of its database, in the order of the ground truth."""
    wanted = [file_name(name) for name in truth.qimlist + truth.imlist]
    names = Names(there or name for name, there in zip(wanted, present_names(wanted, place.images), strict=True))
    return FileImages(name=place.ground_truth.stem.removeprefix("gnd_"), split="all", root=place.images, names=names,
                      source=f"queries and database in {place.images}", allow_truncated=allow_truncated)


def open_distractors(folder: str | Path, place: RevisitedPaths, allow_truncated: bool = False) -> FileImages:
    """The distractors in `folder`, none of them read yet: all images at any depth, or those that its list names.

    The list is NAME.txt in a folder NAME, as of revisitop1m: a file on each line, relative to `jpg` where there is
    one. `folder` may be NAME/jpg, too. DataError for a folder or list without images, files that are listed
    twice or absent. UsageError for the images of the set at `place` itself.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder} of distractors; name the folder that holds their images")
    top = folder.resolve()
    if top.name == "jpg":
        top = top.parent
    root = top / "jpg" if (top / "jpg").is_dir() else top
    own = place.images.resolve()
    if own in (root, *root.parents) or root in own.parents:
        raise UsageError(f"--distractors {folder} holds the images of the set in {place.images}; distractors are "
                         "other images, none of which shows what a query shows")
    listing = list_images(root)
    list_file = top / f"{top.name}.txt"
    names = _listed_names(list_file, root, set(listing.names)) if list_file.is_file() else listing.names
    if not names:
        raise DataError(f"{list_file if list_file.is_file() else root} names no distractors: there is not one image")
    return FileImages(name=top.name, split="all", root=root, names=Names(names), source=f"distractors in {root}",
                      allow_truncated=allow_truncated)


def _listed_names(list_file: Path, root: Path, there: set[str]) -> list[str]:
    """What `list_file` names, in its order; DataError unless each is a file below `root`, and named once."""
    if list_file.stat().st_size > _LARGEST_LIST:
        raise DataError(f"{list_file} is larger than {_LARGEST_LIST // 2**20} MiB: no list of distractors")
    try:
        text = list_file.read_text("utf-8", "surrogateescape")
    except OSError as error:
        raise DataError(f"{list_file} cannot be read: {error.strerror or error}") from error
    names = [name for line in text.split("\n") if (name := line.strip())]
    for name in names:
        parts = PurePosixPath(name).parts
        if "\0" in name or "\\" in name or ".." in parts or PurePosixPath(name).is_absolute():
            raise DataError(f"{list_file} names {name!r}, which is no file below {root}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{list_file} names {len(twice):,} images more than once, first {twice[0]}")
    unseen = [name for name in names if name not in there]
    written = {name: found for name, found in zip(unseen, present_names(unseen, root), strict=True) if found}
    if absent := [name for name in unseen if name not in written]:
        more = f"\n  and {len(absent) - _MOST_LISTED:,} more" if len(absent) > _MOST_LISTED else ""
        shown = "".join(f"\n  {name}" for name in absent[:_MOST_LISTED])
        raise DataError(f"{len(absent):,} of the {len(names):,} distractors that {list_file} names are not in {root}, "
                        f"so no number is given; download them again:{shown}{more}")
    return [written.get(name, name) for name in names]
