"""Landmark retrieval on revisited Oxford and Paris, on sets in their layout, and among a million distractors.

Protocols: `revisitop`, as the benchmark's authors demand it (queries cut to their box, 1024 px, three scales); `dino`
and `ibot`, as facebookresearch/dino and bytedance/ibot run eval_image_retrieval.py (queries whole); `native`, at the
size the network was trained at. A set that is neither Oxford nor Paris is treated as `rparis6k`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchssl.data.images import FileImages, ImageSet
from patchssl.eval.cells import Cell, DataPlace, TaskOptions, decode_seconds
from patchssl.eval.features import extract_outputs, iter_outputs, look_at
from patchssl.eval.galleries import (
    DISTRACTOR,
    ERROR,
    JUNK,
    POSITIVE,
    Picture,
    Shown,
    ends_of,
    first_results,
    gallery,
    latest,
)
from patchssl.eval.protocols import Protocol, choose_protocol
from patchssl.eval.records import Result, covered, joined, make_record, plain_text
from patchssl.eval.revisited.images import CropBox, PreparedImages, open_distractors, queries_and_database
from patchssl.eval.revisited.ranking import KS, LEVELS, LevelScores, levels_of_similarity
from patchssl.eval.tasks import ANYWHERE, ComputeOptions
from patchssl.eval.transforms import native_resize
from patchssl.models.backbone import Backbone
from patchssl.runtime.device import describe_device
from patchssl.runtime.errors import DataError
from patchssl.runtime.progress import Progress, shifted
from patchssl.sets.revisited import (
    LABELS,
    GroundTruth,
    RevisitedPaths,
    find_ground_truth,
    read_ground_truth,
    require_images,
)

OFFICIAL: Mapping[str, tuple[int, int]] = {"roxford5k": (70, 4993), "rparis6k": (70, 6322)}  # queries, database
_MILLION = "revisitop1m"
_SCALES = (1.0, 2**-0.5, 0.5)
PICTURED = ("medium", "hard")  # the levels whose queries a record shows
_DIGITS = 6  # of an AP in a record


def task_of(set_name: str) -> str:
    """What records of the set call their task: its name for Oxford and Paris, `revisited` for others."""
    return set_name if set_name in OFFICIAL else "revisited"


def revisited_protocol(name: str | None, backbone: Backbone, set_name: str) -> Protocol:
    """The protocol `name` (None: the default, `dino` or `native`) for `backbone` on the set `set_name`.

    UsageError for an unknown name.
    """
    makers: dict[str, Callable[[int], dict[str, Any]]] = {
        "dino": partial(_dino, set_name),
        "ibot": lambda size: _whole_queries(512, _SCALES),
        "revisitop": _revisitop,
        "native": _native,
    }
    return choose_protocol(task_of(set_name), name, backbone.image_size, makers)


def find_revisited(backbone: Backbone, place: DataPlace, options: TaskOptions) -> Iterator[tuple[str, Any]]:
    """Retrieval on every set whose ground truth lies there, without distractors and with those that were named."""
    for path in sorted(Path(place.data).glob("gnd_*.pkl")):
        name = path.stem.removeprefix("gnd_")
        yield f"revisited on {path}", partial(_cell, backbone, place.data, name, None)
        if (extra := options.revisited_distractors) is not None:
            yield f"revisited on {path} with {extra}", partial(_cell, backbone, place.data, name, extra)


def _cell(backbone: Backbone, place: str, name: str, distractors: Path | None) -> Cell:
    found = open_revisited(Path(place), name, distractors)
    count = len(found.images) + (0 if found.distractors is None else len(found.distractors))
    protocol = revisited_protocol(None, backbone, name)
    return Cell("revisited", place, found.name, protocol, count, backbone.weights_sha256,
                decode_seconds(found.images), lambda: joined(found.fingerprints().values()), protocol.name,
                name, {} if distractors is None else {"distractors": distractors})


def evaluate_revisited(
    backbone: Backbone,
    root: str | Path,
    protocol: str | None = None,
    compute: ComputeOptions = ANYWHERE,
    *,
    set_name: str,
    distractors: str | Path | None = None,
    allow_truncated: bool = False,
) -> Result:
    """The retrieval record of `backbone` on the set `set_name` below `root` under `protocol` (None: the default).

    `root` holds gnd_NAME.pkl and jpg/, or a folder NAME or datasets/NAME with them. The images in the folder
    `distractors` (see `open_distractors`) join the database; they are streamed, so that memory holds their
    similarities to the queries and one block of features. By default a batch has 16 images, which are large here.
    Metrics: LEVEL/map and LEVEL/mp@{1,5,10} of every level on which a query has positives; detail: the queries' names
    and APs, and the first results of the worst and best ones on the levels medium and hard.

    The official code reads files that end early as if they were whole; here that takes `allow_truncated`.
    UsageError for an unknown protocol. DataError, before an image is read, for a ground truth that is no plain data,
    lacks a box or contradicts itself, for absent images, all of them named, and a database smaller than the ranks
    asked for; later with all unreadable images of the set, or of the distractors.
    """
    began = time.monotonic()
    plan = revisited_protocol(protocol, backbone, set_name)
    found = open_revisited(Path(root), set_name, distractors, allow_truncated)
    compute.say(found.describe())
    run = _RevisitedPass(backbone, plan, compute.passes(backbone, batch_size=16))
    look_at(backbone, run.all_images(found), plan, (run.output,), compute, plan.settings["scales"])
    similarity = _similarity(run, found, compute.counter("features"))
    levels = levels_of_similarity(similarity, found.truth)
    metrics = {f"{level}/{name}": value for level, scores in levels.items() if scores.num_queries
               for name, value in scores.means().items()}
    return make_record(backbone, plan, dataset=found.name, fingerprints=found.fingerprints().values(), metrics=metrics,
                       detail={**_detail(found, run, levels), "galleries": _galleries(found, similarity, levels)},
                       device=describe_device(compute.where(backbone)), duration=time.monotonic() - began)


def _revisitop(_image_size: int) -> dict[str, Any]:
    """As the benchmark's authors extract features (filipradenovic/cnnimageretrieval-pytorch)."""
    return _settings(_SCALES, cut_queries=True, longest=1024, interpolation="lanczos")


