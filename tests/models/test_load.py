"""One string names any backbone: what it gives, and that what does not fit exactly is refused."""

import json
import logging
import math
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from cases import each
from safetensors.torch import save_file
from torch import nn

import patchssl.models.load
import patchssl.models.pretrained
from patchssl.models.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, VitBackbone
from patchssl.models.checkpoint import save_checkpoint
from patchssl.models.load import load_backbone, load_network
from patchssl.models.names import parse_location
from patchssl.models.networks import NetworkSpec, build_vit, create
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.engine import Engine
from patchssl.pretrain.network import network_spec
from patchssl.runtime.errors import CheckpointError, UsageError

SMALL = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=24&depth=3&num_heads=3"


def enlivened(network):
    """`network` with weights so large that every part shows in the output; position embeddings of std 1."""
    rng = torch.Generator().manual_seed(7)
    for name, p in network.named_parameters():
        nn.init.normal_(p, std=1.0 if "pos_embed" in name else 0.2, generator=rng)
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 2.0, generator=rng)
    return network.eval().requires_grad_(False)


def images(*size, count=2):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def saved(content, path):
    torch.save(content, path)
    return path


def assert_says(words, uri, kind=CheckpointError):
    """Loading `uri` fails with a sentence of one line that holds all `words`."""
    with pytest.raises(kind) as caught:
        load_backbone(str(uri))
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# untrained networks --------------------------------------------------------------------------------------------


def test_random_uri_sets_every_option():
    backbone = load_backbone(SMALL + "&seed=5")
    assert (backbone.image_size, backbone.patch_size, backbone.embed_dim, backbone.depth) == (32, 8, 24, 3)
    assert backbone.module.blocks[0].attn.num_heads == 3
    differing = "img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3"
    assert backbone.arch == f"vit_tiny_patch16_224 ({differing})"
    assert (backbone.method, backbone.name) == ("random", "random")
    assert (backbone.seed, backbone.pretrain_epochs, backbone.pretrain_data) == (5, 0, None)
    assert (backbone.mean, backbone.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (backbone.dino_positions, backbone.notes) == (True, ())
    assert not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())


@each(("arch", "image_size", "patch_size"), [
    ("vit_tiny_patch16_224", 224, 16), ("vit_tiny_patch16_384", 384, 16),
    ("vit_base_patch32_clip_224", 224, 32), ("vit_small_patch14_dinov2", 518, 14),
])
def test_sizes_default_to_those_in_timms_name(arch, image_size, patch_size):
    backbone = load_backbone(f"random:{arch}?depth=1&embed_dim=12&num_heads=3")
    assert (backbone.image_size, backbone.patch_size) == (image_size, patch_size)


def test_a_seed_fixes_the_weights_whatever_ran_before():
    torch.manual_seed(1)
    first = load_backbone(SMALL + "&seed=3").weights_sha256
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert load_backbone(SMALL + "&seed=3").weights_sha256 == first
    assert torch.equal(torch.random.get_rng_state(), state)  # and nothing after it is changed
    assert load_backbone(SMALL + "&seed=4").weights_sha256 != first
    assert load_backbone(SMALL).weights_sha256 == load_backbone(SMALL + "&seed=0").weights_sha256


@each("arch", ["test_resnet", "test_convnext", "eva02_base_patch16_clip_224"])
def test_other_untrained_networks(arch, monkeypatch):
    if arch.startswith("eva"):
        monkeypatch.setattr(patchssl.models.load, "create", lambda name: create(name, embed_dim=32, depth=1,
                                                                                num_heads=2))
    first, same, other = (load_backbone(f"random:{arch}?seed={seed}") for seed in (1, 1, 2))
    assert first.weights_sha256 == same.weights_sha256 != other.weights_sha256
    assert (first.arch, first.method, first.seed, first.mean) == (arch, "random", 1, IMAGENET_MEAN)
    assert math.isfinite(first.features(images(224, 224, count=1)).abs().max())


# wrong names ---------------------------------------------------------------------------------------------------


