"""Files in every layout, in the official names and shapes, against what the official code gave for their weights."""

import argparse
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import each
from safetensors.torch import save_file

from patchssl.models.load import load_backbone
from patchssl.models.networks import NetworkSpec, build_vit, default_sizes
from patchssl.models.recognize import describe_left_out, official_stem, recognize
from patchssl.models.weights import BARE, read_weights, weights_in
from patchssl.runtime.errors import CheckpointError

recorder = runpy.run_path(str(Path(__file__).parents[1] / "record_official.py"))
filled = recorder["filled"]
RECORD = dict(np.load(recorder["OUTPUTS"]))
SHAPES = json.loads(str(RECORD["shapes"]))  # names and shapes of the official networks' tensors
HEADS = {"dino": "", "pwself": "?heads=3", "ibot": "?heads=3", "ibot_scaled": "?heads=3", "dinov2": "?heads=2",
         "dinov2_chunks": "?heads=2", "dinov2_reg": "?heads=2", "dinov2_swiglu": "?heads=2"}
ARCHS = {"dino": "vit_base_patch16_224 (img_size=96, embed_dim=64, depth=4, num_heads=1)",
         "pwself": "vit_base_patch16_224 (img_size=96, embed_dim=48, depth=4, num_heads=3)",
         "ibot": "vit_base_patch16_224 (img_size=96, embed_dim=24, depth=4, num_heads=3)",
         "ibot_scaled": "vit_base_patch16_224 (img_size=96, embed_dim=24, depth=4, num_heads=3, init_values=1.0)",
         "dinov2": "vit_base_patch14_dinov2 (img_size=84, embed_dim=32, depth=4, num_heads=2)",
         "dinov2_chunks": "vit_base_patch14_dinov2 (img_size=84, embed_dim=32, depth=4, num_heads=2)",
         "dinov2_reg": "vit_base_patch14_reg4_dinov2 (img_size=84, embed_dim=32, depth=4, num_heads=2)"}
HEAD = {"head.mlp.0.weight": (8, 64), "head.mlp.0.bias": (8,), "head.last_layer.weight_g": (16, 1),
         "head.last_layer.weight_v": (16, 8)}  # a DINO head, smaller


def official(name, seed=""):
    """The official network's tensors; `seed` gives others."""
    return {key: torch.from_numpy(filled(seed + key, shape)) for key, shape in SHAPES[name].items()}


def with_head(state, prefix=""):
    """As in a training checkpoint: a backbone and its head, in a module that may be wrapped."""
    head = {name: torch.from_numpy(filled(name, shape)) for name, shape in HEAD.items()}
    network = {f"backbone.{name}": tensor for name, tensor in state.items()} | head
    return {f"{prefix}{name}": tensor for name, tensor in network.items()}


def training(name, *, center, student_prefix="module.", teacher_prefix="", **rest):
    """A training checkpoint as main_dino.py writes it: numpy's numbers in the optimizer, and the command line."""
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.ones(4)}},
                 "param_groups": [{"lr": np.float64(0.0005), "weight_decay": np.float64(0.04), "params": [0]}]}
    return {"student": with_head(official(name, "student "), student_prefix),
            "teacher": with_head(official(name), teacher_prefix), "optimizer": optimizer, "epoch": 7,
            "args": argparse.Namespace(arch="vit_tiny", lr=0.0005, local_crops_scale=(0.05, 0.4)),
            "dino_loss": {"center": torch.zeros(center)}, "fp16_scaler": {"scale": 65536.0}} | rest


def saved(content, path):
    torch.save(content, path)
    return path


def assert_gives_what_the_official_code_gives(backbone, name, most=1e-5):
    """At every recorded size: tokens, class tokens of the last four blocks, attention of DINO's networks."""
    sizes = sorted({key.split("/")[1] for key in RECORD if key.startswith(f"{name}/")})
    assert len(sizes) >= 3
    for size in sizes:
        image = torch.from_numpy(filled("image", (1, 3, *map(int, size.split("x")))))
        found = {"tokens": backbone.tokens(image), "last4": backbone.class_tokens(image, 4),
                 "attention": backbone.class_attention(image)}
        for what, values in found.items():
            if (expected := RECORD.get(f"{name}/{size}/{what}")) is not None:
                difference = np.linalg.norm(values.numpy() - expected) / np.linalg.norm(expected)
                assert difference < most, f"{what} of {name} at {size}: {difference:.1e}"


