"""Where a student's backbone starts: untrained, or from the weights that the recipe's `init` names."""

from __future__ import annotations

import torch

from patchssl.backbone import IMAGENET_MEAN, IMAGENET_STD, VitBackbone
from patchssl.errors import UsageError
from patchssl.loading import load_backbone
from patchssl.networks import misfit
from patchssl.pretrain.config import Recipe


def starting_backbone(recipe: Recipe) -> VitBackbone | None:
    """The backbone that `recipe.init` names, None without one; UsageError for one that cannot be trained on."""
    if recipe.init is None:
        return None
    start = load_backbone(recipe.init)
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
