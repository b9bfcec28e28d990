"""What is said of a file, against what loading makes of it; each trouble planted and found, and none in sound files."""

import argparse
import json
import pickle
import runpy
import shlex
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from cases import each
from safetensors.torch import save_file

from patchssl.models import inspect as inspect_module
from patchssl.models import networks, pretrained
from patchssl.models.backbone import IMAGENET_MEAN, IMAGENET_STD
from patchssl.models.checkpoint import NEWEST, PREVIOUS
from patchssl.models.inspect import inspect_model
from patchssl.models.load import load_backbone
from patchssl.models.networks import NetworkSpec, build_vit
from patchssl.runtime.errors import CheckpointError, UsageError

recorder = runpy.run_path(str(Path(__file__).parents[1] / "record_official.py"))
filled = recorder["filled"]
SHAPES = json.loads(str(np.load(recorder["OUTPUTS"])["shapes"]))  # names and shapes of the official networks' tensors
HEADS = {name: "" if name == "dino" else "?heads=2" if name.startswith("dinov2") else "?heads=3" for name in SHAPES}
TIMM_VIT = "test_vit.r160_in1k"  # timm's own network for tests


def official(name, seed=""):
    """The official network's tensors, filled with numbers like those of a trained one."""
    return {key: torch.from_numpy(filled(seed + key, shape)) for key, shape in SHAPES[name].items()}


def trained(network, classifier=None):
    """The state of a timm network with such numbers; a classifier of five classes beside it."""
    state = {name: torch.from_numpy(filled(name, tuple(tensor.shape))) if tensor.is_floating_point() else tensor
             for name, tensor in network.state_dict().items()}
    if classifier:
        state |= {f"{classifier}.weight": torch.ones(5, network.num_features), f"{classifier}.bias": torch.ones(5)}
    return state


def training(name="dino", **rest):
    """A training checkpoint as main_dino.py writes it, optimizer with numpy's numbers and all."""
    head = {"head.mlp.0.weight": torch.ones(8, 64), "head.mlp.0.bias": torch.ones(8),
            "head.last_layer.weight_g": torch.ones(16, 1), "head.last_layer.weight_v": torch.ones(16, 8)}
    student, teacher = ({f"backbone.{key}": tensor for key, tensor in official(name, seed).items()} | head
                        for seed in ("student ", ""))
    return {"student": {f"module.{key}": tensor for key, tensor in student.items()}, "teacher": teacher,
            "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.ones(4)}},
                          "param_groups": [{"lr": np.float64(0.0005), "betas": (0.9, 0.999), "params": [0]}]},
            "epoch": 7, "args": argparse.Namespace(arch="vit_made_up", lr=0.0005),
            "dino_loss": {"center": torch.zeros(1, 16)}, "fp16_scaler": {"scale": 65536.0}} | rest


def saved(content, path, **options):
    torch.save(content, path, **options)
    return path


def assert_is_what_loading_makes(found, uri):
    """Every fact of the chosen network, and the checksum, come out of the loaded backbone as well."""
    backbone, report, facts = load_backbone(str(uri)), found.main, found.main.facts
    module = backbone.module
    heads = module.blocks[0].attn.num_heads if hasattr(module, "blocks") else None
    assert (report.weights_sha256, report.method) == (backbone.weights_sha256, backbone.method)
    assert (facts.name, facts.architecture) == (backbone.name, backbone.arch)
    assert facts.num_parameters == sum(parameter.numel() for parameter in backbone.parameters())
    assert (facts.patch_size, facts.image_size) == (backbone.patch_size, backbone.image_size)
    assert (facts.embed_dim, facts.depth) == (backbone.embed_dim, getattr(backbone, "depth", None))
    assert (facts.mean, facts.std, facts.num_heads) == (backbone.mean, backbone.std, heads)
    assert (facts.positions == "DINO's") == getattr(backbone, "dino_positions", False)
    assert (facts.pretrain_data, facts.pretrain_epochs, facts.seed) == (
        backbone.pretrain_data, backbone.pretrain_epochs, backbone.seed)
    assert report.num_tensors == len(module.state_dict())


def assert_command_loads(found):
    """What the command evaluates has the checksum that was printed."""
    words = shlex.split(found.command)
    assert (words[:3], words[4:]) == (["patchssl", "eval", "knn"], ["--data", "DIR"])
    assert load_backbone(words[3]).weights_sha256 == found.main.weights_sha256


