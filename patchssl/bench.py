"""Speed measured side by side in one run, on one thread, as ratios against peers; JSON-able out.

Contenders take turns and medians of processor time are kept: whatever else the machine does meets them alike.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms as tv

from patchssl.backbone import IMAGENET_MEAN, IMAGENET_STD
from patchssl.bench_timing import Candidate, machine, median_times, peak_memory
from patchssl.geometry import Crops, View, patch_at, patch_centers, patches_per_side
from patchssl.imagefile import decode_image
from patchssl.imageset import ArrayImages
from patchssl.matching import RULES, match_crops, match_patches
from patchssl.pretrain.config import PhotometricConfig, Recipe, ViewConfig
from patchssl.pretrain.engine import color_views
from patchssl.pretrain.views import ViewDataset, collate_views, cut_views, draw_views, sample_rng

PATCH_SIZES = (32, 16, 8)
EMBED_DIM = 384  # ViT-S, for the tokens of similarity matching
BATCH = 8  # images colored together
CPU = torch.device("cpu")


def bench_views(image: str | Path | None = None, repeats: int = 20) -> dict[str, Any]:
    """Milliseconds per image for 2 x 224 + 8 x 96 px views of one photograph, and how much faster than peers.

    `image`: a file; by default a made-up photograph of 500 x 375 pixels, about 50 KB as a JPEG. "crops"
    draws, cuts, resizes and mirrors; "crops + color" adds whole-view color and normalization to float32, as
    the peers do; "crops + patch-wise color" is PW-Self's. Decoding is in none of them and stated by itself.
    """
    with _photograph(image) as path:
        pixels, num_bytes = decode_image(path), path.stat().st_size
        decode = Candidate(lambda turn: decode_image(path))
        contenders = {"decode": decode, **_view_contenders(pixels)}
        times = median_times(contenders, repeats)
    peers = [name for name in times if name.startswith("peer: ")]
    ours = [name for name in times if name.startswith("crops")]
    return {
        "what": "views of one image (2 x 224 + 8 x 96 px) on one thread; peers crop, color and normalize",
        "image": {"height": pixels.shape[0], "width": pixels.shape[1], "bytes": num_bytes},
        "milliseconds": {name: 1e3 * seconds for name, seconds in times.items()},
        "times faster": {peer: {name: times[peer] / times[name] for name in ours} for peer in peers},
        "repeats": repeats,
        "machine": machine(),
    }


def bench_matching(num_images: int = 64, repeats: int = 20, num_pairs: int = 6000) -> dict[str, Any]:
    """Milliseconds to match all 18 pairs of 2 x 224 and 8 x 96 px views of a batch, and the peers' time.

    Peers, timed on an eighth of the batch and scaled up: `match_patches` called pair by pair, and similarity
    matching (each student token takes the teacher token of greatest cosine; random tokens of 384 numbers, the
    network that would make them not counted). "MiB" are the tensors a call makes, at their most, the peers'
    scaled up as their time, though nothing keeps them from going image by image. "quality" is `rule_quality`
    over `num_pairs` pairs.
    """
    views = _drawn(num_images, ViewConfig())
    times: dict[str, dict[str, float]] = {}
    memory: dict[str, dict[str, float]] = {}
    for patch_size in PATCH_SIZES:
        contenders = _matching_candidates(views, patch_size)
        memory[f"patch {patch_size}"] = {name: peak_memory(partial(contender.run, 0)) * num_images / contender.units
                                         for name, contender in contenders.items() if name != "pair by pair"}
        times[f"patch {patch_size}"] = {name: 1e3 * num_images * seconds
                                        for name, seconds in median_times(contenders, repeats).items()}
    return {
        "what": f"matching all 18 pairs of views (2 x 224 + 8 x 96 px) of {num_images} images on one thread",
        "milliseconds": times,
        "MiB": memory,
        "patches of a global view": {f"patch {p}": patches_per_side(224, p) ** 2 for p in PATCH_SIZES},
        "times faster than": {name: {size: row[name] / row["center"] for size, row in times.items()}
                              for name in ("pair by pair", "similarity")},
        "growth from patch 32 to 8": {name: times["patch 8"][name] / times["patch 32"][name]
                                      for name in times["patch 8"]},
        "quality": {rule: rule_quality(rule, num_pairs) for rule in RULES},
        "repeats": repeats,
        "machine": machine(),
    }


def rule_quality(rule: str, num_pairs: int = 6000, seed: int = 0) -> dict[str, float]:
    """How well `rule` finds the teacher patch that holds a student patch's center, over random pairs.

    A global 224 px and a local 96 px view of a 500 x 375 image, patches of 16 px. "exact": share of matches
    whose teacher patch contains the center; "off by more than a patch": share whose two centers are more than
    one teacher patch apart in height or in width; "matches": how many there are per pair.
    """
    config = ViewConfig(num_global=1, num_local=1)
    teacher, student = (Crops.of(side) for side in zip(*_drawn(num_pairs, config, seed), strict=True))
    found = match_crops(teacher, student, 16, rule)
    image, patch = (found >= 0).nonzero(as_tuple=True)
    matched = found[image, patch]
    y, x = patch_centers(student, 16)
    exact = patch_at(teacher, y, x, 16)[image, patch] == matched
    teacher_y, teacher_x = patch_centers(teacher, 16)
    patch_height, patch_width = teacher.boxes.T[2:] / patches_per_side(224, 16)
    rows = (y[image, patch] - teacher_y[image, matched]).abs() / patch_height[image]
    columns = (x[image, patch] - teacher_x[image, matched]).abs() / patch_width[image]
    return {"exact": float(exact.double().mean()),
            "off by more than a patch": float((torch.maximum(rows, columns) > 1).double().mean()),
            "matches": len(image) / num_pairs}


def made_up_photograph(height: int = 375, width: int = 500, seed: int = 0) -> NDArray[np.uint8]:
    """Clouds (height, width, 3) uint8 whose spectrum falls as that of photographs; about 50 KB as a JPEG."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    phases = np.exp(2j * np.pi * rng.random((4, *frequency.shape)))
    fields = np.fft.irfft2(phases * frequency**-1.4, s=(height, width))
    fields = (fields - fields.mean((1, 2), keepdims=True)) / fields.std((1, 2), keepdims=True)
    colors = fields[:1] + 0.4 * fields[1:]  # mostly gray, as photographs are
    return np.clip(128 + 50 * colors, 0, 255).astype(np.uint8).transpose(1, 2, 0)


