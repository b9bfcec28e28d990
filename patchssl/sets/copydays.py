"""Sets in the layout of INRIA Copydays: twenty blocks of copies, all searched among the originals.

    ROOT/original/                                     the originals, 157 in Copydays itself
    ROOT/strong/                                       229 strong copies
    ROOT/jpegqual/{3,5,8,10,15,20,30,50,75}/           every original, scaled down and saved at this quality
    ROOT/crops/{10,15,20,30,40,50,60,70,80}/           every original, so many percent of its area cut away
    ROOT/distractors/, ROOT/whitening/                 further photographs, at any depth

Files are told apart by their stems, whatever the extension. A copy in `jpegqual` and `crops` is called like
its original; a strong copy shares its first four characters: 200001.jpg is a copy of 200000.jpg. Copydays' own
originals are called 2nnn00; its archives copydays_original and copydays_strong hold bare images, the others
folders jpegqual/ and crops/.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from patchssl.data.decode import Listing, left_out, list_images
from patchssl.data.images import FileImages, Names
from patchssl.runtime.errors import DataError, UsageError
from patchssl.runtime.text import shortened

JPEG_QUALITIES = (3, 5, 8, 10, 15, 20, 30, 50, 75)
CROP_PERCENTS = (10, 15, 20, 30, 40, 50, 60, 70, 80)  # of the area, cut away
BLOCKS: tuple[str, ...] = (
    "original",
    "strong",
    *(f"jpegqual/{quality}" for quality in JPEG_QUALITIES),
    *(f"crops/{percent}" for percent in CROP_PERCENTS),
)
NUM_ORIGINALS, NUM_STRONG = 157, 229  # of Copydays itself
PREFIX = 4  # characters of a strong copy's name that it shares with its original
_OWN_NAME = re.compile(r"2\d{3}00")
_MOST_LISTED = 10


@dataclass(frozen=True, kw_only=True)
class CopydaysBlock:
    """The queries of one block, in the order of their names."""

    name: str
    images: FileImages
    originals: np.ndarray  # (len(images),) int64: of which original each is a copy


@dataclass(frozen=True, kw_only=True)
class CopydaysSet:
    """What `open_copydays` found; no image has been read."""

    root: Path
    blocks: tuple[CopydaysBlock, ...]  # as in BLOCKS; the originals are the first
    distractors: FileImages | None
    whitening: FileImages | None
    official: bool  # by their names and number, these are the images of Copydays itself

    @property
    def originals(self) -> FileImages:
        """The database; `CopydaysBlock.originals` are indices into it."""
        return self.blocks[0].images

    @property
    def others(self) -> Mapping[str, int]:
        """How many files with other extensions lie among the images, by extension."""
        total: dict[str, int] = {}
        for images in self._parts().values():
            for extension, count in images.others.items():
                total[extension] = total.get(extension, 0) + count
        return dict(sorted(total.items()))

    @property
    def fingerprint(self) -> str:
        """sha256 in hex of the fingerprints of all files that take part."""
        parts = (f"{name} {images.fingerprint}\n" for name, images in self._parts().items())
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def describe(self) -> str:
        """One line: what it is, where it lies, how many images."""
        copies = sum(len(block.images) for block in self.blocks[1:])
        extra = "".join(f", {len(images):,} in {name}" for name, images in self._parts().items()
                        if name in ("distractors", "whitening"))
        skipped = f"; skipped {left_out(self.others)}" if self.others else ""
        kind = "Copydays" if self.official else "a set in Copydays' layout"
        return f"{kind} in {self.root}: {len(self.originals):,} originals, {copies:,} copies{extra}{skipped}"

    def _parts(self) -> dict[str, FileImages]:
        extra = {"distractors": self.distractors, "whitening": self.whitening}
        there = {name: images for name, images in extra.items() if images is not None}
        return {block.name: block.images for block in self.blocks} | there


def open_copydays(
    root: str | Path,
    *,
    distractors: str | Path | None = None,
    whitening: str | Path | None = None,
    needs_distractors: bool = True,
    needs_whitening: bool = True,
    allow_truncated: bool = False,
) -> CopydaysSet:
    """The blocks below `root`, with every file accounted for before any image is read.

    `distractors` and `whitening` are folders of further images, by default those beside the blocks. A protocol
    without them says so by `needs_distractors` or `needs_whitening`: they are None then, whatever lies there.
    DataError names what is missing or too many; UsageError for a folder given to a protocol that has no use
    for it, and for one that holds images of the blocks.
    """
    place = Path(root)
    if not place.is_dir():
        raise DataError(f"{place} is no folder: give the one that holds original/, strong/, jpegqual/ and crops/")
    blocks, official = _read_blocks(place, allow_truncated)
    return CopydaysSet(
        root=place,
        blocks=tuple(blocks),
        distractors=_extra(place, "distractors", distractors, needs_distractors, allow_truncated),
        whitening=_extra(place, "whitening", whitening, needs_whitening, allow_truncated),
        official=official,
    )


def _read_blocks(place: Path, allow_truncated: bool) -> tuple[list[CopydaysBlock], bool]:
    """The blocks below `place`, and whether they are Copydays' own by the names of the originals."""
    _require_folders(place)
    listings = {name: list_images(place / name) for name in BLOCKS}
    files = {name: _by_stem(place / name, listing.names) for name, listing in listings.items()}
    stems = sorted(files["original"])
    official = all(_OWN_NAME.fullmatch(stem) for stem in stems)
    if official:
        _check_counts(place, files)
    indices = {stem: index for index, stem in enumerate(stems)}
    blocks = []
    for name in BLOCKS:
        copies = sorted(files[name])
        if name == "strong":
            originals = _strong_originals(place, copies, indices)
        else:
            originals = _equal_originals(place, name, copies, indices)
        listing = Listing([files[name][stem] for stem in copies], listings[name].others)
        images = _images(place / name, f"block {name}", listing, allow_truncated)
        blocks.append(CopydaysBlock(name=name, images=images, originals=np.array(originals, dtype=np.int64)))
    return blocks, official