def assert_sound(found):
    assert (found.trouble, found.loads) == ((), True)


# sound files -----------------------------------------------------------------------------------------------------


@each("name", SHAPES)
def test_a_bare_official_file(tmp_path, name):
    path = saved(official(name), tmp_path / f"{name}.pth")
    found = inspect_model(f"{path}{HEADS[name]}")
    assert_is_what_loading_makes(found, f"{path}{HEADS[name]}")
    assert_sound(found)
    assert_command_loads(found)
    assert (found.file, found.size_bytes, found.kind) == (str(path), path.stat().st_size, "torch zip")
    assert (found.default, [report.network for report in found.networks]) == ("", [""])
    assert found.main.dtypes == ("float32",)
    assert found.main.heads_assumed == (name == "dino")


def test_kinds_of_files(tmp_path):
    state = official("dino")
    save_file(state, tmp_path / "a.safetensors")
    old = saved(state, tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    kinds = [inspect_model(str(path)).kind for path in (tmp_path / "a.safetensors", old)]
    assert kinds == ["safetensors", "torch legacy"]


@each(("content", "framework", "left_out"), [
    (training, "DINO", 4),
    (lambda: training(dino_loss={"center": torch.zeros(1, 37, 16)}),
     "PW-Self (the authors' code: one center per token position)", 4),
    (lambda: training("ibot", ibot_loss={"center": torch.zeros(1, 16)}), "iBOT", 5),
    (lambda: official("dinov2_reg"), "DINOv2", 1),
    (lambda: official("dino") | {"head.weight": torch.ones(5, 64), "head.bias": torch.ones(5)},
     "timm or torchvision, with a classifier", 2),
])
def test_framework_and_what_is_left_out(tmp_path, content, framework, left_out):
    path = saved(content(), tmp_path / "a.pth")
    found = inspect_model(f"{path}?heads=2")
    assert_is_what_loading_makes(found, f"{path}?heads=2")
    assert (found.main.framework, len(found.main.left_out)) == (framework, left_out)


def test_both_networks_of_a_training_checkpoint(tmp_path):
    path = saved(training(), tmp_path / "checkpoint.pth")
    found = inspect_model(str(path))
    assert_is_what_loading_makes(found, path)
    assert_sound(found)
    assert_command_loads(found)
    assert (found.default, found.chosen, found.main.facts.pretrain_epochs) == ("teacher", "teacher", 7)
    assert {report.network: report.weights_sha256 for report in found.networks} == {
        network: load_backbone(f"{path}#{network}").weights_sha256 for network in ("student", "teacher")}
    assert found.command == f"patchssl eval knn {path} --data DIR"


def test_the_other_network(tmp_path):
    """In a folder whose name a shell would take apart."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    uri = f"{saved(training(), folder / 'checkpoint.pth')}#student"
    found = inspect_model(f"{uri}?heads=2&mean=0.5&std=0.5,0.5,0.25&method=dino")
    assert_is_what_loading_makes(found, f"{uri}?heads=2&mean=0.5&std=0.5,0.5,0.25&method=dino")
    assert_sound(found)
    assert_command_loads(found)
    assert (found.chosen, found.main.facts.name) == ("student", "checkpoint-student")
    assert (found.main.facts.mean, found.main.facts.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.25))
    assert found.normalization == "mean and std as given"
    assert found.command == f"patchssl eval knn '{uri}?heads=2&mean=0.5&std=0.5,0.5,0.25&method=dino' --data DIR"


def test_a_resnet_has_no_heads_and_no_positions(tmp_path):
    path = saved(trained(timm.create_model("resnet18", num_classes=0), "fc"), tmp_path / "resnet.pth")
    found = inspect_model(str(path))
    assert_is_what_loading_makes(found, path)
    assert_sound(found)
    facts = found.main.facts
    assert (facts.architecture, facts.embed_dim, facts.positions) == ("resnet18", 512, None)
    assert (facts.depth, facts.num_heads) == (None, None)
    assert found.main.left_out == ("fc.bias", "fc.weight")


def test_a_run(tiny_run):
    found = inspect_model(str(tiny_run))
    assert_is_what_loading_makes(found, tiny_run)
    assert_sound(found)
    assert_command_loads(found)
    steps = json.loads((tiny_run / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert (found.main.framework, found.steps_done, found.main.facts.pretrain_epochs) == ("patchssl", steps, 2)
    assert (found.main.facts.seed, found.main.facts.pretrain_data) == (0, "colors")
    assert found.file == str(tiny_run / NEWEST)
    assert [report.network for report in found.networks] == ["teacher", "student"]
    student = inspect_model(f"{tiny_run}#student")
    assert_is_what_loading_makes(student, f"{tiny_run}#student")
    assert_command_loads(student)


def test_one_checkpoint_of_a_run(tiny_run):
    found = inspect_model(str(tiny_run / NEWEST))
    assert_is_what_loading_makes(found, tiny_run / NEWEST)
    assert found.main.weights_sha256 == load_backbone(str(tiny_run)).weights_sha256


def exported(folder, state=None, **changes):
    """A folder in timm's layout: a network of other sizes than its architecture's, and another normalization."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    folder.mkdir()
    save_file(state or trained(timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)),
              folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "model_args": sizes,
              "pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "input_size": [3, 32, 32]}} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_exported_folder(tmp_path):
    origin = {"name": "mine", "method": "pwself", "pretrain_data": "shoes", "pretrain_epochs": 3.5, "seed": 4}
    folder = exported(tmp_path / "mine", patchssl={"origin": origin, "arch": "a label", "positions": "dino"})
    found = inspect_model(str(folder))
    assert_is_what_loading_makes(found, folder)
    assert_sound(found)
    assert_command_loads(found)
    assert (found.main.framework, found.main.facts.mean) == ("timm, exported by patchssl", (0.5, 0.4, 0.3))
    assert found.normalization.startswith("as config.json says")
    assert (found.main.facts.positions, found.main.facts.seed) == ("DINO's", 4)


def test_a_plain_folder_of_timm(tmp_path):
    found = inspect_model(str(exported(tmp_path / "plain")))
    assert_is_what_loading_makes(found, tmp_path / "plain")
    assert (found.main.framework, found.main.facts.positions, found.main.method) == ("timm", "timm's", "other")


def test_names_of_timm_and_of_the_hub(tmp_path, monkeypatch):
    network = timm.create_model(TIMM_VIT, num_classes=5)
    save_file(trained(network), tmp_path / "model.safetensors")
    config = {"architecture": "test_vit", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "classifier": "head",
                                                             "input_size": [3, 160, 160]}}
    for module in (pretrained, inspect_module):
        monkeypatch.setattr(module, "hub_file", lambda repo, names, revision=None: tmp_path / names[0])
        monkeypatch.setattr(module, "hub_json", lambda repo, name, revision=None: config)
    for uri in (f"timm:{TIMM_VIT}", "timm:test_vit", "hf-hub:org/net@main"):
        found = inspect_model(uri)
        assert_is_what_loading_makes(found, uri)
        assert_sound(found)
        assert_command_loads(found)
        assert found.main.left_out == ("head.bias", "head.weight")
        assert found.file == str(tmp_path / "model.safetensors")
        assert found.command == f"patchssl eval knn {uri} --data DIR"


