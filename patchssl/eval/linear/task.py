"""The linear probe: how well a linear classifier does on frozen features, under a named protocol.

`dino` trains as facebookresearch/dino does, with random crops through the network in every epoch and the best test
epoch reported; `cached` and `native` compute features once and choose among many probes on images held out of train;
`logreg` is scikit-learn's logistic regression, chosen likewise.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import patchssl
from patchssl.data.images import ImageSet
from patchssl.data.open import open_pair
from patchssl.data.unreadable import listing_unreadable
from patchssl.eval.cells import Cell, DataPlace, TaskOptions
from patchssl.eval.features import extract_outputs, look_at
from patchssl.eval.linear.cached import cached_probe, require_narrow
from patchssl.eval.linear.logreg import logreg_probe
from patchssl.eval.linear.scores import LinearScores, ProbeOutcome, require_classes, require_two_of_each, score_logits
from patchssl.eval.protocols import Protocol, choose_protocol
from patchssl.eval.records import Result, covered, joined, make_record, pack_bits, plain_text, safe_name
from patchssl.eval.tasks import ANYWHERE, ComputeOptions
from patchssl.eval.transforms import native_resize
from patchssl.models.backbone import Backbone
from patchssl.models.identity import identify
from patchssl.models.pixels import RawPixels
from patchssl.runtime.device import describe_device
from patchssl.runtime.distributed import locked_by_one
from patchssl.runtime.errors import UsageError
from patchssl.runtime.progress import Progress, shifted

BLOCKS = 4  # whose class tokens are put side by side, in DINO's protocol for ViT-S and in the grid of `cached`
_WIDE = 768  # channels from which on DINO takes the class and mean patch token of the last block instead: ViT-B


def linear_protocol(name: str | None, backbone: Backbone, *, epochs: int | None = None) -> Protocol:
    """The protocol `dino`, `cached`, `native` or `logreg` for `backbone`.

    `epochs` in the place of the protocol's own number make another protocol of it, dino-10-epochs.
    None is the default: `native` for networks whose training size is not 224, else `cached`, not `dino`: its choice
    does not look at the test images, and it takes minutes where `dino` takes a hundred passes. What the probes see
    depends on what the network can give; the settings say it. UsageError for an unknown name, for epochs below 1 and
    for epochs of `logreg`.
    """
    makers: dict[str, Callable[[int], dict[str, Any]]] = {
        "dino": partial(_dino, backbone), "cached": partial(_cached, backbone, size=224),
        "native": partial(_cached, backbone), "logreg": partial(_logreg, backbone)}
    plan = choose_protocol("linear", name, backbone.image_size, makers, usual="cached")
    if epochs is None:
        return plan
    if plan.name == "logreg" or epochs < 1:
        raise UsageError(f"{epochs} epochs were asked for; " + ("logreg has none, it ends when it has converged"
                         if plan.name == "logreg" else "1 is the least"))
    exactly = {"least_updates": 0} if "least_updates" in plan.settings else {}
    settings = {**plan.settings, "epochs": epochs, **exactly}
    if settings == plan.settings:
        return plan
    return Protocol(plan.task, f"{plan.name}-{epochs}-epochs", plan.version, settings)


def find_linear(backbone: Backbone, place: DataPlace, options: TaskOptions) -> Iterator[tuple[str, Any]]:
    """A linear probe on labeled train and val images, under the default protocol."""
    yield f"linear on {place.data}", partial(_cell, backbone, place)


def _cell(backbone: Backbone, place: DataPlace) -> Cell:
    train, val = place.labeled_pair
    protocol = linear_protocol(None, backbone)
    return Cell("linear", place.data, val.name, protocol, len(train) + len(val), backbone.weights_sha256,
                place.decode_seconds, lambda: joined([train.fingerprint, val.fingerprint]), protocol.name)


def score_linear(backbone: Backbone, data: str, protocol: str | None = None, compute: ComputeOptions = ANYWHERE,
                 **options: Any) -> Result:
    """`evaluate_linear` on train and val of `data`."""
    train, val = open_pair(data)
    for images in (train, val):
        compute.say(images.describe())
    return evaluate_linear(backbone, train, val, protocol, compute=compute, **options)


def evaluate_linear(backbone: Backbone, train: ImageSet, val: ImageSet, protocol: str | None = None, *,
                    epochs: int | None = None, seed: int = 0, compute: ComputeOptions = ANYWHERE,
                    looked_at: bool = False, checkpoint_folder: Path | None = None) -> Result:
    """The linear record of `backbone`: trained on `train`, scored on `val` under `protocol` (None: the default).

    `train` and `val` share their class ids, as from `open_pair`. `seed` fixes the split, the order and the crops. What
    counts progress counts images while features are computed, then starts again: crops of all epochs (`dino`), updates
    (`cached`, `native`), fits (`logreg`). Files are looked at before, unless they were `looked_at` already. With a
    `checkpoint_folder`, `dino` keeps a checkpoint per epoch in a folder of its own there and resumes from it after a
    kill; the others need none, their features are in the cache. UsageError for an unknown protocol and for features
    too wide for it, DataError for sets without labels, with other classes, or with too few images of a class, all
    before a pass over the images; later for those of both sets that cannot be read; PatchSSLError names images whose
    features are not finite, NotFiniteError a training that diverged.
    """
    began = time.monotonic()
    plan = linear_protocol(protocol, backbone, epochs=epochs)
    if seed < 0:
        raise UsageError(f"seed = {seed} is negative; choose a whole number from 0 on")
    labels = require_classes(train, val)
    if not looked_at:
        # crops are made of training images whatever is cached
        cropped = replace(compute, cache=None) if plan.settings["selection"] == _BEST_TEST_EPOCH else compute
        look_at(backbone, (train, val), plan, plan.settings["outputs"], cropped)
    if plan.settings["selection"] == _BEST_TEST_EPOCH:
        outcome = _run_dino(backbone, (train, val), labels, plan, seed, compute, checkpoint_folder)
    else:
        outcome = _run_grid(backbone, (train, val), labels[0], plan, seed, compute)
    scores = score_logits(outcome.logits, labels[1])
    return make_record(backbone, plan, dataset=val.name, fingerprints=(train.fingerprint, val.fingerprint),
                       metrics=scores.metrics, detail=_detail(train, val, seed, outcome, scores),
                       device=describe_device(compute.where(backbone)), duration=time.monotonic() - began)


def _run_grid(backbone: Backbone, sets: tuple[ImageSet, ImageSet], labels: torch.Tensor, plan: Protocol, seed: int,
              compute: ComputeOptions) -> ProbeOutcome:
    """Features of both sets once, then the probe chosen on images held out of train."""
    train, val = sets
    require_two_of_each(labels, train.classes)
    if isinstance(backbone, RawPixels) and "ridge" in plan.settings:
        require_narrow(3 * plan.settings["crop"] ** 2)
    progress, parts = compute.counter("linear"), []
    for images, before, later in ((train, 0, val), (val, len(train), None)):
        shown = None if progress is None else shifted(progress, before, len(train) + len(val))
        parts.append(_outputs(backbone, images, plan, shown, compute, later))
    shared: dict[str, Any] = {"seed": seed, "progress": progress}
    if plan.name == "logreg":
        return logreg_probe(parts[0], labels, parts[1], train.classes, plan.settings, **shared)
    return cached_probe(parts[0], labels, parts[1], train.classes, plan.settings, device=compute.where(backbone),
                        **shared)


def _run_dino(backbone: Backbone, sets: tuple[ImageSet, ImageSet], labels: tuple[torch.Tensor, torch.Tensor],
              plan: Protocol, seed: int, compute: ComputeOptions, folder: Path | None) -> ProbeOutcome:
    from patchssl.eval.linear.dino import ProbeTraining, dino_probe

    (train, val), progress, options = sets, compute.counter("linear"), compute.passes(backbone)
    test = _outputs(backbone, val, plan, progress, compute, later=train)
    training = ProbeTraining(backbone, train, labels[0], len(train.classes), plan.plain_settings(), seed,
                             options["device"], options["batch_size"], options["workers"])
    network = identify(backbone)
    facts = {"protocol": plan.fingerprint, "network": network.sha256, "train": train.fingerprint,
             "test": val.fingerprint, "seed": seed, "patchssl": patchssl.__version__,
             "labels": hashlib.sha256(b"".join(part.numpy().tobytes() for part in labels)).hexdigest()}
    own = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    place = folder / f"{safe_name(backbone.name)}-{own}" if folder and not network.unknown else None
    with locked_by_one(place):
        return dino_probe(training, test, labels[1], folder=place, facts=facts, progress=progress)


def _outputs(backbone: Backbone, images: ImageSet, plan: Protocol, progress: Progress | None,
             compute: ComputeOptions, later: ImageSet | None) -> dict[str, torch.Tensor]:
    """The protocol's outputs of `images`; where some cannot be read, the error names those of `later` with them."""
    with listing_unreadable([images] if later is None else [images, later], compute.workers):
        return extract_outputs(backbone, images, plan, plan.settings["outputs"], progress=progress,
                               **compute.passes(backbone))