@contextmanager
def _photograph(image: str | Path | None) -> Iterator[Path]:
    """The user's file, or a made-up one for as long as it is needed."""
    if image is not None:
        yield Path(image)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photograph.jpg"
        Image.fromarray(made_up_photograph()).save(path, quality=85)
        yield path


def _view_contenders(pixels: NDArray[np.uint8]) -> dict[str, Candidate]:
    """Ours, then the peers that are installed."""
    picture = Image.fromarray(pixels)
    contenders = {
        "crops": Candidate(partial(_crops, pixels)),
        "crops + color": _colored(pixels, patch_share=0.0),
        "crops + patch-wise color": _colored(pixels, patch_share=1.0),
        "peer: torchvision on PIL": Candidate(_torchvision_views(picture)),
    }
    try:
        from lightly.transforms import DINOTransform
    except ImportError:
        return contenders
    transform = DINOTransform(n_local_views=8)
    return {**contenders, "peer: lightly DINOTransform": Candidate(lambda turn: transform(picture))}


def _crops(pixels: NDArray[np.uint8], turn: int) -> tuple[Tensor, Tensor]:
    views = draw_views(sample_rng(0, 0, turn, "crops"), pixels.shape[0], pixels.shape[1], ViewConfig())
    return cut_views(pixels, views[:2]), cut_views(pixels, views[2:])


def _colored(pixels: NDArray[np.uint8], patch_share: float) -> Candidate:
    """The way of a training batch: drawn, cut, collated, colored, normalized."""
    recipe = Recipe(photometric=PhotometricConfig(patch_share=patch_share))
    copies = np.zeros(BATCH, dtype=np.int64)
    images = ArrayImages(name="photograph", split="all", source="photograph", array=pixels[None], ids=copies)
    dataset = ViewDataset(images, recipe, seed=0)

    def run(turn: int) -> tuple[Tensor, Tensor]:
        return color_views(collate_views([dataset[turn, index] for index in range(BATCH)]), recipe, CPU)

    return Candidate(run, BATCH)


