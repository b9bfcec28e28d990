"""The smallest recipe that has all parts, and batches for it: what several tests of the engine start from."""

import numpy as np

from patchssl.data.images import ArrayImages
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.dataset import ViewDataset, collate_views
from patchssl.pretrain.network import build_student

BATCH, STEPS = 6, 5  # images an update, updates an epoch


def make_recipe(**parts):
    small = {
        "model": {"arch": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
        "views": {"num_global": 2, "num_local": 2, "global_size": 24, "local_size": 16},
        "head": {"num_prototypes": 32, "hidden": 24, "bottleneck": 8, "freeze_last_layer_epochs": 0},
        "optim": {"epochs": 4, "batch_size": BATCH, "warmup_epochs": 0, "lr": 0.05},
    }
    for name, values in parts.items():
        small[name] = small.get(name, {}) | values if isinstance(values, dict) else values
    return Recipe.model_validate(small)


def make_images(count=30):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 10, 10, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    return ArrayImages(array=pixels, ids=np.arange(count), name="noise", split="train", source="noise")


def make_batch(recipe, step=0, seed=0):
    _, places = build_student(recipe, seed)
    views = ViewDataset(make_images(), recipe, seed, places)
    return collate_views([views[0, (step * BATCH + i) % 30, step] for i in range(BATCH)])
