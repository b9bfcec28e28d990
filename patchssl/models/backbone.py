"""Backbones: one class gives the tokens, class attention and features of any network.

Images inside a `Backbone` are normalized tensors. `patchssl.models.load.load_backbone` makes one from a string.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchssl.models.networks import dino_positions, state_sha256, timm_positions
from patchssl.runtime.errors import PatchSSLError, UsageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
    final norm, registers dropped. `notes` are sentences on what loading decided.
    """

    has_class_token = True
    notes: tuple[str, ...] = ()

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
        """One's own network: `tokens` (default: calling `module`) maps (B, 3, H, W) to (B, 1 + N, D).

        Class token first, then one token for each whole patch, as `own_tokens` understands or refuses it whenever it
        is called. UsageError for a `mean` or `std` that is not three numbers, or a size that holds no patch.
        """
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UsageError(f"mean {mean} and std {std}: three numbers each, for red, green and blue, std above 0")
        if not 1 <= patch_size <= image_size:
            raise UsageError(f"an image of {image_size} pixels does not hold a patch of {patch_size}")
        return cls(module, tokens, mean=tuple(mean), std=tuple(std), patch_size=patch_size, image_size=image_size,
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
        tokens_of: Callable[[Tensor], Any] = self.module if self._tokens_of is None else self._tokens_of
        whole = whole_patches(images, self.patch_size)
        try:
            found = tokens_of(whole)
        except (PatchSSLError, MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # one's own code
            raise UsageError(f"the tokens of {self.name} could not be computed: your code raised "
                             f"{type(error).__name__} for images of {images.shape[-2]} x {images.shape[-1]} pixels: "
                             f"{error}") from error
        return own_tokens(found, whole, self)

    def patch_tokens(self, images: Tensor) -> Tensor:
        """(B, N, D): the tokens without the class token; a feature map's places for a network without one."""
        return self.tokens(images)[:, 1:]

    def encode(self, images: Tensor, last: int = 1) -> tuple[Tensor, Tensor]:
        """By one pass, class tokens (B, last, D) of the last blocks and patch tokens (B, N, D) of the final one."""
        if last != 1:
            raise UsageError(f"{self.arch} gives the class token of its last block only, {last} were asked for")
        tokens = self.tokens(images)
        return tokens[:, :1], tokens[:, 1:]

    def class_tokens(self, images: Tensor, last: int = 1) -> Tensor:
        """Class tokens (B, last * D) of the last blocks, each after the final norm, earliest block first."""
        return self.encode(images, last)[0].flatten(1)

    def class_attention(self, images: Tensor) -> Tensor:
        """Attention (B, heads, N) of the class token to the patches in the last block."""
        raise UsageError(f"{self.arch} is not a Vision Transformer of timm: its attention cannot be read")

    def features(self, images: Tensor) -> Tensor:
        """One vector per image (B, D): the class token, or the mean over places for a network without one."""
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
        x = self._embed(images)
        for block in self.module.blocks:
            x = block(x)
        x = self.module.norm(x)
        prefix = self.module.num_prefix_tokens
        return x if prefix == 1 else torch.cat([x[:, :1], x[:, prefix:]], dim=1)

    def encode(self, images: Tensor, last: int = 1) -> tuple[Tensor, Tensor]:
        _require_blocks(self.arch, self.depth, last)
        x = self._embed(images)
        kept = []
        for number, block in enumerate(self.module.blocks):
            x = block(x)
            if number >= self.depth - last:
                kept.append(self.module.norm(x[:, 0]))
        return torch.stack(kept, dim=1), self.module.norm(x)[:, self.module.num_prefix_tokens:]

    def class_attention(self, images: Tensor) -> Tensor:
        x = self._embed(images)
        for block in self.module.blocks[:-1]:
            x = block(x)
        return _class_attention(self.module.blocks[-1], x)[..., self.module.num_prefix_tokens:]

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings for a grid of rows x columns patches, prefix tokens as in the network's own."""
        vit = self.module
        if self.dino_positions:
            return dino_positions(vit.pos_embed, rows, columns)
        return timm_positions(vit, rows, columns)

    def _embed(self, images: Tensor) -> Tensor:
        vit = self.module
        patches = vit.patch_embed(whole_patches(images, self.patch_size))  # (B, rows, columns, D)
        if self.dino_positions:
            square = images.shape[-2] == images.shape[-1]
            positions = dino_positions(vit.pos_embed, patches.shape[1], patches.shape[2], square=square)
            class_token = vit.cls_token.expand(images.shape[0], -1, -1)
            x = torch.cat([class_token, patches.flatten(1, 2)], dim=1) + positions
        else:
            x = vit._pos_embed(patches)
        return vit.norm_pre(x)


class TransformerBackbone(Backbone):
    """A timm transformer with another kind of block (EVA, DINOv3); positions as timm's network makes them."""

    module: Any

    def __init__(self, network: Any, *, mean: tuple[float, ...], std: tuple[float, ...], arch: str,
                 origin: Origin) -> None:
        if network.cls_token is None or isinstance(network.norm, nn.Identity):
            raise UsageError(f"{arch} has no class token with a final norm; choose one of timm's vit_* models")
        size, patch = network.patch_embed.img_size, network.patch_embed.patch_size
        super().__init__(network, mean=mean, std=std, patch_size=int(patch[0]), image_size=int(size[0]), arch=arch,
                         origin=origin)
        self.embed_dim, self.depth = int(network.embed_dim), len(network.blocks)

    def tokens(self, images: Tensor) -> Tensor:
        x = self.module.forward_features(whole_patches(images, self.patch_size))
        return torch.cat([x[:, :1], x[:, self.module.num_prefix_tokens:]], dim=1)

    def encode(self, images: Tensor, last: int = 1) -> tuple[Tensor, Tensor]:
        _require_blocks(self.arch, self.depth, last)
        found = self.module.forward_intermediates(whole_patches(images, self.patch_size), indices=last, norm=True,
                                                  return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True)
        return torch.stack([prefix[:, 0] for _, prefix in found], dim=1), found[-1][0]


class ConvolutionalBackbone(Backbone):
    """A timm network with a feature map instead of tokens, such as a ResNet; images keep their remainder."""

    has_class_token = False
    module: Any

    def __init__(self, network: Any, *, mean: tuple[float, ...], std: tuple[float, ...], image_size: int, arch: str,
                 origin: Origin) -> None:
        stride = int(network.feature_info[-1]["reduction"])
        super().__init__(network, mean=mean, std=std, patch_size=stride, image_size=image_size, arch=arch,
                         origin=origin)
        self.embed_dim = int(network.num_features)

    def tokens(self, images: Tensor) -> Tensor:
        raise UsageError(f"{self.arch} has no class token; its features serve k-NN, the linear probe and copy "
                         "detection")

    def class_tokens(self, images: Tensor, last: int = 1) -> Tensor:
        return self.tokens(images)

    def encode(self, images: Tensor, last: int = 1) -> tuple[Tensor, Tensor]:
        patches = self.patch_tokens(images)
        return patches[:, :0], patches

    def patch_tokens(self, images: Tensor) -> Tensor:
        return self.module.forward_features(images).flatten(2).transpose(1, 2)

    def features(self, images: Tensor) -> Tensor:
        return self.module(images)


def own_tokens(found: Any, images: Tensor, backbone: Backbone) -> Tensor:
    """What one's own function gave for `images` (B, 3, H, W) as tokens (B, 1 + N, D), N being the number of patches.

    Of an output of transformers its `last_hidden_state`, of DINOv2's table its normalized tokens; registers after the
    class token are dropped where the module says how many it has. UsageError for all else: what it is, what is needed.
    """
    tokens = getattr(found, "last_hidden_state", found)
    if isinstance(found, Mapping):
        tokens = found.get("last_hidden_state")
        if {"x_norm_clstoken", "x_norm_patchtokens"} <= found.keys():
            tokens = torch.cat([found["x_norm_clstoken"][:, None], found["x_norm_patchtokens"]], dim=1)
    rows, columns = (side // backbone.patch_size for side in images.shape[-2:])
    needed = 1 + rows * columns
    if isinstance(tokens, Tensor) and tokens.ndim == 3 and tokens.is_floating_point() and len(tokens) == len(images):
        extra = _num_registers(backbone.module)
        if extra and tokens.shape[1] == needed + extra:
            return torch.cat([tokens[:, :1], tokens[:, 1 + extra:]], dim=1)
        if tokens.shape[1] == needed and tokens.shape[2]:
            return tokens
    height, width = images.shape[-2:]
    raise UsageError(f"the tokens of {backbone.name} are {_in_words(found)}; ({len(images)}, {needed}, channels) of "
                     f"floating point are needed for {len(images)} images of {height} x {width} pixels: the class "
                     f"token, then one for each of the {rows} x {columns} patches of {backbone.patch_size} pixels"
                     f"{_advice(tokens, needed)}")


def _num_registers(module: nn.Module) -> int:
    """Tokens between the class token and the patches, if `module` or its configuration says so."""
    for source in (module, getattr(module, "config", None)):
        if isinstance(prefix := getattr(source, "num_prefix_tokens", None), int):  # timm's, with the class token
            return max(0, prefix - 1)
        for name in ("num_register_tokens", "num_registers"):
            if isinstance(number := getattr(source, name, None), int):
                return number
    return 0


def _in_words(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"of the shape {tuple(found.shape)}, {str(found.dtype).removeprefix('torch.')}"
    several = enumerate(found) if isinstance(found, tuple | list) else ()
    inside = found.items() if isinstance(found, Mapping) else several
    parts = [f"{name}: {tuple(part.shape)}" if isinstance(part, Tensor) else f"{name}: a {type(part).__name__}"
             for name, part in inside]
    return f"a {type(found).__name__}" + (f" with {', '.join(parts[:4])}" if parts else "")


def _advice(tokens: Any, needed: int) -> str:
    """What to do about tokens of the wrong shape."""
    if isinstance(tokens, tuple | list):
        return "; choose the part that holds them, such as tokens=lambda images: network(images)[0]"
    if not isinstance(tokens, Tensor):
        return "; give a function that returns them as tokens="
    if tokens.ndim == 2:
        return f"; a network of one vector per image may repeat it: vectors[:, None].expand(-1, {needed}, -1)"
    if tokens.ndim == 4:
        return ("; of a feature map make patches = map.flatten(2).transpose(1, 2), and put a class token before them: "
                "torch.cat([patches.mean(1, keepdim=True), patches], 1)")
    if tokens.ndim == 3 and tokens.shape[1] == needed - 1:
        return "; put a class token before the patches: torch.cat([patches.mean(1, keepdim=True), patches], 1)"
    return "; are patch_size and image size the network's, and registers and the like dropped?"


def _require_blocks(arch: str, depth: int, last: int) -> None:
    if not 1 <= last <= depth:
        raise UsageError(f"{arch} has {depth} blocks, class tokens of the last {last} were asked for")


def whole_patches(images: Tensor, patch_size: int) -> Tensor:
    """`images` (B, 3, H, W) without the remainder of the patch size at right and bottom."""
    height, width = (side // patch_size * patch_size for side in images.shape[-2:])
    if not (height and width):
        raise UsageError(f"images of {images.shape[-2]} x {images.shape[-1]} pixels hold no whole patch of "
                         f"{patch_size} x {patch_size} pixels; resize them first")
    return images[..., :height, :width]


def _class_attention(block: Any, x: Tensor) -> Tensor:
    """Softmax attention (B, heads, tokens) of the first token of `x` in a timm block."""
    attention = block.attn
    b, n, _ = x.shape
    qkv = attention.qkv(block.norm1(x)).reshape(b, n, 3, attention.num_heads, attention.head_dim)
    query, key, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = attention.q_norm(query[:, :, :1]), attention.k_norm(key)
    return (query * attention.scale @ key.transpose(-2, -1)).softmax(dim=-1)[:, :, 0]
