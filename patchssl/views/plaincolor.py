"""The color of one view in its plain form: torchvision's own operations, one patch after the other.

`patchssl.views.color` does the same to all views of a batch at once, on any device; tests hold the two equal.

Whole views are colored as DINO's (arXiv 2104.14294; `DataAugmentationDINO` in facebookresearch/dino, main_dino.py).
Patch-wise color is PW-Self's (arXiv 2310.18651): the whole view is colored first, then each patch mildly, by
`change_patches` (PatchAugmentation in alijavidani/dino, branch imagenet100-patch_augmentation, 26acb86). The harsher
`replace_patches`, which is not theirs, draws anew for each patch what a whole view would have drawn, instead of it.
What was drawn is in `ColorDraws` and `PatchDraws`, here of one view (batch shape ()); images are (3, height, width)
float in [0, 1], patches 8-bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torchvision.transforms.functional as TF
from torch import Tensor

from patchssl.views.color import BLUR_REACH, ORDERS, ColorDraws
from patchssl.views.patchcolor import BLUR_REACH as PATCH_BLUR_REACH
from patchssl.views.patchcolor import NEUTRAL, STEPS, PatchDraws
from patchssl.views.patchcolor import ORDERS as ORDERS_OF_STEPS


def color_view(view: Tensor, draws: ColorDraws, patch_size: int, patches: PatchDraws | None = None) -> Tensor:
    """The view (3, S, S) colored as `draws` say, and then, where there are draws of them, its patches changed."""
    colored = replace_patches(view, draws, patch_size) if draws.replaced else color_whole(view, draws)
    return colored if patches is None else change_patches(colored, patches, patch_size)


def change_patches(view: Tensor, draws: PatchDraws, patch_size: int) -> Tensor:
    """Each patch of the ViT's grid changed by itself, on 8-bit values."""
    changed = (255 * view).round().to(torch.uint8)
    per_side = view.shape[-1] // patch_size
    for patch in range(per_side**2):
        top, left = (patch_size * place for place in divmod(patch, per_side))
        pixels = changed[:, top : top + patch_size, left : left + patch_size]
        pixels.copy_(change_patch(pixels, draws.strengths[patch].tolist(), int(draws.order[patch])))
    return changed / 255


def change_patch(pixels: Tensor, strengths: Sequence[float], order: int) -> Tensor:
    """One patch (3, p, p) uint8 with the five steps of its order taken, each by torchvision; neutral ones left out.

    The blur is 1 pixel wide and 5 high, or what a smaller patch reflects.
    """
    for step in ORDERS_OF_STEPS[order]:
        strength = strengths[step]
        if strength != NEUTRAL[step]:
            pixels = _STEPS[STEPS[step]](pixels, strength)
    return pixels


def _blur_columns(pixels: Tensor, sigma: float) -> Tensor:
    reach = min(PATCH_BLUR_REACH, pixels.shape[-1] - 1)
    return TF.gaussian_blur(pixels, [1, 2 * reach + 1], [sigma] * 2)


_STEPS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "brightness": TF.adjust_brightness, "hue": TF.adjust_hue, "blur": _blur_columns,
    "sharpness": TF.adjust_sharpness, "posterize": lambda pixels, bits: TF.posterize(pixels, int(bits))}


def replace_patches(view: Tensor, draws: ColorDraws, patch_size: int) -> Tensor:
    """Blur the view, then jitter, grayscale and solarize each patch of the ViT's grid by draws of its own."""
    colored = blur(view, draws.sigma).clone()
    per_side = view.shape[-1] // patch_size
    for patch in range(per_side**2):
        top, left = (patch_size * place for place in divmod(patch, per_side))
        pixels = colored[:, top : top + patch_size, left : left + patch_size]
        pixels.copy_(solarize(recolor(pixels, draws, patch), draws, patch))
    return colored


def color_whole(view: Tensor, draws: ColorDraws) -> Tensor:
    """Jitter, grayscale, blur, solarize: DINO's order. All patches of a whole view have the same draws."""
    return solarize(blur(recolor(view, draws, 0), draws.sigma), draws, 0)


def recolor(image: Tensor, draws: ColorDraws, patch: int) -> Tensor:
    """Jitter of an image x by factors f in the order that `patch` drew, then grayscale where it drew it.

    Brightness f x, contrast f x + (1 - f) mean gray(x), saturation f x + (1 - f) gray(x), each cut to [0, 1]; hue
    turned by f turns in HSV. No jitter is f = 1, 1, 1, 0.
    """
    adjust = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue  # as JITTERS
    for which in ORDERS[int(draws.order[patch])]:
        image = adjust[which](image, float(draws.factors[patch, which]))
    return TF.rgb_to_grayscale(image, num_output_channels=3) if draws.grayscale[patch] else image


def solarize(image: Tensor, draws: ColorDraws, patch: int) -> Tensor:
    """Values of at least 1/2 become 1 - value, where `patch` drew it."""
    return TF.solarize(image, 0.5) if draws.solarize[patch] else image


def blur(view: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian of `sigma` () pixels, 0 = none, cut off at BLUR_REACH standard deviations; edges reflect."""
    if not sigma:
        return view
    reach = min(math.ceil(BLUR_REACH * float(sigma)), view.shape[-1] - 1)
    return TF.gaussian_blur(view, [2 * reach + 1] * 2, [float(sigma)] * 2)
