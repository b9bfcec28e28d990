"""Settings of what a network sees: `ViewConfig` of crops, `PhotometricConfig` of color, `MaskConfig` of masks.

They are the parts `views`, `photometric` and `masks` of a recipe (`patchssl.pretrain.config`), whose other parts have
the same base, `ConfigPart`. Sizes are pixels of a view, scales shares of the image's area, probabilities are from 0 to
1. The defaults are DINO's multi-crop and whole-view color (arXiv 2104.14294), the patch-wise color of PW-Self's authors
and iBOT's masks (arXiv 2111.07832).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Range = tuple[NonNegativeFloat, NonNegativeFloat]


class ConfigPart(BaseModel):
    """Base of every part of a recipe: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ViewConfig(ConfigPart):
    """Multi-crop views: sizes in pixels, scales as a share of the image area."""

    num_global: Annotated[int, Field(ge=1)] = 2
    num_local: NonNegativeInt = 8
    global_size: PositiveInt = 224
    local_size: PositiveInt = 96
    global_scale: Range = (0.4, 1.0)
    local_scale: Range = (0.05, 0.4)
    aspect: Range = (3 / 4, 4 / 3)  # width / height of a crop, drawn log-uniformly
    mirror: Share = 0.5  # probability
    shared_in_batch: bool = False  # crops, mirror and color drawn once for all images of a batch, in fractions of each

    @property
    def num_views(self) -> int:
        return self.num_global + self.num_local

    @model_validator(mode="after")
    def _ranges_ascend(self) -> ViewConfig:
        for name in ("global_scale", "local_scale", "aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"views.{name} = [{low}, {high}] must be positive and ascending")
            if name != "aspect" and high > 1:
                raise ValueError(f"views.{name} = [{low}, {high}] are shares of the image area, at most 1")
        if self.num_views < 2:
            raise ValueError(f"views.num_global = {self.num_global} and views.num_local = {self.num_local}: "
                             "self-distillation compares two different views, ask for at least two")
        return self


class PatchColorConfig(ConfigPart):
    """What `patchwise: layered` does to each patch of a colored view: four operations, in an order drawn anew.

    The defaults are those of the authors' PatchAugmentation (alijavidani/dino, branch imagenet100-patch_augmentation,
    26acb86). They work on 8-bit values, as torchvision's, whose names and meanings the settings have.
    """

    jitter: Share = 1.0  # probability of a patch to be jittered: brightness and hue, in an order drawn anew too
    brightness: NonNegativeFloat = 0.1  # the factor is drawn from [max(0, 1 - value), 1 + value]
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1  # shift in turns, drawn from [-value, value]
    blur: Share = 1.0  # probability: a Gaussian 1 pixel wide and 5 high, inside the patch
    blur_radius: Range = (0.1, 2.0)  # its standard deviation in pixels
    sharpen: Share = 0.5  # probability
    sharpness: NonNegativeFloat = 2.0  # 0: smoothed, 1: as it was, 2: twice as sharp
    posterize: Share = 0.5  # probability
    posterize_bits: Annotated[int, Field(ge=1, le=8)] = 3  # that are kept of each 8


class PhotometricConfig(ConfigPart):
    """Color augmentation; triples are (first global, second global, local) views, probabilities.

    `patchwise` is `layered` (whole-view color, then milder changes patch by patch, `patch`: PW-Self as its authors run
    it), `replace` (jitter, grayscale and solarization of whole-view strength drawn anew for each patch instead of
    whole-view color: harsher, and nobody else's) or `none` (DINO's and iBOT's).
    """

    patchwise: Literal["layered", "replace", "none"] = "layered"
    patch_share: Share = 1.0  # share of views that get patch-wise color
    patch: PatchColorConfig = PatchColorConfig()
    jitter: Share = 0.8
    brightness: NonNegativeFloat = 0.4  # factors are drawn from [max(0, 1 - value), 1 + value]
    contrast: NonNegativeFloat = 0.4
    saturation: NonNegativeFloat = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1  # shift in turns, drawn from [-value, value]
    grayscale: Share = 0.2
    blur: tuple[Share, Share, Share] = (1.0, 0.1, 0.5)
    blur_radius: Range = (0.1, 2.0)  # standard deviation in pixels of the view
    solarize: tuple[Share, Share, Share] = (0.0, 0.2, 0.0)


class MaskConfig(ConfigPart):
    """What the student of iBOT, and on request that of PW-Self, does not see of its global views."""

    matched: bool = False  # mask PW-Self's student too: a masked patch is compared with its match in another view
    probability: Share = 0.5  # of a view to be masked at all
    ratio: tuple[Share, Share] = (0.1, 0.5)  # share of a masked view's patches, drawn from this range
    shape: Literal["block", "random"] = "block"
    aspect: Range = (0.3, 1 / 0.3)  # width / height of a block, drawn log-uniformly
    start_epoch: NonNegativeInt = 0  # no masks, and so no patch term, before

    @model_validator(mode="after")
    def _ranges_ascend(self) -> MaskConfig:
        for name in ("ratio", "aspect"):
            low, high = getattr(self, name)
            if not 0 <= low <= high or (name == "aspect" and not low):
                raise ValueError(f"masks.{name} = [{low}, {high}] must be ascending, and positive for an aspect")
        return self
