"""k-NN classification on frozen features: every neighbor votes for its class.

A vote weighs exp(similarity / temperature), as in facebookresearch/dino, eval_knn.py. One search serves
every k; sets smaller than k use all they have. The few-shot variant takes the vote of a few training images per
class, drawn several times.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchssl.data.images import ArrayImages, ImageSet
from patchssl.data.unreadable import listing_unreadable, require_readable
from patchssl.eval.cache import FeatureCache
from patchssl.eval.faiss import IndexPlan
from patchssl.eval.features import extract_features
from patchssl.eval.protocols import Protocol, knn_protocol
from patchssl.eval.records import Result, make_record, pack_bits, plain_text
from patchssl.eval.search import Features, Neighbors, as_features, find_neighbors, require_index
from patchssl.models.backbone import Backbone
from patchssl.models.pixels import RawPixels
from patchssl.runtime.device import describe_device
from patchssl.runtime.errors import DataError, UsageError
from patchssl.runtime.progress import Progress, shifted

_VOTES_AT_A_TIME = 2**22  # 32 MiB of float64

Labels = Tensor | np.ndarray | Sequence[int]


@dataclass(frozen=True)
class KnnScores:
    """What one search says: `metrics` holds top1@k and top5@k for every k, `correct` and `class_accuracy` are for
    the headline k.
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
    known, labels = _as_labels(train_labels, len(database), "training").unique(return_inverse=True)
    asked = _as_labels(test_labels, len(queries), "test")
    targets = torch.where(torch.isin(asked, known), torch.searchsorted(known, asked), -1)
    near = find_neighbors(F.normalize(database), F.normalize(queries), max(ks), recall_at=ks, **search)
    targets[near.ids[:, 0] < 0] = -1
    votes = labels[near.ids.clamp(min=0)]
    ranks = _true_ranks(near.similarities, votes, targets, len(known), sorted(set(ks)), temperature)
    metrics = {}
    for k, rank in ranks.items():
        metrics[f"top1@{k}"] = float((rank < 1).double().mean())
        metrics[f"top5@{k}"] = float((rank < min(5, k, len(database), len(known))).double().mean())
    correct = (ranks[headline] < 1).numpy()
    asked_for = asked.numpy()
    accuracy = {int(label): float(correct[asked_for == label].mean()) for label in np.unique(asked_for)}
    return KnnScores(metrics, correct, accuracy, near)


def evaluate_knn(
    backbone: Backbone,
    train: ImageSet,
    val: ImageSet,
    protocol: str | None = None,
    *,
    shots: Sequence[int] = (),
    draws: int = 5,
    seed: int = 0,
    index: str = "Flat",
    search_params: str = "",
    gpus: str = "one",
    device: str | torch.device | None = None,
    batch_size: int = 64,
    workers: int = 0,
    progress: Progress | None = None,
    check_progress: Progress | None = None,
    looked_at: bool = False,
    search_progress: Progress | None = None,
    cache: FeatureCache | None = None,
) -> Result:
    """The k-NN record of `backbone`: `val` classified by `train` under `protocol` (None: the default).

    `train` and `val` share their class ids, as from `open_pair`. The network runs where it is, or moves to
    `device`. Raises UsageError for an unknown protocol, DataError for sets without labels or with bad images.

    For every number n of `shots`, fewshotn/top1@k is the mean over `draws` draws of n training images per class, k
    being the protocol's headline k or all drawn images if they are fewer; `seed` draws the images, the same for
    every network. DataError names classes with fewer than n images. `index`, `search_params` and `gpus` as in
    `find_neighbors`; few-shot searches are exact whatever the index. Both variants change the protocol's name and
    fingerprint, so that the plain record keeps its own. `progress` counts images, `search_progress` what is searched,
    `check_progress` the files looked at before, which are not where they were `looked_at` already.
    """
    began = time.monotonic()
    few, search = FewShot(tuple(shots), draws, seed), IndexPlan(index, search_params, gpus, seed)
    plan = variant(knn_protocol(protocol, backbone.image_size), few, search)
    train_labels, val_labels = _labels_of_both(train, val)
    few.require_images(train)
    where = backbone.device if device is None else torch.device(device)
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "device": where}
    if not search.exact:
        black = ArrayImages(name="black", split="all", source="a black image",
                            array=np.zeros((1, 32, 32), dtype=np.uint8), ids=np.zeros(1, dtype=np.int64))
        require_index(search, len(train), extract_features(backbone, black, plan, **options).shape[1])
    if not looked_at:
        require_readable((train, val), workers, check_progress)
    features = _features_of_both(train, val, progress, backbone=backbone, transform=plan, cache=cache, **options)
    case = _Case(features[0], train_labels, features[1], val_labels, plan.settings["temperature"])
    k = plan.settings["headline_k"]
    scores = case.scores(ks=plan.settings["ks"], headline_k=k, device=where, progress=search_progress,
                         **asdict(search))
    few_metrics, few_detail = _few_shot(case, few, k, device=where, gpus=gpus, progress=search_progress)
    return make_record(backbone, plan, dataset=val.name, fingerprints=(train.fingerprint, val.fingerprint),
                       metrics=scores.metrics | few_metrics, detail=_detail(train, val, plan, scores) | few_detail,
                       device=describe_device(where), duration=time.monotonic() - began)