@each("name", SHAPES)
def test_a_bare_official_file(tmp_path, name):
    path = saved(official(name), tmp_path / f"{name}.pth")
    assert_gives_what_the_official_code_gives(load_backbone(f"{path}{HEADS[name]}"), name)


@each("name", ARCHS)
def test_the_architecture_is_timms_nearest_with_what_differs(tmp_path, name):
    backbone = load_backbone(f"{saved(official(name), tmp_path / 'a.pth')}{HEADS[name]}")
    assert backbone.arch == ARCHS[name]
    assert (backbone.name, backbone.image_size, backbone.patch_size) == ("a", *SIZES_OF[name])


SIZES_OF = {name: (84, 14) if name.startswith("dinov2") else (96, 16) for name in SHAPES}


@each("network", ["dino", "ibot", "dinov2"])
def test_wrong_weights_would_be_seen(tmp_path, network):
    """The comparison can fail: with other weights, or with another number of heads."""
    path = saved(official(network, "other "), tmp_path / "a.pth")
    with pytest.raises(AssertionError, match="tokens of"):
        assert_gives_what_the_official_code_gives(load_backbone(f"{path}{HEADS[network]}"), network, most=0.1)
    path = saved(official(network), tmp_path / "b.pth")
    with pytest.raises(AssertionError, match="tokens of"):
        assert_gives_what_the_official_code_gives(load_backbone(f"{path}?heads=4"), network, most=1e-3)


CONTAINERS = {
    "state_dict": lambda state: {"state_dict": state},
    "model": lambda state: {"model": state, "epoch": 3},
    "only a teacher": lambda state: {"teacher": state},
    "module.": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "backbone.": lambda state: {f"backbone.{name}": tensor for name, tensor in state.items()},
    "_orig_mod.": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "module.backbone.": lambda state: {f"module.backbone.{name}": tensor for name, tensor in state.items()},
    "module._orig_mod.backbone.": lambda state: {f"module._orig_mod.backbone.{k}": v for k, v in state.items()},
    "backbone.module.": lambda state: {f"backbone.module.{name}": tensor for name, tensor in state.items()},
    "backbone._orig_mod.": lambda state: {f"backbone._orig_mod.{name}": tensor for name, tensor in state.items()},
    "_fsdp_wrapped_module.": lambda state: {
        f"_fsdp_wrapped_module.{name.replace('attn.', 'attn._fsdp_wrapped_module.')}": tensor
        for name, tensor in state.items()},
    "blocks compiled one by one": lambda state: {name.replace(".attn.", "._orig_mod.attn."): tensor
                                                 for name, tensor in state.items()},
}


@each("container", CONTAINERS)
@each("name", ["dino", "dinov2_reg"])
def test_containers_and_prefixes(tmp_path, name, container):
    path = saved(CONTAINERS[container](official(name)), tmp_path / "a.pth")
    assert_gives_what_the_official_code_gives(load_backbone(f"{path}{HEADS[name]}"), name)


