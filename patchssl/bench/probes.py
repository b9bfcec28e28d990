"""What linear probes cost: a grid on cached features beside one probe that is trained as DINO trains it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from patchssl.data.images import ImageSet
from patchssl.data.open import open_pair
from patchssl.eval.features import extract_outputs
from patchssl.eval.linear.cached import cached_probe, grid
from patchssl.eval.linear.scores import require_classes
from patchssl.eval.linear.task import linear_protocol
from patchssl.eval.protocols import Protocol
from patchssl.models.backbone import Backbone
from patchssl.models.load import load_backbone
from patchssl.runtime.progress import Progress, shifted


def time_probes(backbone: Backbone | None = None, train: ImageSet | None = None, val: ImageSet | None = None, *,
                epochs: int = 10, num_classes: int | None = None, batch_size: int = 64,
                progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Processor seconds of all `cached` probes and of `epochs` epochs of one `dino` probe, in one run; JSON-able.

    Default: an untrained ViT-Ti/16 and 128 + 32 embedded textures. `num_classes` widens the probes to what a set of
    so many classes would cost, which would not be a small one: `least_updates` is left out then. The grid is timed on
    computed features, with its choice, the training of the chosen probe and the test images; "features" are what it
    needs once; "dino" includes its own test features. On a GPU these are seconds of the clock. `progress` gets what is
    timed, and how much of it is done and in all: images, updates, crops.
    """
    network = backbone or load_backbone("random:vit_tiny_patch16_224")
    pair = (train, val) if train is not None and val is not None else _small_pair()
    wide = max(num_classes or 0, len(pair[0].classes))
    cached = linear_protocol("cached", network)
    if num_classes is not None:
        cached = linear_protocol("cached", network, epochs=cached.settings["epochs"])
    dino, count = linear_protocol("dino", network, epochs=epochs), len(grid(cached.settings))
    options: dict[str, Any] = {"batch_size": batch_size, "device": network.device}
    names = ("features", f"{count} cached probes", f"dino, {epochs} epochs")
    shown = [None if progress is None else partial(progress, name) for name in names]
    features, probes, one = _parts(network, pair, cached, dino, wide, options, shown)
    return {
        "what": f"{count} linear probes on cached features beside {epochs} epochs of one as DINO trains it",
        "network": network.arch, "images": len(pair[0]), "test images": len(pair[1]), "classes": wide,
        "device": str(network.device), "threads": torch.get_num_threads(),
        "seconds": dict(zip(names, (features, probes, one), strict=True)),
        "times faster": {"probes": one / max(probes, 1e-9), "probes and features": one / max(probes + features, 1e-9)},
    }


def _parts(network: Backbone, pair: tuple[ImageSet, ImageSet], cached: Protocol, dino: Protocol, wide: int,
           options: dict[str, Any], shown: Sequence[Progress | None]) -> Iterator[float]:
    """Seconds for features, for the grid on them, and for the probe as DINO trains it."""
    from patchssl.eval.linear.dino import ProbeTraining, dino_probe

    train, val = pair
    labels, test_labels = require_classes(train, val)
    classes = (*train.classes, *(f"class {number}" for number in range(len(train.classes), wide)))
    clock = time.perf_counter if network.device.type == "cuda" else time.process_time
    began = clock()
    found = [extract_outputs(network, images, cached, cached.settings["outputs"], **options, progress=seen)
             for images, seen in zip(pair, _halves(shown[0], pair), strict=True)]
    yield clock() - began
    began = clock()
    cached_probe(found[0], labels, found[1], classes, cached.settings, device=network.device,
                 progress=shown[1])
    yield clock() - began
    began = clock()
    test = extract_outputs(network, val, dino, dino.settings["outputs"], **options)
    dino_probe(ProbeTraining(network, train, labels, wide, dino.plain_settings(), **options), test, test_labels,
               progress=shown[2])
    yield clock() - began


def _halves(shown: Progress | None, pair: tuple[ImageSet, ImageSet]) -> Iterator[Progress | None]:
    """One progress over both sets, for either of them."""
    total = len(pair[0]) + len(pair[1])
    for before in (0, len(pair[0])):
        yield None if shown is None else shifted(shown, before, total)


def _small_pair() -> tuple[ImageSet, ImageSet]:
    train, val = open_pair("textures-64")
    return train.subset(range(128)), val.subset(range(32))
