"""Copy detection as on Copydays: every picture of twenty blocks is searched among the originals and distractors.

Protocols: `dino` and its runs without distractors, without whitening or without both (facebookresearch/dino,
eval_copy_detection.py); `sscd` and `sscd-224` (facebookresearch/sscd-copy-detection, copydays_eval.py); `native`,
at the size the network was trained at, which needs nothing but the blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchssl.data.images import ArrayImages, FileImages, ImageSet, Names
from patchssl.data.unreadable import find_unreadable, raise_unreadable
from patchssl.eval.cells import Cell, DataPlace, TaskOptions, decode_seconds
from patchssl.eval.features import extract_outputs, look_at
from patchssl.eval.galleries import DISTRACTOR, ERROR, NUM_SHOWN, POSITIVE, Picture, Shown, ends_of, gallery
from patchssl.eval.metrics import CopyScores, score_neighbors
from patchssl.eval.protocols import Protocol, choose_protocol
from patchssl.eval.records import Result, covered, joined, make_record, plain_text
from patchssl.eval.revisited.ranking import ranks_of
from patchssl.eval.search import search_topk
from patchssl.eval.tasks import ANYWHERE, ComputeOptions
from patchssl.eval.transforms import native_resize
from patchssl.eval.whitening import Whitening
from patchssl.models.backbone import Backbone
from patchssl.models.pixels import RawPixels
from patchssl.runtime.device import describe_device
from patchssl.runtime.errors import DataError, UnreadableImage, UsageError
from patchssl.runtime.progress import Progress, shifted
from patchssl.sets.copydays import CopydaysSet, open_copydays

TASK = "copydays"
PICTURED = "strong"  # the block whose queries a record shows
_DIGITS = 6  # of an AP in a record


def copydays_protocol(name: str | None, backbone: Backbone, ranks: int | None = None) -> Protocol:
    """The Copydays protocol `name` (None: the default) for `backbone`, all sizes and outputs being settled.

    `ranks` instead of the protocol's own number make another protocol, such as native-12-ranks. UsageError for an
    unknown name, for no ranks, and for any but `native` with raw pixels, which have no tokens.
    """
    pixels = isinstance(backbone, RawPixels)
    if pixels and name not in (None, "native"):
        raise UsageError(f"raw pixels are scored under the protocol native, not {name}")
    makers: dict[str, Callable[[int], dict[str, Any]]] = {
        "dino": partial(_dino, backbone),
        "dino-nodistractors": partial(_dino, backbone, distractors=False),
        "dino-nowhitening": partial(_dino, backbone, whitening=None),
        "dino-plain": partial(_dino, backbone, distractors=False, whitening=None),
        "sscd": partial(_sscd, backbone, resize=288),
        "sscd-224": partial(_sscd, backbone, square=224),
        "native": _native,
    }
    plan = choose_protocol(TASK, "native" if pixels else name, backbone.image_size, makers)
    if ranks is None or ranks == plan.settings["num_ranks"]:
        return plan
    if ranks < 1:
        raise UsageError(f"the first {ranks} ranks hold no image; 1 is the least")
    return replace(plan, name=f"{plan.name}-{ranks}-ranks", settings={**plan.plain_settings(), "num_ranks": ranks})


def find_copydays(backbone: Backbone, place: DataPlace, options: TaskOptions) -> Iterator[tuple[str, Any]]:
    """Copy detection where there are Copydays' blocks."""
    if (Path(place.data) / "original").is_dir():
        yield f"copydays on {place.data}", partial(_cell, backbone, place.data, options)


