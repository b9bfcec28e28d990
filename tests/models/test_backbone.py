"""Backbones against timm's own forward pass, and position embeddings against what DINO's code gave."""

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import each
from torch import nn

import patchssl
from patchssl.models.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    ConvolutionalBackbone,
    Origin,
    TransformerBackbone,
    VitBackbone,
    dino_positions,
    whole_patches,
)
from patchssl.models.load import load_backbone
from patchssl.models.networks import create, state_sha256
from patchssl.runtime.errors import UsageError

SMALL = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=24&depth=3&num_heads=3"
SIZES = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "origin": Origin()}


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


@each("arch", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2",
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
    for ask in (backbone.class_tokens, backbone.encode):
        with pytest.raises(UsageError, match=f"has 3 blocks.*last {last}"):
            ask(images(32, 32), last=last)


def some_backbones():
    """Small ones of every class, with the sizes of an image they take."""
    yield enlivened(load_backbone(SMALL)), (40, 24)
    registers = create("vit_small_patch14_reg4_dinov2", embed_dim=24, depth=2, num_heads=3, img_size=56)
    yield VitBackbone(enlivened(registers).eval()), (42, 70)
    eva = create("vit_small_patch16_dinov3", embed_dim=32, depth=2, num_heads=2, img_size=64)
    yield TransformerBackbone(enlivened(eva).eval(), arch="eva", **SIZES), (48, 80)
    yield Backbone.from_module(OwnNetwork(), patch_size=2), (4, 6)


@each("index", range(4))
def test_one_pass_gives_what_each_function_gives(index):
    backbone, size = list(some_backbones())[index]
    x = images(*size)
    tokens = backbone.tokens(x)
    assert tokens.shape[:2] == (2, 1 + (size[0] // backbone.patch_size) * (size[1] // backbone.patch_size))
    for last in (1, 2) if index < 3 else (1,):
        class_tokens, patches = backbone.encode(x, last)
        assert class_tokens.shape == (2, last, tokens.shape[-1])
        torch.testing.assert_close(class_tokens[:, -1], tokens[:, 0])
        torch.testing.assert_close(patches, tokens[:, 1:])
        torch.testing.assert_close(backbone.class_tokens(x, last), class_tokens.flatten(1))
    assert torch.equal(backbone.patch_tokens(x), tokens[:, 1:])
    torch.testing.assert_close(backbone.features(x), tokens[:, 0])
    assert backbone.has_class_token


@each("arch", ["vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb",
               "eva02_base_patch16_clip_224"])
@each("size", [(64, 64), (96, 48)])
def test_other_transformers_of_timm(arch, size):
    """EVA and DINOv3: tokens as timm's, class tokens of the last blocks against hooks on the blocks."""
    network = enlivened(create(arch, embed_dim=32, depth=4, num_heads=2, img_size=64)).eval()
    backbone = TransformerBackbone(network, arch=arch, **SIZES)
    assert (backbone.embed_dim, backbone.depth, backbone.patch_size, backbone.image_size) == (32, 4, 16, 64)
    outputs, x = [], images(*size)
    hooks = [block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
             for block in network.blocks]
    theirs = network.forward_features(x)
    for hook in hooks:
        hook.remove()
    expected = torch.cat([network.norm(output)[:, 0] for output in outputs[-3:]], dim=-1)
    torch.testing.assert_close(backbone.class_tokens(x, last=3), expected)
    assert torch.equal(backbone.tokens(x), torch.cat([theirs[:, :1], theirs[:, network.num_prefix_tokens:]], dim=1))
    torch.testing.assert_close(backbone.features(x), theirs[:, 0])
    longer = torch.cat([x, x[:, :, :5]], dim=2)  # 5 rows that are no whole patch
    assert torch.equal(backbone.tokens(longer), backbone.tokens(x))


def test_what_other_transformers_cannot_give():
    network = create("vit_small_patch16_dinov3", embed_dim=32, depth=4, num_heads=2, img_size=64)
    backbone = TransformerBackbone(network, arch="mine", **SIZES)
    with pytest.raises(UsageError, match="mine has 4 blocks, class tokens of the last 5"):
        backbone.class_tokens(images(64, 64), last=5)
    with pytest.raises(UsageError, match="attention cannot be read"):
        backbone.class_attention(images(64, 64))
    pooled = create("eva02_tiny_patch14_224", embed_dim=32, depth=1, num_heads=2)  # its norm is of the mean of tokens
    with pytest.raises(UsageError, match="mine has no class token with a final norm"):
        TransformerBackbone(pooled, arch="mine", **SIZES)


@each("arch", ["test_resnet", "test_convnext", "resnet18"])
@each("size", [(64, 64), (70, 97)])
def test_a_network_with_a_feature_map(arch, size):
    torch.manual_seed(0)
    network = create(arch).eval()
    backbone = ConvolutionalBackbone(network, arch=arch, image_size=160, **SIZES)
    x = images(*size)
    places = network.forward_features(x)
    assert (backbone.has_class_token, backbone.patch_size, backbone.embed_dim) == (False, 32, places.shape[1])
    assert torch.equal(backbone.features(x), network(x))
    assert backbone.features(x).shape == (2, backbone.embed_dim)
    found = backbone.patch_tokens(x)
    assert found.shape == (2, places.shape[2] * places.shape[3], backbone.embed_dim)
    assert torch.equal(found[:, 1], places[:, :, 0, 1])  # row by row
    if arch != "test_convnext":  # whose head has a norm after the mean
        torch.testing.assert_close(backbone.features(x), found.mean(1))
    class_tokens, patches = backbone.encode(x)
    assert class_tokens.shape == (2, 0, backbone.embed_dim)
    assert torch.equal(patches, found)


def test_what_a_feature_map_cannot_give_is_said():
    backbone = ConvolutionalBackbone(create("test_resnet"), arch="test_resnet", image_size=160, **SIZES)
    for ask in (backbone.tokens, backbone.class_tokens):
        with pytest.raises(UsageError, match="test_resnet has no class token; its features serve"):
            ask(images(64, 64))
    with pytest.raises(UsageError, match="attention cannot be read"):
        backbone.class_attention(images(64, 64))


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
RECORD = Path(__file__).parents[1] / "data" / "dino_positions.npz"


@each("size", [(224, 224), (96, 96), (480, 480), (224, 160), (336, 512)])
def test_positions_are_resized_as_dino_resizes_them(size):
    """14 x 14 embeddings of standard deviation 1, patch 16, at five image sizes."""
    record = np.load(RECORD)
    found = dino_positions(torch.from_numpy(record["embedding"]), size[0] // 16, size[1] // 16)
    torch.testing.assert_close(found, torch.from_numpy(record[f"{size[0]}x{size[1]}"]), rtol=1e-5, atol=1e-5)


def test_positions_of_an_image_that_is_not_square():
    """DINO's code leaves them only where the grid is the trained one and the image is square, in pixels."""
    embedding = torch.randn(1, 17, 2, generator=torch.Generator().manual_seed(0))
    assert dino_positions(embedding, 4, 4) is embedding
    resized = dino_positions(embedding, 4, 4, square=False)
    assert torch.equal(resized[:, 0], embedding[:, 0])
    assert 0.001 < (resized - embedding).abs().max() < 1


def test_the_position_embeddings_that_a_backbone_uses(backbone):
    """What `positions` hands out is what is added to the patches, whichever way they are resized."""
    seen = []
    for dinos in (True, False):
        one = VitBackbone(copy.deepcopy(backbone.module), dino_positions=dinos)
        nn.init.zeros_(one.module.patch_embed.proj.weight)
        nn.init.zeros_(one.module.patch_embed.proj.bias)
        one.module.blocks[0].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        one.tokens(images(40, 24, count=1))
        torch.testing.assert_close(seen[-1][:, 1:], one.positions(5, 3)[:, 1:])
    assert (seen[0] - seen[1]).abs().max() > 0.01


@each(("arch", "dinos"), [
    ("vit_tiny_patch16_224", True), ("deit_tiny_distilled_patch16_224", False), ("deit3_small_patch16_224", False),
    ("vit_small_patch14_reg4_dinov2", False),
])
def test_dinos_positions_need_one_prefix_token_with_a_position(arch, dinos):
    network = create(arch, embed_dim=24, depth=1, num_heads=3, img_size=112)
    assert VitBackbone(network, dino_positions=True).dino_positions is dinos
    assert VitBackbone(network, dino_positions=False).dino_positions is False


@each("n", [4, 14, 28])
def test_resized_positions_fit_every_grid(n):
    embedding = torch.randn(1, 1 + n * n, 2)
    shapes = {(rows, columns): dino_positions(embedding, rows, columns).shape[1]
              for rows in range(1, 65, 3) for columns in (1, n, rows, 65 - rows)}
    assert [grid for grid, found in shapes.items() if found != 1 + grid[0] * grid[1]] == []


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


@each(("options", "words"), [
    ({"mean": (0.5, 0.5)}, r"mean \(0\.5, 0\.5\) and std .*three numbers each"), ({"mean": ()}, "three numbers each"),
    ({"std": (1, 1, 1, 1)}, "three numbers each"), ({"std": (1, 0, 1)}, "std above 0"),
    ({"std": (1, -1, 1)}, "std above 0"),
    ({"patch_size": 0}, "does not hold a patch of 0"), ({"patch_size": -2}, "does not hold a patch of -2"),
    ({"image_size": 1}, "an image of 1 pixels does not hold a patch of 2"),
])
def test_ones_own_module_with_wrong_numbers(options, words):
    with pytest.raises(UsageError, match=words):
        Backbone.from_module(OwnNetwork(), **{"patch_size": 2} | options)


def test_a_module_without_weights_is_on_the_cpu():
    class Nothing(nn.Module):
        def forward(self, x):
            return torch.cat([x.mean((2, 3))[:, None], x.flatten(2).transpose(1, 2)], dim=1)

    backbone = Backbone.from_module(Nothing(), patch_size=1, image_size=1)
    assert backbone.device == torch.device("cpu")
    assert backbone.patch_tokens(images(2, 2)).shape == (2, 4, 3)
    assert backbone.weights_sha256 == state_sha256({})


@each(("size", "whole"), [((16, 16), (16, 16)), ((17, 31), (16, 24)), ((8, 9), (8, 8))])
def test_whole_patches_keep_top_and_left(size, whole):
    x = images(*size)
    assert torch.equal(whole_patches(x, 8), x[..., :whole[0], :whole[1]])
    assert whole_patches(x, 8).shape[-2:] == whole


def test_what_ones_own_module_cannot_give_is_said():
    backbone = Backbone.from_module(OwnNetwork(), patch_size=2)
    with pytest.raises(UsageError, match="last block only, 4 were asked for"):
        backbone.class_tokens(images(4, 4), last=4)
    with pytest.raises(UsageError, match="attention cannot be read"):
        backbone.class_attention(images(4, 4))


class Output(dict):
    """As transformers' ModelOutput: a table whose entries are attributes too."""

    def __getattr__(self, name):
        return self[name]


class Gives(nn.Module):
    """Gives what `of` makes of the right tokens (B, 1 + N, 3) for patches of 2 pixels."""

    def __init__(self, of, **about):
        super().__init__()
        self.of = of
        for name, value in about.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.of(OwnNetwork()(x))


def with_registers(tokens, count=4):
    return torch.cat([tokens[:, :1], torch.full_like(tokens[:, :1], 9).expand(-1, count, -1), tokens[:, 1:]], dim=1)


@each("of, about", [
    (lambda t: t, {}), (lambda t: t.half(), {}),
    (lambda t: Output(last_hidden_state=t, pooler_output=t[:, 0]), {}),
    (lambda t: {"last_hidden_state": t}, {}),
    (lambda t: {"x_norm_clstoken": t[:, 0], "x_norm_patchtokens": t[:, 1:], "x_norm_regtokens": t[:, :0]}, {}),
    (with_registers, {"num_register_tokens": 4}), (with_registers, {"num_prefix_tokens": 5}),
    (lambda t: Output(last_hidden_state=with_registers(t)), {"config": SimpleNamespace(num_register_tokens=4)}),
    (lambda t: t, {"num_register_tokens": 4}),  # dropped already
])
def test_what_ones_own_module_gives_is_understood(of, about):
    x = images(4, 7)
    expected = OwnNetwork()(x[..., :6])
    backbone = Backbone.from_module(Gives(of, **about), patch_size=2)
    torch.testing.assert_close(backbone.tokens(x).float(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(backbone.features(x).float(), expected[:, 0], rtol=1e-3, atol=1e-3)


@each("of, words", [
    (lambda t: t[:, 0], r"of the shape \(2, 3\), float32; \(2, 7, channels\).*2 images of 4 x 6 pixels.*2 x 3 patches "
                        r"of 2 pixels.*may repeat it: vectors\[:, None\]\.expand\(-1, 7, -1\)"),
    (lambda t: t[:, 1:], r"of the shape \(2, 6, 3\).*put a class token before the patches"),
    (lambda t: t[:, :1], r"of the shape \(2, 1, 3\)"), (lambda t: t[:1], r"of the shape \(1, 7, 3\)"),
    (lambda t: t[..., :0], r"of the shape \(2, 7, 0\)"),
    (with_registers, r"of the shape \(2, 11, 3\).*registers and the like dropped"),
    (lambda t: t.transpose(1, 2)[:, :, 1:].unflatten(2, (2, 3)), r"of the shape \(2, 3, 2, 3\).*flatten\(2\)"),
    (lambda t: t.long(), "int64; .*of floating point"),
    (lambda t: (t, t[:, 0]), r"a tuple with 0: \(2, 7, 3\), 1: \(2, 3\);.*choose the part.*network\(images\)\[0\]"),
    (lambda t: {"logits": t[:, 0]}, r"a dict with logits: \(2, 3\)"), (lambda t: None, "a NoneType;"),
    (lambda t: t.detach().numpy(), "a ndarray;"),
])
def test_what_ones_own_module_gives_is_refused_by_its_shape(of, words):
    backbone = Backbone.from_module(Gives(of), patch_size=2)
    for ask in (backbone.features, backbone.tokens, backbone.patch_tokens, backbone.encode, backbone.class_tokens):
        with pytest.raises(UsageError, match=words):
            ask(images(4, 6))


def test_what_ones_own_module_raises_is_said_with_the_size_of_the_images():
    def raises(tokens):
        raise ValueError("of my own")

    with pytest.raises(UsageError, match="your code raised ValueError for images of 4 x 6 pixels: of my own"):
        Backbone.from_module(Gives(raises), patch_size=2).tokens(images(4, 6))


def test_the_advice_for_one_vector_per_image_works():
    backbone = Backbone.from_module(Gives(lambda t: t[:, 0][:, None].expand(-1, 7, -1)), patch_size=2)
    torch.testing.assert_close(backbone.features(images(4, 6)), OwnNetwork()(images(4, 6))[:, 0])


def test_tokens_that_fit_one_size_only_are_refused_at_another():
    backbone = Backbone.from_module(Gives(lambda t: t[:, :7]), patch_size=2)
    backbone.tokens(images(4, 6))
    with pytest.raises(UsageError, match=r"\(2, 7, 3\).*\(2, 10, channels\).*6 x 6 pixels"):
        backbone.tokens(images(6, 6))


def test_the_public_names():
    assert patchssl.load_backbone is load_backbone
    assert patchssl.Backbone is Backbone