def _detail(train: ImageSet, val: ImageSet, seed: int, outcome: ProbeOutcome, scores: LinearScores) -> dict[str, Any]:
    names = train.classes
    return {
        "num_train": len(train),
        "num_test": len(val),
        "train_fingerprint": train.fingerprint,
        "test_fingerprint": val.fingerprint,
        "fingerprints_cover": covered(train=train, test=val),
        "seed": seed,
        "interval95": {name: list(interval) for name, interval in scores.intervals.items()},
        "class_accuracy": {plain_text(names[label]): share for label, share in scores.class_accuracy.items()},
        # one bit per test image, see results.unpack_bits: for a paired bootstrap between models
        "correct": {"top1": pack_bits(scores.correct)},
        **outcome.detail,
    }


def _blocks(backbone: Backbone) -> int:
    """Of how many last blocks `backbone` gives the class token, at most `BLOCKS`; 0 for features alone."""
    if not backbone.has_class_token or isinstance(backbone, RawPixels):
        return 0
    return min(BLOCKS, int(getattr(backbone, "depth", 1)))  # one's own module gives its last block's only


def _dino(backbone: Backbone, image_size: int) -> dict[str, Any]:
    """facebookresearch/dino, eval_linear.py, as run for its tables: 8 GPUs with 128 images each."""
    blocks = _blocks(backbone)
    outputs = [f"class:{blocks}"] if blocks else ["features"]
    if blocks and int(getattr(backbone, "embed_dim", 0)) >= _WIDE:
        outputs = ["class:1", "mean_patch"]
    return {
        "resize": 256, "crop": 224, "interpolation": "bicubic",
        "train_crop": 224, "train_scale": [0.08, 1.0], "train_aspect": [3 / 4, 4 / 3],
        "train_interpolation": "bilinear", "train_mirror": 0.5,
        "outputs": outputs, "combined": "interleaved" if len(outputs) > 1 else "side by side",
        "optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.0, "initial_deviation": 0.01,
        "learning_rate": 0.001, "learning_rate_is_per": 256, "batch": 1024, "epochs": 100,
        "schedule": "cosine to 0, one step an epoch", "selection": _BEST_TEST_EPOCH,
    }


