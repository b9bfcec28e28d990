"""k-NN classification on frozen features: every neighbor votes for its class.

A vote weighs exp(similarity / temperature), as in facebookresearch/dino, eval_knn.py. One search serves
every k; sets smaller than k use all they have.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchssl.backbone import Backbone
from patchssl.data import ImageSet
from patchssl.errors import DataError, UsageError
from patchssl.eval.features import Progress, RawPixels, describe_device, extract_features
from patchssl.eval.protocols import Protocol, knn_protocol
from patchssl.eval.results import Result, library_versions, pack_bits, plain_text
from patchssl.eval.search import as_features, faiss_version, search_topk

_VOTES_AT_A_TIME = 2**22  # 32 MiB of float64

Features = Tensor | np.ndarray
Labels = Tensor | np.ndarray | Sequence[int]


class KnnScores(NamedTuple):
    """What one search says: `metrics` holds top1@k and top5@k for every k, the rest is for the headline k."""

    metrics: dict[str, float]
    correct: np.ndarray  # (Q,) bool: the first class is the right one
    class_accuracy: dict[int, float]  # label -> top-1 share, for labels that have test images


def knn_accuracy(
    train_features: Features,
    train_labels: Labels,
    test_features: Features,
    test_labels: Labels,
    *,
    num_neighbors: int,
    temperature: float = 0.07,
) -> dict[str, float]:
    """Weighted k-NN accuracy, {"top1", "top5"} as fractions.

    Features (N, D) and (Q, D) are L2-normalized here; labels are integers, (N,) and (Q,). Fewer than
    `num_neighbors` training images: all of them vote. "top5": the right class is among the first
    min(5, neighbors, classes). Classes with equal votes, also those without any, follow in ascending order:
    DINO's function with a stable sort. With few classes among the neighbors, where DINO's own sort orders the
    classes without votes as it happens, its top-5 differs by such lucky hits.
    """
    scores = knn_scores(
        train_features, train_labels, test_features, test_labels, ks=(num_neighbors,), temperature=temperature
    )
    return {name: scores.metrics[f"{name}@{num_neighbors}"] for name in ("top1", "top5")}


def knn_scores(
    train_features: Features,
    train_labels: Labels,
    test_features: Features,
    test_labels: Labels,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    headline_k: int | None = None,
    device: str | torch.device = "cpu",
    backend: str = "auto",
) -> KnnScores:
    """As `knn_accuracy` for all `ks` by one search; `headline_k` (default: the first) gets the detail."""
    headline = min(ks[:1], default=0) if headline_k is None else headline_k
    if not ks or min(ks) < 1 or headline not in ks:
        raise UsageError(f"k = {list(ks)} with headline {headline}: every k is 1 or more, the headline one of them")
    if not temperature > 0:
        raise UsageError(f"a temperature of {temperature} gives no vote; it must be above 0")
    database, queries = as_features(train_features, "training"), as_features(test_features, "test")
    known, labels = _as_labels(train_labels, len(database), "training").unique(return_inverse=True)
    asked = _as_labels(test_labels, len(queries), "test")
    targets = torch.where(torch.isin(asked, known), torch.searchsorted(known, asked), -1)
    similarities, ids = search_topk(
        F.normalize(database), F.normalize(queries), max(ks), device=device, backend=backend
    )
    ranks = _true_ranks(similarities, labels[ids], targets, len(known), sorted(set(ks)), temperature)
    metrics = {}
    for k, rank in ranks.items():
        metrics[f"top1@{k}"] = float((rank < 1).double().mean())
        metrics[f"top5@{k}"] = float((rank < min(5, k, len(database), len(known))).double().mean())
    correct = (ranks[headline] < 1).numpy()
    asked_for = asked.numpy()
    accuracy = {int(label): float(correct[asked_for == label].mean()) for label in np.unique(asked_for)}
    return KnnScores(metrics, correct, accuracy)


def evaluate_knn(
    backbone: Backbone,
    train: ImageSet,
    val: ImageSet,
    protocol: str | None = None,
    *,
    device: str | torch.device | None = None,
    batch_size: int = 64,
    workers: int = 0,
    progress: Progress | None = None,
) -> Result:
    """The k-NN record of `backbone`: `val` classified by `train` under `protocol` (None: the default).

    `train` and `val` share their class ids, as from `open_pair`. The network runs where it is, or moves to
    `device`. Raises UsageError for an unknown protocol, DataError for sets without labels or with bad images.
    """
    began = time.monotonic()
    plan = knn_protocol(protocol, backbone.image_size)
    train_labels, val_labels = _labels_of_both(train, val)
    where = backbone.device if device is None else torch.device(device)
    parts, done = [], 0
    for images in (train, val):
        shown = None if progress is None else _shifted(progress, done, len(train) + len(val))
        options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "device": where}
        parts.append(extract_features(backbone, images, plan, progress=shown, **options))
        done += len(images)
    settings = plan.settings
    scores = knn_scores(
        parts[0],
        train_labels,
        parts[1],
        val_labels,
        ks=settings["ks"],
        temperature=settings["temperature"],
        headline_k=settings["headline_k"],
        device=where,
    )
    return _record(backbone, train, val, plan, scores, describe_device(where), time.monotonic() - began)


def evaluate_pixels(
    train: ImageSet, val: ImageSet, image_size: int | None = None, *, progress: Progress | None = None
) -> Result:
    """The k-NN record of raw pixels under `native` at `image_size` pixels: the row that needs no network.

    Default size: the short side of the first training image, at most 64, so that it all fits into memory.
    """
    if image_size is None:
        if not len(train):
            raise DataError(f"{train.name} holds no training images")
        image_size = min(64, *train.pixels(0).shape[:2])
    return evaluate_knn(RawPixels(image_size), train, val, "native", progress=progress)


def _labels_of_both(train: ImageSet, val: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """Labels that mean the same in both sets; DataError where there are none, or two meanings."""
    labels = train.require_labels(), val.require_labels()
    if train.classes != val.classes:
        raise DataError(
            f"the {len(train.classes)} classes of {train.source} are not the {len(val.classes)} of "
            f"{val.source}, so their labels mean different things; open both with patchssl.data.open_pair"
        )
    return labels


def _as_labels(labels: Labels, count: int, what: str) -> Tensor:
    tensor = torch.as_tensor(labels).cpu()
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

    `similarities` and `neighbor_labels` (Q, K) are sorted by similarity, `targets` (Q,) are -1 where unknown.
    """
    rows = max(1, _VOTES_AT_A_TIME // num_classes)
    places: dict[int, list[Tensor]] = {k: [] for k in ks}
    for near, labels, true in zip(
        similarities.split(rows), neighbor_labels.split(rows), targets.split(rows), strict=True
    ):
        # the nearest weighs 1: the same ratios, and no overflow at any temperature
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


def _shifted(progress: Progress, before: int, total: int) -> Progress:
    """`progress` of one part as progress of the whole."""
    return lambda done, _: progress(before + done, total)


def _record(
    backbone: Backbone,
    train: ImageSet,
    val: ImageSet,
    protocol: Protocol,
    scores: KnnScores,
    device: str,
    duration: float,
) -> Result:
    both = f"{train.fingerprint} {val.fingerprint}"
    return Result(
        model=plain_text(backbone.name),
        method=backbone.method,
        arch=backbone.arch,
        weights_sha256=backbone.weights_sha256,
        pretrain_data=backbone.pretrain_data,
        pretrain_epochs=backbone.pretrain_epochs,
        task=protocol.task,
        dataset=plain_text(val.name),
        dataset_fingerprint=hashlib.sha256(both.encode()).hexdigest(),
        protocol=protocol.name,
        protocol_version=protocol.version,
        protocol_settings=protocol.plain_settings(),
        protocol_fingerprint=protocol.fingerprint,
        metrics=scores.metrics,
        detail=_detail(train, val, protocol, scores),
        seed=backbone.seed,
        versions={**library_versions(), "faiss": faiss_version()},
        device=device,
        duration=duration,
    )


def _detail(train: ImageSet, val: ImageSet, protocol: Protocol, scores: KnnScores) -> dict[str, Any]:
    names = train.classes
    return {
        "num_train": len(train),
        "num_test": len(val),
        "train_fingerprint": train.fingerprint,
        "test_fingerprint": val.fingerprint,
        "class_accuracy": {plain_text(names[label]): share for label, share in scores.class_accuracy.items()},
        # one bit per test image, see results.unpack_bits: for a paired bootstrap between models
        "correct": {f"top1@{protocol.settings['headline_k']}": pack_bits(scores.correct)},
    }
