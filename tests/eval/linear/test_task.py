import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from told import Told
from torch import nn

from patchssl.bench.probes import time_probes
from patchssl.data.open import open_images, open_pair
from patchssl.eval import features
from patchssl.eval.cache import FeatureCache
from patchssl.eval.linear.task import evaluate_linear, linear_protocol
from patchssl.eval.metrics import wilson_interval
from patchssl.eval.records import read_result, unpack_bits
from patchssl.eval.tasks import ANYWHERE, ComputeOptions
from patchssl.models.backbone import Backbone
from patchssl.models.load import load_backbone
from patchssl.models.pixels import RawPixels
from patchssl.runtime.errors import DataError, PatchSSLError, UsageError

NETWORK = "random:vit_tiny_patch16_224?img_size=32&patch_size=16&embed_dim=24&num_heads=3&depth=2"
PROTOCOLS = ("dino", "cached", "native", "logreg")


class Tokens(nn.Module):
    """Tokens of one's own: mean color, and the mean colors of the patches of 8 pixels."""

    def forward(self, images):
        patches = nn.functional.avg_pool2d(images, 8).flatten(2).transpose(1, 2)
        return torch.cat([images.mean(dim=(2, 3)).unsqueeze(1), patches], dim=1)


def own_module(image_size=32):
    return Backbone.from_module(Tokens(), patch_size=8, image_size=image_size)


@pytest.fixture(scope="module")
def pair(colors):
    return open_pair(colors)


def evaluate(pair, protocol=None, backbone=None, compute=ANYWHERE, **options):
    short = {"epochs": {"dino": 2, "cached": 60, "native": 60}.get(protocol)}
    return evaluate_linear(backbone or load_backbone(NETWORK), *pair, protocol, compute=compute, **short | options)


@pytest.mark.parametrize(("size", "name"), [(224, "cached"), (32, "native"), (336, "native")])
def test_the_default_looks_at_no_test_image_and_takes_the_size_of_the_training(size, name):
    plan = linear_protocol(None, own_module(size))
    assert plan.name == name
    assert plan.settings["crop"] == size
    assert "held-out" in plan.settings["selection"]


def test_at_224_native_differs_from_cached_by_its_name_alone():
    cached, native = (linear_protocol(name, own_module(224)) for name in ("cached", "native"))
    assert (cached.settings["resize"], cached.settings["crop"]) == (256, 224)
    assert cached.settings == native.settings


@pytest.mark.parametrize(("uri", "outputs", "combined"), [
    ("random:vit_tiny_patch16_224?img_size=32", ["class:4"], "side by side"),
    ("random:vit_small_patch16_224?img_size=32&depth=3", ["class:3"], "side by side"),
    ("random:vit_base_patch16_224?img_size=32&depth=2", ["class:1", "mean_patch"], "interleaved"),
    ("random:resnet10t", ["features"], "side by side")])
def test_dino_sees_what_its_script_is_given_for_the_size_of_the_network(uri, outputs, combined):
    settings = linear_protocol("dino", load_backbone(uri)).settings
    assert (list(settings["outputs"]), settings["combined"]) == (outputs, combined)
    assert {name: settings[name] for name in ("epochs", "batch", "learning_rate", "learning_rate_is_per", "momentum",
                                              "weight_decay", "initial_deviation", "selection")} == {
        "epochs": 100, "batch": 1024, "learning_rate": 0.001, "learning_rate_is_per": 256, "momentum": 0.9,
        "weight_decay": 0, "initial_deviation": 0.01, "selection": "best test epoch"}


@pytest.mark.parametrize(("uri", "inputs"), [
    ("random:vit_tiny_patch16_224?img_size=32",
     ["class:1", "class:4", "class:1 + mean_patch", "class:4 + mean_patch"]),
    ("random:vit_tiny_patch16_224?img_size=32&depth=1", ["class:1", "class:1 + mean_patch"]),
    ("random:resnet10t", ["features"])])
