"""Images that cannot be decoded: how they are found, listed, and how many of them training bears.

Training skips them within `UnreadableBudget`; evaluation reads no number past one: it lists them all and fails
(`require_readable`, `raise_unreadable`).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from patchssl.data.decode import strict_pillow
from patchssl.data.images import ArrayImages, ImageSet
from patchssl.runtime.errors import DataError, UnreadableImage
from patchssl.runtime.progress import Progress, Say, shifted

_MOST_LISTED = 20
_BLOCK = 256  # images a worker checks before it reports
MOST_LOOKED_AT = 100_000  # files before an evaluation: of a cold disk or a network a minute or two


def find_unreadable(
    images: ImageSet, workers: int = 0, progress: Progress | None = None
) -> list[tuple[str, str]]:
    """(name, reason) of every image that cannot be decoded, in the set's order.

    Decodes all files, in `workers` threads; arrays are readable as they are. `progress` is called with the
    number of images looked at and of all.
    """
    return _unreadable(images, range(len(images)), workers, progress, all_of_them=True)


def require_readable(sets: Sequence[ImageSet], workers: int = 0, progress: Progress | None = None,
                     say: Say | None = None) -> None:
    """DataError, before anything is computed, that lists the images of `sets` that cannot be decoded.

    Begin and end of every file are looked at, and what does not look whole is decoded; if that finds one that cannot be
    decoded, all are, so that the list is complete. Of more than `MOST_LOOKED_AT` files every so many-th is looked at,
    which `say` is told, and those are the list. Damage elsewhere shows when a pass decodes it (`listing_unreadable`).
    `progress` counts the images that are looked at, and starts again where all are decoded.
    """
    sets = [images for images in sets if not isinstance(images, ArrayImages)]
    total = sum(map(len, sets))
    step = max(1, -(-total // MOST_LOOKED_AT))
    if step > 1 and say is not None:
        say(f"looking at one file of {step} among {total:,}; what is damaged among the others is told at the end of "
            "the pass that decodes them")
    parts = [range(0, len(images), step) for images in sets]
    ends = np.cumsum([len(part) for part in parts]).tolist()

    def found(all_of_them: bool) -> Iterator[tuple[str, str]]:
        for images, part, end in zip(sets, parts, ends, strict=True):
            shown = None if progress is None else shifted(progress, end - len(part), ends[-1])
            yield from _unreadable(images, part, workers, shown, all_of_them)

    if bad := [*itertools.islice(found(all_of_them=False), None if step > 1 else 1)]:
        bad = bad if step > 1 else [*found(all_of_them=True)]
        raise_unreadable(sorted((UnreadableImage(*each) for each in bad), key=lambda error: error.name), ends[-1])


def _unreadable(images: ImageSet, part: range, workers: int, progress: Progress | None,
                all_of_them: bool) -> list[tuple[str, str]]:
    """`find_unreadable` in `part`; not `all_of_them`: among those that do not look whole."""
    if isinstance(images, ArrayImages):
        return []
    blocks = [part[at : at + _BLOCK] for at in range(0, len(part), _BLOCK)]
    bad: list[tuple[str, str]] = []
    check = partial(_unreadable_among, images, all_of_them)
    with strict_pillow(), ThreadPoolExecutor(max(workers, 1)) as pool:
        found = pool.map(check, blocks) if workers else map(check, blocks)
        try:
            for number, block in enumerate(blocks):
                bad += next(found)
                if progress:
                    progress(number * _BLOCK + len(block), len(part))
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, the rest is not worth waiting for
    return bad


def _unreadable_among(images: ImageSet, all_of_them: bool, indices: range) -> list[tuple[str, str]]:
    bad = []
    for index in indices:
        if not all_of_them and images.quick_check(index):
            continue
        try:
            images.pixels(index)
        except UnreadableImage as error:
            bad.append((error.name, error.reason))
    return bad


def raise_unreadable(bad: Sequence[UnreadableImage], total: int) -> None:
    """DataError that lists `bad` out of `total` images; nothing happens when `bad` is empty.

    For a pass over the images that decodes them once and collects what it met.
    """
    if bad:
        raise DataError(
            f"{len(bad):,} of {total:,} images cannot be read, so no number is given; repair or remove them "
            f"(eval revisited can allow truncated ones):\n{_listed({error.name: error.reason for error in bad})}"
        )


@contextlib.contextmanager
def listing_unreadable(sets: Sequence[ImageSet], workers: int = 0) -> Iterator[None]:
    """A pass over some of `sets` that fails for its data names the images of all that cannot be decoded."""
    try:
        yield
    except DataError:
        bad = [UnreadableImage(*found) for images in sets for found in find_unreadable(images, workers)]
        raise_unreadable(bad, sum(len(images) for images in sets))
        raise


class TooManyUnreadable(DataError):
    """More images cannot be read than training bears: `bad`, name -> reason, of `total`."""

    def __init__(self, bad: Mapping[str, str], total: int) -> None:
        self.bad, self.total = dict(bad), total
        super().__init__(f"training stopped: {self.counted()}, more than run.unreadable_share allows; repair or remove "
                         f"them:\n{self.listed()}")

    def __reduce__(self) -> tuple[type[TooManyUnreadable], tuple[Mapping[str, str], int]]:
        """As it was made: exceptions cross from a worker process by pickling."""
        return type(self), (self.bad, self.total)

    def counted(self) -> str:
        """How many, in words."""
        return f"{len(self.bad):,} of {self.total:,} images cannot be read ({len(self.bad) / self.total:.2g} of all)"

    def listed(self) -> str:
        """A line each, up to a limit."""
        return _listed(self.bad)


class UnreadableBudget:
    """Counts the images that training has to skip, and ends it when they are more than `share` of all.

    An image counts once, however often it is met.
    """

    def __init__(self, total: int, share: float = 0.01) -> None:
        self.total, self.share = total, share
        self.bad: dict[str, str] = {}  # name -> reason

    @property
    def count(self) -> int:
        """How many images were unreadable so far."""
        return len(self.bad)

    def add(self, name: str, reason: str = "") -> None:
        """Count the image `name`; TooManyUnreadable when that is too many."""
        self.add_all({name: reason})

    def add_all(self, found: Mapping[str, str]) -> None:
        """Count all of `found`, name -> reason; TooManyUnreadable when that is too many."""
        self.bad |= found
        if found and self.count > self.share * self.total + 1e-9:
            raise TooManyUnreadable(self.bad, self.total)


def _listed(bad: Mapping[str, str]) -> str:
    """One line for each bad image, up to a limit."""
    lines = [f"  {name}: {reason}" if reason else f"  {name}" for name, reason in bad.items()]
    more = [f"  and {len(lines) - _MOST_LISTED:,} more"] if len(lines) > _MOST_LISTED else []
    return "\n".join(lines[:_MOST_LISTED] + more)
