"""Patch correspondence: does a patch token find the patch of another view that shows the same place?

Of every image two views are cut that differ in scale and color. Each patch token of one looks for the most similar
token of the other, in both directions; geometry knows the right answer, so no labels are needed. What raw pixels,
the same place of the grid and chance reach on the very same views stands beside it.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

from patchssl.data.images import ImageSet
from patchssl.data.open import open_images, split_names
from patchssl.data.unreadable import raise_unreadable, require_readable
from patchssl.eval.cells import Cell, DataPlace, TaskOptions, decode_seconds
from patchssl.eval.protocols import Protocol, choose_protocol
from patchssl.eval.records import Result, covered, joined, make_record
from patchssl.eval.tasks import ANYWHERE, ComputeOptions
from patchssl.eval.transforms import normalize_images
from patchssl.models.backbone import Backbone
from patchssl.models.pixels import PixelPatches, RawPixels, pixel_tokens
from patchssl.runtime.console import LOOK
from patchssl.runtime.device import describe_device
from patchssl.runtime.distributed import all_gather_objects, rank, world_size
from patchssl.runtime.errors import DataError, PatchSSLError, UnreadableImage, UsageError
from patchssl.runtime.loader import BatchLoader
from patchssl.runtime.progress import Progress
from patchssl.views.geometry import Crops, View, patches_per_side
from patchssl.views.matching import match_crops

TASK = "patches"
SOURCES = ("", "pixels/", "position/", "chance/")  # of an answer: prefixes of the metrics `exact` and `within1`
_COLUMNS = tuple(f"{source}{name}" for source in SOURCES for name in ("exact", "within1"))
_SIMILARITIES = 2**26  # in memory at a time: 256 MiB
_DIGITS = 6


def patches_protocol(backbone: Backbone, name: str | None = None, *, pairs: int = 1, seed: int = 0) -> Protocol:
    """The protocol `native` (None: the same), the only one, for `backbone`: views of its training size.

    Size and patch size are settings, as the number of patches to choose from moves the score. Other `pairs` of views
    per image and another `seed` of their draws are part of the protocol's name. UsageError for an unknown name.
    """
    if pairs < 1:
        raise UsageError(f"{pairs} pairs of views per image show nothing; 1 is the least")
    network = with_patches(backbone)
    plan = choose_protocol(TASK, name, network.image_size, {"native": lambda size: _native(size, network.patch_size)},
                           usual="native")
    suffix = (f"-{pairs}-pairs" if pairs != 1 else "") + (f"-seed-{seed}" if seed else "")
    return Protocol(TASK, plan.name + suffix, plan.version, {**plan.settings, "pairs": pairs, "seed": seed})


def find_patches(backbone: Backbone, place: DataPlace, options: TaskOptions) -> Iterator[tuple[str, Any]]:
    """Patch correspondence on the val images of a set that has them, labeled or not."""
    yield f"patches on {place.data}", partial(_cell, backbone, place.data)


def _cell(backbone: Backbone, place: str) -> Cell:
    val, protocol = open_images(place, "val"), patches_protocol(backbone)
    return Cell(TASK, place, val.name, protocol, len(val), backbone.weights_sha256, decode_seconds(val),
                lambda: joined([val.fingerprint]), protocol.name)


def score_patches(backbone: Backbone, data: str, protocol: str | None = None, compute: ComputeOptions = ANYWHERE,
                  **options: Any) -> Result:
    """`evaluate_patches` on the val images of `data`, or all where nothing is split; labels are not needed."""
    images = open_images(data, "val" if "val" in split_names(data) else None)
    compute.say(images.describe())
    return evaluate_patches(backbone, images, protocol, compute=compute, **options)


def evaluate_patches(backbone: Backbone, images: ImageSet, protocol: str | None = None, *, pairs: int = 1,
                     seed: int = 0, compute: ComputeOptions = ANYWHERE, looked_at: bool = False) -> Result:
    """The patch correspondence record of `backbone` on `images`, whose labels are not looked at.

    Metrics: `exact`, the share of patches whose nearest token by cosine is that of the patch which contains their
    center, and `within1`, that patch or one of its eight neighbors; each a mean over images, patches whose center lies
    outside the other view skipped. `pixels/`, `position/` and `chance/` before them: the patches' own pixels as
    tokens, the same place of the grid, and the expectation of a blind guess. Detail: the shares of every image.

    A batch is one of views; on a GPU the network runs in bfloat16. Of several processes each looks at every so many-th
    image. Files are looked at before, unless they were `looked_at` already. DataError for a set without images and,
    after the pass, with all unreadable images; UsageError for a network without one token per patch; PatchSSLError
    names images whose tokens are not finite.
    """
    began = time.monotonic()
    network = with_patches(backbone)
    plan = patches_protocol(network, protocol, pairs=pairs, seed=seed)
    if not len(images):
        raise DataError(f"{images.name} holds no {images.split} images: there is nothing to find patches in")
    where, batch_size = compute.where(network), 64 if compute.batch_size is None else compute.batch_size
    if batch_size < 1:
        raise UsageError(f"a batch of {batch_size} views holds none; 1 is the least")
    if not looked_at:
        require_readable([images], compute.workers, compute.counter(LOOK), compute.say)
    table = _all_tallies(network, images, plan, max(1, batch_size // (2 * pairs)), compute.workers, where,
                         compute.counter("patches"))
    shares = _shares(network, images, table)
    if np.isnan(shares["exact"]).all():
        raise DataError(f"no two views of {images.name} share a patch of {network.patch_size} pixels")
    return make_record(network, plan, dataset=images.name, fingerprints=(images.fingerprint,),
                       metrics={name: float(np.nanmean(values)) for name, values in shares.items()},
                       detail=_detail(images, table, shares), device=describe_device(where),
                       duration=time.monotonic() - began)


def nearest_tokens(queries: Tensor, targets: Tensor) -> Tensor:
    """For each of `queries` (B, N, D) the most similar by cosine of `targets` (B, M, D): ids (B, N) int64."""
    unit, known = F.normalize(queries.float(), dim=-1), F.normalize(targets.float(), dim=-1).transpose(1, 2)
    rows = max(1, _SIMILARITIES // (known.shape[0] * known.shape[2]))
    return torch.cat([(part @ known).argmax(dim=-1) for part in unit.split(rows, dim=1)], dim=1)


def count_hits(found: Tensor, right: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """How many of the patches `found` (B, N) are the `right` ones, and how many those or a neighbor: (B,) each.

    Ids are row-major in a grid of side x side; where `right` is -1 there is nothing to find.
    """
    known = right >= 0
    rows, columns = (found // side - right // side).abs(), (found % side - right % side).abs()
    return ((found == right) & known).sum(-1), ((torch.maximum(rows, columns) <= 1) & known).sum(-1)


def expected_hits(right: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """What `count_hits` gives on average, float64, if every patch of the grid is found equally often."""
    known = right >= 0
    # three of a line and its neighbors, less those beyond either edge
    rows, columns = (3.0 - (line == 0).double() - (line == side - 1).double() for line in (right // side, right % side))
    return known.sum(-1).double() / side**2, (rows * columns * known).sum(-1) / side**2


def draw_views(pixels: Tensor, name: str, settings: Mapping[str, Any]) -> tuple[list[View], Tensor]:
    """The 2 x pairs views of an image (3, H, W) uint8 that its set calls `name`, wide and close by turns.

    A protocol's `settings` say how; also what is seen through the views, (V, 3, size, size) uint8.
    """
    rng = _rng(name, settings["seed"])
    pairs = [draw_pair(rng, pixels.shape[1], pixels.shape[2], settings) for _ in range(settings["pairs"])]
    views = [view for pair in pairs for view in pair]
    return views, torch.stack([cut_view(pixels, view, rng, settings) for view in views])


def draw_pair(rng: np.random.Generator, height: int, width: int, settings: Mapping[str, Any]) -> tuple[View, View]:
    """A wide and a close square crop of an image of height x width pixels, the close one's center inside the wide.

    Areas are shares of the largest square in the image; whole pixels, either view mirrored by chance.
    """
    short = min(height, width)
    sides = [max(1, round(short * math.sqrt(rng.uniform(*settings[name])))) for name in ("wide_area", "close_area")]
    top, left = (int(rng.integers(0, length - sides[0] + 1)) for length in (height, width))
    middle = [start + sides[0] * rng.random() for start in (top, left)]
    corner = [min(max(0, round(at - sides[1] / 2)), length - sides[1])
              for at, length in zip(middle, (height, width), strict=True)]
    mirrored = [bool(rng.random() < settings["mirror"]) for _ in sides]
    size = settings["view_size"]
    return (View(top, left, sides[0], sides[0], mirrored[0], size),
            View(corner[0], corner[1], sides[1], sides[1], mirrored[1], size))


def cut_view(pixels: Tensor, view: View, rng: np.random.Generator, settings: Mapping[str, Any]) -> Tensor:
    """`view` of an image (3, H, W) uint8, resized, mirrored and then colored: (3, size, size) uint8."""
    cut = TF.resized_crop(pixels, int(view.top), int(view.left), int(view.height), int(view.width),
                          [view.size, view.size], TF.InterpolationMode.BICUBIC, antialias=True)
    seen = TF.horizontal_flip(cut) if view.mirrored else cut
    for name in ("brightness", "contrast", "saturation"):
        strength = settings[name]
        seen = getattr(TF, f"adjust_{name}")(seen, rng.uniform(1 - strength, 1 + strength))
    return TF.adjust_hue(seen, rng.uniform(-settings["hue"], settings["hue"]))


def _native(image_size: int, patch_size: int) -> dict[str, Any]:
    """Views as large as the images the network was trained on; strengths of color are those of its training in DINO."""
    size = image_size // patch_size * patch_size
    return {
        "view_size": size, "patch_size": patch_size, "interpolation": "bicubic",
        "wide_area": [0.5, 1.0], "close_area": [0.1, 0.3], "mirror": 0.5,
        "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1,
        "feature": "final patch tokens", "similarity": "cosine", "queries": "both views", "rule": "center",
    }


def with_patches(backbone: Backbone) -> Backbone:
    """`backbone`, whose pixels are grouped into patches if it is made of nothing else."""
    bare = isinstance(backbone, RawPixels) and not isinstance(backbone, PixelPatches)
    return PixelPatches(backbone.image_size) if bare else backbone


class _Views(NamedTuple):
    """The views of one image, or of B of them: V = 2 x pairs, wide and close by turns."""

    pixels: Tensor  # (V, 3, S, S) uint8
    boxes: Tensor  # (V, 4) float64 as in `Crops`
    mirrored: Tensor  # (V,) bool


class _Pairs(Dataset[Any]):
    """Views by index of the image; of an unreadable one its (name, reason), so that workers can send it."""

    def __init__(self, images: ImageSet, settings: Mapping[str, Any]) -> None:
        self._images, self._settings = images, dict(settings)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> _Views | tuple[str, str]:
        try:
            pixels = torch.from_numpy(self._images.pixels(index)).permute(2, 0, 1).contiguous()
        except UnreadableImage as error:
            return error.name, error.reason
        views, cut = draw_views(pixels, self._images.item_name(index), self._settings)
        crops = Crops.of(views)
        return _Views(cut, crops.boxes, crops.mirrored)


def _rng(name: str, seed: int) -> np.random.Generator:
    """Draws of the image `name`: the same in whatever order, and on however many processes, images are looked at."""
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return np.random.Generator(np.random.PCG64([seed, *np.frombuffer(digest, dtype="<u4").tolist()]))


def _all_tallies(backbone: Backbone, images: ImageSet, plan: Protocol, batch_size: int, workers: int,
                 device: torch.device, progress: Progress | None) -> np.ndarray:
    """(len(images), 1 + 8): how many patches were looked for, and hits as in `_COLUMNS`, NaN for tokens that are."""
    own = range(rank(), len(images), world_size())
    training = backbone.training
    backbone.to(device).eval()
    try:
        table, bad = _tallies(backbone, images, plan, own, batch_size, workers, device, progress)
    finally:
        if training:
            backbone.train()
    found = all_gather_objects((list(own), table, bad))
    unreadable = sorted((entry for _, _, entries in found for entry in entries))
    raise_unreadable([UnreadableImage(name, reason) for name, reason in unreadable], len(images))
    whole = np.empty((len(images), 1 + len(_COLUMNS)))
    for places, part, _ in found:
        whole[places] = part
    return whole


def _tallies(backbone: Backbone, images: ImageSet, plan: Protocol, own: Sequence[int], batch_size: int, workers: int,
             device: torch.device, progress: Progress | None) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Rows of the images `own` and what cannot be read of them; past such an image the others are only decoded."""
    batches = [list(own[at : at + batch_size]) for at in range(0, len(own), batch_size)]
    loader = BatchLoader(_Pairs(images, plan.settings), batches, list, workers=min(workers, len(batches)),
                         pin_memory=device.type == "cuda")
    rows: list[np.ndarray] = []
    bad: list[tuple[str, str]] = []
    done = 0
    for items in loader:
        bad += [(item[0], item[1]) for item in items if len(item) == 2]
        if not bad:
            rows.append(_tally(backbone, _Views(*(torch.stack(parts) for parts in zip(*items, strict=True))), device))
        done += len(items)
        if progress is not None:
            progress(done, len(own))
    return np.concatenate(rows) if rows else np.empty((0, 1 + len(_COLUMNS))), bad


