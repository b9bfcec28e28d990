"""The crops of an image's views: drawn from (seed, epoch, index) alone, and cut out.

All randomness of a sample starts at `sample_rng`: each kind of draw (crops, color, masks, ...) has a stream of its own,
so that a changed setting of one leaves the others as they were, and nothing depends on a worker or a process.
`draw_views` is multi-crop (SwAV, arXiv 2006.09882): a few large views and many small ones, each a random resized crop
as torchvision's RandomResizedCrop draws it, mirrored with some probability. `cut_views` makes pixels of them; their
color comes later, on the training device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from patchssl.runtime.errors import UsageError, unknown_choice
from patchssl.views.config import ViewConfig
from patchssl.views.geometry import View

STREAMS = {"crops": 0, "color": 1, "drop_path": 2, "masks": 3, "shuffle": 4, "matches": 5, "patch_color": 6}
TRIES = 10  # random crops before the central one, as torchvision's RandomResizedCrop
DRAWS_PER_VIEW = 2 * TRIES + 3  # (area, aspect) of every try, then top, left, mirror


def sample_rng(seed: int, epoch: int, index: int, stream: str) -> np.random.Generator:
    """The generator of one kind of draw (a name in `STREAMS`) for image `index` in `epoch`."""
    if stream not in STREAMS:
        raise ValueError(unknown_choice("stream", stream, STREAMS))
    if seed < 0:
        raise UsageError(f"seed = {seed} is negative; choose a whole number from 0 on")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, index, STREAMS[stream]])))


def draw_views(rng: np.random.Generator, height: int, width: int, config: ViewConfig) -> list[View]:
    """Random resized crops of an image of height x width pixels, in whole pixels, globals first.

    Each view takes the same number of draws: the first views do not depend on how many follow.
    """
    views = []
    for number, draws in enumerate(rng.random((config.num_views, DRAWS_PER_VIEW)).tolist()):
        is_global = number < config.num_global
        scale, size = ((config.global_scale, config.global_size) if is_global
                       else (config.local_scale, config.local_size))
        crop_height, crop_width, is_central = _crop_size(draws, height, width, scale, config.aspect)
        free_rows, free_columns = height - crop_height, width - crop_width
        top = free_rows // 2 if is_central else int(draws[-3] * (free_rows + 1))
        left = free_columns // 2 if is_central else int(draws[-2] * (free_columns + 1))
        views.append(View(top, left, crop_height, crop_width, draws[-1] < config.mirror, size))
    return views


def _crop_size(draws: Sequence[float], height: int, width: int, scale: tuple[float, float],
               aspect: tuple[float, float]) -> tuple[int, int, bool]:
    """Height and width in pixels, and whether it is the central crop for images that no random one fitted."""
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for area_draw, aspect_draw in zip(draws[:2 * TRIES:2], draws[1:2 * TRIES:2], strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        ratio = math.exp(low + (high - low) * aspect_draw)
        crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            return crop_height, crop_width, False
    if width < height * aspect[0]:
        return max(1, round(width / aspect[0])), width, True
    if width > height * aspect[1]:
        return height, max(1, round(height * aspect[1])), True
    return height, width, True


def cut_views(pixels: NDArray[np.uint8], views: Sequence[View]) -> Tensor:
    """Cut and resize (bicubic, antialiased), then mirror: (len(views), 3, size, size) uint8, not yet colored.

    `pixels` (H, W, 3) uint8; the views share one size and lie inside the image in whole pixels.
    """
    resized = []
    for view in views:
        top, left = int(view.top), int(view.left)
        bottom, right = top + int(view.height), left + int(view.width)
        if not (0 <= top < bottom <= pixels.shape[0] and 0 <= left < right <= pixels.shape[1]):
            raise ValueError(f"{view} is not inside an image of {pixels.shape[0]} x {pixels.shape[1]} pixels")
        # a copy of its own with a batch dimension is channels-last to torch, which resizes it fastest
        crop = torch.from_numpy(pixels[None, top:bottom, left:right].copy()).permute(0, 3, 1, 2)
        out = F.interpolate(crop, size=(view.size, view.size), mode="bicubic", antialias=True)
        resized.append(out.flip(-1) if view.mirrored else out)
    return torch.cat(resized).contiguous()