def _cached(backbone: Backbone, image_size: int, size: int | None = None) -> dict[str, Any]:
    """A grid of probes on features of center crops of `size` pixels; None: the size the network was trained at."""
    blocks = _blocks(backbone)
    names = [f"class:{count}" for count in sorted({1, blocks})] if blocks else ["features"]
    inputs = [*names, *(f"{name} + mean_patch" for name in names)] if blocks else names
    return {
        **_center_crop(size or image_size),
        "outputs": [f"class:{blocks}", "mean_patch"] if blocks else names, "inputs": inputs,
        "features": "standardized, whitened with a ridge, divided by the root of their number", "ridge": 1e-3,
        "optimizer": "sgd", "momentum": 0.9, "initial_weights": 0.0, "batch": 256, "epochs": 30, "least_updates": 1000,
        "schedule": "cosine to 0, one step an update",
        "learning_rates": [1.0, 3.0, 10.0, 30.0], "weight_decays": [0.0, 1e-5, 1e-4],
        **_SELECTION,
    }


def _logreg(backbone: Backbone, image_size: int) -> dict[str, Any]:
    """scikit-learn's LogisticRegression on the final class token, at the size the network was trained at."""
    return {
        **_center_crop(image_size),
        "outputs": ["class:1"] if _blocks(backbone) else ["features"], "features": "standardized",
        "solver": "lbfgs", "tolerance": 1e-4, "max_iterations": 1000,
        "inverse_regularizations": [float(f"1e{power}") for power in range(-5, 5)],
        **_SELECTION,
    }


_BEST_TEST_EPOCH = "best test epoch"
_SELECTION: Mapping[str, Any] = {
    "held_out": 0.1, "selection": "accuracy on held-out training images, then their loss",
    "final": "the chosen one trained again on all training images, test images scored once"}


def _center_crop(size: int) -> dict[str, Any]:
    return {"resize": native_resize(size), "crop": size, "interpolation": "bicubic"}
