"""Layouts: what the tensors of a file of weights are, read from their names and shapes.

Official files of DINO, iBOT, PW-Self's authors, DINOv2 and timm become timm's names and a `NetworkSpec`.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from patchssl.models.networks import NetworkSpec, has_arch
from patchssl.models.weights import WeightsFile, split_head
from patchssl.runtime.errors import CheckpointError
from patchssl.runtime.text import shortened

CHANNELS_A_HEAD = 64  # in every Vision Transformer of these projects
_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16),
          "giant": (1536, 40, 24)}  # timm's word: channels, blocks, heads
_WORDS = {sizes[:2]: word for word, sizes in _SIZES.items() if word != "giant"}  # timm's own giant is another
_WIDE = {1280: 16, 1408: 16, 1664: 16}  # heads of ViT-H, ViT-g and ViT-G, which have more channels each
_HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "giant2": 24}  # by the last word of DINO's --arch
_RESNETS: Mapping[tuple[str, tuple[int, ...]], str] = {
            ("conv2", (2, 2, 2, 2)): "resnet18", ("conv2", (3, 4, 6, 3)): "resnet34",
            ("conv3", (3, 4, 6, 3)): "resnet50", ("conv3", (3, 4, 23, 3)): "resnet101",
            ("conv3", (3, 8, 36, 3)): "resnet152"}  # (last convolution of a block, blocks per stage)
MOST_BLOCKS = 1000
_HEAD = re.compile(r"(head|head_dist|dino_head|ibot_head|dino_loss|ibot_loss|fc|pre_logits)\.")
_NDIM = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "reg_token": 3}  # what is read from shapes
_MASK_TOKENS = frozenset({"mask_token", "masked_embed"})
_STRANGERS = {"layers.0.blocks.": "a Swin Transformer, which has no class token",
              "relative_position_bias_table": "a BEiT, whose attention has a bias for every distance",
              "cls_attn_blocks": "an XCiT, which attends over channels, not over patches",
              "embeddings.cls_token": "a network in the layout of the transformers library; take timm's twin of it",
              "visual.": "a CLIP model; take timm's vit_*_clip_* twin of it",
              "base_encoder.": "a MoCo checkpoint, whose parts are not named like the network"}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A network in a file: what it is, and its tensors under timm's names."""

    framework: str  # in words
    method: str  # what records call it: dino, ibot, pwself, supervised, other
    arch: str  # timm's name
    spec: NetworkSpec | None  # None for a convolutional network
    state: Mapping[str, Tensor]
    left_out: tuple[str, ...] = ()  # heads and mask tokens
    dino_positions: bool = True  # positions at other sizes as DINO resizes them, else as timm does
    notes: tuple[str, ...] = ()  # what was assumed


@dataclass(frozen=True, kw_only=True)
class RunLayout(Layout):
    """A network that patchssl trained, always a Vision Transformer."""

    spec: NetworkSpec


def recognize(file: WeightsFile, network: str, heads: int | None = None) -> Layout:
    """What `network` of `file` is; `heads` overrides the number of attention heads, which no tensor tells.

    Whether every tensor is there and fits is not checked here. CheckpointError for what is neither a plain
    Vision Transformer nor a ResNet.
    """
    where = f"{file.path}#{network}" if network else str(file.path)
    tensors, outside = split_head(file.networks[network], where)
    strange = [name for name in outside if not _HEAD.match(name)]
    if strange:
        raise CheckpointError(f"{where} holds, beside a backbone and its head, {shortened(strange, 5)}")
    left_out = {name for name in tensors if _HEAD.match(name) or name in _MASK_TOKENS}
    kept = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    framework, method = _framework(file, tensors)
    if stranger := _stranger(tensors):
        raise CheckpointError(f"{where} is {stranger}")
    if any(name.endswith(".attn.qkv.weight") for name in kept):
        state = {_timm_name(name): tensor for name, tensor in kept.items()}
        if len(state) != len(kept):
            raise CheckpointError(f"{where} holds tensors twice, under the names of two layouts")
        layout = _recognize_vit(state, "mask_token" in tensors, file.args, heads, where)
    elif "conv1.weight" in kept and any(name.startswith("layer1.0.") for name in kept):
        layout = _recognize_resnet(kept, where)
    else:
        raise CheckpointError(f"{where} is neither a plain Vision Transformer nor a ResNet of DINO, iBOT, PW-Self, "
                              f"DINOv2 or timm; its tensors are called {shortened(sorted(tensors), 3)}")
    return replace(layout, framework=framework, method=method, left_out=(*sorted(left_out), *outside))


