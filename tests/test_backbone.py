"""Backbones against timm's own forward pass, and position embeddings against what DINO's code gave."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import patchssl.backbone
from patchssl.backbone import (
    IMAGENET_MEAN,
    Backbone,
    NetworkSpec,
    VitBackbone,
    build_vit,
    dino_positions,
    load_backbone,
    state_sha256,
)
from patchssl.checkpoint import save_checkpoint
from patchssl.errors import CheckpointError, UsageError
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.engine import Engine, network_spec

SMALL = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=24&depth=3&num_heads=3"


def enlivened(network):
    """`network` with weights so large that every part shows in the output; position embeddings of std 1."""
    rng = torch.Generator().manual_seed(7)
    for name, p in network.named_parameters():
        nn.init.normal_(p, std=1.0 if "pos_embed" in name else 0.2, generator=rng)
    return network


def images(*size, count=2):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def backbone():
    return enlivened(load_backbone(SMALL))


def test_random_uri_sets_every_option():
    backbone = load_backbone(SMALL + "&seed=5")
    assert (backbone.image_size, backbone.patch_size, backbone.embed_dim, backbone.depth) == (32, 8, 24, 3)
    assert backbone.module.blocks[0].attn.num_heads == 3
    differing = "img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3"
    assert backbone.arch == f"vit_tiny_patch16_224 ({differing})"
    assert (backbone.method, backbone.name) == ("random", "random")
    assert (backbone.seed, backbone.pretrain_epochs, backbone.pretrain_data) == (5, 0, None)
    assert (backbone.mean, backbone.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize(("arch", "image_size", "patch_size"), [
    ("vit_tiny_patch16_224", 224, 16), ("vit_tiny_patch16_384", 384, 16),
    ("vit_base_patch32_clip_224", 224, 32), ("vit_small_patch14_dinov2", 224, 14),
])
def test_sizes_default_to_those_in_timms_name(arch, image_size, patch_size):
    backbone = load_backbone(f"random:{arch}?depth=1&embed_dim=12&num_heads=3")
    assert (backbone.image_size, backbone.patch_size) == (image_size, patch_size)


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2",
                                  "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224",
                                  "vit_base_patch16_clip_224"])
def test_tokens_at_the_native_size_are_timms(arch):
    backbone = enlivened(load_backbone(f"random:{arch}?depth=2&embed_dim=24&num_heads=3&img_size=112"))
    x = images(112, 112)
    theirs = backbone.module.forward_features(x)
    extra = backbone.module.num_prefix_tokens - 1
    side = 112 // backbone.patch_size
    assert backbone.tokens(x).shape == (2, 1 + side**2, 24)
    expected = torch.cat([theirs[:, :1], theirs[:, 1 + extra :]], dim=1)
    torch.testing.assert_close(backbone.tokens(x), expected)
    torch.testing.assert_close(backbone.class_tokens(x), theirs[:, 0])
    assert torch.equal(backbone.features(x), backbone.class_tokens(x))
    assert backbone.class_attention(x).shape == (2, 3, side**2)


def test_a_network_without_dino_positions_keeps_timms_interpolation(backbone):
    vit = backbone.module
    x = images(40, 64)
    ours, dinos = VitBackbone(vit, dino_positions=False).tokens(x), VitBackbone(vit).tokens(x)
    torch.testing.assert_close(ours, vit.forward_features(x))
    assert (ours - dinos).abs().max() > 0.01


def test_class_tokens_of_the_last_blocks_come_earliest_first(backbone):
    outputs, x = [], images(32, 32)
    for block in backbone.module.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    backbone.module.forward_features(x)
    expected = [backbone.module.norm(output)[:, 0] for output in outputs]
    outputs.clear()
    torch.testing.assert_close(backbone.class_tokens(x, last=2), torch.cat(expected[1:], dim=-1))
    torch.testing.assert_close(backbone.class_tokens(x, last=3), torch.cat(expected, dim=-1))


@pytest.mark.parametrize("last", [0, 4])
def test_class_tokens_of_blocks_that_are_not_there(backbone, last):
    with pytest.raises(UsageError, match=f"has 3 blocks.*last {last}"):
        backbone.class_tokens(images(32, 32), last=last)


@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_class_attention_is_what_timms_block_computes(backbone, size):
    attention = copy.deepcopy(backbone).module
    attention.blocks[-1].attn.fused_attn = False
    seen = []
    attention.blocks[-1].attn.attn_drop.register_forward_hook(lambda _m, _i, output: seen.append(output))
    VitBackbone(attention).tokens(images(*size))
    torch.testing.assert_close(backbone.class_attention(images(*size)), seen[0][:, :, 0, 1:])
    assert seen[0][:, :, 0].sum(-1).allclose(torch.ones(2, 3))  # softmax over patches and the class token


def test_a_remainder_of_the_patch_size_is_cut_at_right_and_bottom(backbone):
    x = images(45, 39)
    assert torch.equal(backbone.tokens(x), backbone.tokens(x[..., :40, :32]))
    assert torch.equal(backbone.class_tokens(x, last=2), backbone.class_tokens(x[..., :40, :32], last=2))
    assert torch.equal(backbone.class_attention(x), backbone.class_attention(x[..., :40, :32]))


@pytest.mark.parametrize("size", [(7, 32), (32, 7), (0, 0)])
def test_an_image_smaller_than_a_patch(backbone, size):
    with pytest.raises(UsageError, match=rf"{size[0]} x {size[1]} pixels hold no whole patch of 8 x 8"):
        backbone.tokens(torch.zeros(1, 3, *size))


# outputs of interpolate_pos_encoding of facebookresearch/dino
RECORD = Path(__file__).parent / "data" / "dino_positions.npz"


@pytest.mark.parametrize("size", [(224, 224), (96, 96), (480, 480), (224, 160), (336, 512)])
def test_positions_are_resized_as_dino_resizes_them(size):
    """14 x 14 embeddings of standard deviation 1, patch 16, at five image sizes."""
    record = np.load(RECORD)
    found = dino_positions(torch.from_numpy(record["embedding"]), size[0] // 16, size[1] // 16)
    torch.testing.assert_close(found, torch.from_numpy(record[f"{size[0]}x{size[1]}"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [4, 14, 28])
def test_resized_positions_fit_every_grid(n):
    embedding = torch.randn(1, 1 + n * n, 2)
    shapes = {(rows, columns): dino_positions(embedding, rows, columns).shape[1]
              for rows in range(1, 65, 3) for columns in (1, n, rows, 65 - rows)}
    assert [grid for grid, found in shapes.items() if found != 1 + grid[0] * grid[1]] == []


def test_a_seed_fixes_the_weights_whatever_ran_before():
    torch.manual_seed(1)
    first = load_backbone(SMALL + "&seed=3").weights_sha256
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert load_backbone(SMALL + "&seed=3").weights_sha256 == first
    assert torch.equal(torch.random.get_rng_state(), state)  # and nothing after it is changed
    assert load_backbone(SMALL + "&seed=4").weights_sha256 != first
    assert load_backbone(SMALL).weights_sha256 == load_backbone(SMALL + "&seed=0").weights_sha256


def test_the_hash_depends_on_names_shapes_types_and_values():
    state = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    same = {"b": torch.ones(1), "a": torch.zeros(3, 2).T}
    others = [{"a": torch.zeros(3, 2), "b": torch.ones(1)}, {"a": torch.zeros(2, 3), "c": torch.ones(1)},
              {"a": torch.zeros(2, 3), "b": torch.ones(1, dtype=torch.bfloat16)},
              {"a": torch.zeros(2, 3), "b": torch.tensor([1.0000001])}]
    assert state_sha256(same) == state_sha256(state)
    assert len({state_sha256(x) for x in [state, *others]}) == 5


@pytest.mark.parametrize(("uri", "words"), [
    ("random:vit_tine_patch16_224", ["vit_tine_patch16_224", "did you mean 'vit_tiny_patch16_224'"]),
    ("random:vit_tiny_patch16_224?imgsize=32", ["'imgsize'", "did you mean 'img_size'"]),
    ("random:vit_tiny_patch16_224?seed=one", ["seed=one", "whole number"]),
    ("random:vit_tiny_patch16_224?img_size=30", ["30", "no multiple of the patch size 16"]),
    ("random:vit_tiny_patch16_224?embed_dim=32&num_heads=3", ["cannot be built", "'embed_dim': 32"]),
    ("random:resnet18", ["resnet18"]),
    ("random:vit_base_patch16_siglip_224?depth=1&embed_dim=12&num_heads=3", ["class token", "vit_*"]),
    ("random:vit_small_patch16_18x2_224?depth=1&embed_dim=12&num_heads=3", ["no plain Vision Transformer"]),
    ("timm:vit_tine_patch16_224", ["did you mean 'vit_tiny_patch16_224'"]),
    ("timm:vit_small_patch16_224.dyno", ["'dyno'", "did you mean 'dino'"]),
    ("runs/nothing-here", ["runs/nothing-here", "neither a run folder nor a file"]),
    ("nothing.pth", ["nothing.pth", "neither a run folder nor a file"]),
])
def test_wrong_names_are_answered_in_words(uri, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        load_backbone(uri)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_weights_of_timm_that_cannot_be_downloaded(monkeypatch):
    def offline(*_args, **_options):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"timm:vit_small_patch16_224\.dino .*hf download"):
        load_backbone("timm:vit_small_patch16_224.dino")


@pytest.mark.parametrize(("name", "mean", "dinos", "method"), [
    ("vit_small_patch16_224.dino", IMAGENET_MEAN, True, "dino"),
    ("vit_tiny_patch16_224.augreg_in21k", (0.5, 0.5, 0.5), False, "other"),
])
def test_weights_of_timm_come_with_their_normalization(monkeypatch, name, mean, dinos, method):
    create = timm.create_model

    def without_weights(model, *, pretrained, **options):
        assert pretrained
        return create(model, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", without_weights)
    backbone = load_backbone(f"timm:{name}")
    assert (backbone.mean, backbone.dino_positions, backbone.method) == (mean, dinos, method)
    assert (backbone.name, backbone.image_size, backbone.patch_size) == (name, 224, 16)


def small_engine(seed=0):
    recipe = Recipe.model_validate({
        "model": {"arch": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 24, "depth": 2,
                  "num_heads": 3},
        "views": {"global_size": 32, "local_size": 16},
        "head": {"num_prototypes": 16, "hidden": 8, "bottleneck": 4},
    })
    return recipe, Engine(recipe, seed, 10, torch.device("cpu"))


def save_run(folder, **changes):
    """A checkpoint with the keys that a run writes; teacher and student differ."""
    recipe, engine = small_engine()
    enlivened(engine.student)
    spec = {name: getattr(network_spec(recipe), name) for name in NetworkSpec.__dataclass_fields__}
    origin = {"name": "mine", "method": "pwself", "pretrain_data": "textures", "pretrain_epochs": 2.5,
              "seed": 4}
    save_checkpoint(folder, {**engine.state_dict(), "network": spec, "origin": origin} | changes)
    return engine


def test_a_runs_checkpoint_gives_the_teacher_or_the_student(tmp_path):
    engine = save_run(tmp_path / "run")
    x = images(32, 32)
    for uri, network, name in (("run", engine.teacher, "mine"), ("run#teacher", engine.teacher, "mine"),
                               ("run#student", engine.student, "mine-student"),
                               ("run/checkpoint.pth#student", engine.student, "mine-student")):
        backbone = load_backbone(str(tmp_path / uri))
        assert torch.equal(backbone.tokens(x), network.eval().backbone.tokens(x))
        assert backbone.name == name
        assert backbone.weights_sha256 == network.backbone.weights_sha256
    assert (backbone.method, backbone.pretrain_data, backbone.pretrain_epochs) == ("pwself", "textures", 2.5)
    assert (backbone.seed, backbone.image_size, backbone.patch_size) == (4, 32, 8)


def test_a_networks_weights_are_saved_once():
    _, engine = small_engine()
    state = engine.state_dict()["teacher"]
    backbone = {name.removeprefix("backbone.") for name in state if name.startswith("backbone.")}
    assert backbone == set(engine.teacher.backbone.module.state_dict())  # timm's own names
    assert len(backbone) + len(engine.teacher.head.state_dict()) == len(state)


def test_a_checkpoint_with_another_network_inside(tmp_path):
    recipe, _ = small_engine()
    spec = {name: getattr(network_spec(recipe), name) for name in NetworkSpec.__dataclass_fields__}
    save_run(tmp_path / "deep", network=spec | {"depth": 3})
    with pytest.raises(CheckpointError, match=r"does not fit vit_tiny_patch16_224: missing \['blocks\.2"):
        load_backbone(str(tmp_path / "deep"))
    save_run(tmp_path / "wide", network=spec | {"embed_dim": 48})
    with pytest.raises(CheckpointError, match=r"of another shape \['blocks\.0\.attn\.proj\.bias'"):
        load_backbone(str(tmp_path / "wide"))


def test_a_network_that_the_checkpoint_does_not_have(tmp_path):
    save_run(tmp_path / "run")
    uri = str(tmp_path / "run#techer")
    with pytest.raises(CheckpointError, match=re.escape("no 'techer', only ['student', 'teacher']")):
        load_backbone(uri)


class OwnNetwork(nn.Module):
    """Class token: the mean color; patch tokens: the colors of 2 x 2 averages."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        patches = torch.nn.functional.avg_pool2d(x, 2).flatten(2).transpose(1, 2)
        return self.scale * torch.cat([patches.mean(1, keepdim=True), patches], dim=1)

    def half(self, x):
        return self(x) / 2