def _cell(backbone: Backbone, place: str, options: TaskOptions) -> Cell:
    """Under the default protocol, or what of it the folder has everything for; DataError where nothing fits."""
    named = {"distractors": options.distractors, "whitening": options.whitening}
    protocols = _possible_protocols(backbone, [kind for kind, folder in named.items() if folder is not None])
    for protocol in protocols:
        needs = {kind: bool(protocol.settings[kind]) for kind in named}
        used = {kind: folder for kind, folder in named.items() if folder is not None and needs[kind]}
        try:
            found = open_copydays(place, needs_distractors=needs["distractors"], needs_whitening=needs["whitening"],
                                  distractors=used.get("distractors"), whitening=used.get("whitening"))
        except DataError:
            if protocol is not protocols[-1]:
                continue
            raise
        break
    require_ranks(found, protocol)
    count = sum(len(block.images) for block in found.blocks)
    count += sum(len(extra) for extra in (found.distractors, found.whitening) if extra is not None)
    return Cell(TASK, place, dataset_name(found), protocol, count, backbone.weights_sha256,
                decode_seconds(found.originals), lambda: joined([found.fingerprint]), protocol.name, options=used)


def _possible_protocols(backbone: Backbone, named: Sequence[str]) -> list[Protocol]:
    """The default and, best first, those of DINO that do with fewer images but read all `named` kinds of them."""
    usual = copydays_protocol(None, backbone)
    if usual.name == "native":  # which needs nothing but the blocks
        return [usual]
    fewer = [copydays_protocol(f"dino-{less}", backbone) for less in ("nodistractors", "nowhitening", "plain")]
    return [usual, *(protocol for protocol in fewer if all(protocol.settings[kind] for kind in named))]


def evaluate_copydays(
    backbone: Backbone,
    root: str | Path,
    protocol: str | None = None,
    compute: ComputeOptions = ANYWHERE,
    *,
    ranks: int | None = None,
    distractors: str | Path | None = None,
    whitening: str | Path | None = None,
    allow_truncated: bool = False,
) -> Result:
    """The copy detection record of `backbone` on the set below `root` under `protocol` (None: the default).

    `root` has Copydays' layout; `distractors` and `whitening` are folders of photographs, by default those beside
    its blocks (see `open_copydays`). `ranks` instead of the protocol's own suit a small set. Metrics: BLOCK/map for all
    blocks, overall/muap; detail: the queries' APs in the order of their names, these names, and the first results of
    the worst and best strong copies.

    UsageError for an unknown protocol or a folder it has no use for. DataError, before an image is read, for
    what is missing, for a database smaller than the ranks and for too few whitening images; later with all unreadable
    images of all folders.
    """
    began = time.monotonic()
    plan = copydays_protocol(protocol, backbone, ranks)
    found = open_copydays(root, distractors=distractors, whitening=whitening, allow_truncated=allow_truncated,
                          needs_distractors=plan.settings["distractors"],
                          needs_whitening=plan.settings["whitening"] is not None)
    compute.say(found.describe())
    require_ranks(found, plan)
    run = _CopydaysPass(backbone, plan, compute)
    if found.whitening is not None:
        _require_enough(run, found.whitening)
    parts = {"copies": _copies(found), "distractors": found.distractors, "whitening": found.whitening}
    images = {name: part for name, part in parts.items() if part is not None}
    look_at(backbone, list(images.values()), plan, plan.settings["outputs"], compute)
    scores, pictured = _score(run, found, images, _all_features(run, images))
    detail = {**_detail(found, images, scores), "galleries": {PICTURED: pictured}}
    return make_record(backbone, plan, dataset=dataset_name(found), fingerprints=(found.fingerprint,),
                       metrics=scores.metrics, detail=detail, device=describe_device(compute.where(backbone)),
                       duration=time.monotonic() - began)


def require_ranks(found: CopydaysSet, plan: Protocol) -> None:
    """DataError for a database with fewer images than `plan` counts ranks: every original would be found."""
    size, ranks = len(found.originals) + len(found.distractors or ()), plan.settings["num_ranks"]
    if size < ranks:
        whole = "originals and distractors" if plan.settings["distractors"] else "originals"
        raise DataError(f"{found.root} has a database of {size:,} images ({whole}), fewer than the first {ranks} ranks "
                        f"of {plan.name}: add photographs, or score it with --ranks {size}, a protocol of its own")


