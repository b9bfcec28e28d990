"""Networks of timm: what they are called, how one is built, and how weights get into it, exactly or not at all."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchssl.runtime.errors import CheckpointError, UsageError, unknown_choice
from patchssl.runtime.text import shortened

# how a network gives tokens: a plain Vision Transformer, one with another kind of block, or a feature map
ArchFamily = Literal["vit", "transformer", "convolutional"]
_FAMILIES: Mapping[ArchFamily, tuple[str, ...]] = {"vit": ("vision_transformer", "deit"), "transformer": ("eva",),
                                                   "convolutional": ("resnet", "convnext")}
_REFUSED = {"swin": "a Swin Transformer has no class token, and its patches merge from stage to stage",
            "xcit": "XCiT attends over channels, not over patches"}
_NAMED_KEYS = 5  # in an error


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """A timm Vision Transformer, and what of it differs from timm's default."""

    arch: str
    image_size: int  # pixels; fixes the grid of the learned position embeddings
    patch_size: int
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float | None = None
    qkv_bias: bool | None = None
    init_values: float | None = None  # layer scale; None: as timm's architecture has it
    reg_tokens: int | None = None

    def label(self) -> str:
        """The architecture's name with what differs from timm's default, for tables: vit_tiny_patch16_224 (...)."""
        default = default_sizes(self.arch)
        own = {"img_size": default[0], "patch_size": default[1]}
        differing = [f"{name}={value}" for name, value in self.options().items() if own.get(name) != value]
        return f"{self.arch} ({', '.join(differing)})" if differing else self.arch

    def options(self) -> dict[str, Any]:
        """Keyword arguments for timm: those that were set."""
        chosen = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "arch"}
        chosen = {"img_size": chosen.pop("image_size"), **chosen}
        return {name: value for name, value in chosen.items() if value is not None}


def default_sizes(arch: str) -> tuple[int, int]:
    """Image and patch size in pixels that timm's name says, such as vit_small_patch16_224."""
    patch, size = re.search(r"_patch(\d+)", arch), re.search(r"_(\d+)$", arch)
    usual = 518 if arch.endswith("_dinov2") else 224
    return int(size[1]) if size else usual, int(patch[1]) if patch else 16


def build_vit(spec: NetworkSpec, *, seed: int | None = None) -> nn.Module:
    """An untrained timm Vision Transformer without classifier; `seed` fixes its weights, whatever ran before."""
    require_arch(spec.arch)
    if family_of(spec.arch) != "vit":
        raise UsageError(f"{spec.arch} is no plain Vision Transformer: choose one of timm's vit_* models")
    if not 0 < spec.patch_size <= spec.image_size or spec.image_size % spec.patch_size:
        raise UsageError(f"an image size of {spec.image_size} pixels is no multiple of the patch size "
                         f"{spec.patch_size}")
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            vit = create(spec.arch, **spec.options())
        except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"{spec.arch} cannot be built with {spec.options()}: {reason}") from None
    return require_vit(vit, spec.arch)


def create(arch: str, **options: Any) -> nn.Module:
    """timm's untrained `arch` without classifier; a transformer takes images of any size."""
    import timm

    sized = {} if family_of(arch) == "convolutional" else {"dynamic_img_size": True}
    module: nn.Module = timm.create_model(arch, pretrained=False, num_classes=0, **(options | sized))
    return module


def pretrained_config(name: str) -> dict[str, Any] | None:
    """timm's own record of the weights `name` (architecture.tag; without tag: its default ones), None for none."""
    import timm

    if name not in timm.list_pretrained() and "." in name:
        return None
    config = timm.get_pretrained_cfg(name)
    return config.to_dict() if config is not None and config.has_weights else None


def has_arch(arch: str) -> bool:
    """Does timm have an architecture of this name?"""
    import timm

    return timm.is_model(arch)


def require_arch(arch: str) -> None:
    """UsageError unless timm has an architecture `arch`."""
    import timm

    if not timm.is_model(arch):
        raise UsageError(unknown_choice("architecture", arch, timm.list_models("vit*")))


def require_tag(arch: str, tag: str) -> None:
    """UsageError unless timm knows weights `tag` of `arch`."""
    import timm

    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{arch}.*")]
    if not tags:
        raise UsageError(f"timm has no weights of {arch}; random:{arch} is the untrained network")
    if tag and tag not in tags:
        raise UsageError(unknown_choice(f"tag of timm model {arch}", tag, tags))