def test_the_grid_has_what_the_network_can_give_and_48_probes_for_a_transformer(uri, inputs):
    settings = linear_protocol("native", load_backbone(uri)).settings
    assert list(settings["inputs"]) == inputs
    count = len(inputs) * len(settings["learning_rates"]) * len(settings["weight_decays"])
    assert count == 12 * len(inputs)


def test_epochs_of_ones_own_are_another_protocol_and_wrong_ones_are_refused():
    usual, own = (linear_protocol("native", own_module(), epochs=epochs) for epochs in (None, 3))
    assert (own.settings["epochs"], own.settings["least_updates"]) == (3, 0)
    assert usual.fingerprint != own.fingerprint
    assert (usual.name, own.name) == ("native", "native-3-epochs")  # a record of its own, apart from published ones
    assert linear_protocol("dino", own_module(), epochs=100) == linear_protocol("dino", own_module())
    with pytest.raises(UsageError, match="logreg has none"):
        linear_protocol("logreg", own_module(), epochs=3)
    with pytest.raises(UsageError, match="1 is the least"):
        linear_protocol("dino", own_module(), epochs=0)
    with pytest.raises(UsageError, match=r"linear protocol 'dinov2' is unknown.*cached, dino, logreg, native"):
        linear_protocol("dinov2", own_module())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_record_holds_the_accuracy_its_interval_and_where_they_come_from(pair, protocol, tmp_path):
    result = evaluate(pair, protocol)
    assert read_result(result.write(tmp_path)) == result
    name = {"dino": "dino-2-epochs", "logreg": "logreg"}.get(protocol, f"{protocol}-60-epochs")
    assert (result.task, result.protocol, result.dataset) == ("linear", name, "colors")
    assert sorted(result.metrics) == ["top1"]  # of three classes, a top-5 would always be right
    correct = unpack_bits(result.detail["correct"]["top1"], 12)
    assert correct.mean() == pytest.approx(result.metrics["top1"])
    assert result.detail["interval95"]["top1"] == list(wilson_interval(int(correct.sum()), 12))
    assert result.detail["class_accuracy"] == {
        name: pytest.approx(correct[pair[1].labels == label].mean()) for label, name in enumerate(pair[1].classes)}
    assert result.detail["selection"]["by"] == result.protocol_settings["selection"]
    assert (result.detail["num_train"], result.detail["num_test"], result.detail["seed"]) == (48, 12, 0)


@pytest.mark.parametrize("protocol", ["cached", "native", "logreg"])
def test_colors_are_told_apart_by_ones_own_module_that_sees_them(pair, protocol):
    assert evaluate(pair, protocol, own_module()).metrics["top1"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["native", "logreg"])
@pytest.mark.parametrize("backbone", [RawPixels(8), "random:resnet10t"])
def test_networks_without_a_class_token_are_probed_by_their_features(pair, protocol, backbone):
    backbone = load_backbone(backbone) if isinstance(backbone, str) else backbone
    result = evaluate(pair, protocol, backbone)
    assert result.protocol_settings["outputs"] == ["features"]
    assert 1 / 3 < result.metrics["top1"] <= 1


@pytest.mark.parametrize("protocol", ["native", "logreg"])
def test_the_labels_of_the_test_images_never_move_what_is_chosen(pair, protocol):
    train, val = pair
    wrong = replace(val, labels=(val.labels + 1) % 3)
    honest, fooled = (evaluate((train, test), protocol, own_module()).detail for test in (val, wrong))
    for name in ("chosen", "selection"):
        assert honest[name] == fooled[name]
    correct = [unpack_bits(detail["correct"]["top1"], 12) for detail in (honest, fooled)]
    assert correct[0].all()
    assert not correct[1].any()