def dataset_name(found: CopydaysSet) -> str:
    """What records call the set: `copydays` for Copydays itself and for no other, else the name of its folder."""
    if found.official:
        return TASK
    name = found.root.resolve().name
    return f"own {name}".strip() if name in (TASK, "") else name


def _dino(
    backbone: Backbone, _image_size: int, *, distractors: bool = True, whitening: str | None = "dino"
) -> dict[str, Any]:
    """As the published numbers: 224 px, but 320 for patches of 8 px. DINO's code knows transformers only.

    A network without class token gives its own vector (the mean over places for a ResNet) in its stead.
    """
    return {
        "square": 320 if backbone.patch_size == 8 else 224,
        "interpolation": "bicubic",
        "outputs": ["class:1" if backbone.has_class_token else "features", "gem:4"],
        "whitening": whitening,
        "distractors": distractors,
        **_search(20, "strong/map"),
    }


def _sscd(backbone: Backbone, _image_size: int, **size: int) -> dict[str, Any]:
    """As SSCD's code resizes, whitens and scores; its own networks, all convolutional, pool by GeM with p = 3."""
    return {
        **size,
        "interpolation": "bilinear",
        "outputs": ["class:1", "gem:4"] if backbone.has_class_token else ["gem:3"],
        "whitening": "pca",
        "distractors": True,
        **_search(100, "overall/muap"),
    }


def _native(image_size: int) -> dict[str, Any]:
    """The network's own vector of a center crop at its training size, compared as it is."""
    return {
        "resize": native_resize(image_size),
        "crop": image_size,
        "interpolation": "bicubic",
        "outputs": ["features"],
        "whitening": None,
        "distractors": False,
        **_search(20, "strong/map"),
    }


def _search(num_ranks: int, headline: str) -> dict[str, Any]:
    return {"normalization": "l2", "similarity": "cosine", "num_ranks": num_ranks, "headline": headline}


class _CopydaysPass(NamedTuple):
    """What every pass over images shares."""

    backbone: Backbone
    plan: Protocol
    compute: ComputeOptions

    def features(self, images: ImageSet, progress: Progress | None) -> Tensor:
        """The protocol's outputs side by side, (len(images), D)."""
        outputs: Sequence[str] = self.plan.settings["outputs"]
        parts = extract_outputs(self.backbone, images, self.plan, outputs, progress=progress,
                                **self.compute.passes(self.backbone))
        return torch.cat([parts[output] for output in outputs], dim=1)


def _copies(found: CopydaysSet) -> FileImages:
    """The images of all blocks one after the other, so that one pass serves them."""
    names = (f"{block.name}/{name}" for block in found.blocks for name in block.images.names)
    return FileImages(name=TASK, split="all", source=f"blocks in {found.root}", root=found.root, names=Names(names),
                      allow_truncated=found.originals.allow_truncated)


def _require_enough(run: _CopydaysPass, whitening: FileImages) -> None:
    """DataError unless there are whitening images for all dimensions; how many that are, one made image tells."""
    rows, columns = np.mgrid[:64, :64].astype(np.uint8)
    made = np.stack([4 * rows, 4 * columns, 2 * (rows + columns)], axis=-1)[None]
    image = ArrayImages(name="gradient", split="all", source="an image made here", array=made, ids=np.arange(1))
    width = run._replace(compute=replace(run.compute, workers=0, cache=None)).features(image, None).shape[1]
    least = width + (run.plan.settings["whitening"] == "pca")  # centering takes one
    if len(whitening) < least:
        raise DataError(f"{whitening.root} holds {len(whitening):,} whitening images, too few for features of "
                        f"{width:,} dimensions: at least {least:,} are needed, ten times as many are better; or choose "
                        "the protocol dino-nowhitening (dino-plain: without distractors too), whose numbers cannot be "
                        "compared with published ones")