def _require_folders(root: Path) -> None:
    """DataError with the blocks that are no folders."""
    if missing := [name for name in BLOCKS if not (root / name).is_dir()]:
        flat = any(path.suffix.lower() in (".jpg", ".jpeg") for path in root.iterdir())
        remedy = (
            f"; the images right in {root} look like copydays_original.tar.gz or copydays_strong.tar.gz, which "
            "hold no folder: unpack them into original/ and strong/" if flat else
            "; copydays_jpeg.tar.gz and copydays_crop.tar.gz hold jpegqual/ and crops/, the other two archives "
            "belong into original/ and strong/"
        )
        raise DataError(f"{root} lacks {len(missing)} of Copydays' {len(BLOCKS)} blocks: "
                        f"{', '.join(missing)}{remedy}")


def _by_stem(folder: Path, names: list[str]) -> dict[str, str]:
    """The images `names` in `folder` by stem; DataError when there is none or two share one."""
    found: dict[str, str] = {}
    for name in names:
        stem = PurePosixPath(name).stem
        if stem in found:
            raise DataError(f"{folder} holds both {found[stem]} and {name}: remove one, as each stands for {stem}")
        found[stem] = name
    if not found:
        raise DataError(f"the block {folder} holds no image")
    return found


def _check_counts(root: Path, files: Mapping[str, Mapping[str, str]]) -> None:
    """DataError unless every block has as many images as Copydays itself, whose names these are."""
    wrong = []
    for name, found in files.items():
        expected = NUM_STRONG if name == "strong" else NUM_ORIGINALS
        if len(found) != expected:
            wrong.append(f"{name} holds {len(found)} of {expected}{_difference(files, name)}")
    if wrong:
        raise DataError(f"{root} is Copydays by the names of its originals, but not all of it: {'; '.join(wrong)}. "
                        "Unpack the archives anew")