@torch.inference_mode()
def _tally(backbone: Backbone, views: _Views, device: torch.device) -> np.ndarray:
    """(B, 1 + 8) of B images, summed over both directions and all pairs of views."""
    patch, count, size = backbone.patch_size, *views.pixels.shape[1::3]
    side = patches_per_side(size, patch)
    pixels = views.pixels.to(device, non_blocking=True)
    tokens = view_tokens(backbone, pixels.flatten(0, 1), side).unflatten(0, (-1, count))
    plain = pixel_tokens(pixels.flatten(0, 1).float().div_(255), patch).unflatten(0, (-1, count))
    place = torch.arange(side**2, device=device)
    sums = torch.zeros(len(pixels), 1 + len(_COLUMNS), dtype=torch.float64, device=device)
    for query in range(count):
        target = query ^ 1  # the other one of the pair
        known, asked = (Crops(views.boxes[:, i], views.mirrored[:, i], size) for i in (target, query))
        right = match_crops(known, asked, patch, "center").to(device)
        hits = [*count_hits(nearest_tokens(tokens[:, query], tokens[:, target]), right, side),
                *count_hits(nearest_tokens(plain[:, query], plain[:, target]), right, side),
                *count_hits(place, right, side), *expected_hits(right, side)]
        sums += torch.stack([(right >= 0).sum(-1), *hits], dim=1)
    sums[~torch.isfinite(torch.linalg.vector_norm(tokens, dim=-1)).flatten(1).all(dim=1), 1:3] = torch.nan
    return sums.cpu().numpy()


