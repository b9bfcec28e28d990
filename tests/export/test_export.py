"""Exports against those who read them: timm, onnxruntime, our reader of DINO's files, and DINO's own names."""

import argparse
import ast
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
import yaml
from PIL import Image

from patchssl.eval.records import Result
from patchssl.export import export_model, folder, is_export, push_model, source
from patchssl.export import onnx as onnx_file
from patchssl.models.checkpoint import load_checkpoint, save_checkpoint
from patchssl.models.load import load_backbone
from patchssl.pretrain.recipe import parse_recipe
from patchssl.runtime.errors import CheckpointError, FolderInUse, UsageError
from patchssl.runtime.lock import locked

# state_dict() of facebookresearch/dino's VisionTransformer(img_size=[32], patch_size=8, embed_dim=24, depth=1,
# num_heads=3, qkv_bias=True) and of its DINOHead(24, 32, hidden_dim=32, bottleneck_dim=16)
DINO_NETWORK = {
    "cls_token": (1, 1, 24), "pos_embed": (1, 17, 24), "patch_embed.proj.weight": (24, 3, 8, 8),
    "patch_embed.proj.bias": (24,), "blocks.0.norm1.weight": (24,), "blocks.0.norm1.bias": (24,),
    "blocks.0.attn.qkv.weight": (72, 24), "blocks.0.attn.qkv.bias": (72,), "blocks.0.attn.proj.weight": (24, 24),
    "blocks.0.attn.proj.bias": (24,), "blocks.0.norm2.weight": (24,), "blocks.0.norm2.bias": (24,),
    "blocks.0.mlp.fc1.weight": (96, 24), "blocks.0.mlp.fc1.bias": (96,), "blocks.0.mlp.fc2.weight": (24, 96),
    "blocks.0.mlp.fc2.bias": (24,), "norm.weight": (24,), "norm.bias": (24,)}
DINO_HEAD = {
    "mlp.0.weight": (32, 24), "mlp.0.bias": (32,), "mlp.2.weight": (32, 32), "mlp.2.bias": (32,),
    "mlp.4.weight": (16, 32), "mlp.4.bias": (16,), "last_layer.weight_g": (32, 1), "last_layer.weight_v": (32, 16)}
SIZES = [(32, 32), (48, 48), (32, 56), (43, 33)]
REGISTERS = "random:vit_small_patch14_reg4_dinov2?img_size=28&embed_dim=48&depth=2&num_heads=3"


def lively(shapes, seed):
    """Weights by name so large that every part shows in the output; position embeddings of std 1."""
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng) * (1.0 if "pos_embed" in name else 0.2)
            for name, shape in shapes.items()}


def images(height, width, count=2):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def off(found, expected):
    """The largest difference as a share of the largest value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """The tiny run's folder with other weights, and a full path to its data, as a user's run has."""
    checkpoint = load_checkpoint(tiny_run)
    for seed, name in enumerate(("teacher", "student")):
        checkpoint[name] = lively({key: value.shape for key, value in checkpoint[name].items()}, seed)
    return save_checkpoint(tmp_path_factory.mktemp("lively") / "mine", checkpoint).parent


@pytest.fixture(scope="module")
def record(run):
    """A record of the run's teacher, as `patchssl eval knn` writes it."""
    backbone = load_backbone(str(run))
    return Result(model="mine", method="pwself", arch=backbone.arch, weights_sha256=backbone.weights_sha256,
                  task="knn", dataset="red|blue", dataset_fingerprint="0" * 16, protocol="native", protocol_version=1,
                  protocol_settings={}, protocol_fingerprint="1" * 16, metrics={"top1@20": 0.8125, "top1@10": 0.5},
                  versions={}, device="cpu", duration=1.0)


@pytest.fixture(scope="module")
def exported(run, record, tmp_path_factory):
    """The report of an export in all formats, with records of these and of other weights."""
    root = tmp_path_factory.mktemp("exported")
    record.write(root / "results")
    replace(record, weights_sha256="f" * 64, metrics={"top1@20": 0.999}).write(root / "results")
    return export_model(str(run), root / "mine", license="apache-2.0", results=root / "results")


