"""The k-NN benchmark: what it can be run on, and its record; `dino` and `native` differ in the images' size."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchssl.data.images import ImageSet, labels_of_both
from patchssl.data.open import open_pair
from patchssl.data.unreadable import listing_unreadable
from patchssl.eval.cells import Cell, DataPlace, TaskOptions
from patchssl.eval.faiss import IndexPlan
from patchssl.eval.features import extract_features, look_at
from patchssl.eval.knn import KnnScores, knn_scores
from patchssl.eval.knn.fewshot import FewShot
from patchssl.eval.pooling import compute_outputs
from patchssl.eval.protocols import Protocol, knn_protocol
from patchssl.eval.records import Result, covered, joined, make_record, pack_bits, plain_text
from patchssl.eval.search import require_index
from patchssl.eval.tasks import ANYWHERE, ComputeOptions
from patchssl.models.backbone import Backbone
from patchssl.models.pixels import RawPixels
from patchssl.runtime.device import describe_device
from patchssl.runtime.errors import DataError, PatchSSLError, UsageError
from patchssl.runtime.progress import Progress, shifted


def find_knn(backbone: Backbone, place: DataPlace, options: TaskOptions) -> Iterator[tuple[str, Any]]:
    """k-NN on labeled train and val images, under the default protocol or an index's own."""
    if options.search != IndexPlan():
        _require_index(backbone, place, options.search)
    yield f"knn on {place.data}", partial(_cell, backbone, place, options.search)


def _require_index(backbone: Backbone, place: DataPlace, search: IndexPlan) -> None:
    """UsageError, before anything is run, for an index that was asked for and cannot search the train images."""
    try:
        train, _ = place.labeled_pair
    except PatchSSLError:  # said where the cell is made
        return
    require_index(search, len(train), _width(backbone))


def _width(backbone: Backbone) -> int:
    """How many numbers the features of an image are."""
    side, training = backbone.image_size, backbone.training
    backbone.eval()
    try:
        with torch.inference_mode():
            black = torch.zeros(1, 3, side, side, device=backbone.device)
            return int(compute_outputs(backbone, black, ["features"])["features"].shape[1])
    finally:
        backbone.train(training)


def _cell(backbone: Backbone, place: DataPlace, search: IndexPlan) -> Cell:
    train, val = place.labeled_pair
    protocol, options = knn_protocol(None, backbone.image_size), {}
    if search != IndexPlan():
        protocol, options = variant(protocol, FewShot(), search), asdict(search)
    # a variant's name is not that of the protocol it varies: the default is asked for
    return Cell("knn", place.data, val.name, protocol, len(train) + len(val), backbone.weights_sha256,
                place.decode_seconds, lambda: joined([train.fingerprint, val.fingerprint]), options=options)


def score_knn(backbone: Backbone, data: str, protocol: str | None = None, compute: ComputeOptions = ANYWHERE, *,
              looked_at: bool = False, **variant: Any) -> Result:
    """`evaluate_knn` on train and val of `data`; raw pixels whose size was left open take that of the images."""
    if isinstance(backbone, RawPixels) and protocol not in (None, "native"):
        raise UsageError(f"raw pixels are scored under the protocol native, not {protocol}")
    train, val = open_pair(data)
    compute.say(train.describe())
    compute.say(val.describe())
    if isinstance(backbone, RawPixels):
        if not backbone.sized:
            return evaluate_pixels(train, val, compute=compute, looked_at=looked_at, **variant)
        protocol = "native"
    return evaluate_knn(backbone, train, val, protocol, compute=compute, looked_at=looked_at, **variant)


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


def evaluate_knn(backbone: Backbone, train: ImageSet, val: ImageSet, protocol: str | None = None, *,
                 shots: Sequence[int] = (), draws: int = 5, seed: int = 0, index: str = "Flat", search_params: str = "",
                 gpus: str = "one", compute: ComputeOptions = ANYWHERE, looked_at: bool = False) -> Result:
    """The k-NN record of `backbone`: `val` classified by `train` under `protocol` (None: the default).

    `train` and `val` share their class ids, as from `open_pair`. Raises UsageError for an unknown protocol, DataError
    for sets without labels or with bad images, which are looked for before unless they were `looked_at` already.

    For every number n of `shots`, fewshotn/top1@k is the mean over `draws` draws of n training images per class, k
    being the protocol's headline k or all drawn images if they are fewer; `seed` draws the images, the same for
    every network. DataError names classes with fewer than n images. `index`, `search_params` and `gpus` as in
    `find_neighbors`; few-shot searches are exact. Both variants change the protocol's name and fingerprint.
    """
    began = time.monotonic()
    few, search = FewShot(tuple(shots), draws, seed), IndexPlan(index, search_params, gpus, seed)
    plan = variant(knn_protocol(protocol, backbone.image_size), few, search)
    labels = labels_of_both(train, val)
    few.require_images(train)
    passes = compute.passes(backbone)
    if not search.exact:
        require_index(search, len(train), _width(backbone))
    if not looked_at:
        look_at(backbone, (train, val), plan, ("features",), compute)
    features = _features_of_both(train, val, compute, backbone=backbone, transform=plan, **passes)
    case = _Case(features[0], labels[0], features[1], labels[1], plan.settings["temperature"])
    k, shared = plan.settings["headline_k"], {"device": passes["device"], "progress": compute.counter("search")}
    scores = case.scores(ks=plan.settings["ks"], headline_k=k, **shared, **asdict(search))
    few_metrics, few_detail = _few_shot(case, few, k, gpus=gpus, **shared)
    return make_record(backbone, plan, dataset=val.name, fingerprints=(train.fingerprint, val.fingerprint),
                       metrics=scores.metrics | few_metrics, detail=_detail(train, val, plan, scores) | few_detail,
                       device=describe_device(passes["device"]), duration=time.monotonic() - began)


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


def _features_of_both(train: ImageSet, val: ImageSet, compute: ComputeOptions, **options: Any) -> list[Tensor]:
    parts, done, progress = [], 0, compute.counter("features")
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


def _detail(train: ImageSet, val: ImageSet, protocol: Protocol, scores: KnnScores) -> dict[str, Any]:
    names, recall = train.classes, scores.neighbors.recall
    detail: dict[str, Any] = {
        "num_train": len(train),
        "num_test": len(val),
        "train_fingerprint": train.fingerprint,
        "test_fingerprint": val.fingerprint,
        "fingerprints_cover": covered(train=train, test=val),
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