@each(("uri", "words"), [
    ("random:vit_tine_patch16_224", ["vit_tine_patch16_224", "did you mean 'vit_tiny_patch16_224'"]),
    ("random:", ["architecture ''"]),
    ("random:vit_tiny_patch16_224?imgsize=32", ["'imgsize'", "did you mean 'img_size'"]),
    ("random:vit_tiny_patch16_224?seed=one", ["seed=one", "whole number"]),
    ("random:vit_tiny_patch16_224?seed=-1", ["seed=-1", "whole number"]),
    ("random:vit_tiny_patch16_224?seed=²", ["seed=²", "whole number"]),
    ("random:vit_tiny_patch16_224?seed=" + "9" * 30, ["whole number below 10^18"]),
    ("random:vit_tiny_patch16_224?img_size=30", ["30", "no multiple of the patch size 16"]),
    ("random:vit_tiny_patch16_224?img_size=0", ["0 pixels"]),
    ("random:vit_tiny_patch16_224?patch_size=0", ["patch size 0"]),
    ("random:vit_tiny_patch16_224?embed_dim=32&num_heads=3", ["cannot be built", "'embed_dim': 32"]),
    ("random:vit_base_patch16_siglip_224?depth=1&embed_dim=12&num_heads=3", ["class token", "vit_*"]),
    ("random:vit_small_patch16_18x2_224?depth=1&embed_dim=12&num_heads=3", ["no plain Vision Transformer"]),
    ("random:test_resnet?patch_size=8", ["patch_size", "plain Vision Transformers only"]),
    ("random:swin_tiny_patch4_window7_224", ["not supported: a Swin Transformer has no class token"]),
    ("random:xcit_nano_12_p16_224", ["not supported: XCiT attends over channels"]),
    ("timm:swin_tiny_patch4_window7_224", ["not supported: a Swin Transformer has no class token"]),
    ("timm:xcit_nano_12_p16_224.fb_in1k", ["not supported: XCiT attends over channels"]),
    ("timm:mobilenetv3_small_100", ["neither a plain Vision Transformer nor a ResNet"]),
    ("timm:vit_tine_patch16_224", ["did you mean 'vit_tiny_patch16_224'"]),
    ("timm:vit_small_patch16_224.dyno", ["'dyno'", "did you mean 'dino'"]),
    ("timm:vit_small_patch16_18x2_224", ["no weights", "random:vit_small_patch16_18x2_224"]),
    ("timm:", ["architecture ''"]),
    ("hf-hub:", ["''", "ORG/NAME"]), ("hf-hub:a/b/c", ["'a/b/c'", "ORG/NAME"]), ("hf-hub:../x", ["'../x'"]),
    ("runs/nothing-here", ["model 'runs/nothing-here' does not exist", "nothing else is loaded in its place",
                           "'patchssl models' lists names"]),
    ("nothing.pth", ["model 'nothing.pth' does not exist"]),
    ("nothing.pth#teacher?heads=3", ["model 'nothing.pth#teacher?heads=3' does not exist"]),
    ("", ["model '' does not exist"]), ("#teacher", ["does not exist"]), ("?heads=3", ["does not exist"]),
    ("a\0b", ["does not exist"]), ("x" * 5000, ["does not exist"]),
    ("~nobody-of-this-name/x", ["does not exist"]),
    ("other:thing", ["model 'other:thing' does not exist"]),
])
def test_wrong_names_are_answered_in_words(uri, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        load_backbone(uri)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@each(("uri", "near"), [
    ("runs/mime", "runs/mine"), ("runs/mine/checkpont.pth", "runs/mine/checkpoint.pth"),
    ("run/mine", None), ("vit_small.pt", "vit_small.pth"), ("vit_small_patch16_224.dino", "timm:vit_small_patch16_224"),
    ("tim:vit_small_patch16_224", "timm:vit_small_patch16_224"), ("random_:x", "random:x"),
])
def test_the_nearest_name_is_given_and_not_taken(uri, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "runs" / "mine")
    saved({}, tmp_path / "vit_small.pth")
    with pytest.raises(UsageError) as caught:
        load_backbone(uri)
    if near:
        assert f"(did you mean {near}" in str(caught.value)
    else:
        assert "did you mean" not in str(caught.value)


def test_a_path_that_is_not_there_ends_the_command_with_2(patchssl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = patchssl("eval", "knn", "nothing.pth", "--data", "textures")
    assert (ended.code, ended.out) == (2, "")
    assert "model 'nothing.pth' does not exist, and nothing else is loaded in its place" in " ".join(ended.err.split())


def test_a_damaged_file_ends_the_command_with_1(patchssl, tmp_path):
    (tmp_path / "a.pth").write_bytes(b"")
    ended = patchssl("eval", "knn", tmp_path / "a.pth", "--data", "textures")
    assert (ended.code, ended.out) == (1, "")
    assert "is empty (0 bytes)" in " ".join(ended.err.split())


@each(("uri", "parts"), [
    ("{}/run", ("run", None, {})), ("{}/run#student", ("run", "student", {})),
    ("{}/run?heads=3", ("run", None, {"heads": "3"})), ("{}/run#ema?heads=3&mean=0.5", ("run", "ema", {"heads": "3",
                                                                               "mean": "0.5"})),
    ("{}/run?heads=3#ema", ("run", "ema", {"heads": "3"})), ("{}/a#b?c=1", ("a#b?c=1", None, {})),
    ("{}/run#", ("run", None, {})),
])
def test_the_parts_of_a_path(tmp_path, uri, parts):
    for name in ("run", "a#b?c=1"):
        (tmp_path / name).mkdir()
    found = parse_location(uri.format(tmp_path))
    assert (found.path.name, found.network, found.options) == parts


def test_a_path_from_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_run(tmp_path / "run")
    assert load_backbone("~/run#student").name == "mine-student"


def test_what_was_decided_is_logged(tmp_path, caplog):
    save_run(tmp_path / "run")
    with caplog.at_level(logging.INFO, logger="patchssl.models.load"):
        backbone = load_backbone(str(tmp_path / "run"))
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path / 'run'}: {note}"
                                                                  for note in backbone.notes] != []


# timm's weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of local files: the answers by repository, and what was asked for."""
    asked, there = [], {}

    def hub_file(repo, names, revision=None):
        asked.append((repo, tuple(names), revision))
        return there[repo]

    def hub_json(repo, name, revision=None):
        asked.append((repo, name, revision))
        return there[f"{repo}/{name}"]

    monkeypatch.setattr(patchssl.models.pretrained, "hub_file", hub_file)
    monkeypatch.setattr(patchssl.models.pretrained, "hub_json", hub_json)
    hub_file.asked, hub_file.there = asked, there
    return hub_file


def put(hub, repo, network, path):
    save_file(network.state_dict(), path)
    hub.there[repo] = path
    return network


@pytest.mark.parametrize(("name", "size"), [("test_vit.r160_in1k", 160), ("vit_tiny_patch16_224.augreg_in21k", 224)])
def test_weights_of_timm(hub, tmp_path, name, size):
    """Without the classifier of the file; tokens, resized positions and normalization are timm's own."""
    theirs = enlivened(timm.create_model(name.partition(".")[0], num_classes=11, dynamic_img_size=True))
    put(hub, f"timm/{name}", theirs, tmp_path / "a.safetensors")
    backbone = load_backbone(f"timm:{name}")
    assert hub.asked == [(f"timm/{name}", ("model.safetensors", "pytorch_model.bin"), None)]
    for shape in ((size, size), (96, 96), (64, 112)):
        torch.testing.assert_close(backbone.tokens(images(*shape)), theirs.forward_features(images(*shape)))
    config = timm.get_pretrained_cfg(name)
    assert (backbone.mean, backbone.std) == (config.mean, config.std) != (IMAGENET_MEAN, IMAGENET_STD)
    assert (backbone.name, backbone.method, backbone.notes) == (name, "other", ("left out: head.* (2 tensors)",))
    assert (backbone.patch_size, backbone.dino_positions) == (16, False)


def test_the_default_weights_of_timm_are_named(hub, tmp_path):
    put(hub, "timm/test_vit.r160_in1k", timm.create_model("test_vit"), tmp_path / "a.safetensors")
    backbone = load_backbone("timm:test_vit")
    assert backbone.notes == ("timm's default weights of test_vit are taken: test_vit.r160_in1k",
                              "left out: head.* (2 tensors)")
    assert backbone.name == "test_vit.r160_in1k"