def test_ones_own_module():
    backbone = Backbone.from_module(OwnNetwork(), patch_size=2, mean=(0.1, 0.2, 0.3), std=(1, 1, 1),
                                    name="own")
    x = images(4, 7)
    assert backbone.tokens(x).shape == (2, 1 + 2 * 3, 3)
    torch.testing.assert_close(backbone.features(x), 2 * x[..., :6].mean((2, 3)))
    assert (backbone.name, backbone.arch, backbone.method) == ("own", "OwnNetwork", "other")
    assert (backbone.mean, backbone.std, backbone.patch_size) == ((0.1, 0.2, 0.3), (1, 1, 1), 2)
    assert backbone.weights_sha256 == state_sha256({"scale": torch.tensor(2.0)})
    assert list(backbone.state_dict()) == ["module.scale"]


def test_ones_own_module_with_a_function_for_its_tokens():
    module = OwnNetwork()
    backbone = Backbone.from_module(module, tokens=module.half, patch_size=2)
    torch.testing.assert_close(backbone.tokens(images(4, 4)), module(images(4, 4)) / 2)


def test_what_ones_own_module_cannot_give_is_said():
    backbone = Backbone.from_module(OwnNetwork(), patch_size=2)
    with pytest.raises(UsageError, match="last block only, 4 were asked for"):
        backbone.class_tokens(images(4, 4), last=4)
    with pytest.raises(UsageError, match="attention cannot be read"):
        backbone.class_attention(images(4, 4))


def test_the_public_names():
    assert patchssl.load_backbone is patchssl.backbone.load_backbone
    assert patchssl.Backbone is Backbone
    assert build_vit(NetworkSpec(arch="test_vit", image_size=32, patch_size=16)).num_classes == 0