# trouble ---------------------------------------------------------------------------------------------------------


def test_values_that_are_not_finite(tmp_path):
    content = training()
    content["teacher"]["backbone.blocks.1.mlp.fc1.weight"][3, 4:6] = torch.nan
    content["teacher"]["backbone.norm.bias"][2] = -torch.inf
    path = saved(content, tmp_path / "a.pth")
    found = inspect_model(str(path))
    assert found.trouble == ("teacher: 2 tensors hold 2 NaN and 1 infinite values: blocks.1.mlp.fc1.weight, norm.bias",)
    assert (found.loads, found.command) == (False, None)
    assert found.as_text().endswith("not possible, see trouble")
    assert found.main.weights_sha256 == load_backbone(str(path)).weights_sha256
    student = inspect_model(f"{path}#student")
    assert (student.trouble, student.loads) == (found.trouble, True)
    assert_command_loads(student)


def test_weights_of_zeros(tmp_path):
    state = official("dino")
    state["pos_embed"].zero_()
    state["blocks.0.attn.qkv.weight"].zero_()
    for allowed in ("cls_token", "norm.bias", "patch_embed.proj.bias"):
        state[allowed].zero_()
    found = inspect_model(str(saved(state, tmp_path / "a.pth")))
    assert found.trouble == ("2 tensors are zero throughout: blocks.0.attn.qkv.weight, pos_embed",)
    assert found.loads


