"""What a network sees of an image, and what it says of it: attention, patch tokens, their colors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from patchssl.data.decode import decode_image
from patchssl.data.open import open_images
from patchssl.models.backbone import Backbone
from patchssl.report.plots.canvas import Pixels
from patchssl.runtime.errors import DataError, UsageError
from patchssl.runtime.progress import Say

MOST_PATCHES = 16_384  # of one image: 1024 x 1024 pixels at patch 8


def item_name(name: str) -> str:
    """What the set of an image calls it: `name` is a file or SET:INDEX, as `read_image` takes."""
    data, colon, index = name.rpartition(":")
    if Path(name).is_file() or not colon:
        return Path(name).name
    return open_images(data).item_name(int(index))


def read_image(name: str) -> Pixels:
    """The image file `name`, or image INDEX of the training images of SET where `name` is SET:INDEX."""
    data, colon, index = name.rpartition(":")
    if Path(name).is_file() or not (colon and index.isdecimal()):
        if not Path(name).is_file():
            raise DataError(f"{name} is neither an image file nor SET:INDEX, as in textures:7")
        return decode_image(Path(name))
    images = open_images(data)
    if int(index) >= len(images):
        raise DataError(f"{name}: {images.name} has {len(images)} images, the last is {data}:{len(images) - 1}")
    return images.pixels(int(index))


def check_size(pixels: Pixels, patch_size: int, size: int) -> None:
    """Errors where an image resized to the short side `size` holds no patch, or more than a network can look at."""
    height, width = pixels.shape[:2]
    if size < patch_size:
        raise UsageError(f"--size {size} is less than the model's patch size of {patch_size} pixels")
    patches = -(-size // patch_size) * -(-int(size * max(height, width) / min(height, width)) // patch_size)
    if patches > MOST_PATCHES:
        raise DataError(f"an image of {height} x {width} pixels with its short side at {size} would be {patches:,} "
                        f"patches, more than {MOST_PATCHES:,}; crop it, or choose a smaller --size")


def normalized(pixels: Pixels, backbone: Backbone, size: int) -> Tensor:
    """(1, 3, H, W) normalized for `backbone`, short side resized to `size`."""
    image = TF.resize(torch.from_numpy(pixels).permute(2, 0, 1), [size], antialias=True,
                      interpolation=TF.InterpolationMode.BICUBIC)
    return TF.normalize(TF.to_dtype(image, scale=True), list(backbone.mean), list(backbone.std))[None]


def pad_to_patches(images: Tensor, patch_size: int) -> Tensor:
    """(B, 3, H, W) with the last row and column repeated until height and width are whole numbers of patches."""
    below, right = (-side % patch_size for side in images.shape[-2:])
    return F.pad(images, (0, right, 0, below), mode="replicate")


def preprocess(pixels: Pixels, backbone: Backbone, size: int, say: Say | None = None,
               name: str = "the image") -> tuple[Pixels, Tensor, tuple[int, int]]:
    """The image at the size asked (H, W, 3), the padded (1, 3, H', W') the network sees, and its (rows, columns).

    The short side becomes `size`; padding, if any is needed, is said in a sentence that calls the image `name`.
    """
    check_size(pixels, backbone.patch_size, size)
    x = normalized(pixels, backbone, size)
    padded = pad_to_patches(x, backbone.patch_size)
    if say is not None and padded.shape != x.shape:
        say(f"{name}: {' x '.join(map(str, x.shape[-2:]))} pixels are padded at right and bottom to "
            f"{' x '.join(map(str, padded.shape[-2:]))}, whole patches of {backbone.patch_size}")
    rows, columns = (side // backbone.patch_size for side in padded.shape[-2:])
    return _pixels_of(x, backbone), padded.to(backbone.device), (rows, columns)


@torch.inference_mode()
def attention_rows(backbone: Backbone, images: Sequence[Pixels], size: int, *, say: Say | None = None,
                   names: Sequence[str] = ()) -> list[tuple[Pixels, np.ndarray]]:
    """For each image its pixels at the short side `size` (H, W, 3), and its class attention (heads, rows, columns).

    The grid holds the whole image: what is missing to whole patches is padded, and said by the image's name.
    """
    rows = []
    for number, pixels in enumerate(images):
        seen, x, grid = preprocess(pixels, backbone, size, say, *names[number : number + 1])
        attention = backbone.class_attention(x)[0].float().cpu()
        rows.append((seen, attention.unflatten(-1, grid).numpy()))
    return rows


@torch.inference_mode()
def token_maps(backbone: Backbone, images: Sequence[Pixels], size: int, *, say: Say | None = None,
               names: Sequence[str] = ()) -> list[tuple[Pixels, np.ndarray]]:
    """For each image its pixels at the short side `size` (H, W, 3), and its patch tokens (rows, columns, D) float32.

    Padded as for `attention_rows`.
    """
    maps = []
    for number, pixels in enumerate(images):
        seen, x, grid = preprocess(pixels, backbone, size, say, *names[number : number + 1])
        tokens = backbone.patch_tokens(x)[0].float().cpu()
        if len(tokens) != grid[0] * grid[1]:
            raise UsageError(f"{backbone.name} gave {len(tokens)} patch tokens for {grid[0]} x {grid[1]} patches")
        maps.append((seen, tokens.unflatten(0, grid).numpy()))
    return maps


def component_colors(maps: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Colors (rows, columns, 3) in [0, 1] of token maps (rows, columns, D), and the shares of variance they show.

    Red, green and blue are the first three principal components of the tokens of all maps together, each stretched
    from its 1st to its 99th percentile: one color means one thing in all of them. Fewer components than three: the
    colors of those that lack stay in the middle. UsageError for tokens that do not differ, or are not finite.
    """
    from sklearn.decomposition import PCA

    tokens = np.concatenate([one.reshape(-1, one.shape[-1]) for one in maps]).astype(np.float64)
    if not np.isfinite(tokens).all() or np.allclose(tokens, tokens[0]):
        raise UsageError(f"{len(tokens)} patch tokens that are all the same, or not finite, have no components to draw")
    pca = PCA(min(3, *tokens.shape), svd_solver="full").fit(tokens)
    places = pca.transform(tokens)
    low, high = np.percentile(places, (1, 99), axis=0)
    stretched = ((places - low) / np.maximum(high - low, np.finfo(float).tiny)).clip(0, 1)
    colors = np.full((len(tokens), 3), 0.5)
    colors[:, : stretched.shape[1]] = stretched
    ends = np.cumsum([one.shape[0] * one.shape[1] for one in maps])[:-1]
    parts = zip(np.split(colors, ends), maps, strict=True)
    return [part.reshape(*one.shape[:2], 3) for part, one in parts], pca.explained_variance_ratio_


def _pixels_of(x: Tensor, backbone: Backbone) -> Pixels:
    """The pixels of normalized images (1, 3, H, W)."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.mean, backbone.std))
    return ((x[0] * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
