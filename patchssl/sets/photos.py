"""Photographs on their way into a synthetic set: found, read, scaled down, told apart, and written beside the goal."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from patchssl.data.decode import decode_image, left_out, list_images, strict_pillow
from patchssl.runtime.errors import DataError, UnreadableImage, UsageError
from patchssl.runtime.lock import locked
from patchssl.runtime.progress import Steps

LEAST_SIDE = 64  # pixels of the short side: below, a quarter of it shows nothing
QUALITY = 92  # of the JPEG files that are written
_THUMBNAIL = 16
_EXTRA = ("distractors", "whitening")  # kinds of photographs that have no copies
_ALIKE, _FLAT = 2.0, 1.0  # gray levels between two thumbnails; across one
T = TypeVar("T")
U = TypeVar("U")


class PhotoFolder(NamedTuple):
    """Photographs below a folder."""

    root: Path
    names: list[str]


def find_photographs(folder: Path) -> PhotoFolder:
    """The photographs in `folder`; DataError when there are none."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: give one that holds photographs")
    listing = list_images(folder)
    if not listing.names:
        seen = f" ({left_out(listing.others)})" if listing.others else ""
        raise DataError(f"{folder} holds no photograph{seen}")
    return PhotoFolder(folder, listing.names)


class Intake:
    """Photographs on their way into a set: read, scaled down, told apart and written."""

    def __init__(self, size: int | None, workers: int, steps: Steps) -> None:
        self.left_out: dict[str, str] = {}
        self._bad: list[UnreadableImage] = []
        self._size, self._workers, self._steps = size, workers, steps
        self._means = np.empty((0, 3))  # colors of the photographs that were taken
        self._thumbnails: list[np.ndarray] = []
        self._seen: list[str] = []

    def take(
        self, kind: str, source: PhotoFolder, folder: Path, first: int, stem: str, *, distinct: bool = True
    ) -> dict[str, str]:
        """Write the photographs that can serve into `folder`; their stems there and their own names.

        Stems are `stem` formatted with the numbers from `first`. With `distinct` none may look like one that
        was taken before. `kind` is what they are for: "original", "jpg", "distractors" or "whitening".
        """
        folder.mkdir(parents=True)
        taken: dict[str, str] = {}

        def use(read: tuple[str, Image.Image | UnreadableImage]) -> None:
            name, image = read
            self._steps.one()
            if isinstance(image, UnreadableImage):
                self._bad.append(image)
            elif reason := self._unfit(name, image, distinct):
                self.left_out[f"{kind}: {name}" if kind in _EXTRA else name] = reason
            else:
                numbered = stem.format(first + len(taken))
                image.save(folder / f"{numbered}.jpg", "JPEG", quality=QUALITY)
                taken[numbered] = name

        in_order(partial(_read, source.root, self._size), source.names, self._workers, use)
        return taken

    def require(self, taken: Mapping[str, Mapping[str, str]], sources: Mapping[str, PhotoFolder]) -> None:
        """DataError for what could not be read, and for too few photographs of a kind."""
        if self._bad:
            total = sum(len(source.names) for source in sources.values())
            listed = "\n".join(f"  {error.name}: {error.reason}" for error in self._bad)
            raise DataError(f"{len(self._bad):,} of {total:,} photographs cannot be read, so no set is made; repair or "
                            f"remove them:\n{listed}")
        for kind, names in taken.items():
            if len(names) < (least := 1 if kind in _EXTRA else 2):
                reasons = "".join(f"\n  {name}: {reason}" for name, reason in self.left_out.items())
                purpose = f" as {kind}" if kind in _EXTRA else ""
                raise DataError(f"{sources[kind].root} holds {len(names)} of the {least} or more photographs that are "
                                f"needed{purpose}{'; skipped:' if reasons else ''}{reasons}")

    def _unfit(self, name: str, image: Image.Image, distinct: bool) -> str | None:
        """Why an image cannot serve; one that can is remembered."""
        if min(image.size) < LEAST_SIDE:
            return f"{image.width} x {image.height} pixels are too few"
        pixels = np.asarray(image.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX), dtype=np.int16)
        if np.ptp(pixels.reshape(-1, 3), axis=0).max() < _FLAT:
            return "one color"
        if not distinct:
            return None
        mean = pixels.mean(axis=(0, 1))
        # means are at most as far apart as the pixels are on average: few others need a closer look
        for index in np.flatnonzero(np.abs(self._means - mean).mean(axis=1) < _ALIKE):
            if np.abs(self._thumbnails[index] - pixels).mean() < _ALIKE:
                return f"looks like {self._seen[index]}"
        self._means = np.concatenate([self._means, mean[None]])
        self._thumbnails.append(pixels)
        self._seen.append(name)
        return None


def _read(root: Path, size: int | None, name: str) -> tuple[str, Image.Image | UnreadableImage]:
    """A photograph upright and scaled down to `size`, or why it cannot be read."""
    try:
        image = Image.fromarray(decode_image(root / name))
    except UnreadableImage as error:
        return name, error
    if size is not None:
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
    return name, image


def in_order(work: Callable[[T], U], items: Sequence[T], workers: int, use: Callable[[U], object]) -> None:
    """`use(work(item))` for every item, in order; `work` runs in `workers` threads, a few items ahead."""
    with strict_pillow(), ThreadPoolExecutor(workers) as pool:
        try:
            for start in range(0, len(items), 4 * workers):
                for result in pool.map(work, items[start : start + 4 * workers]):
                    use(result)
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, the rest is not worth waiting for


@contextmanager
def staged_folder(out: Path, sources: Iterable[PhotoFolder]) -> Iterator[Path]:
    """A folder OUT.partial that becomes `out` when all went well, and is gone otherwise."""
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} is there and not empty: choose another place, or remove it first")
    for source in sources:
        if out.resolve().is_relative_to(source.root.resolve()):
            raise UsageError(f"{out} lies inside {source.root}, whose photographs are asked for: choose a place "
                             "outside of it")
    stage = out.with_name(f"{out.name}.partial")
    with locked(out.parent, "wait for it to end, or choose another --out", file=f".{out.name}.lock"):
        try:
            stage.mkdir(parents=True)
        except FileExistsError:
            raise UsageError(f"{stage} is what a run left that was killed: remove it first, or choose another "
                             "place") from None
        try:
            yield stage
            if out.exists():
                out.rmdir()
            stage.rename(out)
        except BaseException:  # Ctrl-C too
            shutil.rmtree(stage, ignore_errors=True)
            raise
