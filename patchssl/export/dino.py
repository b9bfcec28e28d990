"""dino.pth, in the layout of DINO's own checkpoints (facebookresearch/dino, main_dino.py), for its scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchssl.export.source import ExportSource, Format, Written, alone, compare_tokens, sizes_to_compare
from patchssl.models.backbone import Backbone, VitBackbone
from patchssl.models.networks import as_float32, build_vit, load_exactly, state_sha256
from patchssl.models.recognize import describe_left_out, recognize, recognize_run
from patchssl.models.weights import BACKBONE, TEACHER, WeightsFile, read_weights, unwrapped

DINO_FILE = "dino.pth"
STUDENT = "student"
_ARCHS = {(192, 12, 3): "vit_tiny", (384, 12, 6): "vit_small", (768, 12, 12): "vit_base"}  # channels, blocks, heads
_HEAD = re.compile(r"head\.(mlp\.(\d+\.)?\w+|last_layer\.weight_[gv])")  # the tensors of DINO's DINOHead
_EPS = 1e-6  # of the layer norms of DINO's vit_tiny, vit_small and vit_base
_CLOSE = 1e-5


def obstacle(source: ExportSource) -> str | None:
    """Why DINO's VisionTransformer cannot be the network of `source`: the first difference found."""
    backbone = source.backbone
    if not isinstance(backbone, VitBackbone):
        return f"{backbone.arch} is no plain Vision Transformer"
    vit, block = backbone.module, backbone.module.blocks[0]
    attention, mlp = block.attn, block.mlp
    differences = {
        "registers or a distillation token": vit.num_prefix_tokens != 1,
        "a class token without position": vit.no_embed_class,
        "layer scale": not isinstance(block.ls1, nn.Identity),
        "no bias of queries, keys and values": attention.qkv.bias is None,
        "normalized queries and keys": not isinstance(attention.q_norm, nn.Identity),
        "a gated MLP": mlp.fc2.in_features != mlp.fc1.out_features,
        "another activation than GELU": not isinstance(mlp.act, nn.GELU) or mlp.act.approximate != "none",
        "a norm before its blocks": not isinstance(vit.norm_pre, nn.Identity),
        "another layer norm": not isinstance(vit.norm, nn.LayerNorm) or vit.norm.eps != _EPS,
        "other tensors": vit.state_dict().keys() != _names(len(vit.blocks)),
    }
    found = next((words for words, differs in differences.items() if differs), None)
    return f"{backbone.arch} has {found}, which DINO's VisionTransformer cannot have" if found else None


def _names(depth: int) -> set[str]:
    """Names of the tensors of DINO's VisionTransformer with `depth` blocks."""
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    layers = ["patch_embed.proj", "norm", *(f"blocks.{i}.{part}" for i in range(depth) for part in parts)]
    return {"cls_token", "pos_embed", *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))}


def dino_arguments(backbone: Backbone) -> dict[str, Any]:
    """Arguments of DINO's VisionTransformer, after "arch", the word for --arch, where there is one."""
    vit: Any = backbone.module
    hidden, heads = vit.blocks[0].mlp.fc1.out_features, vit.blocks[0].attn.num_heads
    word = _ARCHS.get((vit.embed_dim, len(vit.blocks), heads)) if hidden == 4 * vit.embed_dim else None
    return {**({"arch": word} if word else {}), "img_size": [backbone.image_size], "patch_size": backbone.patch_size,
            "embed_dim": vit.embed_dim, "depth": len(vit.blocks), "num_heads": heads,
            "mlp_ratio": hidden / vit.embed_dim}


def exported_network(source: ExportSource) -> str:
    """The key in dino.pth of the network that is exported."""
    return source.network if source.network in (STUDENT, TEACHER) else TEACHER


def write(source: ExportSource, folder: Path) -> Written:
    """Write dino.pth: student and teacher where both are known, with their heads; loaded it has to be the same.

    "args" is a plain table, not the argparse.Namespace of DINO's files: those `torch.load(path)`, which DINO's code
    calls, refuses since torch 2.6.
    """
    backbone, path = source.backbone, folder / DINO_FILE
    networks, notes = _networks(source)
    content: dict[str, Any] = {**networks, "args": dino_arguments(backbone)}
    if backbone.pretrain_epochs is not None:
        content["epoch"] = int(backbone.pretrain_epochs)
    torch.save(content, path)
    sizes = sizes_to_compare(backbone)
    if not getattr(backbone, "dino_positions", False):
        sizes = sizes[:1]
        notes.append(f"{DINO_FILE}: at other sizes than {backbone.image_size} pixels DINO's network resizes position "
                     "embeddings in another way than timm")
    return Written(compare_tokens(_read_back(path, source), source, sizes, _CLOSE, DINO_FILE), tuple(notes))


def _networks(source: ExportSource) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The networks of dino.pth by key, the exported one and its twin if the source has it; and what was left out."""
    chosen, file = exported_network(source), source.file
    if file is None:
        return {chosen: _prefixed(source.backbone.module.state_dict(), {})}, []
    found = {chosen: source.network, **{name: name for name in (STUDENT, TEACHER) if name in file.networks}}
    networks, notes = {}, dict[str, None]()
    for key, network in sorted(found.items()):
        layout = recognize_run(file, network) if source.of_run else recognize(file, network, _num_heads(source))
        tensors = {unwrapped(name): tensor for name, tensor in file.networks[network].items()}
        head = {name: tensor for name, tensor in tensors.items() if _HEAD.fullmatch(name)}
        networks[key] = _prefixed(layout.state, head)
        if left_out := describe_left_out(name for name in layout.left_out if name not in head):
            notes[f"{DINO_FILE}: {left_out}, for which DINO's network has no place"] = None
    return networks, list(notes)


def _prefixed(backbone: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a backbone and its head as DINO's checkpoints name them, float32."""
    tensors = {**{f"{BACKBONE}{name}": tensor for name, tensor in backbone.items()}, **head}
    return {name: alone(as_float32(tensor)) for name, tensor in tensors.items()}


def _num_heads(source: ExportSource) -> int:
    vit: Any = source.backbone.module
    return int(vit.blocks[0].attn.num_heads)


def _read_back(path: Path, source: ExportSource) -> VitBackbone:
    """The exported backbone of dino.pth, read as any file of DINO's is; CheckpointError for other weights."""
    file: WeightsFile = read_weights(path)
    layout = recognize(file, exported_network(source), _num_heads(source))
    source.require_weights(state_sha256(layout.state), DINO_FILE)
    assert layout.spec is not None
    vit = load_exactly(partial(build_vit, layout.spec), layout.state, layout.arch, str(path))
    return VitBackbone(vit.eval().requires_grad_(False), dino_positions=layout.dino_positions)


DINO = Format(obstacle, write)