@pytest.fixture
def official(tmp_path):
    """A checkpoint as DINO's training writes it, wrapped by DDP where DINO wraps it, and a bare backbone."""
    names = {f"backbone.{name}": shape for name, shape in DINO_NETWORK.items()}
    names |= {f"head.{name}": shape for name, shape in DINO_HEAD.items()}
    student, teacher = lively(names, 5), lively(names, 6)
    torch.save({"student": {f"module.{name}": tensor for name, tensor in student.items()}, "teacher": teacher,
                "optimizer": {}, "epoch": 7, "args": argparse.Namespace(arch="vit_tiny", patch_size=8),
                "dino_loss": {"center": torch.zeros(1, 32)}}, tmp_path / "full.pth")
    torch.save(lively(DINO_NETWORK, 7), tmp_path / "bare.pth")
    return tmp_path


def test_timm_gives_bit_equal_features(run, exported):
    network = timm.create_model(f"local-dir:{exported.folder}", pretrained=True).eval()
    assert torch.equal(network(images(32, 32)), load_backbone(str(run)).features(images(32, 32)))
    assert network.pretrained_cfg["mean"] == [0.485, 0.456, 0.406]  # timm's own record of this network says 0.5


def test_timm_adds_a_classifier_to_an_export(run, exported):
    network = timm.create_model(f"local-dir:{exported.folder}", pretrained=True, num_classes=5).eval()
    assert network(images(32, 32)).shape == (2, 5)
    assert torch.equal(network.forward_features(images(32, 32)), load_backbone(str(run)).tokens(images(32, 32)))


@pytest.mark.parametrize("network", ["", "#student"])
def test_an_export_is_read_back_as_the_network_it_came_from(run, tmp_path, network):
    export_model(f"{run}{network}", tmp_path / "out", formats=["timm"])
    before, after = load_backbone(f"{run}{network}"), load_backbone(str(tmp_path / "out"))
    for size in SIZES:
        assert torch.equal(before.tokens(images(*size)), after.tokens(images(*size)))
    for fact in ("weights_sha256", "origin", "arch", "mean", "std", "image_size", "patch_size", "dino_positions"):
        assert getattr(after, fact) == getattr(before, fact)
    assert after.name == ("tiny-student" if network else "tiny")


