"""Speed measured side by side in one run, on one thread, as ratios against peers; JSON-able out.

Contenders take turns and medians of processor time are kept: whatever else the machine does meets them alike.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms as tv

from patchssl.bench.timing import Candidate, machine, median_times
from patchssl.data.decode import decode_image
from patchssl.data.images import ArrayImages
from patchssl.models.backbone import IMAGENET_MEAN, IMAGENET_STD
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.dataset import ViewDataset, collate_views
from patchssl.pretrain.engine import color_views
from patchssl.views.config import PhotometricConfig, ViewConfig
from patchssl.views.crops import cut_views, draw_views, sample_rng

BATCH = 8  # images colored together
KINDS = {"layered": "crops + color + layered", "replaced": "crops + replaced"}  # of patch-wise color
CPU = torch.device("cpu")


def bench_views(image: str | Path | None = None, repeats: int = 20) -> dict[str, Any]:
    """Milliseconds per image for 2 x 224 + 8 x 96 px views of one photograph, and how much faster than peers.

    `image`: a file; by default a made-up photograph of 500 x 375 pixels, about 50 KB as a JPEG. "crops"
    draws, cuts, resizes and mirrors; "crops + color" adds whole-view color and normalization to float32, as
    the peers do; "+ layered" then changes each patch, which is PW-Self's, "+ replaced" colors each patch instead of
    the view. Decoding is in none of them and stated by itself. "color" is what is left without the crops: whole-view
    color by itself and, as its shares, what each way to color patches adds to it.
    """
    with _photograph(image) as path:
        pixels, num_bytes = decode_image(path), path.stat().st_size
        decode = Candidate(lambda turn: decode_image(path))
        candidates = {"decode": decode, **_view_candidates(pixels)}
        times = median_times(candidates, repeats)
    peers = [name for name in times if name.startswith("peer: ")]
    ours = [name for name in times if name.startswith("crops")]
    return {
        "what": "views of one image (2 x 224 + 8 x 96 px) on one thread; peers crop, color and normalize",
        "image": {"height": pixels.shape[0], "width": pixels.shape[1], "bytes": num_bytes},
        "milliseconds": {name: 1e3 * seconds for name, seconds in times.items()},
        "color": _color_shares({name: 1e3 * seconds for name, seconds in times.items()}),
        "times faster": {peer: {name: times[peer] / times[name] for name in ours} for peer in peers},
        "repeats": repeats,
        "machine": machine(),
    }


def _color_shares(times: dict[str, float]) -> dict[str, float]:
    """Milliseconds of whole-view color alone, and the time that each kind of patch-wise color adds as a share of it."""
    whole = times["crops + color"] - times["crops"]
    kinds = {kind: times[name] - times["crops + color"] for kind, name in KINDS.items()}
    peers = times["peer: torchvision on PIL, patch by patch"] - times["peer: torchvision on PIL"]
    return {"whole-view color, ms": whole,
            **{f"{kind} adds, share of it": added / whole for kind, added in kinds.items()},
            "patch by patch on PIL adds, share of it": peers / whole}


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


def _view_candidates(pixels: NDArray[np.uint8]) -> dict[str, Candidate]:
    """Ours, then the peers that are installed."""
    picture = Image.fromarray(pixels)
    candidates = {
        "crops": Candidate(partial(_crops, pixels)),
        "crops + color": _colored(pixels, "none"),
        KINDS["layered"]: _colored(pixels, "layered"),
        KINDS["replaced"]: _colored(pixels, "replace"),
        "peer: torchvision on PIL": Candidate(_torchvision_views(picture)),
        "peer: torchvision on PIL, patch by patch": Candidate(_torchvision_views(picture, _change_patches)),
    }
    try:
        from lightly.transforms import DINOTransform
    except ImportError:
        return candidates
    transform = DINOTransform(n_local_views=8)
    return {**candidates, "peer: lightly DINOTransform": Candidate(lambda turn: transform(picture))}


def _crops(pixels: NDArray[np.uint8], turn: int) -> tuple[Tensor, Tensor]:
    views = draw_views(sample_rng(0, 0, turn, "crops"), pixels.shape[0], pixels.shape[1], ViewConfig())
    return cut_views(pixels, views[:2]), cut_views(pixels, views[2:])


def _colored(pixels: NDArray[np.uint8], patchwise: Literal["none", "layered", "replace"]) -> Candidate:
    """The way of a training batch: drawn, cut, collated, colored, normalized."""
    recipe = Recipe(photometric=PhotometricConfig(patchwise=patchwise))
    copies = np.zeros(BATCH, dtype=np.int64)
    images = ArrayImages(name="photograph", split="all", source="photograph", array=pixels[None], ids=copies)
    dataset = ViewDataset(images, recipe, seed=0)

    def run(turn: int) -> tuple[Tensor, Tensor]:
        return color_views(collate_views([dataset[turn, index] for index in range(BATCH)]), recipe, CPU)

    return Candidate(run, BATCH)


def _torchvision_views(picture: Image.Image, change: Callable[[Image.Image], Image.Image] | None = None,
                       ) -> Callable[[int], list[Tensor]]:
    """Multi-crop as in DINO's recipe, from torchvision's transforms of PIL images; `change`: of the colored view."""
    def view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> Callable[..., Tensor]:
        return tv.Compose([
            tv.RandomResizedCrop(size, scale, interpolation=tv.InterpolationMode.BICUBIC),
            tv.RandomHorizontalFlip(),
            tv.RandomApply([tv.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            tv.RandomGrayscale(0.2),
            tv.RandomApply([_pil_blur], p=blur),
            tv.RandomSolarize(128, p=solarize),
            *([change] if change else []),
            tv.ToTensor(),
            tv.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    views = [view(224, (0.4, 1.0), 1.0, 0.0), view(224, (0.4, 1.0), 0.1, 0.2)]
    views += [view(96, (0.05, 0.4), 0.5, 0.0)] * 8
    return lambda turn: [transform(picture) for transform in views]


def _change_patches(view: Image.Image, size: int = 16) -> Image.Image:
    """Each patch changed by itself, one after the other, in PIL: the way of the authors' PatchAugmentation."""
    steps = [tv.ColorJitter(brightness=0.1, hue=0.1), tv.GaussianBlur((1, 5), (0.1, 2.0)),
             tv.RandomAdjustSharpness(2), tv.RandomPosterize(3)]
    changed = view.copy()
    for top in range(0, view.height, size):
        for left in range(0, view.width, size):
            patch = view.crop((left, top, left + size, top + size))
            for step in random.sample(steps, len(steps)):
                patch = step(patch)
            changed.paste(patch, (left, top))
    return changed


def _pil_blur(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