def recognize_run(file: WeightsFile, network: str) -> RunLayout:
    """The layout of a checkpoint of ours, which says itself what its tensors are."""
    try:
        spec, origin = NetworkSpec(**file.rest["network"]), file.rest["origin"]
        state, outside = split_head(file.networks[network], f"{file.path}#{network}")
        sizes = spec.options().values()
        if (not isinstance(spec.arch, str) or not all(isinstance(size, int | float) for size in sizes)
                or (spec.depth or 0) > min(len(state), MOST_BLOCKS)):
            raise TypeError(f"its {len(state)} tensors are not of {reprlib.repr(file.rest['network'])}")
        return RunLayout(framework="patchssl", method=str(origin["method"]), arch=spec.arch, spec=spec, state=state,
                         left_out=tuple(outside))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file.path} lacks what a checkpoint of patchssl says about itself: {error}") from None


def _timm_name(name: str) -> str:
    """timm's name of a Vision Transformer's tensor: chunked blocks, layer scale, registers and SwiGLU renamed."""
    name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)  # DINOv2's training splits blocks into chunks
    name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
    name = re.sub(r"\.mlp\.w12\.", ".mlp.fc1.", name)
    name = re.sub(r"\.mlp\.w3\.", ".mlp.fc2.", name)
    return "reg_token" if name == "register_tokens" else name


def _recognize_vit(state: dict[str, Tensor], dinov2: bool, args: Mapping[str, Any], heads: int | None,
                   where: str) -> Layout:
    absent = [name for name in _NDIM if name not in state and name != "reg_token"]
    if absent:
        raise CheckpointError(f"{where} is a Vision Transformer without {', '.join(absent)}, from which its "
                              "architecture is read: the file is incomplete or of another kind")
    flat = [name for name, ndim in _NDIM.items()
            if name in state and (state[name].ndim != ndim or not state[name].numel())]
    if flat:
        raise CheckpointError(f"{where} has {flat[0]} of the shape {tuple(state[flat[0]].shape)}, "
                              f"{_NDIM[flat[0]]} dimensions are needed, none of them 0")
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    dim, _, _, patch = state["patch_embed.proj.weight"].shape
    if dinov2 and registers:  # timm adds the class token's position to the token itself
        position = state["pos_embed"].float()
        if state["cls_token"].shape != position[:, :1].shape:
            raise CheckpointError(f"{where} has a cls_token of {tuple(state['cls_token'].shape)} numbers, and its "
                                  f"pos_embed {tuple(position.shape)}: they do not fit each other")
        state |= {"cls_token": state["cls_token"].float() + position[:, :1], "pos_embed": position[:, 1:]}
    side = _grid(state["pos_embed"].shape[1] - (not registers), where)
    count, notes = _num_heads(dim, args, heads, where)
    spec = NetworkSpec(image_size=side * patch, patch_size=patch,
                       **_architecture(state, _depth(state, where), patch, count, dinov2=dinov2))
    return Layout(framework="", method="", arch=spec.arch, spec=spec, state=state, notes=notes,
                  dino_positions=not registers)


def _grid(positions: int, where: str) -> int:
    side = math.isqrt(max(0, positions))
    if not side or side * side != positions:
        raise CheckpointError(f"{where} has position embeddings for {positions} patches, which is no square grid")
    return side


def _num_heads(dim: int, args: Mapping[str, Any], heads: int | None, where: str) -> tuple[int, tuple[str, ...]]:
    """The number of attention heads and, where it is an assumption, the sentence that says so."""
    note = ""
    arch = args["arch"] if isinstance(args.get("arch"), str) else ""
    if heads is not None:
        count = heads
    elif isinstance(own := args.get("num_heads"), int) and own > 0:
        count = own  # as exported files say it
    elif (word := arch.rpartition("_")[2]) in _HEADS:
        count = _HEADS[word]
        note = f"{count} attention heads, as the checkpoint's own --arch {arch} has"
    elif dim in _WIDE:
        count = _WIDE[dim]
        note = f"{count} attention heads are assumed, as ViTs of {dim} channels have; ?heads=n sets another number"
    elif dim % CHANNELS_A_HEAD == 0:
        count = dim // CHANNELS_A_HEAD
        note = (f"{count} attention heads are assumed, {CHANNELS_A_HEAD} channels each: the file does not say; "
                "?heads=n sets another number")
    else:
        raise CheckpointError(f"the number of attention heads is not in {where}, and its {dim} channels are no "
                              f"multiple of {CHANNELS_A_HEAD}; say it as {where}?heads=n")
    if not count or dim % count:
        raise CheckpointError(f"{count} attention heads do not divide the {dim} channels of {where}")
    return count, (note,) if note else ()