@each("name", ["dino", "ibot_scaled", "dinov2_chunks"])
def test_safetensors_and_torchs_old_format(tmp_path, name):
    save_file(official(name), tmp_path / "a.safetensors")
    torch.save(official(name), tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    for file in ("a.safetensors", "a.bin"):
        assert_gives_what_the_official_code_gives(load_backbone(f"{tmp_path / file}{HEADS[name]}"), name)


@each("name", ["dino", "dinov2"])
@each("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path, name, dtype):
    rounded = {key: tensor.to(dtype) for key, tensor in official(name).items()}
    first = load_backbone(f"{saved(rounded, tmp_path / 'a.pth')}{HEADS[name]}")
    whole = {key: tensor.float() for key, tensor in rounded.items()}
    second = load_backbone(f"{saved(whole, tmp_path / 'b.pth')}{HEADS[name]}")
    assert {tensor.dtype for tensor in first.state_dict().values()} == {torch.float32}
    assert first.weights_sha256 == second.weights_sha256
    assert_gives_what_the_official_code_gives(first, name, most=1e-5 if dtype == torch.float64 else 0.03)


def test_a_training_checkpoint_of_dino(tmp_path):
    content = training("dino", center=(1, 16))
    del content["args"]
    path = saved(content, tmp_path / "checkpoint0100.pth")
    teacher, student = load_backbone(str(path)), load_backbone(f"{path}#student")
    assert_gives_what_the_official_code_gives(teacher, "dino")
    assert torch.equal(student.module.cls_token, official("dino", "student ")["cls_token"])
    assert load_backbone(f"{path}#teacher").weights_sha256 == teacher.weights_sha256 != student.weights_sha256
    assert (teacher.name, teacher.method, teacher.pretrain_epochs) == ("checkpoint0100", "dino", 7)
    assert student.name == "checkpoint0100-student"
    assert teacher.notes == (
        "1 attention heads are assumed, 64 channels each: the file does not say; ?heads=n sets another number",
        "the teacher is loaded; #student chooses another network", "left out: head.* (4 tensors)")
    assert student.notes == (teacher.notes[0], "left out: head.* (4 tensors)")


def test_the_command_line_in_a_checkpoint_tells_the_heads(tmp_path):
    """--arch vit_tiny has three; what is said in the name goes before it."""
    path = saved(training("pwself", center=(1, 37, 16)), tmp_path / "checkpoint.pth")
    backbone = load_backbone(str(path))
    assert_gives_what_the_official_code_gives(backbone, "pwself")
    assert backbone.notes[0] == "3 attention heads, as the checkpoint's own --arch vit_tiny has"
    asked = load_backbone(f"{path}?heads=4")
    assert asked.module.blocks[0].attn.num_heads == 4
    assert not any("attention heads" in note for note in asked.notes)


@pytest.mark.parametrize("args", [{"arch": "vit_tiny"}, argparse.Namespace(arch="vit_tiny")])
def test_a_command_line_kept_as_a_table(tmp_path, args):
    path = saved(training("pwself", center=(1, 16), args=args), tmp_path / "checkpoint.pth")
    assert load_backbone(str(path)).module.blocks[0].attn.num_heads == 3


def test_a_training_checkpoint_of_the_authors_of_pwself(tmp_path):
    path = saved(training("pwself", center=(1, 37, 16)), tmp_path / "checkpoint.pth")
    layout = recognize(read_weights(path), "teacher")
    assert (layout.method, layout.framework) == ("pwself", "PW-Self (the authors' code: one center per token position)")
    assert load_backbone(str(path)).method == "pwself"


def test_a_training_checkpoint_of_ibot(tmp_path):
    """Its student learned to fill masked patches: a token more than the teacher has."""
    centers = {"center": torch.zeros(1, 16), "center2": torch.zeros(1, 1, 16)}
    content = training("ibot", center=(1, 16), ibot_loss=centers, args=argparse.Namespace(arch="vit_tiny"))
    del content["dino_loss"]
    content["teacher"] = {k: v for k, v in content["teacher"].items() if not k.endswith("masked_embed")}
    path = saved(content, tmp_path / "checkpoint.pth")
    teacher, student = load_backbone(str(path)), load_backbone(f"{path}#student")
    assert_gives_what_the_official_code_gives(teacher, "ibot")
    assert (teacher.method, student.method) == ("ibot", "ibot")
    assert teacher.notes[-1] == "left out: head.* (4 tensors)"
    assert student.notes[-1] == "left out: masked_embed, head.* (4 tensors)"


def test_the_teacher_of_dinov2s_training(tmp_path):
    """Its backbone beside two heads, its blocks in chunks."""
    state = {f"backbone.{name}": tensor for name, tensor in official("dinov2_chunks").items()}
    heads = {f"{head}_head.mlp.0.weight": torch.ones(2, 2) for head in ("dino", "ibot")}
    path = saved({"teacher": state | heads}, tmp_path / "teacher_checkpoint.pth")
    backbone = load_backbone(f"{path}?heads=2")
    assert_gives_what_the_official_code_gives(backbone, "dinov2_chunks")
    assert backbone.notes == ("the teacher is loaded",
                              "left out: mask_token, dino_head.* (1 tensors), ibot_head.* (1 tensors)")


@each(("content", "file", "framework", "method"), [
    (lambda: training("dino", center=(1, 16)), "a.pth", "DINO", "dino"),
    (lambda: official("ibot"), "a.pth", "iBOT", "ibot"),
    (lambda: official("dinov2_reg"), "a.pth", "DINOv2", "other"),
    (lambda: official("dino"), "dino_deitsmall16_pretrain.pth", "DINO, by the file's name", "dino"),
    (lambda: official("dino") | {"head.weight": torch.ones(5, 64), "head.bias": torch.ones(5)}, "a.pth",
     "timm or torchvision, with a classifier", "supervised"),
    (lambda: official("dino"), "a.pth", "DINO, iBOT, PW-Self or timm, whose bare files look alike", "other"),
])
def test_which_project_wrote_a_file(tmp_path, content, file, framework, method):
    weights = read_weights(saved(content(), tmp_path / file))
    layout = recognize(weights, weights.choose(None), heads=1)
    assert (layout.framework, layout.method) == (framework, method)


def test_a_classifier_is_left_out_and_said_so(tmp_path):
    state = official("dino") | {"head.weight": torch.ones(5, 64), "head.bias": torch.ones(5)}
    backbone = load_backbone(str(saved(state, tmp_path / "a.pth")))
    assert_gives_what_the_official_code_gives(backbone, "dino")
    assert backbone.notes[-1] == "left out: head.* (2 tensors)"
    assert backbone.method == "supervised"


@each(("sizes", "arch"), [
    ((192, 12, 16, 14), "vit_tiny_patch16_224"), ((384, 12, 16, 14), "vit_small_patch16_224"),
    ((384, 12, 8, 28), "vit_small_patch8_224"), ((768, 12, 8, 28), "vit_base_patch8_224"),
    ((1024, 24, 16, 14), "vit_large_patch16_224"), ((192, 12, 8, 28), "vit_tiny_patch16_224 (patch_size=8)"),
])
def test_published_sizes_get_timms_own_name(sizes, arch):
    """Without any weights: tensors that repeat one number."""
    dim, depth, patch, grid = sizes
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + grid**2, dim),
              "patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    shapes |= {f"blocks.{block}.attn.qkv.{part}": (3 * dim, dim)[: 2 - (part == "bias")] for block in range(depth)
               for part in ("weight", "bias")}
    shapes |= {f"blocks.{block}.mlp.fc{number}.weight": ((4 * dim, dim), (dim, 4 * dim))[number - 1]
               for block in range(depth) for number in (1, 2)}
    file = weights_in({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, Path("a.pth"))
    spec = recognize(file, BARE).spec
    assert (spec.label(), spec.num_heads, spec.options()["img_size"]) == (arch, None, 224)


def test_default_sizes_are_those_in_timms_name():
    assert default_sizes("vit_small_patch14_reg4_dinov2") == (518, 14)
    assert NetworkSpec(arch="vit_base_patch32_384", image_size=384, patch_size=32).label() == "vit_base_patch32_384"


WRONG = {
    "positions": ({"pos_embed": (1, 32, 64)}, ["position embeddings for 31 patches", "no square grid"]),
    "one position": ({"pos_embed": (1, 1, 64)}, ["position embeddings for 0 patches", "no square grid"]),
    "no position": ({"pos_embed": (1, 0, 64)}, ["pos_embed of the shape (1, 0, 64)", "none of them 0"]),
    "flat positions": ({"pos_embed": (37, 64)}, ["pos_embed of the shape (37, 64)", "3 dimensions"]),
    "flat patches": ({"patch_embed.proj.weight": (64, 768)}, ["patch_embed.proj.weight of the shape (64, 768)"]),
    "a number as token": ({"cls_token": ()}, ["cls_token of the shape ()"]),
    "oblong patches": ({"patch_embed.proj.weight": (64, 3, 16, 8)}, ["patch_embed.proj.weight is 64 x 3 x 16 x 8"]),
    "patches of 0": ({"patch_embed.proj.weight": (64, 3, 0, 0)}, ["none of them 0"]),
    "no channels": ({"patch_embed.proj.weight": (0, 3, 16, 16)}, ["none of them 0"]),
    "gray": ({"patch_embed.proj.weight": (64, 1, 16, 16)}, ["64 x 1 x 16 x 16 instead of 64 x 3 x 16 x 16"]),
    "a far block": ({"blocks.999999999.norm1.weight": (64,)}, ["block 999999999", "none of block 4"]),
    "farther": ({f"blocks.{'9' * 5000}.norm1.weight": (64,)}, ["'blocks.99999....norm1.weight'", "at most 500"]),
    "no digit": ({"blocks.²³.norm1.weight": (64,)}, ["1 unexpected: blocks.²³"]),
    "many blocks": ({f"blocks.{block}.norm1.weight": (1,) for block in range(4, 1001)}, ["tensors of 1,001 blocks"]),
    "a color": ({"a\x1b[31m": (1,)}, ["1 unexpected: a"]),
    "half a block": ({"blocks.4.norm1.weight": (64,)}, ["11 missing: blocks.4.attn.proj.bias"]),
    "extra": ({"extra": (1,)}, ["1 unexpected: extra"]),
    "wrapped and not": ({"module.cls_token": (1, 1, 64)}, ["twice", "module."]),
    "chunked and not": ({"blocks.7.1.norm1.weight": (64,)}, ["twice", "two layouts"]),
    "half a scale": ({"blocks.0.ls1.gamma": (64,)}, ["missing", "blocks.0.ls2.gamma"]),
    "two names of a scale": ({"blocks.0.ls1.gamma": (64,), "blocks.0.gamma_1": (64,)}, ["twice", "two layouts"]),
    "registers": ({"register_tokens": (1, 4, 64)}, ["position embeddings for 37 patches"]),
    "flat registers": ({"reg_token": (4, 64)}, ["reg_token of the shape (4, 64)"]),
    "DINOv2 of two widths": ({"register_tokens": (1, 4, 64), "mask_token": (1, 64), "cls_token": (1, 1, 48)},
                             ["cls_token of (1, 1, 48)", "do not fit"]),
    "beside a backbone": ({"backbone.cls_token": (1, 1, 64)}, ["beside a backbone and its head", "blocks.0"]),
    "a Swin Transformer's": ({"layers.0.blocks.0.attn.qkv.weight": (9, 3)}, ["a Swin Transformer"]),
    "a BEiT's": ({"blocks.0.attn.relative_position_bias_table": (9, 2)}, ["a BEiT"]),
}


@each("wrong", WRONG)
def test_shapes_and_names_that_are_no_network(tmp_path, wrong):
    shapes, words = WRONG[wrong]
    path = saved(official("dino") | {name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        load_backbone(str(path))
    assert [word for word in [str(path), *words] if word not in str(caught.value)] == [], str(caught.value)


@each(("heads", "words"), [
    ("3", "3 attention heads do not divide the 64 channels"), ("0", "0 attention heads do not divide"),
    ("128", "128 attention heads do not divide"),
])
def test_heads_that_do_not_divide(tmp_path, heads, words):
    path = saved(official("dino"), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=words):
        load_backbone(f"{path}?heads={heads}")


def test_heads_that_nothing_tells(tmp_path):
    path = saved(official("ibot"), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"24 channels are no multiple of 64; say it as .*a\.pth\?heads=n"):
        load_backbone(str(path))


def test_what_was_left_out_in_words():
    assert describe_left_out([]) == ""
    assert describe_left_out(["fc.bias", "masked_embed", "fc.weight"]) == "left out: fc.* (2 tensors), masked_embed"


@each(("file", "name"), [("a.pth", "a"), ("b.pth.tar", "b"), ("c.d.safetensors", "c.d"), ("e", "e")])
def test_names_for_records(file, name):
    assert official_stem(Path("folder") / file) == name


def test_wide_networks_have_more_channels_a_head(tmp_path):
    """ViT-H has 16 heads of 80 channels, not 20 of 64."""
    vit = build_vit(NetworkSpec(arch="vit_tiny_patch16_224", image_size=32, patch_size=16, embed_dim=1280, depth=1,
                                num_heads=16))
    torch.save(vit.state_dict(), tmp_path / "wide.pth")
    backbone = load_backbone(str(tmp_path / "wide.pth"))
    assert backbone.module.blocks[0].attn.num_heads == 16
    assert any("16 attention heads are assumed" in note for note in backbone.notes)