def test_an_untrained_network(tmp_path):
    spec = NetworkSpec(arch="vit_tiny_patch16_224", image_size=32, patch_size=8)
    path = saved(build_vit(spec, seed=3).state_dict(), tmp_path / "a.pth")
    found = inspect_model(str(path))
    assert len(found.trouble) == 1
    assert found.trouble[0].startswith("looks untrained: ")
    assert found.loads


@each("dtype", [torch.float16, torch.bfloat16])
@each("name", ["dino", "dinov2_reg"])
def test_half_precision(tmp_path, name, dtype):
    path = saved({key: tensor.to(dtype) for key, tensor in official(name).items()}, tmp_path / "a.pth")
    found = inspect_model(f"{path}{HEADS[name]}")
    assert_is_what_loading_makes(found, f"{path}{HEADS[name]}")
    word = str(dtype).removeprefix("torch.")
    assert (found.trouble, found.loads) == (
        (f"stored in {word}, half precision or less; loaded as float32",), True)


def test_a_teacher_that_is_the_student(tmp_path):
    content = training()
    content["student"] = content["teacher"]
    found = inspect_model(str(saved(content, tmp_path / "a.pth")))
    assert found.trouble == ("teacher and student are identical: saved before the first update, or one is a copy",)
    assert found.loads


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    state = official("dino")
    del state["blocks.2.norm1.weight"], state["blocks.2.norm1.bias"]
    state |= {"extra.weight": torch.ones(3), "norm.bias": torch.ones(7), "blocks.0.attn.proj.bias": torch.zeros(64)}
    state["norm.weight"][0] = torch.nan
    path = saved(state, tmp_path / "a.pth")
    found = inspect_model(str(path))
    report, refusal = found.main, found.trouble[0]
    assert report.missing == ("blocks.2.norm1.bias", "blocks.2.norm1.weight")
    assert (report.unexpected, report.misshaped) == (("extra.weight",), ("norm.bias is (7,) instead of (64,)",))
    with pytest.raises(CheckpointError) as caught:
        load_backbone(str(path))
    assert refusal == str(caught.value)
    assert found.trouble[1] == "1 tensor holds 1 NaN and 0 infinite values: norm.weight"
    assert (found.loads, found.command, report.weights_sha256) == (False, None, None)
    whole = inspect_model(str(saved(official("dino"), tmp_path / "b.pth"))).main
    assert (report.facts.architecture, report.facts.num_heads) == (whole.facts.architecture, 1)
    assert (report.facts.num_parameters, report.notes) == (whole.facts.num_parameters, whole.notes)


@each("name", ["ibot_scaled", "dinov2", "dinov2_reg", "dinov2_swiglu"])
def test_facts_of_an_incomplete_file_are_those_of_the_whole_one(tmp_path, name):
    whole = saved(official(name), tmp_path / "a.pth")
    found = inspect_model(f"{saved(official(name) | {'norm.bias': torch.ones(5)}, tmp_path / 'b.pth')}{HEADS[name]}")
    facts, expected = found.main.facts, inspect_model(f"{whole}{HEADS[name]}").main.facts
    assert (facts.architecture, facts.num_parameters, facts.positions, facts.depth) == (
        expected.architecture, expected.num_parameters, expected.positions, expected.depth)
    assert (found.main.missing, found.main.unexpected) == ((), ())
    assert found.main.misshaped[0].startswith("norm.bias is (5,) instead of")


def test_a_file_whose_architecture_cannot_be_read(tmp_path):
    state = official("dino")
    del state["pos_embed"]
    state["blocks.0.norm1.weight"].zero_()
    path = saved(state, tmp_path / "a.pth")
    found = inspect_model(str(path))
    assert "without pos_embed" in found.trouble[0]
    assert found.trouble[1] == "1 tensor is zero throughout: blocks.0.norm1.weight"
    assert (found.main.facts, found.main.framework, found.main.num_tensors) == (None, None, len(state))
    assert (found.loads, found.command, found.main.weights_sha256) == (False, None, None)
    assert found.as_text().endswith("not possible, see trouble")