def _architecture(state: Mapping[str, Tensor], depth: int, patch: int, heads: int, *, dinov2: bool) -> dict[str, Any]:
    """timm's nearest architecture, and what of the tensors differs from it."""
    dim = state["patch_embed.proj.weight"].shape[0]
    hidden = next((tensor.shape[0] for name, tensor in state.items() if name.endswith(".mlp.fc1.weight")), 4 * dim)
    gated = any(name.endswith(".mlp.fc2.weight") and 2 * tensor.shape[1] == hidden for name, tensor in state.items())
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    word = "giant" if gated else _WORDS.get((dim, depth), "base")
    if dinov2 or registers or gated:
        word = "base" if word == "tiny" else word  # which timm does not have
        arch, ratio = f"vit_{word}_patch14_{'reg4_' if registers else ''}dinov2", 16 / 3 if gated else 4.0
    else:
        arch, ratio = f"vit_{word}_patch{patch}_224", 4.0
        arch = arch if has_arch(arch) else f"vit_{word}_patch16_224"
    usual = _SIZES[word]
    own = {"embed_dim": dim, "depth": depth, "num_heads": heads}
    differing: dict[str, Any] = {name: own[name] for name, value in zip(own, usual, strict=True) if own[name] != value}
    if hidden != round(ratio * dim):
        exact = hidden / dim
        differing["mlp_ratio"] = exact if int(exact * dim) == hidden else (hidden + 0.5) / dim  # timm rounds down
    if not any(name.endswith(".attn.qkv.bias") for name in state):
        differing["qkv_bias"] = False
    if any(name.endswith(".ls1.gamma") for name in state) and "dinov2" not in arch:
        differing["init_values"] = 1.0
    if registers not in (0, 4):
        differing["reg_tokens"] = registers
    return {"arch": arch, **differing}


def _depth(state: Mapping[str, Tensor], where: str) -> int:
    """The number of blocks, counted from 0 without a gap."""
    numbers = {int(found[1]) for name in state if (found := re.match(r"blocks\.([0-9]{1,9})\.", name))}
    if len(numbers) > MOST_BLOCKS:
        raise CheckpointError(f"{where} has tensors of {len(numbers):,} blocks; a network has at most {MOST_BLOCKS:,}")
    absent = next(number for number in range(len(numbers) + 1) if number not in numbers)
    if absent < len(numbers):
        raise CheckpointError(f"{where} has tensors of block {max(numbers)} (blocks.{max(numbers)}.*), and none of "
                              f"block {absent}")
    return absent


def _recognize_resnet(state: Mapping[str, Tensor], where: str) -> Layout:
    stages = tuple(len({name.split(".")[1] for name in state if name.startswith(f"layer{stage}.")})
                   for stage in range(1, 5))
    last = "conv3" if any(name.startswith("layer1.0.conv3.") for name in state) else "conv2"
    if (arch := _RESNETS.get((last, stages))) is None:
        raise CheckpointError(f"{where} is a ResNet with {'-'.join(map(str, stages))} blocks, none of "
                              f"{', '.join(_RESNETS.values())}")
    return Layout(framework="", method="", arch=arch, spec=None, state=state)


def _framework(file: WeightsFile, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """Which project wrote the file, in words, and the method that records name."""
    loss = file.rest.get("dino_loss")
    center = loss.get("center") if isinstance(loss, Mapping) else None
    if "ibot_loss" in file.rest or "masked_embed" in tensors:
        return "iBOT", "ibot"
    if isinstance(center, Tensor) and center.ndim == 3:
        return "PW-Self (the authors' code: one center per token position)", "pwself"
    if center is not None:
        return "DINO", "dino"
    if "mask_token" in tensors:
        return "DINOv2", "other"
    if file.path.stem.startswith(("dino_deitsmall", "dino_vitbase", "dino_resnet50")):
        return "DINO, by the file's name", "dino"
    if any(name in tensors for name in ("head.weight", "fc.weight")):
        return "timm or torchvision, with a classifier", "supervised"
    return "DINO, iBOT, PW-Self or timm, whose bare files look alike", "other"


def _stranger(names: Iterable[str]) -> str:
    """The well-known network of another kind that tensors belong to; empty for none."""
    names = list(names)
    return next((what for sign, what in _STRANGERS.items() if any(sign in name for name in names)), "")


def describe_left_out(names: Iterable[str]) -> str:
    """A sentence on tensors that no backbone needs, grouped by their first word; empty for none.

    >>> describe_left_out(["head.mlp.0.bias", "head.mlp.0.weight", "mask_token"])
    'left out: head.* (2 tensors), mask_token'
    """
    groups: dict[str, int] = {}
    for name in names:
        word = name.split(".")[0] + (".*" if "." in name else "")
        groups[word] = groups.get(word, 0) + 1
    parts = [f"{word} ({count} tensors)" if word.endswith(".*") else word for word, count in groups.items()]
    return f"left out: {', '.join(parts)}" if parts else ""


def official_stem(path: Path) -> str:
    """A name for records from a file's name: without folders and extensions."""
    return path.name.removesuffix(".tar").rpartition(".")[0] or path.name