@pytest.mark.slow
def test_the_best_test_epoch_of_dino_does_depend_on_them_and_says_so(pair):
    """The control of the test above: here the choice is made by the very images that are scored."""
    train, val = pair
    backbone = load_backbone(NETWORK)
    best = {evaluate((train, replace(val, labels=np.roll(val.labels, shift))), "dino", backbone, epochs=5)
            .detail["selection"]["best_epoch"] for shift in range(3)}
    assert len(best) > 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_same_seed_gives_the_same_record_and_batches_of_another_size_the_same_numbers(pair, protocol):
    first, again, other = (evaluate(pair, protocol, compute=ComputeOptions(batch_size=size)) for size in (64, 64, 7))
    assert first.metrics == again.metrics == other.metrics
    assert first.detail == again.detail
    assert first.detail["correct"] == other.detail["correct"]


def test_the_seed_draws_another_split(pair):
    losses = {evaluate(pair, "native", seed=seed).detail["selection"]["loss"] for seed in range(3)}
    assert len(losses) == 3


def test_cached_features_are_not_computed_again(pair, tmp_path, monkeypatch):
    cache, backbone = FeatureCache(tmp_path), load_backbone(NETWORK)
    calls, forward = [], features._forward
    monkeypatch.setattr(features, "_forward", lambda *given: calls.append(1) or forward(*given))
    first = evaluate(pair, "native", backbone, ComputeOptions(cache=cache))
    assert calls
    calls.clear()
    again = evaluate(pair, "native", backbone, ComputeOptions(cache=cache))
    assert not calls
    assert again.metrics == first.metrics


def test_a_finished_dino_probe_is_read_from_its_own_folder_and_another_seed_has_another(pair, tmp_path):
    first = evaluate(pair, "dino", checkpoint_folder=tmp_path)
    told = Told()
    again = evaluate(pair, "dino", checkpoint_folder=tmp_path, compute=ComputeOptions(progress=told))
    calls = told.counts["linear"]
    assert calls[-1] == (96, 96)
    assert len(calls) == 2  # test features, and that all is done
    assert (again.metrics, again.detail) == (first.metrics, first.detail)
    evaluate(pair, "dino", checkpoint_folder=tmp_path, seed=1)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_progress_of_every_phase_rises_to_its_total(pair, protocol):
    told = Told()
    evaluate(pair, protocol, compute=ComputeOptions(progress=told))
    calls = told.counts["linear"]
    phases = [[calls[0]]]
    for call in calls[1:]:
        if phases[-1][-1][0] == phases[-1][-1][1]:
            phases.append([])
        phases[-1].append(call)
    assert len(phases) == 2
    for phase in phases:
        assert [done for done, _ in phase] == sorted(done for done, _ in phase)
        assert len({total for _, total in phase}) == 1
        assert phase[-1][0] == phase[-1][1]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sets_that_cannot_be_scored_are_refused_by_name(pair, colors, protocol, tmp_path):
    train, val = pair
    flat = open_images(colors / "val" / "red")
    with pytest.raises(DataError, match="this needs labels"):
        evaluate((train, flat), protocol)
    with pytest.raises(DataError, match="this needs labels"):
        evaluate((flat, val), protocol)
    with pytest.raises(DataError, match="open_pair"):
        evaluate((train, replace(val, classes=("red", "green", "violet"))), protocol)
    with pytest.raises(DataError, match="nothing to tell apart"):
        evaluate((train.subset(np.flatnonzero(train.labels == 1)), val), protocol)
    with pytest.raises(DataError, match="holds no val images"):
        evaluate((train, val.subset([])), protocol)
    with pytest.raises(UsageError, match="seed = -1 is negative"):
        evaluate(pair, protocol, seed=-1)
    with pytest.raises(UsageError, match="batch of 0 images"):
        evaluate(pair, protocol, compute=ComputeOptions(batch_size=0))


@pytest.mark.parametrize("protocol", ["native", "logreg"])
def test_a_class_too_small_to_hold_an_image_out_is_named(pair, protocol):
    train, val = pair
    few = train.subset([*np.flatnonzero(train.labels != 2), np.flatnonzero(train.labels == 2)[0]])
    with pytest.raises(DataError, match=f"1 of 3 classes have one training image only: {train.classes[2]};"):
        evaluate((few, val), protocol)
    assert evaluate((few, val), "dino").metrics.keys() == {"top1"}


