"""Record what the official networks give for weights and images that everybody can make: data/official_outputs.npz.

    python tests/record_official.py DINO IBOT DINOV2 PWSELF

The arguments are clones of facebookresearch/dino, bytedance/ibot, facebookresearch/dinov2 and
alijavidani/Local_Global_Representation_Learning. Tests read `filled` and `OUTPUTS` from here; they need no clone.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import sys
import types
import zlib
from pathlib import Path

import numpy as np

OUTPUTS = Path(__file__).parent / "data" / "official_outputs.npz"
DINO_SIZES = [(96, 96), (128, 128), (80, 112), (104, 96)]  # native, larger, not square, native grid but not square
DINOV2_SIZES = [(84, 84), (112, 112), (70, 98)]
STANDARD_DEVIATION = {r"image|pos_embed|cls_token|register_tokens|mask": 1.0, r"patch_embed": 0.03,
                      r"norm|gamma": 0.2, r"": 0.15}  # by the first pattern that a tensor's name contains
AROUND_ONE = re.compile(r"norm\d?\.weight|gamma")


def filled(name, shape):
    """Uniform float32 numbers that depend on `name` and their index only; 1 is added to scales.

    Integer arithmetic (the finalizer of SplitMix64) and no generator: the same on every machine and forever.
    """
    start = np.uint64(zlib.crc32(name.encode()) << 32)
    z = (np.arange(math.prod(shape), dtype=np.uint64) + start) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    uniform = (z >> np.uint64(40)).astype(np.float64) / 2**24 - 0.5  # its standard deviation is 1 / sqrt(12)
    deviation = next(value for pattern, value in STANDARD_DEVIATION.items() if re.search(pattern, name))
    values = deviation * math.sqrt(12) * uniform + bool(AROUND_ONE.search(name))
    return values.astype(np.float32).reshape(shape)


def imported(clone, file):
    """The module `file` of a `clone`, which imports its own neighbors."""
    sys.path.insert(0, str(clone))
    spec = importlib.util.spec_from_file_location(f"official_{Path(clone).name}", Path(clone) / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(clone))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("utils", "models")]:
        del sys.modules[name]
    return module


def networks(dino, ibot, dinov2, pwself):
    """Small official networks by the name of their layout."""
    registry = types.ModuleType("timm.models.registry")  # iBOT asks for a module that timm no longer has
    registry.register_model = lambda function: function
    sys.modules["timm.models.registry"] = registry
    os.environ["XFORMERS_DISABLED"] = "1"
    small = {"img_size": [96], "patch_size": 16, "depth": 4, "qkv_bias": True}
    yield "dino", imported(dino, "vision_transformer.py").VisionTransformer(**small, embed_dim=64, num_heads=1)
    yield "pwself", imported(pwself, "vision_transformer.py").VisionTransformer(**small, embed_dim=48, num_heads=3)
    vit = imported(ibot, "models/vision_transformer.py").VisionTransformer
    yield "ibot", vit(**small, embed_dim=24, num_heads=3, masked_im_modeling=True)
    yield "ibot_scaled", vit(**small, embed_dim=24, num_heads=3, init_values=0.1)
    vit2 = imported(dinov2, "dinov2/models/vision_transformer.py").DinoVisionTransformer
    small = {"img_size": 84, "patch_size": 14, "embed_dim": 32, "num_heads": 2, "depth": 4, "init_values": 1.0}
    yield "dinov2", vit2(**small, block_chunks=0)
    yield "dinov2_chunks", vit2(**small, block_chunks=2)
    # as its hub builds the networks with registers and the giant
    yield "dinov2_reg", vit2(**small, block_chunks=0, num_register_tokens=4, interpolate_antialias=True,
                             interpolate_offset=0.0)
    yield "dinov2_swiglu", vit2(**small, block_chunks=0, ffn_layer="swiglufused")


def outputs(network, image):
    """Tokens after the final norm, class tokens of the last four blocks, the class token's attention (DINO's only)."""
    import torch

    if hasattr(network, "forward_features"):  # DINOv2
        found = network.forward_features(image)
        tokens = torch.cat([found["x_norm_clstoken"][:, None], found["x_norm_patchtokens"]], dim=1)
        last = network.get_intermediate_layers(image, 4, return_class_token=True)
        return {"tokens": tokens, "last4": torch.cat([token for _, token in last], dim=-1)}
    network.masked_im_modeling = False
    last = network.get_intermediate_layers(image, 4)
    return {"tokens": last[-1], "last4": torch.cat([tokens[:, 0] for tokens in last], dim=-1),
            "attention": network.get_last_selfattention(image)[:, :, 0, 1:]}


def main(clones):
    import torch

    record, shapes = {}, {}
    for name, network in networks(*clones):
        state = network.state_dict()
        shapes[name] = {key: list(tensor.shape) for key, tensor in state.items()}
        network.load_state_dict({key: torch.from_numpy(filled(key, tensor.shape)) for key, tensor in state.items()})
        for size in DINOV2_SIZES if name.startswith("dinov2") else DINO_SIZES:
            with torch.no_grad():
                found = outputs(network.eval(), torch.from_numpy(filled("image", (1, 3, *size))))
            record |= {f"{name}/{size[0]}x{size[1]}/{what}": tensor.numpy() for what, tensor in found.items()}
    np.savez_compressed(OUTPUTS, shapes=np.array(json.dumps(shapes)), **record)
    print(f"{OUTPUTS}: {len(record)} outputs of {len(shapes)} networks, {OUTPUTS.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main([Path(clone).resolve() for clone in sys.argv[1:5]])