@pytest.mark.parametrize(("arch", "as_dino"), [("vit_small_patch14_dinov2", True),
                                               ("vit_small_patch14_reg4_dinov2", False)])
def test_dinov2_from_timm_resizes_positions_as_its_authors_do(hub, tmp_path, arch, as_dino):
    """As in dinov2/hub/backbones.py: DINO's way without registers, by size and with antialiasing with them."""
    put(hub, f"timm/{arch}.lvd142m", timm.create_model(arch, num_classes=0), tmp_path / "a.safetensors")
    assert load_backbone(f"timm:{arch}.lvd142m").dino_positions is as_dino


def test_weights_of_dino_from_timm(hub, tmp_path):
    """DINO's networks see DINO's normalization and DINO's positions, which timm's own forward pass does not have."""
    theirs = enlivened(timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True))
    put(hub, "timm/vit_small_patch16_224.dino", theirs, tmp_path / "a.safetensors")
    backbone = load_backbone("timm:vit_small_patch16_224.dino")
    assert (backbone.mean, backbone.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert (backbone.name, backbone.method, backbone.pretrain_data) == ("vit_small_patch16_224.dino", "dino",
                                                                        "ImageNet-1K")
    assert (backbone.image_size, backbone.patch_size, backbone.dino_positions) == (224, 16, True)
    x = images(48, 80, count=1)
    expected = VitBackbone(theirs, dino_positions=True).tokens(x)
    torch.testing.assert_close(backbone.tokens(x), expected)
    assert (theirs.forward_features(x) - expected).abs().max() > 0.01


def test_a_hostile_file_from_the_hub(hub, tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "created",)

    hub.there["timm/test_vit.r160_in1k"] = saved({"norm.weight": torch.ones(1), "x": Touch()}, tmp_path / "a.bin")
    assert_says(["a.bin asks to run", "Nothing of it was executed"], "timm:test_vit.r160_in1k")
    assert not (tmp_path / "created").exists()


def test_a_file_for_pytorch_from_the_hub(hub, tmp_path):
    theirs = enlivened(timm.create_model("test_vit", num_classes=3))
    hub.there["timm/test_vit.r160_in1k"] = saved(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    backbone = load_backbone("timm:test_vit.r160_in1k")
    torch.testing.assert_close(backbone.tokens(images(224, 224)), theirs.forward_features(images(224, 224)))


@pytest.mark.parametrize("arch", ["test_resnet", "test_convnext"])
def test_convolutional_networks_of_timm(hub, tmp_path, arch):
    theirs = enlivened(timm.create_model(arch, num_classes=7))
    put(hub, f"timm/{arch}.r160_in1k", theirs, tmp_path / "a.safetensors")
    backbone = load_backbone(f"timm:{arch}.r160_in1k")
    x = images(96, 64)
    torch.testing.assert_close(backbone.features(x), theirs.forward_head(theirs.forward_features(x), pre_logits=True))
    torch.testing.assert_close(backbone.patch_tokens(x), theirs.forward_features(x).flatten(2).transpose(1, 2))
    assert (backbone.mean, backbone.image_size) == (timm.get_pretrained_cfg(f"{arch}.r160_in1k").mean, 160)
    assert not backbone.has_class_token


def test_dinov3_of_timm(hub, tmp_path):
    """The whole network, as its name says; rotary positions are computed, registers dropped."""
    name = "vit_small_patch16_dinov3.lvd1689m"
    theirs = timm.create_model("vit_small_patch16_dinov3", num_classes=0).eval()
    put(hub, f"timm/{name}", theirs, tmp_path / "a.safetensors")
    backbone = load_backbone(f"timm:{name}")
    assert (backbone.arch, backbone.patch_size, backbone.mean) == ("vit_small_patch16_dinov3", 16, IMAGENET_MEAN)
    x = images(32, 48, count=1)
    found = theirs.forward_features(x)
    assert torch.equal(backbone.tokens(x), torch.cat([found[:, :1], found[:, 5:]], dim=1))
    outputs = []
    for block in theirs.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    theirs.forward_features(x)
    expected = torch.cat([theirs.norm(output)[:, 0] for output in outputs[-4:]], dim=-1)
    torch.testing.assert_close(backbone.class_tokens(x, 4), expected)


def test_weights_of_timm_that_cannot_be_had(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert_says(["timm/vit_small_patch16_224.dino", "HF_HUB_OFFLINE"], "timm:vit_small_patch16_224.dino")
    assert_says(["config.json of org/name", "HF_HUB_OFFLINE"], "hf-hub:org/name")


def test_weights_of_timm_without_a_place_on_the_hub(monkeypatch):
    monkeypatch.setattr(patchssl.models.pretrained, "pretrained_config", lambda _name: {"url": "https://example.org/a.pth"})
    assert_says(["timm:test_vit has no weights on the Hugging Face hub", "another tag"], "timm:test_vit")


def test_weights_of_timm_that_do_not_fit(hub, tmp_path):
    put(hub, "timm/test_vit.r160_in1k", timm.create_model("test_vit2"), tmp_path / "a.safetensors")
    assert_says(["timm:test_vit.r160_in1k does not fit test_vit", "missing", "unexpected"], "timm:test_vit.r160_in1k")


# folders and repositories in timm's layout ---------------------------------------------------------------------

CONFIG = {"architecture": "test_vit", "num_classes": 0, "model_args": {"img_size": 64, "depth": 2},
          "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
                             "classifier": "head", "num_classes": 5}}


def changed(config, changes):
    """`config` with `changes`, which replace single entries of its tables."""
    return config | {name: config.get(name, {}) | value if isinstance(value, dict) else value
                     for name, value in changes.items()}


def timm_folder(folder, config=CONFIG, network=None, text=None):
    folder.mkdir()
    network = network or timm.create_model("test_vit", num_classes=5, img_size=64, depth=2)
    save_file(network.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config) if text is None else text)
    return folder


def test_a_folder_in_timms_layout(tmp_path):
    theirs = enlivened(timm.create_model("test_vit", num_classes=5, img_size=64, depth=2, dynamic_img_size=True))
    backbone = load_backbone(str(timm_folder(tmp_path / "mine", network=theirs)))
    for size in ((64, 64), (48, 96)):
        torch.testing.assert_close(backbone.tokens(images(*size)), theirs.forward_features(images(*size)))
    assert (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (backbone.name, backbone.arch, backbone.method, backbone.image_size) == ("mine", "test_vit", "other", 64)
    assert backbone.dino_positions is False


def test_a_folder_that_timm_saved(tmp_path):
    """With timm's own function for the hub, which is what others' repositories are made with."""
    theirs = enlivened(timm.create_model("test_vit", num_classes=5, img_size=64, depth=2))
    timm.models.save_for_hf(theirs, tmp_path / "a", model_args={"img_size": 64, "depth": 2}, safe_serialization=True)
    backbone = load_backbone(str(tmp_path / "a"))
    torch.testing.assert_close(backbone.tokens(images(64, 64)), theirs.forward_features(images(64, 64)))
    assert backbone.mean == tuple(theirs.pretrained_cfg["mean"])


@each(("own", "dinos", "origin"), [
    ({"pretrained_cfg": {"tag": "dino"}}, True, ("mine", "dino", "ImageNet-1K", None, None)),
    ({"patchssl": {"positions": "dino"}}, True, ("mine", "other", None, None, None)),
    ({"patchssl": {"positions": "dino", "arch": "test_vit (x)", "origin": {
        "name": "run", "method": "pwself", "pretrain_data": "textures", "pretrain_epochs": 2.5, "seed": 4}}}, True,
     ("run", "pwself", "textures", 2.5, 4)),
    ({}, False, ("mine", "other", None, None, None)),
])
def test_what_a_folder_says_of_itself(tmp_path, own, dinos, origin):
    backbone = load_backbone(str(timm_folder(tmp_path / "mine", changed(CONFIG, own))))
    assert backbone.dino_positions is dinos
    assert (backbone.name, backbone.method, backbone.pretrain_data, backbone.pretrain_epochs, backbone.seed) == origin
    assert backbone.arch == own.get("patchssl", {}).get("arch", "test_vit")


@pytest.mark.parametrize(("uri", "revision"), [("hf-hub:org/net", None), ("hf-hub:org/net@v1.0", "v1.0"),
                                               ("hf-hub:org/net@", None)])
def test_a_repository_on_the_hub(hub, tmp_path, uri, revision):
    theirs = enlivened(timm.create_model("test_vit", num_classes=5, img_size=64, depth=2))
    put(hub, "org/net", theirs, tmp_path / "a.safetensors")
    hub.there["org/net/config.json"] = CONFIG
    backbone = load_backbone(uri)
    assert hub.asked == [("org/net", "config.json", revision),
                         ("org/net", ("model.safetensors", "pytorch_model.bin"), revision)]
    torch.testing.assert_close(backbone.tokens(images(64, 64)), theirs.forward_features(images(64, 64)))
    assert (backbone.name, backbone.mean) == ("net", (0.1, 0.2, 0.3))


def test_a_small_file_for_a_large_network(tmp_path):
    """vit_base in the configuration, vit_small in the file: both shapes are said."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in timm.create_model("vit_small_patch16_224", num_classes=0)
                  .state_dict().items()}
    folder = tmp_path / "net"
    folder.mkdir()
    save_file({name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()},
              folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_224"}))
    assert_says([f"{folder} does not fit vit_base_patch16_224", "150 of another shape",
                 "blocks.0.attn.proj.weight is 384 x 384 instead of 768 x 768"], folder)
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_small_patch16_224"}))
    assert load_backbone(str(folder)).embed_dim == 384


@each(("change", "words"), [
    ({"architecture": "vit_nope"}, ["architecture 'vit_nope' is unknown"]),
    ({"architecture": 3}, ["describes no network", "'architecture'"]),
    ({"architecture": None}, ["describes no network"]),
    ({"architecture": None, "model_type": "vit"}, ["a 'vit' of the transformers library"]),
    ({"architecture": "hf-hub:org/evil"}, ["'hf-hub:org/evil' is unknown"]),
    ({"architecture": "local-dir:/tmp"}, ["'local-dir:/tmp' is unknown"]),
    ({"architecture": "swin_tiny_patch4_window7_224"}, ["not supported: a Swin Transformer"]),
    ({"architecture": "vit_base_patch16_siglip_224"}, ["does not fit vit_base_patch16_siglip_224"]),
    ({"model_args": [1]}, ["says model_args is a list"]), ({"model_args": "x"}, ["says model_args is a str"]),
    ({"pretrained_cfg": [1]}, ["says pretrained_cfg is a list"]), ({"patchssl": "x"}, ["says patchssl is a str"]),
    ({"model_args": {"depth": 500}}, ["set depth", "only sizes up to 30"]),
    ({"model_args": {"depth": "two"}}, ["cannot build"]),
    ({"model_args": {"depth": -1}}, ["cannot build"]), ({"model_args": {"patch_size": 0}}, ["cannot build"]),
    ({"model_args": {"img_size": 10**12}}, ["set img_size", "refused"]),
    ({"model_args": {"img_size": [[64]]}}, ["set img_size", "refused"]),
    ({"model_args": {"mlp_ratio": math.nan}}, ["set mlp_ratio", "refused"]),
    ({"model_args": {"mlp_ratio": math.inf}}, ["set mlp_ratio", "refused"]),
    ({"model_args": {"norm_layer": "os.system"}}, ["cannot build"]),
    ({"model_args": {"block_fn": "os.system"}}, ["cannot build"]),
    ({"model_args": {"model_name": "resnet18"}}, ["cannot build"]),
    ({"model_args": {"nonsense": 1}}, ["cannot build", "nonsense"]),
    ({"model_args": {"pretrained": True}}, ["set pretrained", "nothing that opens a file"]),
    ({"model_args": {"pretrained_cfg": {"file": "evil.pth"}}}, ["set pretrained_cfg", "nothing that opens a file"]),
    ({"model_args": {"pretrained_cfg_overlay": {"file": "evil.pth"}}}, ["set pretrained_cfg_overlay"]),
    ({"model_args": {"checkpoint_path": "evil.pth"}}, ["set checkpoint_path", "nothing that opens a file"]),
    ({"model_args": {"cache_dir": "/"}}, ["set cache_dir", "nothing that opens a file"]),
    ({"model_args": {"features_only": True}}, ["cannot build"]), ({"model_args": {"in_chans": 1}}, ["3 x 16 x 16"]),
    ({"pretrained_cfg": {"mean": [math.nan] * 3}}, ["says mean is [nan, nan, nan]"]),
    ({"pretrained_cfg": {"mean": [math.inf] * 3}}, ["says mean is"]),
    ({"pretrained_cfg": {"mean": "x"}}, ["mean is 'x'"]),
    ({"pretrained_cfg": {"mean": [0.5, 0.5]}}, ["three numbers"]),
    ({"pretrained_cfg": {"mean": 0.5}}, ["three numbers"]),
    ({"pretrained_cfg": {"mean": [10**400] * 3}}, ["three numbers"]),
    ({"pretrained_cfg": {"std": [0, 0, 0]}}, ["std of (0.0, 0.0, 0.0)", "above 0"]),
    ({"pretrained_cfg": {"std": [1, -1, 1]}}, ["above 0"]), ({"pretrained_cfg": {"std": {"r": 1}}}, ["three numbers"]),
    ({"pretrained_cfg": {"input_size": [3, math.nan, math.nan]}}, ["input_size"]),
    ({"pretrained_cfg": {"input_size": ["a"]}}, ["input_size"]),
    ({"pretrained_cfg": {"input_size": 64}}, ["input_size"]),
    ({"pretrained_cfg": {"input_size": [1, 64, 64]}}, ["1 x 64 x 64", "color images"]),
    ({"pretrained_cfg": {"input_size": [3, -1, -1]}}, ["3 x -1 x -1"]),
    ({"pretrained_cfg": {"classifier": "norm"}}, ["2 missing: norm.bias, norm.weight"]),
    ({"patchssl": {"origin": "me"}}, ["says of its origin 'me'"]),
    ({"patchssl": {"origin": {"name": "a", "x": 1}}}, ["says of its origin"]),
    ({"patchssl": {"origin": {"name": ["a"]}}}, ["says of its origin"]),
    ({"patchssl": {"origin": {"name": "a", "seed": "x"}}}, ["says of its origin"]),
])
def test_configurations_that_make_no_sense(tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    folder = timm_folder(tmp_path / "mine", changed(CONFIG, change))
    assert_says([str(folder), *words], folder)


def test_a_configuration_cannot_make_timm_open_a_file(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(torch, "load", lambda *args, **options: opened.append(args))
    saved({"x": 1}, tmp_path / "evil.pth")
    for name in ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"):
        args = {**CONFIG["model_args"], name: str(tmp_path / "evil.pth")}
        assert_says(["nothing that opens a file"], timm_folder(tmp_path / name, {**CONFIG, "model_args": args}))
    assert opened == []


DAMAGED = {
    "empty": ("", ["cannot be read as JSON"]), "cut off": ("{", ["cannot be read as JSON"]),
    "nothing": ("null", ["holds a NoneType"]), "a list": ("[1]", ["holds a list"]),
    "deep lists": ("[" * 100_000, ["cannot be read as JSON"]), "deep tables": ('{"a":' * 100_000, ["cannot be read"]),
    "a long number": ('{"a": ' + "1" * 5000 + "}", ["cannot be read as JSON"]),
    "no word": ("{}", ["describes no network"]),
    "deep arguments": ('{"architecture": "test_vit", "model_args": ' + '{"a":' * 300 + "1" + "}" * 301, ["set a"]),
}


@each("damage", DAMAGED)
def test_a_damaged_configuration(tmp_path, damage):
    text, words = DAMAGED[damage]
    folder = timm_folder(tmp_path / "mine", text=text)
    assert_says([str(folder), *words], folder)


def test_bytes_that_are_no_text(tmp_path):
    folder = timm_folder(tmp_path / "mine")
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    assert_says(["config.json cannot be read as JSON"], folder)


@each("suffix", ["#teacher", "?heads=3", "?mean=0.5"])
def test_a_folder_says_all_about_itself(tmp_path, suffix):
    folder = timm_folder(tmp_path / "mine")
    assert_says(["says all about itself"], f"{folder}{suffix}", UsageError)


def test_a_folder_with_half_of_what_is_needed(tmp_path):
    folder = timm_folder(tmp_path / "mine")
    (folder / "config.json").unlink()
    assert_says([str(folder), "holds no checkpoint.pth"], folder)


# official files ------------------------------------------------------------------------------------------------

SPEC = NetworkSpec(arch="vit_base_patch16_224", image_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=1)
VIT = enlivened(build_vit(SPEC))


@each("name", VIT.state_dict())
def test_a_file_without_one_tensor(tmp_path, name):
    """Whichever it is, it is named, and nothing is loaded."""
    state = {key: tensor for key, tensor in VIT.state_dict().items() if key != name}
    bare = saved(state, tmp_path / "bare.pth")
    assert_says([str(bare), name], bare)
    inside = {f"module.backbone.{key}": tensor for key, tensor in state.items()} | {"module.head.weight": torch.ones(2)}
    training = saved({"teacher": inside, "student": inside}, tmp_path / "training.pth")
    assert_says([f"{training}#teacher", name], training)


@each("name", ["blocks.0.extra", "blocks.0.attn.qkv.weight_scale", "decoder.0.weight", "pos_embed2"])
def test_a_file_with_one_tensor_too_many(tmp_path, name):
    path = saved(VIT.state_dict() | {name: torch.ones(1)}, tmp_path / "a.pth")
    assert_says([str(path), "does not fit", f"1 unexpected: {name}"], path)


@each("name", ["norm.weight", "blocks.1.mlp.fc2.weight", "patch_embed.proj.bias"])
def test_a_file_with_one_tensor_of_another_shape(tmp_path, name):
    path = saved(VIT.state_dict() | {name: torch.ones(5, 3)}, tmp_path / "a.pth")
    needed = " x ".join(map(str, VIT.state_dict()[name].shape))
    assert_says([str(path), f"1 of another shape: {name} is 5 x 3 instead of {needed}"], path)


@each(("suffix", "kind", "words"), [
    ("#student", CheckpointError, ["has no 'student'", "only model, teacher"]),
    ("#optimizer", CheckpointError, ["has no 'optimizer'", "only model, teacher"]),
    ("?heads=5", CheckpointError, ["5 attention heads do not divide the 64 channels"]),
    ("?heads=0", CheckpointError, ["0 attention heads do not divide"]),
    ("?heads=two", UsageError, ["heads=two", "whole number"]), ("?heads=", UsageError, ["heads=", "whole number"]),
    ("?heads=-2", UsageError, ["heads=-2", "whole number"]),
    ("?head=2", UsageError, ["'head'", "did you mean 'heads'"]),
    ("?method=dyno", UsageError, ["method 'dyno'", "did you mean 'dino'"]),
    ("?mean=a", UsageError, ["mean=a is not one number"]),
    ("?std=1,2", UsageError, ["std=1,2", "three between commas"]),
    ("?mean=", UsageError, ["mean= is not"]), ("?mean=nan", UsageError, ["mean=nan"]),
    ("?std=0", UsageError, ["std=0"]), ("?std=-1", UsageError, ["std=-1"]), ("?mean=inf", UsageError, ["mean=inf"]),
])
def test_options_that_make_no_sense(tmp_path, suffix, kind, words):
    path = saved({"teacher": VIT.state_dict(), "model": VIT.state_dict(), "optimizer": {"lr": 1}}, tmp_path / "a.pth")
    assert_says(words, f"{path}{suffix}", kind)


def test_a_safetensors_file_that_says_it_is_ours(tmp_path):
    save_file(VIT.state_dict(), tmp_path / "a.safetensors", metadata={"format": "patchssl", "version": "1"})
    assert_says(["does not say which version"], tmp_path / "a.safetensors")


def test_what_the_name_says_of_a_file(tmp_path):
    path = saved(VIT.state_dict(), tmp_path / "net.pth")
    backbone = load_backbone(f"{path}?heads=2&mean=0.5&std=0.1,0.2,0.3&method=ibot")
    assert backbone.module.blocks[0].attn.num_heads == 2
    assert (backbone.mean, backbone.std, backbone.method) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3), "ibot")
    plain = load_backbone(str(path))
    assert (plain.mean, plain.std, plain.method, plain.name) == (IMAGENET_MEAN, IMAGENET_STD, "other", "net")
    assert plain.notes == ("1 attention heads are assumed, 64 channels each: the file does not say; ?heads=n sets "
                           "another number",)


@each("prefix", ["", "module.", "backbone."])
def test_dinos_resnet(tmp_path, prefix):
    """In torchvision's names, against torchvision's network; its head or classifier is left out and named."""
    theirs = enlivened(torchvision.models.resnet18(num_classes=4))
    classifier = "fc" if prefix != "backbone." else None
    state = {f"{prefix}{name}": tensor for name, tensor in theirs.state_dict().items()
             if classifier or not name.startswith("fc.")}
    backbone = load_backbone(str(saved(state, tmp_path / "dino_resnet50_pretrain.pth")))
    theirs.fc = nn.Identity()
    for size in ((64, 64), (70, 97)):
        torch.testing.assert_close(backbone.features(images(*size)), theirs(images(*size)))
    assert (backbone.arch, backbone.patch_size, backbone.image_size) == ("resnet18", 32, 224)
    assert (backbone.mean, backbone.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert backbone.method == "dino"  # by the file's name
    assert backbone.notes == (("left out: fc.* (2 tensors)",) if classifier else ())


@each("arch", ["resnet34", "resnet50", "resnet101", "resnet152"])
def test_larger_resnets(tmp_path, arch):
    with torch.device("meta"):
        shapes = getattr(torchvision.models, arch)().state_dict()
    state = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in shapes.items()}
    path = saved(state, tmp_path / "a.pth")
    backbone = load_backbone(str(path))
    path.unlink()  # up to 240 MB
    assert (backbone.arch, backbone.embed_dim) == (arch, 512 if arch == "resnet34" else 2048)


@each(("change", "words"), [
    (lambda s: s.pop("layer3.1.bn2.running_var"), ["does not fit resnet18", "1 missing: layer3.1.bn2.running_var"]),
    (lambda s: s.update({"layer3.1.x": torch.ones(1)}), ["1 unexpected: layer3.1.x"]),
    (lambda s: s.update({"layer3.2.conv1.weight": torch.ones(1)}), ["2-2-3-2 blocks", "resnet152"]),
    (lambda s: s.pop("conv1.weight"), ["neither a plain Vision Transformer nor a ResNet"]),
])
def test_a_resnet_that_is_none(tmp_path, change, words):
    state = dict(torchvision.models.resnet18().state_dict())
    change(state)
    path = saved(state, tmp_path / "a.pth")
    assert_says([str(path), *words], path)


def test_a_resnet_has_no_heads(tmp_path):
    path = saved(torchvision.models.resnet18().state_dict(), tmp_path / "a.pth")
    assert_says(["ResNet without attention heads"], f"{path}?heads=2", UsageError)


@each(("arch", "options", "words"), [
    ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2)}, ["is a Swin Trans"]),
    ("swinv2_tiny_window8_256", {"embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2)}, ["is a Swin Transformer"]),
    ("xcit_nano_12_p16_224", {"embed_dim": 32, "depth": 1, "cls_attn_layers": 1}, ["is an XCiT", "over channels"]),
    ("beit_base_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 2}, ["is a BEiT"]),
    ("mobilenetv3_small_050", {}, ["neither a plain Vision Transformer nor a ResNet"]),
    ("test_convnext", {}, ["neither a plain Vision Transformer nor a ResNet", "its tensors are called"]),
    ("deit_tiny_distilled_patch16_224", {"embed_dim": 64, "depth": 1, "num_heads": 1}, ["197 patches"]),
])
def test_files_of_other_networks(tmp_path, arch, options, words):
    path = saved(timm.create_model(arch, num_classes=0, **options).state_dict(), tmp_path / "a.pth")
    assert_says([str(path), *words], path)


@each(("names", "words"), [
    (["vit.embeddings.cls_token", "vit.encoder.layer.0.output.dense.weight"], "layout of the transformers library"),
    (["visual.conv1.weight", "transformer.resblocks.0.attn.in_proj_weight"], "a CLIP model"),
    (["module.base_encoder.conv1.weight"], "a MoCo checkpoint"),
])
def test_files_of_other_libraries(tmp_path, names, words):
    path = saved({"state_dict": {name: torch.ones(1) for name in names}}, tmp_path / "a.pth")
    assert_says([f"{path}#state_dict", words], path)


# runs of ours --------------------------------------------------------------------------------------------------


def small_engine(seed=0):
    recipe = Recipe.model_validate({
        "model": {"arch": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 24, "depth": 2,
                  "num_heads": 3},
        "views": {"global_size": 32, "local_size": 16},
        "head": {"num_prototypes": 16, "hidden": 8, "bottleneck": 4},
    })
    return recipe, Engine(recipe, seed, 10, torch.device("cpu"))


ORIGIN = {"name": "mine", "method": "pwself", "pretrain_data": "textures", "pretrain_epochs": 2.5, "seed": 4}


def save_run(folder, **changes):
    """A checkpoint with the keys that a run writes; teacher and student differ."""
    recipe, engine = small_engine()
    enlivened(engine.student)
    facts = {"network": asdict(network_spec(recipe)), "origin": ORIGIN}
    save_checkpoint(folder, engine.state_dict() | facts | changes)
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
    assert backbone.dino_positions
    assert not backbone.training


def test_what_is_said_of_a_run(tmp_path):
    head = len(save_run(tmp_path / "run").teacher.head.state_dict())
    backbone = load_backbone(str(tmp_path / "run"))
    assert backbone.notes == ("the teacher is loaded; #student chooses another network",
                              f"left out: head.* ({head} tensors)")
    assert load_backbone(f"{tmp_path / 'run'}#student").notes == (f"left out: head.* ({head} tensors)",)


def test_a_networks_weights_are_saved_once():
    _, engine = small_engine()
    state = engine.state_dict()["teacher"]
    backbone = {name.removeprefix("backbone.") for name in state if name.startswith("backbone.")}
    assert backbone == set(engine.teacher.backbone.module.state_dict())  # timm's own names
    assert len(backbone) + len(engine.teacher.head.state_dict()) == len(state)


def test_a_checkpoint_with_another_network_inside(tmp_path):
    spec = asdict(network_spec(small_engine()[0]))
    save_run(tmp_path / "deep", network=spec | {"depth": 3})
    assert_says(["deep#teacher does not fit vit_tiny_patch16_224", "12 missing: blocks.2"], tmp_path / "deep")
    save_run(tmp_path / "wide", network=spec | {"embed_dim": 48})
    assert_says(["of another shape: blocks.0.attn.proj.bias is 24 instead of 48"], tmp_path / "wide")


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_a_checkpoint_without_one_tensor(tmp_path, network):
    _, engine = small_engine()
    state = engine.state_dict()
    gone = state[network].pop("backbone.blocks.1.norm2.bias")
    assert gone.shape == (24,)
    save_run(tmp_path / "run", **state)
    assert_says([f"#{network} does not fit", "1 missing: blocks.1.norm2.bias"], f"{tmp_path / 'run'}#{network}")


def test_a_network_that_the_checkpoint_does_not_have(tmp_path):
    save_run(tmp_path / "run")
    assert_says(["no 'techer', only student, teacher; choose one as"], f"{tmp_path / 'run'}#techer")


def test_a_run_says_all_about_itself(tmp_path):
    save_run(tmp_path / "run")
    for uri in ("run?heads=3", "run#student?heads=3", "run/checkpoint.pth?mean=0.5"):
        assert_says(["says all about itself; leave out ?"], tmp_path / uri, UsageError)


@each(("changes", "words"), [
    ({"network": None}, ["lacks what a checkpoint of patchssl says about itself"]), ({"network": [1]}, ["lacks"]),
    ({"network": {}}, ["lacks"]), ({"network": {"arch": "test_vit"}}, ["'image_size' and 'patch_size'"]),
    ({"network": {"arch": 3, "image_size": 32, "patch_size": 8}}, ["lacks"]),
    ({"network": {"arch": "nope", "image_size": 32, "patch_size": 8}}, ["architecture 'nope' is unknown"]),
    ({"network": {"arch": "resnet18", "image_size": 32, "patch_size": 8}}, ["resnet18 is no plain"]),
    ({"network": {"arch": "test_vit", "image_size": "x", "patch_size": 8}}, ["lacks", "'x'"]),
    ({"network": {"arch": "test_vit", "image_size": 32, "patch_size": 0}}, ["patch size 0"]),
    ({"network": {"arch": "test_vit", "image_size": 32, "patch_size": 8, "depth": 10**9}}, ["lacks", "1000000000"]),
    ({"network": {"arch": "test_vit", "image_size": 32, "patch_size": 8, "mlp_ratio": math.inf}}, ["cannot be built"]),
    ({"network": {"arch": "test_vit", "image_size": 32, "patch_size": 8, "evil": 1}}, ["lacks", "evil"]),
    ({"origin": None}, ["lacks"]), ({"origin": {}}, ["lacks", "method"]), ({"origin": "x"}, ["lacks"]),
    ({"origin": ORIGIN | {"name": 3}}, ["says of its origin"]), ({"origin": ORIGIN | {"x": 3}}, ["says of its origin"]),
    ({"origin": ORIGIN | {"seed": [3]}}, ["says of its origin"]),
    ({"version": "9"}, ["does not say which version"]), ({"version": None}, ["does not say which version"]),
    ({"version": 2}, ["newer patchssl (format 2, this one reads up to 1)"]),
    ({"teacher": {}, "student": {}}, ["holds no network"]), ({"teacher": {"backbone.x": torch.ones(1)}}, ["has no"]),
])
def test_checkpoints_that_make_no_sense(tmp_path, changes, words):
    """Of ours by their own word, and hostile or damaged."""
    save_run(tmp_path / "run", **changes)
    folder = tmp_path / "run"
    for uri in (f"{folder}#teacher", f"{folder / 'checkpoint.pth'}#teacher"):
        assert_says([str(folder), *words], uri)


def test_a_run_folder_with_a_damaged_newest(tmp_path):
    engine = save_run(tmp_path / "run")
    save_run(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint.pth"
    newest.write_bytes(newest.read_bytes()[:-500])
    assert load_backbone(str(tmp_path / "run")).weights_sha256 == engine.teacher.backbone.weights_sha256
    assert_says([str(newest), "damaged"], newest)


# one's own modules ---------------------------------------------------------------------------------------------

OWN = """
import torch
from patchssl import Backbone
calls = []
class Colors(torch.nn.Module):
    def forward(self, x):
        patches = torch.nn.functional.avg_pool2d(x, 2).flatten(2).transpose(1, 2)
        return torch.cat([patches.mean(1, keepdim=True), patches], dim=1)
def make():
    calls.append(1)
    return Backbone.from_module(Colors(), patch_size=2, name="colors")
def network():
    return Colors()
def fails():
    raise RuntimeError("of my own")
number = 3
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    sys.modules.pop("own_networks", None)
    yield
    sys.modules.pop("own_networks", None)


@pytest.mark.usefixtures("own_module")
def test_ones_own_module_from_the_current_folder():
    backbone = load_backbone("py:own_networks:make")
    assert backbone.notes == ("py:own_networks:make ran your own code",)
    assert (backbone.name, backbone.arch, backbone.method) == ("colors", "Colors", "other")
    torch.testing.assert_close(backbone.features(images(4, 4)), images(4, 4).mean((2, 3)))
    assert isinstance(backbone, Backbone)
    assert sys.modules["own_networks"].calls == [1]


@pytest.mark.usefixtures("own_module")
@each(("uri", "words"), [
    ("py:", ["write py:package.module:factory"]), ("py:own_networks", ["write py:package.module:factory"]),
    ("py::make", ["write py:package.module:factory"]), ("py:.own_networks:make", ["write py:package.module:factory"]),
    ("py:own_network:make", ["no module is called own_network", "neither installed nor in"]),
    ("py:own_networks:mak", ["the module own_networks has no function mak"]),
    ("py:own_networks:number", ["the module own_networks has no function number"]),
    ("py:own_networks:network", ["returned a Colors", "patchssl.Backbone.from_module("]),
])
def test_ones_own_module_that_does_not_work(uri, words):
    assert_says(words, uri, UsageError)


@pytest.mark.usefixtures("own_module")
def test_an_error_in_ones_own_code_is_named_and_kept():
    with pytest.raises(UsageError, match="your factory raised RuntimeError: of my own") as caught:
        load_backbone("py:own_networks:fails")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_factory_that_fails_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "failing_factory.py").write_text("def make():\n    raise ValueError('oops')\n")
    (tmp_path / "broken_factory.py").write_text("def make(:\n")
    with pytest.raises(UsageError, match="your factory raised ValueError: oops"):
        load_backbone("py:failing_factory:make")
    with pytest.raises(UsageError, match="importing broken_factory raised SyntaxError"):
        load_backbone("py:broken_factory:make")


def test_a_link_to_nothing(tmp_path):
    (tmp_path / "gone.pth").symlink_to(tmp_path / "nothing.pth")
    with pytest.raises(UsageError, match="it is a link to nothing"):
        load_backbone(str(tmp_path / "gone.pth"))


# the size that any MODEL is evaluated at

def test_any_model_takes_the_size_it_is_evaluated_at(tiny_run, tmp_path, monkeypatch):
    own = load_backbone(str(tiny_run))
    for uri in (f"{tiny_run}?img_size=48", f"{tiny_run}#teacher?img_size=48", f"{tiny_run}?img_size=48#teacher"):
        larger = load_backbone(uri)
        assert (larger.image_size, own.image_size) == (48, 32)
        assert larger.weights_sha256 == own.weights_sha256
        assert any("evaluated at 48 px, not at 32" in note for note in larger.notes)
        assert (own.name, larger.name) == ("tiny", "tiny-student-48px" if "student" in uri else "tiny-48px")
        images = torch.rand(1, 3, 48, 48)
        assert torch.equal(larger.features(images), own.features(images))
    (tmp_path / "mine.py").write_text("from patchssl import Backbone\nimport torch\n\ndef make():\n"
                                      "    return Backbone.from_module(torch.nn.Flatten(), tokens=lambda n, x: x, "
                                      "mean=(0, 0, 0), std=(1, 1, 1), patch_size=8)\n")
    monkeypatch.chdir(tmp_path)
    assert load_backbone("py:mine:make?img_size=64").image_size == 64
    assert load_backbone("random:resnet10t").image_size == 224


@pytest.mark.parametrize("size", ["0", "x", "-8", "7", "33", "1000000"])
def test_a_size_that_is_none_is_refused(tiny_run, size):
    with pytest.raises(UsageError, match="img_size"):
        load_backbone(f"{tiny_run}?img_size={size}")


def test_raw_pixels_are_a_scheme_like_any_other():
    plain, sized, patches = map(load_backbone, ("pixels", "pixels?img_size=16", "pixels?img_size=64&patch_size=8"))
    assert [found.name for found in (plain, sized, patches)] == ["pixels-32", "pixels-16", "pixels-64-8"]
    assert (plain.sized, sized.sized) == (False, True)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(patches.features(images), images.flatten(1))
    assert torch.equal(patches.patch_tokens(images)[0, 1, :8], images[0, 0, 0, 8:16])
    for uri in ("pixels", "pixels?img_size=32"):  # where a file is needed
        with pytest.raises(UsageError, match=r"raw pixels, which are no network: eval scores them"):
            parse_location(uri)


def test_raw_pixels_and_other_sizes_are_refused_where_a_network_is_needed(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for uri in ("pixels", "pixels?img_size=32"):
        with pytest.raises(UsageError, match="raw pixels, which are no network"):
            load_network(uri)
    assert load_network(f"{tiny_run}?img_size=48").image_size == 48
    with pytest.raises(UsageError, match="leave it out"):
        load_network(f"{tiny_run}?img_size=48", own_size=True)
    shutil.copytree(tiny_run, "pixels")
    with pytest.raises(UsageError, match=r"there is a file or folder of this name: write \./pixels"):
        load_backbone("pixels")
    assert load_backbone("./pixels").method == "pwself"
    assert load_backbone("random:resnet10t?img_size=64").image_size == 64