def _dino(set_name: str, _image_size: int) -> dict[str, Any]:
    """As the published numbers: Oxford small and at one scale, Paris larger and at three."""
    return _whole_queries(224, (1.0,)) if set_name == "roxford5k" else _whole_queries(512, _SCALES)


def _whole_queries(longest: int, scales: tuple[float, ...]) -> dict[str, Any]:
    return _settings(scales, cut_queries=False, longest=longest, interpolation="lanczos")


def _native(image_size: int) -> dict[str, Any]:
    """The network's own vector of a center crop at its training size."""
    size = {"resize": native_resize(image_size), "crop": image_size, "interpolation": "bicubic"}
    return _settings((1.0,), cut_queries=True, **size)


def _settings(scales: tuple[float, ...], *, cut_queries: bool, **size: Any) -> dict[str, Any]:
    return {
        **size,
        "enlarged": "crop" in size,  # images smaller than this
        "queries": "cut to bbx, then resized by the factor of the whole image" if cut_queries else "whole",
        "orientation": "as stored",
        "scales": list(scales),
        "scaling": "bilinear, of normalized images, without antialiasing",
        "feature": "final class token, mean over scales",
        "normalization": "l2",
        "similarity": "cosine",
        "ranks": "whole database, junk removed",
        "ks": list(KS),
    }