@each("odd", [
    lambda tensor: tensor.to_sparse(), lambda tensor: tensor.to("meta"), lambda tensor: tensor.to(torch.int64),
    lambda tensor: tensor.to(torch.complex64), lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8),
])
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_kinds(tmp_path, odd):
    state = official("dino")
    state["blocks.0.attn.qkv.weight"] = odd(state["blocks.0.attn.qkv.weight"])
    path = saved(state, tmp_path / "a.pth")
    found = inspect_model(str(path))
    with pytest.raises(CheckpointError) as caught:
        load_backbone(str(path))
    assert found.trouble == (str(caught.value),)
    assert (found.loads, found.main.facts.depth) == (False, 4)


def test_one_network_has_to_be_named(tmp_path):
    content = {"state_dict": official("dino"), "state_dict_ema": official("dino", "ema ")}
    path = saved(content, tmp_path / "a.pth")
    found = inspect_model(str(path))
    assert (found.default, found.chosen, found.loads) == (None, None, False)
    assert "holds the networks state_dict, state_dict_ema; choose one as" in found.trouble[0]
    assert found.command == f"patchssl eval knn '{path}#state_dict' --data DIR"
    assert_command_loads(found)
    named = inspect_model(f"{path}#state_dict_ema")
    assert_is_what_loading_makes(named, f"{path}#state_dict_ema")
    assert_sound(named)
    assert_command_loads(named)


def test_an_incomplete_folder(tmp_path):
    state = trained(timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=24,
                                      depth=2, num_heads=3))
    del state["norm.weight"]
    found = inspect_model(str(exported(tmp_path / "mine", state)))
    assert "1 missing: norm.weight" in found.trouble[0]
    assert (found.loads, found.main.num_tensors, found.main.framework) == (False, len(state), "timm")


@each(("changes", "word"), [
    ({"architecture": None}, "describes no network"), ({"architecture": "swin_tiny_patch4_window7_224"}, "Swin"),
    ({"model_args": {"depth": 10**9}}, "model_args that set depth"), ({"pretrained_cfg": {"mean": [1]}}, "mean"),
    ({"pretrained_cfg": 3}, "pretrained_cfg"), ({"model_args": [1]}, "model_args"),
])
def test_folders_that_loading_refuses(tmp_path, changes, word):
    found = inspect_model(str(exported(tmp_path / "mine", **changes)))
    assert word in found.trouble[0]
    assert (found.loads, found.main.weights_sha256) == (False, None)


def test_a_run_of_a_later_version(tmp_path, tiny_run):
    content = torch.load(tiny_run / NEWEST, weights_only=True) | {"version": 99}
    found = inspect_model(str(saved(content, tmp_path / NEWEST)))
    assert "written by a newer patchssl" in found.trouble[0]
    assert (found.loads, found.main.facts) == (False, None)