def _difference(files: Mapping[str, Mapping[str, str]], name: str) -> str:
    """In brackets, what the other blocks have and the block `name` lacks, and the reverse."""
    if name == "strong":
        return ""
    elsewhere = {stem for other, found in files.items() if other not in ("strong", name) for stem in found}
    lacking, surplus = sorted(elsewhere - set(files[name])), sorted(set(files[name]) - elsewhere)
    parts = [f"{word} {shortened(stems, _MOST_LISTED)}"
             for word, stems in (("without", lacking), ("too many:", surplus)) if stems]
    return f" ({', '.join(parts)})" if parts else ""


def _equal_originals(root: Path, name: str, copies: list[str], indices: Mapping[str, int]) -> list[int]:
    """The original of every copy in a block where names are equal; DataError unless each original has one."""
    if copies != list(indices):
        lacking, surplus = sorted(set(indices) - set(copies)), sorted(set(copies) - set(indices))
        parts = [f"no copy of {shortened(lacking, _MOST_LISTED)}"] if lacking else []
        parts += [f"{shortened(surplus, _MOST_LISTED)}, which {root / 'original'} does not"] if surplus else []
        raise DataError(f"{root / name} holds {' and '.join(parts)}: every block but strong has one image for each "
                        "original, with the same name")
    return list(range(len(copies)))


def _strong_originals(root: Path, copies: list[str], indices: Mapping[str, int]) -> list[int]:
    """The original of every strong copy, by the first characters of its name; DataError unless there is one."""
    by_prefix: dict[str, str] = {}
    for stem in indices:
        if (other := by_prefix.setdefault(stem[:PREFIX], stem)) != stem:
            raise DataError(f"the originals {other} and {stem} in {root / 'original'} begin with the same {PREFIX} "
                            "characters, which are what a strong copy's name tells its original by: rename them, "
                            "for example to 300000, 300100, ... and their strong copies to 300001, 300101, ...")
    if unknown := [stem for stem in copies if stem[:PREFIX] not in by_prefix]:
        raise DataError(f"{root / 'strong'} holds {shortened(unknown, _MOST_LISTED)}, but no original begins with "
                        f"the same {PREFIX} characters")
    return [indices[by_prefix[stem[:PREFIX]]] for stem in copies]


def _images(folder: Path, source: str, listing: Listing, allow_truncated: bool) -> FileImages:
    """An image set of the files that were listed in `folder`."""
    return FileImages(
        name=folder.name, split="all", source=f"{source} in {folder}", root=folder, names=Names(listing.names),
        allow_truncated=allow_truncated, others=listing.others,
    )


def _extra(
    root: Path, kind: str, named: str | Path | None, needed: bool, allow_truncated: bool
) -> FileImages | None:
    """The distractors or the whitening images, None where the protocol has none."""
    if not needed:
        if named is not None:
            raise UsageError(f"--{kind} {named}: this protocol has no {kind} images; leave the option out or choose "
                             "another protocol")
        return None
    folder = root / kind if named is None else Path(named)
    remedy = (f"put photographs into {root / kind}, name their folder by --{kind} FOLDER, or choose the protocol "
              f"dino-no{kind} (dino-plain: without distractors and whitening), whose numbers cannot be compared with "
              "published ones")
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder} for the {kind} images: {remedy}")
    place = folder.resolve()
    if own := [name for name in BLOCKS if place in ((root / name).resolve(), *(root / name).resolve().parents)
               or (root / name).resolve() in place.parents]:
        raise UsageError(f"{folder} holds images of the set itself ({own[0]}), and the {kind} images have to be "
                         f"others; {remedy}")
    if not (listing := list_images(folder)).names:
        raise DataError(f"{folder} holds no image for {kind}: {remedy}")
    return _images(folder, f"{kind} images", listing, allow_truncated)
