"""Few-shot draws: the same few training images per class for every network, by dataset and seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchssl.data.images import ImageSet
from patchssl.runtime.errors import DataError, UsageError

_NAMED = 5  # classes in a message


@dataclass(frozen=True)
class FewShot:
    """`shots` training images per class, for several numbers of them, drawn `draws` times each; UsageError names
    what is out of range.
    """

    shots: tuple[int, ...] = ()
    draws: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shots", tuple(sorted(set(self.shots))))
        if min(self.shots, default=1) < 1 or self.draws < 1 or self.seed < 0:
            raise UsageError(f"{self.draws} draws of {list(self.shots)} images per class with seed {self.seed}: images "
                             "and draws are 1 or more, the seed 0 or more")

    def settings(self) -> dict[str, Any]:
        """What a protocol's record holds of it; nothing where nothing is drawn."""
        return {"shots": list(self.shots), "draws": self.draws, "draw_seed": self.seed} if self.shots else {}

    def require_images(self, train: ImageSet) -> None:
        """DataError, naming the classes, where `train` has fewer images of a class than a draw takes."""
        most = max(self.shots, default=0)
        counts = np.bincount(train.require_labels(), minlength=len(train.classes))
        few = [f"'{train.classes[label]}' {counts[label]}" for label in np.flatnonzero(counts < most)]
        if few:
            more = f" and {len(few) - _NAMED} more" if len(few) > _NAMED else ""
            raise DataError(f"{most} training images per class are to be drawn, and {len(few)} of the "
                            f"{len(train.classes)} classes of {train.source} have fewer: "
                            f"{', '.join(few[:_NAMED])}{more}; ask for fewer shots, or add images")

    def images(self, labels: Sequence[int] | np.ndarray, count: int, draw: int) -> np.ndarray:
        """Ids, ascending, of `count` images of every class of `labels` (N,) in the draw number `draw`.

        A draw of more images holds that of fewer.
        """
        labels = np.asarray(labels)
        order = np.lexsort((np.random.default_rng((self.seed, draw)).random(len(labels)), labels))
        place = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])  # within the class
        return np.sort(order[place < count])