@pytest.fixture
def damaged_run(tiny_run, tmp_path):
    """A run folder whose newest checkpoint was cut short."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    whole = (folder / NEWEST).read_bytes()
    (folder / PREVIOUS).write_bytes(whole)
    (folder / NEWEST).write_bytes(whole[: len(whole) // 2])
    return folder


def test_a_damaged_newest_checkpoint(damaged_run):
    found = inspect_model(str(damaged_run))
    assert_is_what_loading_makes(found, damaged_run)
    assert found.file == str(damaged_run / PREVIOUS)
    assert len(found.trouble) == 1
    assert found.trouble[0].startswith(f"{damaged_run / NEWEST} is ")
    assert found.trouble[0].endswith(f"{PREVIOUS} is taken instead")
    assert found.loads
    assert_command_loads(found)


def test_a_run_without_any_whole_checkpoint(damaged_run):
    (damaged_run / PREVIOUS).write_bytes(b"")
    for path in (damaged_run, damaged_run.parent):
        with pytest.raises(CheckpointError):
            inspect_model(str(path))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@each("raw", [
    b"", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n", b"garbage" * 100, None,
])
def test_what_is_no_file_of_weights_is_refused(tmp_path, raw):
    path = saved(official("dino"), tmp_path / "a.pth")
    path.write_bytes(path.read_bytes()[:-2000] if raw is None else raw)
    with pytest.raises(CheckpointError, match=r"a\.pth"):
        inspect_model(str(path))


def test_a_file_that_asks_to_run_code_is_refused(tmp_path):
    mark = tmp_path / "ran"
    path = saved({"teacher": official("dino"), "args": Evil(mark)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="asks to run"):
        inspect_model(str(path))
    assert not mark.exists()
    assert pickle.loads(pickle.dumps(Evil(mark))) is None  # it would have
    assert mark.exists()


@each(("uri", "word"), [
    ("py:my.module:factory", "it would run your code"), ("random:vit_tiny_patch16_224", "has no file"),
    ("no/such/file.pth", "does not exist"), ("timm:no_such_network", "no_such_network"),
])
def test_names_that_are_not_inspected(uri, word):
    with pytest.raises(UsageError, match=word):
        inspect_model(uri)


@each(("option", "error"), [
    ("#nobody", CheckpointError), ("?heads=three", UsageError), ("?mean=1,2", UsageError),
    ("?method=magic", UsageError), ("?size=3", UsageError),
])
def test_wrong_networks_and_options_are_refused_as_in_loading(tmp_path, option, error):
    uri = f"{saved(training(), tmp_path / 'a.pth')}{option}"
    with pytest.raises(error) as caught:
        inspect_model(uri)
    with pytest.raises(error) as expected:
        load_backbone(uri)
    assert str(caught.value) == str(expected.value)


# how it is said, and what it costs -------------------------------------------------------------------------------


def test_the_text_is_aligned_and_ends_with_the_command(tmp_path):
    found = inspect_model(str(saved(training(), tmp_path / "a.pth")))
    lines = found.as_text().splitlines()
    assert lines[-1].endswith(found.command)
    starts = {len(line) - len(line[len("architecture"):].lstrip()) for line in lines}
    assert starts == {len("architecture") + 2}
    labels = [line[: len("architecture")].strip() for line in lines]
    assert labels.index("architecture") < labels.index("trouble") < labels.index("evaluate")
    text = found.as_text()
    for part in ("DINO", f"{len(official('dino'))} of the backbone", "head.* (4 tensors)",
                 "the teacher is taken, #student names another", "assumed", "0.485 0.456 0.406", "7 epochs",
                 *(report.weights_sha256 for report in found.networks)):
        assert part in text


def test_json_for_machines(tmp_path):
    content = training()
    content["teacher"]["backbone.norm.bias"][2] = torch.nan
    found = inspect_model(str(saved(content, tmp_path / "a.pth")))
    record = found.as_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["loads"], record["trouble"], record["command"]) == (False, list(found.trouble), None)
    teacher = next(network for network in record["networks"] if network["network"] == record["chosen"])
    assert (teacher["facts"]["mean"], teacher["facts"]["std"]) == (list(IMAGENET_MEAN), list(IMAGENET_STD))


def test_names_from_a_file_cannot_move_the_cursor(tmp_path):
    state = official("dino") | {"\x1b[2Jextra.weight": torch.ones(2)}
    text = inspect_model(str(saved(state, tmp_path / "a.pth"))).as_text()
    assert "extra.weight" in text
    assert "\x1b" not in text


def test_progress_counts_up_to_its_total(tmp_path):
    calls = []
    inspect_model(str(saved(training(), tmp_path / "a.pth")), lambda done, total: calls.append((done, total)))
    assert len({total for _, total in calls}) == 1
    assert [done for done, _ in calls] == list(range(1, calls[0][1] + 1))
    assert calls[0][1] >= 2 * 2 * len(official("dino"))


def test_no_more_than_two_tensors_are_converted_at_a_time(tmp_path, monkeypatch):
    """Half precision is not turned into float32 as a whole, neither here nor where the shapes are tried."""
    convert, alive, most = networks.as_float32, weakref.WeakSet(), 0

    def watched(tensor):
        nonlocal most
        made = convert(tensor)
        if made is not tensor:
            alive.add(made)
        most = max(most, len(alive))
        return made

    monkeypatch.setattr(inspect_module, "as_float32", watched)
    monkeypatch.setattr(networks, "as_float32", watched)
    path = saved({name: tensor.half() for name, tensor in official("dino").items()}, tmp_path / "a.pth")
    found = inspect_model(str(path))
    assert found.main.weights_sha256 == load_backbone(str(path)).weights_sha256  # this one converts all
    assert most > 10
    most, alive = 0, weakref.WeakSet()
    inspect_model(str(path))
    assert 1 <= most <= 2
