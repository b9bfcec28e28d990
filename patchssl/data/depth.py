"""Images of 16 bits a channel that hold fewer: microscopes and X-ray detectors write 12 or 14 bits as they are.

Read by the range of their file they become 16 or 64 of 256 gray levels. A scale guessed image by image would be no
fixed scale, so nothing is guessed: some images of a set are looked at, and a sentence says what to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from patchssl.runtime.errors import UnreadableImage

if TYPE_CHECKING:
    from patchssl.data.images import ImageSet

ImageSetT = TypeVar("ImageSetT", bound="ImageSet")

LOWEST_WHITE = 2**14  # what never reaches it holds fewer bits than 16, or is dark
_DEEP = (".png", ".tif", ".tiff", ".pgm", ".ppm", ".pnm", ".jp2", ".j2k")  # what may have 16 bits a channel
_LOOKED_AT = 8  # images of a set
_brightest: ContextVar[list[int] | None] = ContextVar("brightest", default=None)


def note_brightest(value: int) -> None:
    """Tell whoever watches the largest value, of 65,535, of an image with 16 bits a channel that was decoded."""
    if (found := _brightest.get()) is not None:
        found.append(value)


@contextmanager
def _watched() -> Iterator[list[int]]:
    """A list that gets what `note_brightest` is told inside."""
    found: list[int] = []
    token = _brightest.set(found)
    try:
        yield found
    finally:
        _brightest.reset(token)


def depth_note(brightest: Sequence[int]) -> str:
    """What is said where 16-bit images have `brightest` values, "" where they fill their range or are not there.

    >>> depth_note([65535, 900]), depth_note([])
    ('', '')
    """
    if not brightest or (most := max(brightest)) >= LOWEST_WHITE:
        return ""
    bits = max(8, most.bit_length())
    return (f"the brightest value in {len(brightest)} of the 16-bit images is {most:,} of 65,535: if they hold "
            f"{bits} bits, they are read as {round(most / 257) + 1} of 256 levels; multiply their values by "
            f"{2 ** (16 - bits)} and save them again")


def with_depth_note(images: ImageSetT) -> ImageSetT:
    """`images` with `depth_note` of some of them, spread over the set; sets of arrays have 8 bits and are not read."""
    with _watched() as brightest:
        for index in np.unique(np.linspace(0, len(images) - 1, _LOOKED_AT).astype(int)).tolist():
            name = images.item_name(index).lower()
            if name.endswith(_DEEP) or name.startswith("row "):  # of a table, whose rows say no format
                with suppress(UnreadableImage):
                    images.pixels(index)
    note = depth_note(brightest)
    return replace(images, note="; ".join(filter(None, (images.note, note)))) if note else images