def family_of(arch: str) -> ArchFamily:
    """How timm's `arch` gives tokens; UsageError with the reason for one that is not supported."""
    import timm

    for family, modules in _FAMILIES.items():
        if any(timm.models.is_model_in_modules(arch, [module]) for module in modules):
            return family
    reason = next((reason for start, reason in _REFUSED.items() if arch.startswith(start)),
                  "it is neither a plain Vision Transformer nor a ResNet")
    raise UsageError(f"{arch} is not supported: {reason}; choose one of timm's vit_*, resnet* or convnext* models")


def require_vit(module: Any, arch: str) -> nn.Module:
    """`module` if it is a plain timm Vision Transformer with a class token, else UsageError."""
    from timm.models.vision_transformer import Block, VisionTransformer

    if (not isinstance(module, VisionTransformer) or module.cls_token is None
            or any(type(block) is not Block for block in module.blocks)):
        raise UsageError(f"{arch} is no plain Vision Transformer with a class token: choose one of timm's "
                         "vit_* models")
    if isinstance(module.norm, nn.Identity):
        raise UsageError(f"{arch} normalizes the mean of its tokens only, so that its class token has no final norm")
    return module


def timm_positions(vit: Any, rows: int, columns: int) -> Tensor:
    """Position embeddings of a timm Vision Transformer for rows x columns patches, resized as timm does."""
    from timm.layers import resample_abs_pos_embed

    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    resized: Tensor = resample_abs_pos_embed(vit.pos_embed, new_size=[rows, columns], num_prefix_tokens=prefix)
    return resized


def dino_positions(embedding: Tensor, rows: int, columns: int, *, square: bool = True) -> Tensor:
    """Position embeddings (1, 1 + n * n, D) resized to (1, 1 + rows * columns, D) as DINO does.

    Bicubic, without antialiasing, by the scale factor (rows + 0.1) / n (facebookresearch/dino, vision_transformer.py).
    An image that is not `square` in pixels has them resized even where its grid is the trained one, as there.
    """
    n = math.isqrt(embedding.shape[1] - 1)
    if rows == columns == n and square:
        return embedding
    grid = embedding[:, 1:].reshape(1, n, n, -1).permute(0, 3, 1, 2)
    factors = ((rows + 0.1) / n, (columns + 0.1) / n)
    resized = F.interpolate(grid, scale_factor=factors, mode="bicubic")
    return torch.cat([embedding[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class Misfit(NamedTuple):
    """How weights differ from what a network needs; names sorted, shapes as (needed, there)."""

    missing: list[str]
    unexpected: list[str]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def sentence(self) -> str:
        """What is wrong, the first few names of each kind, and how many more there are."""
        shaped = [f"{name} is {_size(there)} instead of {_size(needed)}"
                  for name, (needed, there) in self.shapes.items()]
        parts = [("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shaped)]
        return "; ".join(f"{len(names)} {what}: {shortened(names, _NAMED_KEYS)}" for what, names in parts if names)


def misfit(needed: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> Misfit:
    """How the tensors `there` differ from the `needed` ones, by name and shape."""
    shapes = {name: (tuple(needed[name].shape), tuple(there[name].shape))
              for name in sorted(needed.keys() & there.keys()) if needed[name].shape != there[name].shape}
    return Misfit(sorted(needed.keys() - there.keys()), sorted(there.keys() - needed.keys()), shapes)


def load_exactly(make: Callable[[], nn.Module], state: Mapping[str, Tensor], arch: str, where: str) -> nn.Module:
    """The network that `make` builds with the weights `state`, which are used as they lie, not copied.

    Every name and every shape must fit; CheckpointError says what of `where` does not.
    """
    try:
        with torch.device("meta"):  # no time and no memory for weights that are replaced anyway
            module = make()
    except UsageError as error:
        raise CheckpointError(f"{where}: {error}") from None
    needed = module.state_dict()
    if found := misfit(needed, state):
        raise CheckpointError(f"{where} does not fit {arch}: {found.sentence()}")
    odd = [f"{name} of {tensor.dtype}" for name, tensor in state.items() if tensor.layout != torch.strided
           or tensor.is_meta or tensor.is_floating_point() != needed[name].is_floating_point()]
    if odd:
        raise CheckpointError(f"{where} does not hold plain numbers of the right kind in {shortened(odd, _NAMED_KEYS)}")
    if any(buffer.is_meta for name, buffer in module.named_buffers() if name not in state):
        module = make()  # tables that no file holds, such as rotary frequencies, have to be computed
    module.load_state_dict({name: as_float32(tensor) for name, tensor in state.items()}, assign=True)
    return module


def as_float32(tensor: Tensor) -> Tensor:
    """Half-precision weights as float32; other tensors as they are."""
    return tensor.float() if tensor.is_floating_point() else tensor


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of `state`, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"
