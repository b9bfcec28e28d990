"""model.safetensors and config.json, as timm and `patchssl.models.load` read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchssl import __version__
from patchssl.eval.transforms import native_resize
from patchssl.export.source import (
    ExportSource,
    Format,
    Written,
    alone,
    compare_tokens,
    require_close,
    sample_images,
    sizes_to_compare,
)
from patchssl.models.backbone import Backbone
from patchssl.models.load import load_backbone
from patchssl.models.networks import ArchFamily, create, family_of, has_arch
from patchssl.models.pretrained import FOLDER_CONFIG, FOLDER_WEIGHTS
from patchssl.runtime.errors import CheckpointError, UsageError

_CLOSE, _SAME = 1e-5, 0.0


def timm_arch(backbone: Backbone) -> str | None:
    """What timm calls the architecture; None for a network that timm did not make, or that `load_backbone` refuses."""
    config = getattr(backbone.module, "default_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else None
    try:
        return name if isinstance(name, str) and has_arch(name) and family_of(name) else None
    except UsageError:
        return None


def network_config(source: ExportSource) -> dict[str, Any]:
    """What config.json says: timm's own keys, and under "patchssl" what timm has no key for."""
    backbone = source.backbone
    size, pool = backbone.image_size, "token" if backbone.has_class_token else "avg"
    features = backbone.features(sample_images(1, size, size))
    usual = getattr(backbone.module, "default_cfg", {})
    return {
        "architecture": timm_arch(backbone) or backbone.arch, "num_classes": 0, "num_features": features.shape[-1],
        "global_pool": pool,
        "pretrained_cfg": {"input_size": [3, size, size], "mean": list(backbone.mean), "std": list(backbone.std),
                           "interpolation": "bicubic", "crop_pct": size / native_resize(size), "crop_mode": "center",
                           "fixed_input_size": bool(usual.get("fixed_input_size")), "num_classes": 0,
                           "first_conv": usual.get("first_conv"), "classifier": usual.get("classifier")},
        "model_args": _model_args(backbone),
        "patchssl": {"version": __version__, "arch": backbone.arch, "origin": asdict(backbone.origin),
                     "positions": "dino" if getattr(backbone, "dino_positions", False) else "timm",
                     "weights_sha256": backbone.weights_sha256}}


def _model_args(backbone: Backbone) -> dict[str, Any]:
    """Keyword arguments with which timm makes this network: sizes, and what else differs from its default."""
    arch = timm_arch(backbone)
    if arch is None or (family := family_of(arch)) == "convolutional":
        return {}
    with torch.device("meta"):
        usual = _options(create(arch), family)
    own = {**_options(backbone.module, family), "global_pool": "token"}
    return {name: value for name, value in own.items()
            if name in ("img_size", "patch_size") or value != usual.get(name)}


def _options(network: Any, family: ArchFamily) -> dict[str, Any]:
    """timm's arguments read from the parts of a transformer; of other blocks than a plain ViT's only the sizes."""
    sizes = {"img_size": network.patch_embed.img_size[0], "patch_size": network.patch_embed.patch_size[0],
             "global_pool": network.global_pool}
    if family != "vit":
        return sizes
    block = network.blocks[0]
    hidden, dim = block.mlp.fc1.out_features, network.embed_dim
    ratio = hidden / dim if hidden % dim == 0 else (hidden + 0.5) / dim  # timm rounds down
    scaled = {} if isinstance(block.ls1, nn.Identity) else {"init_values": 1.0}  # a start: weights replace it
    return {**sizes, "embed_dim": dim, "depth": len(network.blocks), "num_heads": block.attn.num_heads,
            "mlp_ratio": ratio, "qkv_bias": block.attn.qkv.bias is not None, "reg_tokens": network.num_reg_tokens,
            **scaled}


def obstacle(source: ExportSource) -> str | None:
    """Why timm cannot load the network of `source`."""
    arch = source.backbone.arch
    return None if timm_arch(source.backbone) else f"{arch} is no network of timm, or none that is supported"


def write(source: ExportSource, folder: Path) -> Written:
    """Write model.safetensors beside config.json; loaded by timm and by `load_backbone` it has to be the same."""
    import timm
    from safetensors.torch import save_file

    backbone, size = source.backbone, source.backbone.image_size
    state = {name: alone(tensor) for name, tensor in backbone.module.state_dict().items()}
    save_file(state, folder / FOLDER_WEIGHTS, metadata={"format": "pt"})
    (folder / FOLDER_WEIGHTS).chmod((folder / FOLDER_CONFIG).stat().st_mode)  # safetensors lets only its owner read it
    images, notes = sample_images(2, size, size), []
    expected = backbone.features(images)
    try:
        network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().requires_grad_(False)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"timm cannot make this {backbone.arch} from a name and sizes: {error}; leave the format "
                              "timm out") from error
    found = network.forward_features(images)[:, 0] if backbone.has_class_token else network(images)
    off = require_close(found, expected, _CLOSE, FOLDER_WEIGHTS)
    if not torch.allclose(network(images), expected, rtol=1e-4, atol=1e-5):
        notes.append("what timm's model(images) gives for this architecture is not the class token; take "
                     "model.forward_features(images)[:, 0]")
    _require_read_back(source, folder)
    return Written(off, tuple(notes))


def _require_read_back(source: ExportSource, folder: Path) -> None:
    """CheckpointError unless `load_backbone` reads the same network, and all that was known of it, from `folder`."""
    backbone, again = source.backbone, load_backbone(str(folder))
    source.require_weights(again.weights_sha256, FOLDER_WEIGHTS)
    for name in ("origin", "arch", "mean", "std", "image_size", "patch_size"):
        if getattr(again, name) != getattr(backbone, name):
            raise CheckpointError(f"{FOLDER_CONFIG} would give {name} = {getattr(again, name)} instead of "
                                  f"{getattr(backbone, name)}; nothing was exported, please report it")
    compare_tokens(again, source, sizes_to_compare(backbone), _SAME, FOLDER_WEIGHTS)


TIMM = Format(obstacle, write)