class RevisitedSet(NamedTuple):
    """A set and its distractors, no image of which has been read."""

    name: str  # what the record calls it
    place: RevisitedPaths
    truth: GroundTruth
    images: FileImages  # the queries, then the database
    distractors: FileImages | None

    @property
    def num_queries(self) -> int:
        return len(self.truth.qimlist)

    def fingerprints(self) -> dict[str, str]:
        """Of everything the numbers depend on."""
        parts = {"ground truth": _truth_fingerprint(self.truth), "images": self.images.fingerprint}
        return parts if self.distractors is None else {**parts, "distractors": self.distractors.fingerprint}

    def describe(self) -> str:
        more = "" if self.distractors is None else f", {len(self.distractors):,} distractors in {self.distractors.root}"
        return (f"{self.place.ground_truth}: {self.num_queries:,} queries, {len(self.truth.imlist):,} database images "
                f"in {self.place.images}{more}")


def _truth_fingerprint(truth: GroundTruth) -> str:
    """sha256 of names, boxes and labels; neither the order of images nor the kind of pickle matters."""
    queries = []
    for name, query in zip(truth.qimlist, truth.gnd, strict=True):
        labels = [sorted(truth.imlist[index] for index in getattr(query, label)) for label in LABELS]
        queries.append([name, [] if query.bbx is None else query.bbx.tolist(), labels])
    content = json.dumps([sorted(truth.imlist), sorted(queries)])
    return hashlib.sha256(content.encode()).hexdigest()


def open_revisited(root: Path, set_name: str, distractors: str | Path | None = None,
                   allow_truncated: bool = False) -> RevisitedSet:
    """The set `set_name` below `root`, its database joined by `distractors`; errors as in `evaluate_revisited`."""
    place = find_ground_truth(root, set_name)
    truth = read_ground_truth(place.ground_truth)
    require_images(truth, place.images)
    extra = None if distractors is None else open_distractors(distractors, place, allow_truncated)
    size = len(truth.imlist) + (0 if extra is None else len(extra))
    if size < max(KS):
        raise DataError(f"{place.ground_truth} has a database of {size} images; precision at {max(KS)} takes "
                        f"{max(KS)} or more")
    if not any(len(query.easy) + len(query.hard) for query in truth.gnd):
        raise DataError(f"no query in {place.ground_truth} has an easy or hard image, so that there is nothing to find")
    name = set_name
    if extra is not None:
        # the official distractors are 1,001,001; a part of them must not pass for all
        name += "+1m" if extra.name == _MILLION and len(extra) >= 10**6 else f"+{extra.name}"
    return RevisitedSet(name, place, truth, queries_and_database(truth, place, allow_truncated), extra)


class _RevisitedPass(NamedTuple):
    """What every pass over images shares; `options` are those of `iter_outputs`."""

    backbone: Backbone
    plan: Protocol
    options: dict[str, Any]

    @property
    def output(self) -> str:
        """The class token, or the network's own vector where it has none."""
        return "class:1" if self.backbone.has_class_token else "features"

    def prepared(self, files: FileImages, boxes: tuple[CropBox | None, ...] | None = None) -> PreparedImages:
        """`files` as the protocol wants them."""
        settings, least = self.plan.settings, 1
        if "crop" not in settings and self.backbone.has_class_token:  # one whole patch at the smallest scale
            least = int(np.ceil(self.backbone.patch_size / min(settings["scales"])))
        return PreparedImages(name=files.name, split=files.split, source=files.source, files=files, least=least,
                              boxes=boxes or (None,) * len(files), longest=settings.get("longest"))

    def all_images(self, found: RevisitedSet) -> list[ImageSet]:
        """Queries and database, then the distractors if there are any."""
        extra = [] if found.distractors is None else [self.prepared(found.distractors)]
        return [self.prepared(found.images, _boxes(found.truth, self.plan)), *extra]

    def arguments(self, progress: Progress | None) -> dict[str, Any]:
        return {"outputs": (self.output,), "transform": self.plan, "scales": self.plan.settings["scales"],
                "progress": progress, **self.options}


