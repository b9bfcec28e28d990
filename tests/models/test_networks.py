"""timm's networks by name, and weights that get into one exactly or not at all."""

import copy

import pytest
import timm
import torch
from cases import each

from patchssl.models.networks import (
    NetworkSpec,
    as_float32,
    build_vit,
    create,
    default_sizes,
    family_of,
    has_arch,
    load_exactly,
    misfit,
    pretrained_config,
    require_arch,
    require_tag,
    require_vit,
    state_sha256,
    timm_positions,
)
from patchssl.runtime.errors import CheckpointError, UsageError

SMALL = NetworkSpec(arch="vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)


# names ---------------------------------------------------------------------------------------------------------


@each(("arch", "sizes"), [
    ("vit_tiny_patch16_224", (224, 16)), ("vit_tiny_patch16_384", (384, 16)), ("vit_base_patch32_clip_224", (224, 32)),
    ("vit_small_patch14_dinov2", (518, 14)), ("vit_small_patch14_reg4_dinov2", (518, 14)), ("test_vit", (224, 16)),
])
def test_sizes_in_timms_names(arch, sizes):
    assert default_sizes(arch) == sizes


@each("arch", ["vit_tiny_patch16_224", "vit_tiny_patch16_384", "vit_base_patch32_clip_224",
               "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_sizes_in_timms_names_are_those_of_its_networks(arch):
    with torch.device("meta"):
        embedding = timm.create_model(arch, depth=1).patch_embed
    assert default_sizes(arch) == (embedding.img_size[0], embedding.patch_size[0])


def test_a_label_names_what_differs():
    assert NetworkSpec(arch="vit_small_patch16_224", image_size=224, patch_size=16).label() == "vit_small_patch16_224"
    assert SMALL.label() == "vit_tiny_patch16_224 (img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)"
    spec = NetworkSpec(arch="vit_base_patch14_dinov2", image_size=518, patch_size=14, init_values=1.0, qkv_bias=False)
    assert spec.label() == "vit_base_patch14_dinov2 (qkv_bias=False, init_values=1.0)"
    assert spec.options() == {"img_size": 518, "patch_size": 14, "qkv_bias": False, "init_values": 1.0}


def test_which_networks_there_are():
    assert has_arch("vit_small_patch8_224")
    assert not has_arch("vit_tiny_patch8_224")
    require_arch("resnet18")
    with pytest.raises(UsageError, match="'vit_tine_patch16_224' is unknown; did you mean 'vit_tiny_patch16_224'"):
        require_arch("vit_tine_patch16_224")


@each(("arch", "tag", "words"), [
    ("vit_small_patch16_224", "dyno", "tag of timm model vit_small_patch16_224 'dyno' is unknown; did you mean 'dino'"),
    ("vit_small_patch8_224", "", None), ("vit_small_patch8_224", "dino", None),
    ("vit_small_patch16_18x2_224", "", "timm has no weights of vit_small_patch16_18x2_224; random:vit_small"),
])
def test_tags(arch, tag, words):
    if words is None:
        require_tag(arch, tag)
    else:
        with pytest.raises(UsageError, match=words):
            require_tag(arch, tag)


def test_timms_record_of_weights():
    """Against timm's own look-up: the default tag, and one that is not the default."""
    default = pretrained_config("vit_small_patch16_224")
    assert default["tag"] == timm.get_pretrained_cfg("vit_small_patch16_224").tag != "dino"
    dino = pretrained_config("vit_small_patch16_224.dino")
    assert (dino["tag"], dino["mean"], dino["num_classes"]) == ("dino", (0.485, 0.456, 0.406), 0)
    assert dino["hf_hub_id"] == "timm/vit_small_patch16_224.dino"
    for name in ("vit_small_patch16_224.dyno", "vit_small_patch16_18x2_224", "resnet18.", "nothing"):
        assert pretrained_config(name) is None


@each(("arch", "family"), [
    ("vit_tiny_patch16_224", "vit"), ("deit3_small_patch16_224", "vit"), ("vit_small_patch14_reg4_dinov2", "vit"),
    ("test_vit", "vit"), ("eva02_tiny_patch14_224", "transformer"), ("vit_small_patch16_dinov3", "transformer"),
    ("resnet50", "convolutional"), ("convnext_tiny", "convolutional"), ("test_convnext", "convolutional"),
])
def test_families(arch, family):
    assert family_of(arch) == family


@each(("arch", "reason"), [
    ("swin_tiny_patch4_window7_224", "a Swin Transformer has no class token"),
    ("swinv2_tiny_window8_256", "a Swin Transformer has no class token"),
    ("xcit_nano_12_p16_224", "XCiT attends over channels, not over patches"),
    ("mobilenetv3_small_100", "neither a plain Vision Transformer nor a ResNet"),
    ("beit_base_patch16_224", "neither a plain Vision Transformer nor a ResNet"),
])
def test_networks_that_are_not_supported(arch, reason):
    with pytest.raises(UsageError, match=rf"{arch} is not supported: .*{reason}.*vit_\*, resnet\* or convnext\*"):
        family_of(arch)


# building ------------------------------------------------------------------------------------------------------


def test_an_untrained_network_is_timms_with_its_seed():
    first, same, other = (build_vit(SMALL, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(1)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, img_size=32, patch_size=8,
                               embed_dim=24, depth=2, num_heads=3)
    assert state_sha256(first.state_dict()) == state_sha256(same.state_dict()) == state_sha256(theirs.state_dict())
    assert state_sha256(other.state_dict()) != state_sha256(first.state_dict())


def test_building_leaves_the_generator_alone():
    before = torch.random.get_rng_state()
    build_vit(SMALL, seed=3)
    build_vit(SMALL)
    assert torch.equal(torch.random.get_rng_state(), before)


@each(("changes", "words"), [
    ({"arch": "vit_tine_patch16_224"}, "did you mean 'vit_tiny_patch16_224'"),
    ({"image_size": 30}, "30 pixels is no multiple of the patch size 8"),
    ({"image_size": 0}, "0 pixels is no multiple"), ({"patch_size": 0}, "no multiple of the patch size 0"),
    ({"patch_size": 64}, "32 pixels is no multiple of the patch size 64"), ({"image_size": -32}, "no multiple"),
    ({"embed_dim": 32}, "cannot be built with .*'embed_dim': 32"), ({"num_heads": 0}, "cannot be built"),
    ({"depth": -1}, "cannot be built"),
    ({"mlp_ratio": float("nan")}, "cannot be built"), ({"mlp_ratio": float("inf")}, "cannot be built"),
    ({"embed_dim": 10**30, "num_heads": 1}, "cannot be built"),
    ({"arch": "resnet18"}, "resnet18 is no plain Vision Transformer"),
    ({"arch": "eva02_tiny_patch14_224"}, "no plain Vision Transformer"),
    ({"arch": "vit_base_patch16_siglip_224"}, "with a class token"),
    ({"arch": "vit_small_patch16_18x2_224"}, "no plain Vision Transformer"),
    ({"arch": "deit3_medium_patch16_224", "reg_tokens": -1}, "cannot be built"),
])
def test_networks_that_cannot_be_built(changes, words):
    with pytest.raises(UsageError, match=words) as caught:
        build_vit(NetworkSpec(**{field: getattr(SMALL, field) for field in SMALL.__dataclass_fields__} | changes))
    assert "\n" not in str(caught.value)


def test_a_network_without_final_norm_for_its_class_token():
    pooled = timm.create_model("test_vit", global_pool="avg", fc_norm=True)
    with pytest.raises(UsageError, match="its class token has no final norm"):
        require_vit(pooled, "test_vit")
    with pytest.raises(UsageError, match="mine is no plain Vision Transformer"):
        require_vit(torch.nn.Linear(2, 2), "mine")


@each("arch", ["test_vit", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224",
               "vit_small_patch14_reg4_dinov2"])
def test_positions_as_timm_resizes_them(arch):
    """Against timm's forward pass: what an image of zeros has in front of the first block, less its patches."""
    vit = build_vit(NetworkSpec(arch=arch, image_size=112, patch_size=14, embed_dim=24, depth=1, num_heads=3), seed=0)
    torch.nn.init.normal_(vit.pos_embed)
    vit.eval().requires_grad_(False)
    patches = torch.zeros(1, 5, 9, 24)
    prefix = vit.num_prefix_tokens
    expected = vit._pos_embed(patches)[:, prefix:]
    found = timm_positions(vit, 5, 9)
    torch.testing.assert_close(found[:, 0 if vit.no_embed_class else prefix:], expected)


# weights -------------------------------------------------------------------------------------------------------


def test_the_hash_depends_on_names_shapes_types_and_values():
    state = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    same = {"b": torch.ones(1), "a": torch.zeros(3, 2).T}
    others = [{"a": torch.zeros(3, 2), "b": torch.ones(1)}, {"a": torch.zeros(2, 3), "c": torch.ones(1)},
              {"a": torch.zeros(2, 3), "b": torch.ones(1, dtype=torch.bfloat16)},
              {"a": torch.zeros(2, 3), "b": torch.tensor([1.0000001])}, {"a": torch.zeros(2, 3)}]
    assert state_sha256(same) == state_sha256(state)
    assert len({state_sha256(x) for x in [state, *others]}) == 6


def test_a_misfit_in_words():
    needed = {name: torch.ones(2, 3) for name in "abcdefgh"}
    assert not misfit(needed, dict(needed))
    found = misfit(needed, {"h": torch.ones(3, 2), "x": torch.ones(1), "g": torch.tensor(1.0)})
    assert found.missing == ["a", "b", "c", "d", "e", "f"]
    assert found.sentence() == ("6 missing: a, b, c, d, e and 1 more; 1 unexpected: x; 2 of another shape: "
                                "g is one number instead of 2 x 3, h is 3 x 2 instead of 2 x 3")


def test_weights_are_used_as_they_lie():
    state = build_vit(SMALL, seed=4).state_dict()
    module = load_exactly(lambda: build_vit(SMALL), state, "small", "a.pth")
    assert {name: p.data_ptr() for name, p in module.named_parameters()} == {n: t.data_ptr() for n, t in state.items()}
    assert state_sha256(module.state_dict()) == state_sha256(state)


@each("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision(dtype):
    state = {name: tensor.to(dtype) for name, tensor in build_vit(SMALL, seed=4).state_dict().items()}
    module = load_exactly(lambda: build_vit(SMALL), state, "small", "a.pth")
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert torch.equal(module.norm.weight, state["norm.weight"].float())
    assert as_float32(torch.tensor(3)).dtype == torch.int64


@pytest.mark.parametrize("arch", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_tables_that_no_file_holds_are_computed(arch):
    """Frequencies of rotary positions are no weights: without them the network would give nonsense."""
    small = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 56 if "14" in arch else 64}
    theirs = create(arch, **small).eval()
    module = load_exactly(lambda: create(arch, **small), copy.deepcopy(theirs.state_dict()), arch, "a.pth").eval()
    x = torch.randn(1, 3, small["img_size"], small["img_size"])
    assert torch.equal(module.forward_features(x), theirs.forward_features(x))


@each(("change", "words"), [
    (lambda s: s.pop("norm.bias"), "1 missing: norm.bias"),
    (lambda s: s.update(extra=torch.ones(1)), "1 unexpected: extra"),
    (lambda s: s.update({"norm.bias": torch.ones(25)}), "norm.bias is 25 instead of 24"),
    (lambda s: s.update({"norm.bias": torch.ones(24, dtype=torch.int64)}), "norm.bias of torch.int64"),
    (lambda s: s.update({"norm.bias": torch.ones(24).to_sparse()}), "norm.bias of torch.float32"),
])
def test_weights_that_do_not_fit(change, words):
    state = dict(build_vit(SMALL).state_dict())
    change(state)
    with pytest.raises(CheckpointError) as caught:
        load_exactly(lambda: build_vit(SMALL), state, "small", "a.pth")
    assert str(caught.value).startswith("a.pth ")
    assert words in str(caught.value)


def test_a_network_that_a_file_asks_for_and_timm_cannot_build():
    wrong = NetworkSpec(arch="vit_tiny_patch16_224", image_size=30, patch_size=8)
    with pytest.raises(CheckpointError, match=r"^a\.pth: an image size of 30 pixels"):
        load_exactly(lambda: build_vit(wrong), {}, "small", "a.pth")
