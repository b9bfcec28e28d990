"""Tokens of masked images against iBOT's own network; a mask token that leaves the backbone as it is."""

import numpy as np
import pytest
import torch
from record_masking import MASKING, SIZES, SPEC, example
from record_official import filled

from patchssl.models.backbone import VitBackbone
from patchssl.models.networks import NetworkSpec, build_vit
from patchssl.pretrain.network import masked_tokens, replace_patches


@pytest.fixture
def backbone():
    spec = NetworkSpec(arch="vit_tiny_patch16_224", image_size=SPEC["img_size"][0], patch_size=SPEC["patch_size"],
                       embed_dim=SPEC["embed_dim"], depth=SPEC["depth"], num_heads=SPEC["num_heads"])
    vit = build_vit(spec, seed=0)
    vit.load_state_dict({name: torch.from_numpy(filled(name, p.shape)) for name, p in vit.state_dict().items()})
    return VitBackbone(vit).eval()


def inputs(size=SIZES[0]):
    images, masks = (torch.from_numpy(array) for array in example(size))
    return images, masks.flatten(1), torch.from_numpy(filled("masked_embed", (1, SPEC["embed_dim"])))[0]


@pytest.mark.parametrize("size", SIZES)
def test_tokens_of_masked_images_are_ibots(backbone, size):
    images, masks, token = inputs(size)
    expected = torch.from_numpy(np.load(MASKING)[f"tokens/{size}"])
    with torch.no_grad():
        found, plain = masked_tokens(backbone, images, token, masks), backbone.tokens(images)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert [(plain[i] - expected[i]).abs().max() > 0.1 for i in range(3)] == [True, False, True]


def test_the_backbone_stays_as_it_was(backbone):
    images, masks, token = inputs()
    names, before = list(backbone.state_dict()), backbone.tokens(images)
    masked_tokens(backbone, images, token, masks)
    with pytest.raises(ValueError, match=r"masks of shape \(3, 5\)"):
        masked_tokens(backbone, images, token, masks[:, :5])
    assert list(backbone.state_dict()) == names
    assert not backbone.module.patch_embed._forward_hooks
    assert torch.equal(backbone.tokens(images), before)


def test_nothing_of_a_hidden_patch_shows(backbone):
    images, masks, token = inputs()
    rows = SPEC["img_size"][0] // SPEC["patch_size"]
    hidden = masks.view(3, 1, rows, rows).repeat_interleave(16, 2).repeat_interleave(16, 3)
    others = torch.where(hidden, images.flip(0) + 1, images)
    assert (others != images).any((1, 2, 3)).tolist() == [True, False, True]
    found = masked_tokens(backbone, images, token, masks)
    assert torch.equal(masked_tokens(backbone, others, token, masks), found)


def test_the_mask_token_learns_from_hidden_places_only():
    patches = torch.arange(24.0).view(2, 2, 2, 3).requires_grad_()
    token, masks = torch.zeros(3, requires_grad=True), torch.tensor([[True, False, False, True], [False] * 4])
    replaced = replace_patches(patches, masks, token)
    replaced.sum().backward()
    assert token.grad.tolist() == [2, 2, 2]
    assert torch.equal(patches.grad.any(-1).flatten(1), ~masks)
    assert torch.equal(replaced[1], patches[1])


def test_batches_without_a_mask_still_give_the_token_a_gradient():
    token = torch.zeros(3, requires_grad=True)  # in several processes none may be missing
    replace_patches(torch.ones(2, 4, 3), torch.zeros(2, 4, dtype=torch.bool), token).sum().backward()
    assert token.grad.tolist() == [0, 0, 0]


def test_the_patches_precision_stays():
    patches = torch.ones(1, 2, 3, dtype=torch.bfloat16)
    assert replace_patches(patches, torch.tensor([[True, False]]), torch.zeros(3)).dtype == torch.bfloat16


def test_nothing_waits_for_what_is_masked():
    patches, token = torch.empty(2, 4, 3, device="meta"), torch.empty(3, device="meta")
    masks = torch.empty(2, 4, dtype=torch.bool, device="meta")  # has no values that anything could look at
    assert replace_patches(patches, masks, token).shape == (2, 4, 3)
