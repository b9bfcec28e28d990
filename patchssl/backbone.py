"""Backbones: one string names a network, one class gives its tokens.

`load_backbone` reads `timm:NAME`, `random:NAME?option=value`, a run folder or a checkpoint of ours
(`PATH#teacher`, `PATH#student`). Images inside a `Backbone` are normalized tensors.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchssl.checkpoint import load_checkpoint, network_state
from patchssl.errors import CheckpointError, UsageError, one_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """A timm Vision Transformer, and what of it differs from timm's default."""

    arch: str
    image_size: int  # pixels; fixes the grid of the learned position embeddings
    patch_size: int
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None

    def label(self) -> str:
        """The architecture's name with what differs from timm's default, for tables: vit_tiny_patch16_224 (...)."""
        default = _default_sizes(self.arch)
        own = {"img_size": default[0], "patch_size": default[1]}
        differing = [f"{name}={value}" for name, value in self.options().items() if own.get(name) != value]
        return f"{self.arch} ({', '.join(differing)})" if differing else self.arch

    def options(self) -> dict[str, int]:
        """Keyword arguments for timm: those that were set."""
        chosen = {"img_size": self.image_size, "patch_size": self.patch_size, "embed_dim": self.embed_dim,
                  "depth": self.depth, "num_heads": self.num_heads}
        return {name: value for name, value in chosen.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a backbone came from: what records and tables say about it."""

    name: str = "backbone"
    method: str = "other"  # pwself, dino, ibot, random, pixels, supervised, other
    pretrain_data: str | None = None
    pretrain_epochs: float | None = None
    seed: int | None = None


class Backbone(nn.Module):
    """A network that turns normalized images into tokens.

    `tokens_of` (default: calling `module`) maps (B, 3, H, W) to (B, 1 + N, D): class token first, after the
    final norm, registers dropped.
    """

    def __init__(self, module: nn.Module, tokens_of: Callable[[Tensor], Tensor] | None = None, *,
                 mean: tuple[float, ...], std: tuple[float, ...], patch_size: int, image_size: int, arch: str,
                 origin: Origin) -> None:
        super().__init__()
        self.module = module
        self._tokens_of = tokens_of  # `module` itself stays None: named twice, it would be saved twice
        self.mean, self.std = mean, std
        self.patch_size, self.image_size = patch_size, image_size
        self.arch, self.origin = arch, origin

    @classmethod
    def from_module(cls, module: nn.Module, *, tokens: Callable[[Tensor], Tensor] | None = None,
                    mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD,
                    patch_size: int, image_size: int = 224, name: str = "module") -> Backbone:
        """One's own network: `tokens` (default: calling `module`) maps (B, 3, H, W) to (B, 1 + N, D)."""
        return cls(module, tokens, mean=mean, std=std, patch_size=patch_size, image_size=image_size,
                   arch=type(module).__name__, origin=Origin(name=name))

    name = property(lambda self: self.origin.name)
    method = property(lambda self: self.origin.method)
    pretrain_data = property(lambda self: self.origin.pretrain_data)
    pretrain_epochs = property(lambda self: self.origin.pretrain_epochs)
    seed = property(lambda self: self.origin.seed)

    @property
    def weights_sha256(self) -> str:
        """sha256 over names, types, shapes and bytes of all weights."""
        return state_sha256(self.module.state_dict())

    @property
    def device(self) -> torch.device:
        """Where the weights are; the CPU for a network without any."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 1 + N, D) after the final norm; a remainder of the patch size is cut off."""
        tokens_of: Callable[[Tensor], Tensor] = self.module if self._tokens_of is None else self._tokens_of
        return tokens_of(whole_patches(images, self.patch_size))

    def class_tokens(self, images: Tensor, last: int = 1) -> Tensor:
        """Class tokens (B, last * D) of the last blocks, each after the final norm, earliest block first."""
        if last != 1:
            raise UsageError(f"{self.arch} gives the class token of its last block only, {last} were asked for")
        return self.tokens(images)[:, 0]

    def class_attention(self, images: Tensor) -> Tensor:
        """Attention (B, heads, N) of the class token to the patches in the last block."""
        raise UsageError(f"{self.arch} is not a Vision Transformer of timm: its attention cannot be read")

    def features(self, images: Tensor) -> Tensor:
        """One vector per image (B, D): the class token."""
        return self.class_tokens(images)


class VitBackbone(Backbone):
    """A timm `VisionTransformer`; with `dino_positions` its position embeddings are resized as DINO's code does."""

    module: Any  # torch types a module's parts as Tensor | Module

    def __init__(self, vit: Any, *, dino_positions: bool = True, mean: tuple[float, ...] = IMAGENET_MEAN,
                 std: tuple[float, ...] = IMAGENET_STD, arch: str = "vit", origin: Origin | None = None) -> None:
        size, patch = vit.patch_embed.img_size, vit.patch_embed.patch_size
        super().__init__(vit, mean=mean, std=std, patch_size=int(patch[0]),
                         image_size=int(size[0]), arch=arch, origin=origin or Origin())
        # DINO's way knows one prefix token, which has a position: not so in distilled or register networks
        self.dino_positions = dino_positions and vit.num_prefix_tokens == 1 and not vit.no_embed_class

    @property
    def embed_dim(self) -> int:
        """Channels D of a token."""
        return int(self.module.embed_dim)

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return len(self.module.blocks)

    def tokens(self, images: Tensor) -> Tensor:
        x = self._embed(whole_patches(images, self.patch_size))
        for block in self.module.blocks:
            x = block(x)
        x = self.module.norm(x)
        prefix = self.module.num_prefix_tokens
        return x if prefix == 1 else torch.cat([x[:, :1], x[:, prefix:]], dim=1)

    def class_tokens(self, images: Tensor, last: int = 1) -> Tensor:
        if not 1 <= last <= self.depth:
            raise UsageError(f"{self.arch} has {self.depth} blocks, class tokens of the last {last} were asked for")
        x = self._embed(whole_patches(images, self.patch_size))
        kept = []
        for number, block in enumerate(self.module.blocks):
            x = block(x)
            if number >= self.depth - last:
                kept.append(self.module.norm(x[:, 0]))
        return torch.cat(kept, dim=-1)

    def class_attention(self, images: Tensor) -> Tensor:
        x = self._embed(whole_patches(images, self.patch_size))
        for block in self.module.blocks[:-1]:
            x = block(x)
        return _class_attention(self.module.blocks[-1], x)[..., self.module.num_prefix_tokens:]

    def _embed(self, images: Tensor) -> Tensor:
        vit = self.module
        patches = vit.patch_embed(images)  # (B, rows, columns, D)
        if self.dino_positions:
            positions = dino_positions(vit.pos_embed, patches.shape[1], patches.shape[2])
            class_token = vit.cls_token.expand(len(images), -1, -1)
            x = torch.cat([class_token, patches.flatten(1, 2)], dim=1) + positions
        else:
            x = vit._pos_embed(patches)
        return vit.norm_pre(x)


def whole_patches(images: Tensor, patch_size: int) -> Tensor:
    """`images` (B, 3, H, W) without the remainder of the patch size at right and bottom."""
    height, width = (side // patch_size * patch_size for side in images.shape[-2:])
    if not (height and width):
        raise UsageError(f"images of {images.shape[-2]} x {images.shape[-1]} pixels hold no whole patch of "
                         f"{patch_size} x {patch_size} pixels; resize them first")
    return images[..., :height, :width]


def dino_positions(embedding: Tensor, rows: int, columns: int) -> Tensor:
    """Position embeddings (1, 1 + n * n, D) resized to (1, 1 + rows * columns, D) as DINO does.

    Bicubic, without antialiasing, by the scale factor (rows + 0.1) / n (facebookresearch/dino, vision_transformer.py).
    """
    n = math.isqrt(embedding.shape[1] - 1)
    if rows == columns == n:
        return embedding
    grid = embedding[:, 1:].reshape(1, n, n, -1).permute(0, 3, 1, 2)
    factors = ((rows + 0.1) / n, (columns + 0.1) / n)
    resized = F.interpolate(grid, scale_factor=factors, mode="bicubic")
    return torch.cat([embedding[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def build_vit(spec: NetworkSpec, *, drop_path: float = 0.0, seed: int | None = None) -> nn.Module:
    """An untrained timm Vision Transformer without classifier; `seed` fixes its weights, whatever ran before."""
    import timm

    if spec.arch not in timm.list_models():
        raise UsageError(one_of("architecture", spec.arch, timm.list_models("vit*")))
    require_vit_name(spec.arch)
    if spec.image_size % spec.patch_size:
        raise UsageError(f"an image size of {spec.image_size} pixels is no multiple of the patch size "
                         f"{spec.patch_size}")
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            vit = timm.create_model(spec.arch, num_classes=0, drop_path_rate=drop_path, dynamic_img_size=True,
                                    **spec.options())
        except (TypeError, AssertionError, RuntimeError) as error:
            raise UsageError(f"{spec.arch} cannot be built with {spec.options()}: {error}") from None
    return require_vit(vit, spec.arch)


def require_vit_name(arch: str) -> None:
    """UsageError if timm's `arch` comes from a module that holds no plain Vision Transformers, such as a ResNet."""
    import timm

    if not any(timm.models.is_model_in_modules(arch, [module]) for module in ("vision_transformer", "deit")):
        raise UsageError(f"{arch} is no plain Vision Transformer: choose one of timm's vit_* models")


def require_vit(module: Any, arch: str) -> nn.Module:
    """`module` if it is a plain timm Vision Transformer with a class token, else UsageError."""
    from timm.models.vision_transformer import Block, VisionTransformer

    if (not isinstance(module, VisionTransformer) or module.cls_token is None
            or any(type(block) is not Block for block in module.blocks)):
        raise UsageError(f"{arch} is no plain Vision Transformer with a class token: choose one of timm's "
                         "vit_* models")
    return module


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of `state`, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_backbone(uri: str, device: str | torch.device = "cpu") -> Backbone:
    """The backbone that `uri` names, in evaluation mode on `device`.

    `timm:vit_small_patch16_224.dino`, `random:vit_tiny_patch16_224?img_size=32&patch_size=8&seed=0`, a run
    folder, or a checkpoint of ours; `#teacher` (default) or `#student` chooses the network of a checkpoint.
    Raises UsageError for what does not exist, CheckpointError for what does not fit.
    """
    kind, colon, rest = str(uri).partition(":")
    if colon and kind == "timm":
        backbone = _from_timm(rest)
    elif colon and kind == "random":
        backbone = _from_random(rest)
    else:
        backbone = _from_checkpoint(str(uri))
    return backbone.to(device).eval().requires_grad_(False)


def _from_timm(name: str) -> Backbone:
    import timm

    base, dot, tag = name.partition(".")
    if base not in timm.list_models():
        raise UsageError(one_of("timm model", base, timm.list_models("vit*")))
    require_vit_name(base)
    if dot and name not in timm.list_pretrained():
        tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{base}.*")]
        raise UsageError(one_of(f"tag of timm model {base}", tag, tags))
    try:
        vit = timm.create_model(name, pretrained=True, num_classes=0, dynamic_img_size=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"the weights of timm:{name} are neither in the Hugging Face cache nor could they be "
                              f"downloaded ({type(error).__name__}); bring them with 'hf download timm/{name}' on a "
                              "machine with a network") from None
    require_vit(vit, name)
    from_dino = tag.startswith("dino") and vit.num_prefix_tokens == 1
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if from_dino else (vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"])
    method = "dino" if from_dino else "other"
    origin = Origin(name=name, method=method)
    return VitBackbone(vit, dino_positions=from_dino, mean=mean, std=std, arch=base, origin=origin)


def _from_random(rest: str) -> Backbone:
    arch, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    allowed = ["img_size", "patch_size", "embed_dim", "depth", "num_heads", "seed"]
    for name, value in options.items():
        if name not in allowed:
            raise UsageError(one_of("option", name, allowed) + f" in random:{rest}")
        if not value.isdecimal():
            raise UsageError(f"option {name}={value} in random:{rest} is not a whole number")
    numbers = {name: int(value) for name, value in options.items()}
    seed = numbers.pop("seed", 0)
    default = _default_sizes(arch)
    spec = NetworkSpec(arch=arch, image_size=numbers.pop("img_size", default[0]),
                       patch_size=numbers.pop("patch_size", default[1]), **numbers)
    origin = Origin(name="random", method="random", pretrain_epochs=0, seed=seed)
    return VitBackbone(build_vit(spec, seed=seed), arch=spec.label(), origin=origin)


def _default_sizes(arch: str) -> tuple[int, int]:
    """Image and patch size that timm's name says, such as vit_small_patch16_224."""
    patch, size = re.search(r"_patch(\d+)", arch), re.search(r"_(\d+)$", arch)
    return int(size[1]) if size else 224, int(patch[1]) if patch else 16


def _from_checkpoint(uri: str) -> Backbone:
    location, _, network = uri.partition("#")
    path = Path(location)
    if not path.exists():
        raise UsageError(f"model '{uri}' is neither a run folder nor a file, and names neither timm:... nor random:...")
    checkpoint = load_checkpoint(path)
    network = network or "teacher"
    state = network_state(checkpoint, network, path)
    spec = NetworkSpec(**checkpoint["network"])
    vit = build_vit(spec)
    expected = vit.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    other = [name for name in sorted(expected.keys() & state.keys()) if state[name].shape != expected[name].shape]
    if missing or unexpected or other:
        raise CheckpointError(f"'{network}' in {path} does not fit {spec.arch}: missing {missing[:5]}, "
                              f"unexpected {unexpected[:5]}, of another shape {other[:5]}")
    vit.load_state_dict(state)
    origin = Origin(**checkpoint["origin"])
    name = origin.name if network == "teacher" else f"{origin.name}-{network}"
    return VitBackbone(vit, arch=spec.label(), origin=replace(origin, name=name))


def _class_attention(block: Any, x: Tensor) -> Tensor:
    """Softmax attention (B, heads, tokens) of the first token of `x` in a timm block."""
    attention = block.attn
    b, n, _ = x.shape
    qkv = attention.qkv(block.norm1(x)).reshape(b, n, 3, attention.num_heads, attention.head_dim)
    query, key, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = attention.q_norm(query[:, :, :1]), attention.k_norm(key)
    return (query * attention.scale @ key.transpose(-2, -1)).softmax(dim=-1)[:, :, 0]