def _torchvision_views(picture: Image.Image) -> Callable[[int], list[Tensor]]:
    """Multi-crop as in DINO's recipe, from torchvision's transforms of PIL images."""
    def view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> Callable[..., Tensor]:
        return tv.Compose([
            tv.RandomResizedCrop(size, scale, interpolation=tv.InterpolationMode.BICUBIC),
            tv.RandomHorizontalFlip(),
            tv.RandomApply([tv.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            tv.RandomGrayscale(0.2),
            tv.RandomApply([_pil_blur], p=blur),
            tv.RandomSolarize(128, p=solarize),
            tv.ToTensor(),
            tv.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    views = [view(224, (0.4, 1.0), 1.0, 0.0), view(224, (0.4, 1.0), 0.1, 0.2)]
    views += [view(96, (0.05, 0.4), 0.5, 0.0)] * 8
    return lambda turn: [transform(picture) for transform in views]


def _pil_blur(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def _drawn(num_images: int, config: ViewConfig, seed: int = 0) -> list[list[View]]:
    """Views of that many images of 500 x 375 pixels."""
    return [draw_views(sample_rng(seed, 0, index, "crops"), 375, 500, config) for index in range(num_images)]


def _matching_candidates(views: Sequence[Sequence[View]], patch_size: int) -> dict[str, Candidate]:
    """Every rule on the whole batch, the peers on an eighth of it."""
    teacher = _batch_crops([image[:2] for image in views])
    local = _batch_crops([image[2:] for image in views])
    other = Crops(teacher.boxes.flip(1), teacher.mirrored.flip(1), teacher.size)
    rows = Crops(teacher.boxes[:, :, None], teacher.mirrored[:, :, None], teacher.size)
    columns = Crops(local.boxes[:, None], local.mirrored[:, None], local.size)

    def batched(rule: str, turn: int) -> tuple[Tensor, Tensor]:
        return match_crops(teacher, other, patch_size, rule), match_crops(rows, columns, patch_size, rule)

    few = views[:max(1, len(views) // 8)]
    tokens = _random_tokens(len(few), patch_size)
    return {**{rule: Candidate(partial(batched, rule), len(views)) for rule in RULES},
            "pair by pair": Candidate(lambda turn: _pair_by_pair(few, patch_size), len(few)),
            "similarity": Candidate(lambda turn: _similarity(*tokens), len(few))}


def _batch_crops(views: Sequence[Sequence[View]]) -> Crops:
    """V crops of each of B images, boxes (B, V, 4)."""
    flat = Crops.of([view for image in views for view in image])
    shape = (len(views), len(views[0]))
    return Crops(flat.boxes.view(*shape, 4), flat.mirrored.view(shape), flat.size)


def _pair_by_pair(views: Sequence[Sequence[View]], patch_size: int) -> None:
    for image in views:
        for teacher in image[:2]:
            for student in image:
                if student is not teacher:
                    match_patches(teacher, student, patch_size)


def _random_tokens(num_images: int, patch_size: int) -> tuple[Tensor, Tensor]:
    """Normalized tokens (B, 2, N, D) of global and (B, 8, n, D) of local views."""
    generator = torch.Generator().manual_seed(0)
    counts = [(2, patches_per_side(224, patch_size) ** 2), (8, patches_per_side(96, patch_size) ** 2)]
    tokens = [torch.randn(num_images, *count, EMBED_DIM, generator=generator) for count in counts]
    return F.normalize(tokens[0], dim=-1), F.normalize(tokens[1], dim=-1)


def _similarity(teacher: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher token of greatest cosine for each student token of all 18 pairs of each image."""
    def nearest(student: Tensor, teacher: Tensor) -> Tensor:
        return (student @ teacher.mT).argmax(-1)

    return nearest(teacher.flip(1), teacher), nearest(local[:, None].flatten(2, 3), teacher)