def _all_features(run: _CopydaysPass, images: Mapping[str, FileImages]) -> dict[str, Tensor]:
    """Features of every part, with progress over the whole; DataError with the unreadable images of all parts."""
    total, progress = sum(map(len, images.values())), run.compute.counter("features")
    before = dict(zip(images, np.cumsum([0, *map(len, images.values())]).tolist(), strict=False))
    shown = {name: None if progress is None else shifted(progress, before[name], total) for name in images}
    try:
        return {name: run.features(part, shown[name]) for name, part in images.items()}
    except DataError:
        bad = [error for name, part in images.items()
               for error in find_unreadable(part, run.compute.workers, shown[name])]
        raise_unreadable([UnreadableImage(name, reason) for name, reason in bad], total)
        raise


def _score(run: _CopydaysPass, found: CopydaysSet, images: Mapping[str, FileImages],
           features: Mapping[str, Tensor]) -> tuple[CopyScores, list[dict[str, Any]]]:
    """The queries are all copies, the database their first block and the distractors; scores and gallery."""
    queries = features["copies"]
    parts = {"queries": queries, "originals": queries[: len(found.originals)]}
    if "distractors" in features:
        parts["distractors"] = features["distractors"]
    if (rule := run.plan.settings["whitening"]) is not None:
        learnt = Whitening.fit(features["whitening"], rule)
        parts = {name: learnt.apply(part) for name, part in parts.items()}
    unit = {name: F.normalize(part) for name, part in parts.items()}
    asked = unit.pop("queries")
    database = torch.cat(list(unit.values()))
    similarities, ids = search_topk(database, asked, run.plan.settings["num_ranks"],
                                    device=run.compute.where(run.backbone))
    originals = np.concatenate([block.originals for block in found.blocks])
    scores = score_neighbors(similarities, ids, originals, {block.name: len(block.images) for block in found.blocks})
    own = _own_queries(found)
    shown = (_shown(images, len(found.originals), own[query], int(originals[own[query]]), ids[own[query]].numpy(),
                    (database @ asked[own[query]]).cpu().numpy()) for query, _ in ends_of(scores.aps[PICTURED]))
    return scores, gallery(scores.aps[PICTURED], shown)


def _own_queries(found: CopydaysSet) -> range:
    """Where the queries of the pictured block stand among all copies."""
    counts = {block.name: len(block.images) for block in found.blocks}
    start = sum(counts[name] for name in list(counts)[: list(counts).index(PICTURED)])
    return range(start, start + counts[PICTURED])


def _shown(images: Mapping[str, FileImages], num_originals: int, query: int, original: int, ids: np.ndarray,
           similarity: np.ndarray) -> Shown:
    """A query, the first of its results `ids` (k,), and its original's rank by `similarity` where it is not there."""
    copies = images["copies"]  # the originals are its first

    def picture(image: int) -> Picture:
        return (Picture(copies, image) if image < num_originals else
                Picture(images["distractors"], image - num_originals))

    def role(image: int) -> str:
        return POSITIVE if image == original else ERROR if image < num_originals else DISTRACTOR

    found = ids.tolist()
    if original in found:  # what was searched decides: another way of adding up may rank near ties otherwise
        rank = found.index(original) + 1
    else:
        rank = max(int(ranks_of(similarity, np.array([original]))[0]), len(found)) + 1
    return Shown(Picture(copies, query), [(picture(image), role(image)) for image in found[:NUM_SHOWN]],
                 [(picture(original), rank)] if rank > NUM_SHOWN else [], 1)


def _detail(found: CopydaysSet, images: Mapping[str, FileImages], scores: CopyScores) -> dict[str, Any]:
    return {
        "official": found.official,
        "num_originals": len(found.originals),
        "num_queries": len(images["copies"]),
        "num_distractors": len(images.get("distractors", ())),
        "num_whitening": len(images.get("whitening", ())),
        "fingerprints": {name: part.fingerprint for name, part in images.items()},
        "fingerprints_cover": covered(**images),
        "aps": {name: np.round(values, _DIGITS).tolist() for name, values in scores.aps.items()},
        # in the other blocks copies are called like their originals
        "queries": {block.name: [plain_text(PurePosixPath(name).stem) for name in block.images.names]
                    for block in found.blocks if block.name in ("original", PICTURED)},
    }
