"""Record masks that iBOT's loader draws, and what its network gives for masked images: data/official_masking.npz.

    python tests/record_masking.py IBOT

The argument is a clone of bytedance/ibot. Tests read `MASKING`, `SPEC` and `example` from here; they need no clone.
"""

from __future__ import annotations

import random
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
from record_official import filled, imported

MASKING = Path(__file__).parent / "data" / "official_masking.npz"
SIDE, VIEWS = 14, 4000  # patches per side, recorded masks
SPEC = {"img_size": [96], "patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 3, "qkv_bias": True}
SIZES = [96, 64]  # pixels; the first has the grid of the learned positions


def example(size):
    """Images (3, 3, size, size) and masks (3, rows, rows): some patches, none, all."""
    rows = size // SPEC["patch_size"]
    masks = filled("mask", (3, rows, rows)) > 0.5
    masks[1], masks[2] = False, True
    return filled("image", (3, 3, size, size)), masks


def loader_masks(ibot, folder):
    """VIEWS masks (SIDE, SIDE) as the loader draws them for the README's recipe, two to an image."""
    import torch
    from PIL import Image

    (folder / "class").mkdir()
    Image.new("RGB", (1, 1)).save(folder / "class" / "image.png")
    views = [torch.zeros(3, 16 * SIDE, 16 * SIDE)] * 2
    images = imported(ibot, "loader.py").ImageFolderMask(
        folder, transform=lambda image: views, patch_size=16, pred_ratio=[0, 0.3], pred_ratio_var=[0, 0.2],
        pred_aspect_ratio=(0.3, 1 / 0.3))
    random.seed(0)
    return np.stack([mask for _ in range(VIEWS // 2) for mask in images[0][2]])


def masked_outputs(ibot):
    """By size: tokens (3, 1 + N, 24) of `example` after the final norm."""
    import torch

    registry = types.ModuleType("timm.models.registry")  # iBOT asks for a module that timm no longer has
    registry.register_model = lambda function: function
    sys.modules["timm.models.registry"] = registry
    network = imported(ibot, "models/vision_transformer.py").VisionTransformer(
        **SPEC, masked_im_modeling=True, return_all_tokens=True).eval()
    state = network.state_dict()
    assert not state["masked_embed"].any()  # where training starts
    network.load_state_dict({key: torch.from_numpy(filled(key, tensor.shape)) for key, tensor in state.items()})
    for size in SIZES:
        images, masks = (torch.from_numpy(array) for array in example(size))
        with torch.no_grad():
            yield f"tokens/{size}", network(images, mask=masks).numpy()


def main(ibot):
    with tempfile.TemporaryDirectory() as folder:
        masks = loader_masks(ibot, Path(folder))
    np.savez_compressed(MASKING, masks=np.packbits(masks.reshape(len(masks), -1), axis=1),
                        **dict(masked_outputs(ibot)))
    print(f"{MASKING}: {len(masks)} masks, {MASKING.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