def _similarity(run: _RevisitedPass, found: RevisitedSet, progress: Progress | None) -> Tensor:
    """Cosines (queries, database and distractors), float32, by one block of distractors at a time."""
    extra, own, count = found.distractors, len(found.images), found.num_queries
    total = own + (0 if extra is None else len(extra))
    shown = None if progress is None else shifted(progress, 0, total)
    images = run.all_images(found)
    features = F.normalize(extract_outputs(run.backbone, images[0], **run.arguments(shown))[run.output])
    queries, database = features[:count], features[count:]
    if extra is None:
        return queries @ database.T
    similarity = torch.empty(count, total - count)
    similarity[:, : len(database)] = queries @ database.T
    shown = None if progress is None else shifted(progress, own, total)
    for part, block in iter_outputs(run.backbone, images[1], **run.arguments(shown)):
        start = len(database) + part.start
        similarity[:, start : start + len(part)] = queries @ F.normalize(block[run.output]).T
    return similarity


def _boxes(truth: GroundTruth, plan: Protocol) -> tuple[CropBox | None, ...]:
    """What is cut from the queries and, nothing, from the database."""
    whole: tuple[CropBox | None, ...] = (None,) * len(truth.imlist)
    if plan.settings["queries"] == "whole":
        return (None,) * len(truth.qimlist) + whole
    boxes = (query.bbx for query in truth.gnd)
    return tuple(None if box is None else tuple(box.tolist()) for box in boxes) + whole


def _detail(found: RevisitedSet, run: _RevisitedPass, levels: Mapping[str, LevelScores]) -> dict[str, Any]:
    sizes = found.num_queries, len(found.truth.imlist)
    return {
        "official": OFFICIAL.get(found.place.ground_truth.stem.removeprefix("gnd_")) == sizes,
        "num_queries": sizes[0], "num_database": sizes[1],
        "num_distractors": 0 if found.distractors is None else len(found.distractors),
        "queries_used": {level: scores.num_queries for level, scores in levels.items()},
        "left_out": {level: f"no query has {' or '.join(LEVELS[level][0])} images"
                     for level, scores in levels.items() if not scores.num_queries},
        "output": run.output,
        "fingerprints": found.fingerprints(),
        "fingerprints_cover": covered(images=found.images, distractors=found.distractors),
        "queries": [plain_text(name) for name in found.truth.qimlist],
        "aps": {level: [None if np.isnan(ap) else round(float(ap), _DIGITS) for ap in scores.aps]
                for level, scores in levels.items() if scores.num_queries},
    }


def _galleries(found: RevisitedSet, similarity: Tensor, levels: Mapping[str, LevelScores]) -> dict[str, Any]:
    """The worst and best queries of the pictured levels."""
    table = similarity.cpu().numpy()
    return {level: gallery(scores.aps, [_shown(found, query, level, table[query]) for query, _ in ends_of(scores.aps)])
            for level, scores in levels.items() if level in PICTURED and scores.num_queries}


def _shown(found: RevisitedSet, query: int, level: str, scores: np.ndarray) -> Shown:
    """A query and its first results by `scores` (N,), junk among them, with the roles they have on `level`."""
    positives, junk = (np.concatenate([getattr(found.truth.gnd[query], label) for label in labels])
                       for labels in LEVELS[level])
    num_own = len(found.truth.imlist)

    def picture(image: int) -> Picture:
        if found.distractors is not None and image >= num_own:
            return Picture(found.distractors, image - num_own)
        return Picture(found.images, found.num_queries + image)

    def role(image: int) -> str:
        if image >= num_own:
            return DISTRACTOR
        return POSITIVE if image in positives else JUNK if image in junk else ERROR

    return Shown(Picture(found.images, query),
                 [(picture(image), role(image)) for image in first_results(scores).tolist()],
                 [(picture(image), rank) for image, rank in latest(scores, positives)], len(positives))