@pytest.mark.parametrize("protocol", ["native", "logreg"])
def test_what_no_pass_can_help_is_said_before_one(pair, protocol, monkeypatch):
    train, val = pair
    few = train.subset([*np.flatnonzero(train.labels != 2), np.flatnonzero(train.labels == 2)[0]])
    read = []
    monkeypatch.setattr(type(train), "pixels", lambda images, index: read.append(index))
    with pytest.raises(DataError, match="one training image only"):
        evaluate((few, val), protocol)
    assert read == []
    if protocol == "native":
        with pytest.raises(UsageError, match=r"features of 150,528 numbers an image are too wide .*logreg"):
            evaluate(pair, protocol, RawPixels(224))
        assert read == []


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_unreadable_images_of_both_sets_are_listed_together(colors, tmp_path, protocol, workers):
    shutil.copytree(colors, tmp_path / "set")
    bad = [sorted((tmp_path / "set" / split / "red").iterdir())[1] for split in ("train", "val")]
    for path in bad:
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="2 of 60 images cannot be read") as caught:
        evaluate(open_pair(tmp_path / "set"), protocol, compute=ComputeOptions(workers=workers))
    assert all(str(path) in str(caught.value) for path in bad)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_features_that_are_not_finite_give_no_number(pair, protocol):
    backbone = load_backbone(NETWORK)
    backbone.module.norm.bias.data[3] = float("nan")
    with pytest.raises(PatchSSLError, match=r"features that random gives for \d+ of \d+ images hold NaN"):
        evaluate(pair, protocol, backbone)


RANKS = """
import sys
from patchssl.data import open_pair
from patchssl.runtime.distributed import end_launched, join_launched, rank
from patchssl.eval.linear.task import evaluate_linear
from patchssl.eval.tasks import ComputeOptions
from patchssl.models.load import load_backbone
from pathlib import Path
join_launched()
for protocol in ("dino", "native"):
    result = evaluate_linear(load_backbone(sys.argv[3]), *open_pair(sys.argv[2]), protocol, epochs=3,
                             compute=ComputeOptions(batch_size=5), checkpoint_folder=Path(sys.argv[1]))
    result.write(Path(sys.argv[1]) / str(rank()))
end_launched(0)
"""


@pytest.mark.slow
def test_two_processes_give_the_same_records_as_one(pair, colors, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script),
               str(tmp_path), str(colors), NETWORK]
    end = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=300, check=False)
    assert end.returncode == 0, end.stderr[-3000:]
    for protocol in ("dino", "native"):
        alone = evaluate(pair, protocol, compute=ComputeOptions(batch_size=5), epochs=3)
        for rank in ("0", "1"):
            together = read_result(next((tmp_path / rank).rglob(f"*@{protocol}-3-epochs.json")))
            assert (together.metrics, together.detail) == (alone.metrics, json.loads(json.dumps(alone.detail)))


def test_probes_are_timed_side_by_side_as_plain_json(pair):
    calls = []
    report = time_probes(load_backbone(NETWORK), *pair, epochs=2, num_classes=7, progress=lambda *c: calls.append(c))
    assert json.loads(json.dumps(report)) == report
    assert list(report["seconds"]) == ["features", "48 cached probes", "dino, 2 epochs"]
    assert all(seconds > 0 for seconds in report["seconds"].values())
    assert report["times faster"]["probes"] == pytest.approx(
        report["seconds"]["dino, 2 epochs"] / report["seconds"]["48 cached probes"])
    assert report["classes"] == 7
    phases = {what: [(done, total) for name, done, total in calls if name == what] for what in report["seconds"]}
    assert [what for what, _, _ in calls] == [what for what, counts in phases.items() for _ in counts]
    updates = 2 * linear_protocol("cached", load_backbone(NETWORK)).settings["epochs"]  # the grid, then the chosen one
    for (what, counts), total in zip(phases.items(), (60, updates, 96), strict=True):
        assert {of for _, of in counts} == {total}, what
        assert [done for done, _ in counts] == sorted({done for done, _ in counts})
        assert counts[-1][0] == total
