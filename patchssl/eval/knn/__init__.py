"""k-NN classification on frozen features: a vote of the nearest training images, as facebookresearch/dino's.

Pure functions of features and labels; `task` runs them on a network and a set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchssl.eval.database import Features, as_features, require_norms
from patchssl.eval.search import Neighbors, find_neighbors
from patchssl.runtime.errors import DataError, UsageError

_VOTES_AT_A_TIME = 2**22  # 32 MiB of float64

FIVE = 5  # classes that a top-5 looks at

Labels = Tensor | np.ndarray | Sequence[int]


@dataclass(frozen=True)
class KnnScores:
    """What one search says: `metrics` holds top1@k for every k, and top5@k where there are more than five classes,
    `correct` and `class_accuracy` are for the headline k.
    """

    metrics: dict[str, float]
    correct: np.ndarray  # (Q,) bool: the first class is the right one
    class_accuracy: dict[int, float]  # label -> top-1 share, for labels that have test images
    neighbors: Neighbors


def knn_accuracy(
    train_features: Features,
    train_labels: Labels,
    test_features: Features,
    test_labels: Labels,
    *,
    num_neighbors: int,
    temperature: float = 0.07,
) -> dict[str, float]:
    """Weighted k-NN accuracy, {"top1", "top5"} as fractions; of fewer than six classes "top1" alone.

    Features (N, D) and (Q, D) are L2-normalized here; labels are integers, (N,) and (Q,). Fewer than
    `num_neighbors` training images: all of them vote. "top5": the right class is among the first min(5, neighbors).
    Classes with equal votes, also those without any, follow in ascending order:
    DINO's function with a stable sort. With few classes among the neighbors, where DINO's own sort orders the
    classes without votes as it happens, its top-5 differs by such lucky hits.
    """
    scores = knn_scores(
        train_features, train_labels, test_features, test_labels, ks=(num_neighbors,), temperature=temperature
    )
    return {name.partition("@")[0]: share for name, share in scores.metrics.items()}


def knn_scores(
    train_features: Features,
    train_labels: Labels,
    test_features: Features,
    test_labels: Labels,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    headline_k: int | None = None,
    **search: Any,
) -> KnnScores:
    """As `knn_accuracy` for all `ks` by one search; `headline_k` (default: the first) gets the detail.

    `search` are options of `find_neighbors`: device, backend, index, progress... What an approximate index does not
    find has no vote, and an image without any neighbor is never right.
    """
    headline = min(ks[:1], default=0) if headline_k is None else headline_k
    if not ks or min(ks) < 1 or headline not in ks:
        raise UsageError(f"k = {list(ks)} with headline {headline}: every k is 1 or more, the headline one of them")
    if not temperature > 0:
        raise UsageError(f"a temperature of {temperature} gives no vote; it must be above 0")
    database, queries = as_features(train_features, "training"), as_features(test_features, "test")
    for part, what in ((database, "training features"), (queries, "test features")):
        require_norms(part, what)
    known, labels = _as_labels(train_labels, len(database), "training").unique(return_inverse=True)
    asked = _as_labels(test_labels, len(queries), "test")
    targets = torch.where(torch.isin(asked, known), torch.searchsorted(known, asked), -1)
    near = find_neighbors(database, queries, max(ks), cosine=True, recall_at=ks, **search)
    targets[near.ids[:, 0] < 0] = -1
    votes = labels[near.ids.clamp(min=0)]
    ranks = _true_ranks(near.similarities, votes, targets, len(known), sorted(set(ks)), temperature)
    metrics = {}
    for k, rank in ranks.items():
        metrics[f"top1@{k}"] = float((rank < 1).double().mean())
        if len(known) > FIVE:  # else the right class is always among five
            metrics[f"top5@{k}"] = float((rank < min(FIVE, k, len(database))).double().mean())
    correct = (ranks[headline] < 1).numpy()
    asked_for = asked.numpy()
    accuracy = {int(label): float(correct[asked_for == label].mean()) for label in np.unique(asked_for)}
    return KnnScores(metrics, correct, accuracy, near)


def _as_labels(labels: Labels, count: int, what: str) -> Tensor:
    found = labels.numpy(force=True) if isinstance(labels, Tensor) else np.asarray(labels)
    if found.dtype.kind in "USO":
        raise DataError(f"the {what} labels are words or objects, {found.ravel()[:1].tolist()} first; {count} integers "
                        "are needed, one per image and the same for a class in both sets: number the classes")
    tensor = torch.from_numpy(found.astype(found.dtype.newbyteorder("="), order="C"))  # whatever its strides
    if tensor.shape != (count,) or tensor.is_floating_point() or tensor.is_complex():
        raise DataError(
            f"the {what} labels are {tensor.dtype} of shape {tuple(tensor.shape)}; {count} integers are "
            "needed, one per image"
        )
    return tensor.to(torch.int64)


def _true_ranks(
    similarities: Tensor,
    neighbor_labels: Tensor,
    targets: Tensor,
    num_classes: int,
    ks: Sequence[int],
    temperature: float,
) -> dict[int, Tensor]:
    """For every k (ascending) the places (Q,) of the true classes: 0 is first, `num_classes` is unknown.

    `similarities` and `neighbor_labels` (Q, K) are sorted by similarity, `targets` (Q,) are -1 where unknown or
    where nothing was found.
    """
    rows = max(1, _VOTES_AT_A_TIME // num_classes)
    places: dict[int, list[Tensor]] = {k: [] for k in ks}
    for near, labels, true in zip(
        similarities.split(rows), neighbor_labels.split(rows), targets.split(rows), strict=True
    ):
        # the nearest weighs 1: the same ratios, and no overflow at any temperature; what was not found weighs 0
        weights = ((near - near[:, :1]).double() / temperature).exp()
        votes = torch.zeros(len(near), num_classes, dtype=torch.float64)
        start = 0
        for k in ks:
            votes.scatter_add_(1, labels[:, start:k], weights[:, start:k])
            places[k].append(_place(votes, true))
            start = k
    return {k: torch.cat(blocks) for k, blocks in places.items()}


def _place(votes: Tensor, true: Tensor) -> Tensor:
    """How many classes come before the class `true` (Q,): more votes, or as many and a lower id."""
    own = votes.gather(1, true.clamp(min=0).unsqueeze(1))
    lower = torch.arange(votes.shape[1]) < true.unsqueeze(1)
    before = ((votes > own) | ((votes == own) & lower)).sum(dim=1)
    return torch.where(true < 0, votes.shape[1], before)
