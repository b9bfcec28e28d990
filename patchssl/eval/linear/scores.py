"""What the linear probes share: labels, the split held out of train, standardized features, and how logits are scored.

A probe hands back logits of the test images; their labels are met here alone, after everything was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchssl.data.images import ImageSet, labels_of_both
from patchssl.eval.knn import FIVE
from patchssl.eval.metrics import wilson_interval
from patchssl.runtime.errors import DataError, NotFiniteError
from patchssl.runtime.text import shortened

_ROWS = 4096  # images at a time
_HOLD_OUT_STREAM, _SHUFFLE_STREAM = 0, 1  # kinds of draws from one seed


class ProbeOutcome(NamedTuple):
    """What a probe says of the test images, and how it came about."""

    logits: Tensor  # (Q, C) float32 on the CPU; -inf for a class without training images
    detail: dict[str, Any]  # plain JSON: what was chosen, and by what


class LinearScores(NamedTuple):
    """`metrics` holds top1, and top5 where there are more than five classes; `intervals` their 95 % intervals."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    correct: np.ndarray  # (Q,) bool: the first class is the right one
    class_accuracy: dict[int, float]  # label -> top-1 share, for labels that have test images


def require_classes(train: ImageSet, val: ImageSet) -> tuple[Tensor, Tensor]:
    """Labels (N,) and (Q,) int64 that mean the same in both sets.

    DataError where there are none, or two meanings, or one class only.
    """
    labels = labels_of_both(train, val)
    if len(np.unique(labels[0])) < 2:
        raise DataError(f"{train.describe()}, and its images show one of them only: there is nothing to tell apart")
    return torch.as_tensor(labels[0], dtype=torch.int64), torch.as_tensor(labels[1], dtype=torch.int64)


def score_logits(logits: Tensor, labels: Tensor) -> LinearScores:
    """Accuracy of `logits` (Q, C) for `labels` (Q,).

    Classes of equal logits follow in ascending order, as in k-NN. With five classes or fewer, not counting those
    without training images, the right one is always among five: there is no "top5". The intervals are Wilson's, for
    independent images; what was chosen by these very images they do not cover.
    """
    ranks = true_ranks(logits, labels)
    correct, asked = (ranks < 1).numpy(), labels.numpy()
    hits = {name: int((ranks < k).sum()) for name, k in headline_ranks(logits).items()}
    return LinearScores(
        metrics={name: count / len(labels) for name, count in hits.items()},
        intervals={name: wilson_interval(count, len(labels)) for name, count in hits.items()},
        correct=correct,
        class_accuracy={int(label): float(correct[asked == label].mean()) for label in np.unique(asked)},
    )


def headline_ranks(logits: Tensor) -> dict[str, int]:
    """How many first classes the metrics of `logits` (Q, C) look at, by their names: top1, and top5 where it says more.
    """
    possible = int((logits > -math.inf).any(dim=0).sum())
    return {"top1": 1, "top5": FIVE} if possible > FIVE else {"top1": 1}


def true_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """The places (Q,) of the true classes among `logits` (Q, C), 0 being first; NotFiniteError for NaN and +inf."""
    places = []
    for rows, true in zip(logits.split(_ROWS), labels.split(_ROWS), strict=True):
        if not (rows < math.inf).all():
            raise NotFiniteError("the probe gives logits that are not finite: its training has diverged")
        own = rows.gather(1, true.unsqueeze(1))
        lower = torch.arange(rows.shape[1], device=rows.device) < true.unsqueeze(1)
        places.append(((rows > own) | ((rows == own) & lower)).sum(dim=1))
    return torch.cat(places).cpu()


def hold_out(labels: Tensor, share: float, seed: int, classes: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Indices to fit on and indices held out, both ascending: `share` of every class, drawn by `seed`.

    At least one image of a class is held out and one is kept. DataError names the classes that have one image only.
    """
    require_two_of_each(labels, classes)
    order = _rng(seed, _HOLD_OUT_STREAM).permutation(len(labels))
    shuffled = labels.numpy()[order]
    counts = np.bincount(shuffled, minlength=len(classes))
    quota = np.where(counts > 0, np.clip(np.round(share * counts), 1, counts - 1), 0).astype(np.int64)
    by_class = np.argsort(shuffled, kind="stable")
    within = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # place among its own class
    held = within < quota[shuffled[by_class]]
    return tuple(torch.from_numpy(np.sort(order[by_class[part]])) for part in (~held, held))  # type: ignore[return-value]


def require_two_of_each(labels: Tensor, classes: tuple[str, ...]) -> None:
    """DataError with the classes that `labels` (N,) have one image of; a class without any does no harm."""
    counts = np.bincount(labels.numpy(), minlength=len(classes))
    if len(single := np.flatnonzero(counts == 1)):
        named = shortened([classes[label] for label in single], 5)
        raise DataError(
            f"{len(single):,} of {len(classes):,} classes have one training image only: {named}; every class needs "
            "two, one to train on and one held out to choose by. Add images, leave these classes out, or use the "
            "protocol dino, which holds none out"
        )


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order (count,) in which an epoch over features meets its images."""
    return torch.from_numpy(_rng(seed, _SHUFFLE_STREAM, epoch).permutation(count))


def _rng(seed: int, *stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *stream])))


class Scaling(NamedTuple):
    """Features minus their mean, over their standard deviation, both (D,) float32; what is constant becomes 0."""

    mean: Tensor
    factor: Tensor

    @classmethod
    def fit(cls, features: Tensor, indices: Tensor) -> Scaling:
        """From the rows `indices` of `features` (N, D), summed in float64."""
        total, squares = torch.zeros(2, features.shape[1], dtype=torch.float64, device=features.device)
        for rows in indices.split(_ROWS):
            total += features[rows].sum(dim=0, dtype=torch.float64)
        mean = total / len(indices)
        for rows in indices.split(_ROWS):
            squares += (features[rows].double() - mean).square().sum(dim=0)
        deviation = (squares / len(indices)).sqrt()
        varies = deviation > 1e-6 * (mean.abs() + deviation)
        factor = torch.where(varies, 1 / deviation.where(varies, torch.ones_like(deviation)), 0)
        return cls(mean.float(), factor.float())

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) * self.factor

    def to(self, device: torch.device) -> Scaling:
        return Scaling(self.mean.to(device), self.factor.to(device))


def best_of(accuracy: Tensor, loss: Tensor) -> int:
    """Which of P probes is best on the images held out: the most accurate, of equal ones the one of least loss.

    `accuracy` and `loss` (P,); the first of those equal in both. NotFiniteError when no loss is finite.
    """
    usable = loss.isfinite()
    if not usable.any():
        raise NotFiniteError("none of the probes has a finite loss on the images held out: all of them diverged")
    top = accuracy.masked_fill(~usable, -1.0)
    return int(loss.masked_fill(top < top.max(), math.inf).argmin())


def join_outputs(found: Mapping[str, Tensor]) -> Tensor:
    """All outputs of a pass side by side (N, sum of D); a single one as it is."""
    parts = list(found.values())
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
