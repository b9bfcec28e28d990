"""`holdout:SHARE:DATA`: the train images of DATA without a fixed share of them, and that share in the place of val.

For a search: what is chosen on the share that was held out has never looked at DATA's own val images, which are not
even opened. The draw is the same for every run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from patchssl.errors import DataError, UsageError
from patchssl.imageset import ImageSet

PREFIX = "holdout:"
_SEED = 2310


def parse_holdout(data: str) -> tuple[float, str]:
    """Share and DATA of `holdout:SHARE:DATA`; UsageError where it is not that.

    >>> parse_holdout("holdout:0.2:textures")
    (0.2, 'textures')
    """
    text, _, inner = data.removeprefix(PREFIX).partition(":")
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not (0 < share < 1 and inner):
        raise UsageError(f"'{data}' is not holdout:SHARE:DATA with a share between 0 and 1, such as "
                         "holdout:0.2:textures")
    return share, inner


def holdout_splits(openers: Mapping[str, Callable[[], ImageSet]], share: float) -> dict[str, Callable[[], ImageSet]]:
    """Train and val of `holdout:SHARE:DATA` from the `openers` of DATA's splits, of which only the first is used."""
    whole = next(iter(openers.values()))

    def part(split: str) -> ImageSet:
        images = whole()
        count = round(share * len(images))
        if not 0 < count < len(images):
            raise DataError(f"{share:g} of the {len(images)} images of {images.name} leaves one part empty")
        order = np.random.Generator(np.random.PCG64(_SEED)).permutation(len(images))
        chosen = np.sort(order[:count] if split == "val" else order[count:])
        return replace(images.subset(chosen), name=f"{images.name}-holdout", split=split)

    return {split: lambda split=split: part(split) for split in ("train", "val")}  # type: ignore[misc]