def view_tokens(backbone: Backbone, views: Tensor, side: int) -> Tensor:
    """Tokens (B, side^2, D) float32 of views (B, 3, S, S) uint8."""
    images = normalize_images(views, backbone.mean, backbone.std)
    with torch.autocast(views.device.type, torch.bfloat16, enabled=views.device.type == "cuda"):
        tokens = backbone.patch_tokens(images)
    if tokens.ndim != 3 or tokens.shape[:2] != (len(views), side**2):
        raise UsageError(f"{backbone.name} gave patch tokens of shape {tuple(tokens.shape)} for {len(views)} views of "
                         f"{side} x {side} patches; one token per patch is needed")
    return tokens.float()


def _shares(backbone: Backbone, images: ImageSet, table: np.ndarray) -> dict[str, np.ndarray]:
    """Shares (len(images),) of each metric, NaN for an image whose views share no patch."""
    bad = np.isnan(table).any(axis=1).nonzero()[0].tolist()
    if bad:
        named = ", ".join(images.item_name(at) for at in bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise PatchSSLError(f"the tokens that {backbone.name} gives for {len(bad):,} of {len(images):,} images hold "
                            f"NaN or infinity, or are too large to be normalized ({named}): its weights are damaged, "
                            "its training diverged, or they overflow in half precision")
    counts = np.where(table[:, 0] > 0, table[:, 0], np.nan)
    return {name: table[:, 1 + at] / counts for at, name in enumerate(_COLUMNS)}


def _detail(images: ImageSet, table: np.ndarray, shares: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Per image in the set's order, None where its views share no patch: for a paired bootstrap between models."""
    return {
        "num_images": len(images),
        "fingerprints_cover": covered(images=images),
        "num_patches": int(table[:, 0].sum()),
        "shares": {name: [None if np.isnan(share) else round(float(share), _DIGITS) for share in shares[name]]
                   for name in ("exact", "within1")},
    }