def evaluate_pixels(train: ImageSet, val: ImageSet, image_size: int | None = None, **options: Any) -> Result:
    """The k-NN record of raw pixels under `native` at `image_size` pixels: the row that needs no network.

    Default size: the short side of the first training image, at most 64, so that it all fits into memory.
    `options` as in `evaluate_knn`.
    """
    if image_size is None:
        if not len(train):
            raise DataError(f"{train.name} holds no training images")
        image_size = min(64, *train.pixels(0).shape[:2])
    return evaluate_knn(RawPixels(image_size), train, val, "native", **options)


def variant(plan: Protocol, few: FewShot, search: IndexPlan) -> Protocol:
    """`plan` with the settings of few-shot draws and of an approximate index, under a name that says so.

    `plan` itself where neither is asked for. How many GPUs search does not move a number.
    """
    settings, name = few.settings(), plan.name + ("-fewshot" if few.shots else "")
    if not search.exact:
        settings |= {"index": search.index, "search_params": search.search_params, "index_seed": search.seed}
        name = "-".join(filter(None, (name, search.index, search.search_params)))
    return Protocol(plan.task, name, plan.version, {**plan.settings, **settings}) if settings else plan


@dataclass(frozen=True)
class _Case:
    """Features and labels of both sets."""

    train_features: Tensor
    train_labels: np.ndarray
    test_features: Tensor
    test_labels: np.ndarray
    temperature: float

    def scores(self, **options: Any) -> KnnScores:
        return knn_scores(self.train_features, self.train_labels, self.test_features, self.test_labels,
                          temperature=self.temperature, **options)

    def subset(self, ids: np.ndarray) -> _Case:
        """With the training images `ids` alone."""
        return replace(self, train_features=self.train_features[ids], train_labels=self.train_labels[ids])


def _features_of_both(train: ImageSet, val: ImageSet, progress: Progress | None, **options: Any) -> list[Tensor]:
    parts, done = [], 0
    for images in (train, val):
        shown = None if progress is None else shifted(progress, done, len(train) + len(val))
        with listing_unreadable((train, val), options["workers"]):
            parts.append(extract_features(images=images, progress=shown, **options))
        done += len(images)
    return parts


def _few_shot(case: _Case, few: FewShot, k: int, *, progress: Progress | None,
              **search: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """Means over the draws by metric, and the detail: each draw's value and their deviation (of a sample)."""
    metrics, detail, done = {}, {}, 0
    total = len(few.shots) * few.draws * len(case.test_labels)
    for count in few.shots:
        values = []
        for draw in range(few.draws):
            drawn = case.subset(few.images(case.train_labels, count, draw))
            shown = None if progress is None else shifted(progress, done, total)
            values.append(drawn.scores(ks=(k,), progress=shown, **search).metrics[f"top1@{k}"])
            done += len(case.test_labels)
        key = f"fewshot{count}/top1@{k}"
        metrics[key] = float(np.mean(values))
        detail[key] = {"values": values, "deviation": float(np.std(values, ddof=1)) if few.draws > 1 else None,
                       "num_neighbors": min(k, len(drawn.train_labels)), "draws": few.draws, "seed": few.seed}
    return metrics, {"fewshot": detail} if detail else {}


def _labels_of_both(train: ImageSet, val: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """Labels that mean the same in both sets; DataError where there are none, or two meanings."""
    labels = train.require_labels(), val.require_labels()
    if train.classes != val.classes:
        raise DataError(
            f"the {len(train.classes)} classes of {train.source} are not the {len(val.classes)} of "
            f"{val.source}, so their labels mean different things; open both with patchssl.data.open.open_pair"
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


def _detail(train: ImageSet, val: ImageSet, protocol: Protocol, scores: KnnScores) -> dict[str, Any]:
    names, recall = train.classes, scores.neighbors.recall
    detail: dict[str, Any] = {
        "num_train": len(train),
        "num_test": len(val),
        "train_fingerprint": train.fingerprint,
        "test_fingerprint": val.fingerprint,
        "class_accuracy": {plain_text(names[label]): share for label, share in scores.class_accuracy.items()},
        # one bit per test image, see results.unpack_bits: for a paired bootstrap between models
        "correct": {f"top1@{protocol.settings['headline_k']}": pack_bits(scores.correct)},
    }
    if recall is not None:
        detail["search"] = {
            "backend": scores.neighbors.backend,
            "index": protocol.settings["index"],
            "search_params": protocol.settings["search_params"],
            "recall": {f"recall@{k}": share for k, share in recall.shares.items()},
            "recall_queries": recall.num_queries,
            "seed": recall.seed,
            "in_words": f"found {recall}",
        }
    return detail

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