def test_a_folder_whose_maker_let_timm_take_any_size_is_read_all_the_same(run, tmp_path):
    report = export_model(str(run), tmp_path / "out", formats=["timm"])
    config = json.loads((report.folder / "config.json").read_text())
    config["model_args"]["dynamic_img_size"] = True  # as some networks on the hub say
    (report.folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(load_backbone(str(report.folder)).tokens(images(48, 32)),
                       load_backbone(str(run)).tokens(images(48, 32)))


def test_networks_that_resize_positions_as_timm_does_keep_doing_so(tmp_path):
    report = export_model(REGISTERS, tmp_path / "out", formats=["timm"])
    before, after = load_backbone(REGISTERS), load_backbone(str(report.folder))
    assert torch.equal(before.tokens(images(56, 42)), after.tokens(images(56, 42)))
    assert json.loads((report.folder / "config.json").read_text())["patchssl"]["positions"] == "timm"


def test_dino_pth_has_dinos_names_shapes_and_values(run, exported):
    content = torch.load(exported.folder / "dino.pth", map_location="cpu")  # as DINO's code calls it
    checkpoint = load_checkpoint(run)
    assert list(content) == ["student", "teacher", "args", "epoch"]
    assert content["epoch"] == 2
    assert content["args"] == {"img_size": [32], "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3,
                               "mlp_ratio": 4.0}
    for name in ("student", "teacher"):
        plain = {key.replace("backbone.", ""): value for key, value in content[name].items()}  # as DINO's code does
        head = {key.removeprefix("head."): value.shape for key, value in plain.items() if key.startswith("head.")}
        assert head == DINO_HEAD
        assert {key: value.shape for key, value in plain.items() if not key.startswith("head.")} == DINO_NETWORK
        assert all(torch.equal(value, checkpoint[name][key]) for key, value in content[name].items())


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_dino_pth_is_read_as_an_official_file_of_dino(run, exported, network):
    before = load_backbone(f"{run}#{network}")
    after = load_backbone(f"{exported.folder / 'dino.pth'}#{network}?heads=3")
    assert before.weights_sha256 == after.weights_sha256
    for size in SIZES:
        assert off(after.tokens(images(*size)), before.tokens(images(*size))) < 1e-6


@pytest.mark.parametrize(("uri", "keys"), [
    ("full.pth", {"student", "teacher"}), ("full.pth#student", {"student", "teacher"}),
    ("bare.pth?heads=3", {"teacher"})])
def test_official_files_are_exported_for_timm_and_for_dino(official, uri, keys):
    before = load_backbone(f"{official}/{uri}")
    report = export_model(f"{official}/{uri}", official / "out", formats=["timm", "dino"])
    network = timm.create_model(f"local-dir:{report.folder}", pretrained=True).eval()
    assert torch.equal(network(images(32, 32)), before.features(images(32, 32)))
    content = torch.load(report.folder / "dino.pth", map_location="cpu")
    assert {key for key in content if key not in ("args", "epoch")} == keys
    assert content.get("epoch") == (7 if "full" in uri else None)
    for key in keys:
        after = load_backbone(f"{report.folder / 'dino.pth'}#{key}?heads=3")
        original = load_backbone(f"{official}/{'full.pth#' + key if 'full' in uri else uri}")
        assert torch.equal(after.tokens(images(32, 56)), original.tokens(images(32, 56)))
        assert sum(name.startswith("head.") for name in content[key]) == (8 if "full" in uri else 0)
    assert "their authors" in (report.folder / "README.md").read_text()


@pytest.mark.slow
def test_onnxruntime_gives_the_features_of_any_number_of_images(run, exported):
    session = onnxruntime.InferenceSession(str(exported.folder / "model.onnx"), providers=["CPUExecutionProvider"])
    backbone = load_backbone(str(run))
    for count in (1, 3, 5):
        batch = images(32, 32, count)
        (found,) = session.run(None, {"image": batch.numpy()})
        assert off(torch.from_numpy(found), backbone.features(batch)) < 1e-5
    facts = session.get_modelmeta().custom_metadata_map
    assert (facts["mean"], facts["weights_sha256"]) == ("0.485 0.456 0.406", backbone.weights_sha256)


@pytest.mark.slow
def test_a_network_too_large_for_one_file_of_onnx_gets_a_second(run, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "_LARGEST_BYTES", 1000)
    report = export_model(str(run), tmp_path / "out", formats=["onnx"])
    assert set(report.files) == {"README.md", "config.json", "model.onnx", "model.onnx.data"}
    assert report.differences["onnx"] < 1e-5  # it was run from where its second part lies
    onnxruntime.InferenceSession(str(report.folder / "model.onnx"), providers=["CPUExecutionProvider"])


@pytest.mark.slow
def test_a_resnet_has_no_file_for_dino(tmp_path):
    report = export_model("random:resnet10t", tmp_path / "out")
    before, after = load_backbone("random:resnet10t"), load_backbone(str(report.folder))
    assert torch.equal(before.features(images(64, 96)), after.features(images(64, 96)))
    assert list(report.differences) == ["timm", "onnx"]
    assert report.left_out == ("dino: resnet10t is no plain Vision Transformer",)
    with pytest.raises(UsageError, match="random:resnet10t cannot be exported as dino: resnet10t is no plain"):
        export_model("random:resnet10t", tmp_path / "other", formats=["timm", "dino"])
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize(("uri", "reason"), [
    (REGISTERS, "registers"), ("random:vit_base_patch16_clip_224?depth=1&embed_dim=48&num_heads=3", "a norm before"),
    ("random:vit_small_patch14_dinov2?img_size=28&depth=1&embed_dim=48&num_heads=3", "layer scale")])
def test_what_dinos_network_cannot_be_is_said(uri, reason, tmp_path):
    with pytest.raises(UsageError, match=f"cannot be exported as dino: .* has {reason}"):
        export_model(uri, tmp_path / "out", formats=["dino"])
    assert not list(tmp_path.iterdir())


def test_without_the_packages_onnx_is_left_out_unless_it_was_asked_for(run, tmp_path, monkeypatch):
    find_spec = onnx_file.importlib.util.find_spec
    monkeypatch.setattr(onnx_file.importlib.util, "find_spec",
                        lambda name, *rest: None if name == "onnxscript" else find_spec(name, *rest))
    report = export_model(str(run), tmp_path / "out")
    assert report.left_out == ("onnx: it needs onnxscript: pip install 'patchssl[onnx]'",)
    assert set(report.files) == {"README.md", "config.json", "dino.pth", "model.safetensors"}
    with pytest.raises(UsageError, match=r"pip install 'patchssl\[onnx\]'"):
        export_model(str(run), tmp_path / "other", formats=["onnx"])
    assert names_in(tmp_path) == ["out"]


OWN_NETWORKS = """
import timm
import torch
from patchssl.models.backbone import Backbone


class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Conv2d(3, 6, 8, 8)

    def forward(self, x):
        patches = self.project(x).flatten(2).transpose(1, 2)
        return torch.cat([patches.mean(1, keepdim=True), patches], dim=1)


def own():
    return Backbone.from_module(Own(), patch_size=8, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3)


def of_timm():
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, depth=1)
    return Backbone.from_module(network, tokens=network.forward_features, patch_size=8, image_size=32)
"""


@pytest.mark.slow
def test_a_users_own_network_is_exported_to_onnx_and_timms_to_timm_too(tmp_path, monkeypatch):
    (tmp_path / "networks_to_export.py").write_text(OWN_NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    report = export_model("py:networks_to_export:own", tmp_path / "own")
    assert list(report.differences) == ["onnx"]
    assert report.left_out == ("timm: Own is no network of timm, or none that is supported",
                               "dino: Own is no plain Vision Transformer")
    assert "library_name: onnx" in (report.folder / "README.md").read_text()
    report = export_model("py:networks_to_export:of_timm", tmp_path / "timms", formats=["timm"])
    assert load_backbone(str(report.folder)).weights_sha256 == report.weights_sha256


# the card ------------------------------------------------------------------------------------------------------


def card_of(report):
    return (report.folder / "README.md").read_text()


def blocks(card, language):
    """The code blocks of `card` by the heading above them."""
    found = re.finditer(rf"```{language}\n(.*?)```", card, re.S)
    return {re.findall(r"^##+ (.*)", card[: code.start()], re.M)[-1]: code[1] for code in found}


def test_the_card_begins_with_what_the_hub_reads(exported):
    facts = yaml.safe_load(card_of(exported).split("---\n")[1])
    assert facts == {"license": "apache-2.0", "library_name": "timm", "pipeline_tag": "image-feature-extraction",
                     "tags": ["image-feature-extraction", "timm", "dino", "onnx", "patchssl",
                              "self-supervised-learning", "pwself"]}


def test_the_card_says_how_the_network_was_trained(tiny_run, exported):
    card = card_of(exported)
    for line in ("- Method: PW-Self", "- Data: colors", "- Epochs: 2", "- Seed: 0", exported.weights_sha256):
        assert line in card
    shown = parse_recipe(blocks(card, "yaml")["Training"])
    recipe = parse_recipe((tiny_run / "recipe.yaml").read_text())
    assert shown == recipe.model_copy(update={"data": "colors"})
    assert Path(recipe.data).is_absolute()


def test_the_card_has_the_scores_of_these_weights_only(exported):
    scores = card_of(exported).partition("## Scores")[2].partition("## ")[0]
    assert scores.strip().splitlines()[2:] == ["| knn | red\\|blue | native | top1@20 | 81.2 |"]


def test_the_code_of_the_card_runs_inside_the_folder(run, exported, monkeypatch):
    monkeypatch.chdir(exported.folder)
    code = blocks(card_of(exported), "python")
    assert list(code) == ["timm", "patchssl", "DINO", "ONNX"]
    names = {}
    for reader in ("timm", "patchssl", "ONNX"):
        exec(code[reader], names)
    batch, backbone = images(32, 32), load_backbone(str(run))
    assert torch.equal(names["model"](batch), names["backbone"].features(batch))
    assert off(torch.from_numpy(names["embedding"]), backbone.features(torch.zeros(1, 3, 32, 32))) < 1e-5
    photo = Image.new("RGB", (40, 32), (255, 0, 127))
    channels = names["transform"](photo).mean((1, 2)).tolist()
    assert channels == pytest.approx([(1 - 0.485) / 0.229, -0.456 / 0.224, (127 / 255 - 0.406) / 0.225], abs=1e-5)


def test_the_card_calls_dinos_network_with_its_own_arguments(exported):
    tree = ast.parse(blocks(card_of(exported), "python")["DINO"])
    calls = {ast.unparse(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    given = {word.arg: ast.unparse(word.value) for word in calls["vits.VisionTransformer"].keywords}
    assert given == {"img_size": "[32]", "patch_size": "8", "embed_dim": "24", "depth": "1", "num_heads": "3",
                     "mlp_ratio": "4.0", "qkv_bias": "True", "norm_layer": "partial(nn.LayerNorm, eps=1e-06)"}
    loaded = [ast.unparse(word) for word in calls["utils.load_pretrained_weights"].args]
    assert loaded == ["model", "'dino.pth'", "'teacher'", "'vit'", "8"]


def test_the_card_names_the_command_line_of_dinos_scripts_where_they_can_take_the_file(tmp_path):
    report = export_model("random:vit_tiny_patch16_224", tmp_path / "out", formats=["dino"])
    assert ("`--arch vit_tiny --patch_size 16 --pretrained_weights dino.pth --checkpoint_key teacher`"
            in card_of(report))
    assert "The license is not stated." in card_of(report)


def test_no_file_tells_where_it_was_made(run, exported):
    package = Path(folder.__file__).parents[2]
    for file in sorted(exported.folder.iterdir()):
        content = file.read_bytes()
        for path in (run.parent, exported.folder.parent, package, Path(torch.__file__).parents[1]):
            assert os.fsencode(path) not in content, file.name


def test_names_from_a_checkpoint_stay_words(run, tmp_path):
    checkpoint = load_checkpoint(run)
    checkpoint["origin"] |= {"name": "# <b>x</b>\n---\n[a](b)", "pretrain_data": "a\n## b\n| c |"}
    checkpoint["recipe"] = yaml.safe_dump({"data": "```\n## out of its block", "init": "/home/me/start.pth"})
    save_checkpoint(tmp_path / "hostile", checkpoint)
    card = card_of(export_model(str(tmp_path / "hostile"), tmp_path / "out", formats=["timm"], license="x\ny: z"))
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "x\ny: z"
    assert "# \\# \\<b\\>x\\</b\\> --- \\[a\\](b)" in card
    assert "The training started from start.pth: the license of its authors may hold as well." in card
    assert "/home/me" not in card
    assert "- Data: a \\#\\# b \\| c \\|\n" in card
    outside = re.sub(r"^(```+)\w*\n.*?\n\1$", "", card, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)", outside, flags=re.M)
    assert headings[1:] == ["Training", "Scores", "Files and loading", "timm", "patchssl", "License"]


# the folder ----------------------------------------------------------------------------------------------------


def test_the_report_says_what_is_there(exported):
    assert exported.files == {file.name: file.stat().st_size for file in exported.folder.iterdir()}
    assert set(exported.files) == {"README.md", "config.json", "dino.pth", "model.onnx", "model.safetensors"}
    assert exported.differences["timm"] == 0
    assert exported.differences["dino"] <= 1e-6
    assert 0 < exported.differences["onnx"] < 1e-5
    assert json.loads(json.dumps(exported.as_dict()))["weights_sha256"] == exported.weights_sha256
    text = exported.as_text()
    assert f"{exported.files['dino.pth']:,} bytes" in text
    assert "timm 0, dino 0, onnx" in text
    assert "the teacher is loaded; #student chooses another network" in text


def test_progress_counts_up_to_its_total(run, tmp_path):
    seen = []
    export_model(str(run), tmp_path / "out", formats=["dino", "timm"], progress=lambda *step: seen.append(step))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_folder_that_holds_anything_else_is_never_replaced(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(UsageError, match="is a file"):
        export_model(str(run), tmp_path / "file", overwrite=True)
    with pytest.raises(UsageError, match="is not empty and no earlier export"):
        export_model(str(run), tmp_path / "full", overwrite=True)
    assert names_in(tmp_path) == ["file", "full"]
    assert names_in(tmp_path / "full") == ["config.json"]


def test_an_earlier_export_is_replaced_on_request_unless_something_would_be_lost(run, tmp_path):
    out = tmp_path / "new" / "out"
    out.mkdir(parents=True)  # an empty folder is as good as none
    export_model(str(run), out, formats=["timm", "dino"])
    with pytest.raises(UsageError, match=r"holds an earlier export; .* --overwrite"):
        export_model(f"{run}#student", out, formats=["timm"])
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes.txt, which would be lost"):
        export_model(f"{run}#student", out, formats=["timm"], overwrite=True)
    (out / "notes.txt").unlink()
    report = export_model(f"{run}#student", out, formats=["timm"], overwrite=True)
    assert load_backbone(str(out)).weights_sha256 == report.weights_sha256
    assert names_in(out) == ["README.md", "config.json", "model.safetensors"]
    assert names_in(out.parent) == ["out"]


def test_an_export_can_be_exported_to_its_own_place(run, tmp_path):
    first = export_model(str(run), tmp_path / "out", formats=["timm"])
    again = export_model(str(tmp_path / "out"), tmp_path / "out", formats=["timm", "dino"], overwrite=True)
    assert again.weights_sha256 == first.weights_sha256
    teacher = torch.load(tmp_path / "out" / "dino.pth")["teacher"]
    assert {name.removeprefix("backbone.") for name in teacher} == set(DINO_NETWORK)  # its head is not known any more


@pytest.mark.parametrize("place", ["model_card", "_move"])
def test_a_kill_leaves_the_earlier_export_and_nothing_else(run, tmp_path, monkeypatch, place):
    first = export_model(str(run), tmp_path / "out", formats=["timm"])

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, place, killed)
    with pytest.raises(KeyboardInterrupt):
        export_model(f"{run}#student", tmp_path / "out", formats=["timm"], overwrite=True)
    assert names_in(tmp_path) == ["out"]
    assert load_backbone(str(tmp_path / "out")).weights_sha256 == first.weights_sha256


def test_an_earlier_export_comes_back_where_the_new_one_cannot_take_its_place(run, tmp_path, monkeypatch):
    first = export_model(str(run), tmp_path / "out", formats=["timm"])
    replace_path = Path.replace

    def full(path, target):
        if path.name.endswith(".partial"):
            raise OSError("no space left")
        return replace_path(path, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        export_model(f"{run}#student", tmp_path / "out", formats=["timm"], overwrite=True)
    assert names_in(tmp_path) == ["out"]
    assert load_backbone(str(tmp_path / "out")).weights_sha256 == first.weights_sha256


def test_a_file_that_gives_other_features_is_not_exported(run, tmp_path, monkeypatch):
    save = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", lambda tensors, *rest, **words: save(
        {name: tensor * (1.01 if name == "pos_embed" else 1) for name, tensor in tensors.items()}, *rest, **words))
    with pytest.raises(CheckpointError, match=r"model.safetensors would give features that are off by \d"):
        export_model(str(run), tmp_path / "out", formats=["timm"])
    assert not list(tmp_path.iterdir())


def test_two_exports_to_one_folder_do_not_mix(run, tmp_path):
    with locked(tmp_path, file=".out.lock"), pytest.raises(FolderInUse, match=r"is in use by process .*another --out"):
        export_model(str(run), tmp_path / "out", formats=["timm"])
    export_model(str(run), tmp_path / "out", formats=["timm"])
    assert names_in(tmp_path) == ["out"]


def test_a_full_disk_is_a_sentence(run, tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file: file write failed\nmore")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"the format dino could not be written: .* file write failed; nothing"):
        export_model(str(run), tmp_path / "out", formats=["timm", "dino"])
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_saved_meanwhile_is_noticed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "load_network", lambda uri, **_: load_backbone(f"{uri}#student"))
    with pytest.raises(CheckpointError, match=r"other weights than .* run it again"):
        export_model(str(run), tmp_path / "out", formats=["dino"])
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_numbers_are_not_exported(run, tmp_path):
    checkpoint = load_checkpoint(run)
    checkpoint["teacher"]["backbone.norm.bias"] = torch.full((24,), math.nan)
    save_checkpoint(tmp_path / "broken", checkpoint)
    with pytest.raises(CheckpointError, match="not finite"):
        export_model(str(tmp_path / "broken"), tmp_path / "out", formats=["timm"])
    assert names_in(tmp_path) == ["broken"]


def test_an_unknown_format_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UsageError, match="format 'onxx' is unknown; did you mean 'onnx'"):
        export_model(str(tmp_path / "nowhere"), tmp_path / "out", formats=["onxx"])


def test_only_exports_are_pushed(run, exported, monkeypatch):
    sent = []
    monkeypatch.setattr(folder, "upload_folder", lambda *given, **words: sent.append((given, words)) or "address")
    assert push_model(exported.folder, "me/mine", private=True) == "address"
    assert sent == [((exported.folder, "me/mine"), {"private": True, "message": sent[0][1]["message"]})]
    assert is_export(exported.folder)
    with pytest.raises(UsageError, match="is no export of patchssl"):
        push_model(run, "me/mine")
    assert len(sent) == 1
