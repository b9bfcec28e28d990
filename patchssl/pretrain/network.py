"""The network that is trained: a Vision Transformer, a projection head, and for a student that is masked a mask token.

In order: `Network`; `build_student`, which makes one as the recipe says; the weights it may start from instead of
chance (`starting_backbone` finds what `init` names, `take_weights` copies it, `describe_start` says so);
`masked_tokens`, a forward pass that does not see some patches; and the names that weights have in a checkpoint
(`network_to_file` and back).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from patchssl.models.backbone import IMAGENET_MEAN, IMAGENET_STD, VitBackbone
from patchssl.models.load import load_network
from patchssl.models.networks import NetworkSpec, build_vit, misfit
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.droppath import use_sampled_drop_path
from patchssl.pretrain.head import ProjectionHead
from patchssl.runtime.errors import UsageError


class Network(nn.Module):
    """A backbone, its projection head, and for a student that is masked a mask token."""

    def __init__(self, backbone: VitBackbone, head: ProjectionHead, *, masked: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.mask_token = nn.Parameter(torch.zeros(1, backbone.embed_dim)) if masked else None  # as iBOT's

    @property
    def blocks(self) -> list[nn.Module]:
        """The backbone's transformer blocks."""
        return list(self.backbone.module.blocks)


def build_student(recipe: Recipe, seed: int, start: VitBackbone | None = None) -> tuple[Network, int]:
    """A student before its first update and how many places of drop path it has.

    `seed` fixes its weights; with `start` those of the head only.
    """
    spec = network_spec(recipe)
    backbone = VitBackbone(build_vit(spec, seed=seed), arch=spec.label())
    if start is not None:
        take_weights(backbone, start)
    num_drop_path = use_sampled_drop_path(backbone.module, recipe.model.drop_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        head = ProjectionHead(backbone.embed_dim, recipe.head)
    return Network(backbone, head, masked=recipe.masked), num_drop_path


def network_spec(recipe: Recipe) -> NetworkSpec:
    """The backbone that `recipe` asks for; its training size is that of the global views."""
    model = recipe.model
    return NetworkSpec(arch=model.arch, image_size=recipe.views.global_size, patch_size=model.patch_size,
                       embed_dim=model.embed_dim, depth=model.depth, num_heads=model.num_heads)


def starting_backbone(recipe: Recipe) -> VitBackbone | None:
    """The backbone that `recipe.init` names, None without one; UsageError for one that cannot be trained on."""
    if recipe.init is None:
        return None
    start = load_network(recipe.init, own_size=True)
    if not isinstance(start, VitBackbone):
        raise UsageError(f"init = {recipe.init} is a {start.arch}; only plain Vision Transformers are pretrained")
    if start.patch_size != recipe.model.patch_size:
        raise UsageError(f"init = {recipe.init} has patches of {start.patch_size} pixels, the recipe says "
                         f"model.patch_size = {recipe.model.patch_size}")
    return start


@torch.no_grad()
def take_weights(backbone: VitBackbone, start: VitBackbone) -> None:
    """Copy the weights of `start` into `backbone`, its position embeddings resized to the other's grid.

    UsageError when any other tensor is missing, unexpected or of another shape.
    """
    state = start.module.state_dict()
    side = backbone.image_size // backbone.patch_size
    state["pos_embed"] = start.positions(side, side)
    if found := misfit(backbone.module.state_dict(), state):
        raise UsageError(f"init = {start.name} ({start.arch}) does not fit the recipe's model ({backbone.arch}): "
                         f"{found.sentence()}; set model.arch and its sizes to those of init")
    for what, own, given in zip(_UNSEEN, _unseen(backbone), _unseen(start), strict=True):
        if own != given:
            raise UsageError(f"init = {start.name} ({start.arch}) has {given} as its {what}, the recipe's model "
                             f"({backbone.arch}) {own}; no tensor shows it, set it in model to what init has")
    backbone.module.load_state_dict(state)


_UNSEEN = ("number of attention heads", "epsilon of the norms", "activation")


def _unseen(backbone: VitBackbone) -> tuple[int, float, str]:
    """What changes a network's output and is in no tensor's name or shape."""
    block = backbone.module.blocks[0]
    return int(block.attn.num_heads), float(block.norm1.eps), type(block.mlp.act).__name__


def describe_start(start: VitBackbone, image_size: int) -> str:
    """What is taken over and what is changed, in a sentence."""
    said = f"the backbone starts from {start.name} ({start.weights_sha256[:8]}), the head is fresh"
    if start.image_size != image_size:
        said += f"; position embeddings are resized from {start.image_size} to {image_size} pixels"
    if (start.mean, start.std) != (IMAGENET_MEAN, IMAGENET_STD):
        said += (f"; it was trained on images normalized by mean {start.mean} and std {start.std}, from now on they "
                 "are normalized by ImageNet's")
    return said


def masked_tokens(backbone: VitBackbone, images: Tensor, mask_token: Tensor, masks: Tensor) -> Tensor:
    """The backbone's tokens (B, 1 + N, D) of `images` (B, 3, H, W) whose masked patches it does not see.

    `mask_token` (D,) takes the places that are true in `masks` (B, N) after the patch embedding, before positions
    are added. It belongs to the caller: the backbone's own weights, names and later calls stay as they are.
    """

    def replaced(module: nn.Module, inputs: Any, patches: Tensor) -> Tensor:
        return replace_patches(patches, masks, mask_token)

    hook = backbone.module.patch_embed.register_forward_hook(replaced)
    try:
        return backbone.tokens(images)
    finally:
        hook.remove()


def replace_patches(patches: Tensor, masks: Tensor, mask_token: Tensor) -> Tensor:
    """`patches` (B, ..., D) with `mask_token` (D,) in all places that `masks` (B, N) names, N places row by row.

    Raises ValueError when the masks are of other images or grids.
    """
    if masks.shape != patches.flatten(1, -2).shape[:2]:
        raise ValueError(f"masks of shape {tuple(masks.shape)} for patches of shape {tuple(patches.shape)}")
    return torch.where(masks.view(*patches.shape[:-1], 1), mask_token.to(patches.dtype), patches)


def compile_blocks(network: Network) -> None:
    """torch.compile of each transformer block, which all compile alike."""
    for block in network.blocks:
        block.compile()


def network_to_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State of a `Network` under a checkpoint's names: timm's names after `backbone.`, and `head.*`."""
    return {name.replace("backbone.module.", "backbone.", 1): value for name, value in state.items()}


def network_from_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `network_to_file`."""
    return {name.replace("backbone.", "backbone.module.", 1) if name.startswith("backbone.") else name: value
            for name, value in state.items()}
