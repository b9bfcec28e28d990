"""What joins pretraining, evaluation and report, and the names that others call."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import each

import patchssl as package
from patchssl.eval import score
from patchssl.eval.records import read_results
from patchssl.eval.score import score_knn
from patchssl.models.load import load_backbone
from patchssl.pretrain.recipe import load_recipe
from patchssl.pretrain.run.setup import training_images
from patchssl.report.tables.make import make_tables
from patchssl.runtime.console import Console
from patchssl.runtime.device import default_device
from patchssl.runtime.errors import UsageError
from patchssl.workflows.probe import make_probe, plan_pretraining, pretrain_with_probe, resume_with_probe, run_facts

SMALL = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=1&embed_dim=24"


@pytest.fixture
def quiet():
    return Console(quiet=True)


# the contract of the package

def test_the_names_that_others_call_are_reached_from_the_package(tiny_run):
    backbone = package.load_backbone(str(tiny_run))
    assert isinstance(backbone, package.Backbone)
    assert backbone.features(torch.zeros(2, 3, 32, 32)).shape == (2, 24)
    whole = package.geometry.View(0, 0, 32, 32, False, 32)
    teacher, student = package.matching.match_patches(whole, whole, 8)
    assert teacher.tolist() == student.tolist() == list(range(16))
    one = package.eval.knn.knn_accuracy(torch.eye(3), [0, 1, 2], torch.eye(3), [0, 1, 1], num_neighbors=1)
    assert one["top1"] == pytest.approx(2 / 3)
    assert package.evaluate is score.evaluate
    with pytest.raises(AttributeError, match="no attribute 'pretend'"):
        _ = package.pretend


def test_the_package_pretrain_can_be_called(colors, tmp_path, tiny):
    folder = package.pretrain(load_recipe("quickstart", tiny), colors, tmp_path / "run", seed=2)
    assert folder == tmp_path / "run"
    recipe, data, seed = run_facts(folder)
    assert recipe == load_recipe("quickstart", (*tiny, f"data={colors}"))
    assert (data, seed) == (str(colors), 2)


# one score

@pytest.mark.parametrize(("model", "name"), [("pixels", "pixels-32"), ("pixels?img_size=16", "pixels-16")])
def test_raw_pixels_tell_colors_apart(colors, model, name):
    result = score_knn(model, str(colors), workers=0)
    assert (result.model, result.metrics["top1@20"]) == (name, 1.0)


def test_a_score_says_what_it_looks_at(colors, capsys):
    with Console() as console:
        score_knn(SMALL, str(colors), workers=0, console=console)
    said = capsys.readouterr().err
    assert "48 train images in 3 classes" in said and "12 val images in 3 classes" in said
    assert "features 60 of 60" in said


@each("wrong", ["pixels?", "pixels?img_size=0", "pixels?img_size=x", "pixels?size=8"])
def test_sizes_of_pixels_that_are_none(wrong):
    with pytest.raises(UsageError, match="img_size=32"):
        load_backbone(wrong)


def test_default_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device(None) == torch.device("cpu")
    assert default_device("cpu") == torch.device("cpu")
    for wrong in ("gpu", "cuda:999", "cpu:x"):
        with pytest.raises(UsageError, match=f"device {wrong} cannot be used"):
            default_device(wrong)


# k-NN while training

def test_the_probe_is_off_unless_asked_for_and_where_there_are_no_labels(colors, tiny, tmp_path, photo):
    off, asked = (load_recipe("quickstart", (*tiny, *more)) for more in ((), ("run.knn_every_epochs=1",)))
    assert make_probe(off, training_images(off, str(colors), 0), 0) is None
    for index in range(10):
        (tmp_path / f"{index}.png").write_bytes(photo.read_bytes())
    assert make_probe(asked, training_images(asked, str(tmp_path), 0), 0) is None


def test_the_probe_classifies_training_images_by_others(colors, tiny, monkeypatch):
    asked = load_recipe("quickstart", (*tiny, "run.knn_every_epochs=1"))
    probe = make_probe(asked, training_images(asked, str(colors), 0), 0)
    seen = []

    def features(backbone, images, protocol, workers):  # a network that tells red from the rest
        seen.append([images.item_name(i) for i in range(len(images))])
        return torch.stack([torch.tensor([1.0, images.classes[label] == "red"]) for label in images.labels])

    monkeypatch.setattr("patchssl.workflows.probe.extract_features", features)
    accuracy = probe(SimpleNamespace(image_size=32))
    bank, queries = seen
    assert (len(bank), len(queries)) == (39, 9) and not set(bank) & set(queries)
    assert all(Path(name).parent.name in {"red", "green", "blue"} for name in bank)
    red = sum("red" in name for name in queries)
    others = [sum(color in name for name in queries) for color in ("blue", "green")]
    assert accuracy in {(red + other) / 9 for other in others}


def test_probe_rows_are_logged_also_after_a_resume(colors, tiny, tmp_path, quiet):
    overrides = (*tiny, "run.knn_every_epochs=1")
    run = pretrain_with_probe("quickstart", str(colors), tmp_path / "run", 0, overrides, device="cpu", console=quiet)
    before = (run / "log.jsonl").read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    assert [row["step"] for row in rows if "knn_top1" in row] == [6, 12]
    assert resume_with_probe(run, device="cpu", console=quiet) == run
    assert (run / "log.jsonl").read_text() == before  # it was done


def test_facts_of_what_is_no_run(tmp_path):
    with pytest.raises(UsageError, match="is not a run folder"):
        run_facts(tmp_path)


def test_a_plan_counts_whole_batches(colors, tiny):
    plan = plan_pretraining("quickstart", str(colors), 0, (*tiny, "optim.batch_size=7"), device="cpu")
    assert (plan.images, plan.steps_per_epoch, plan.total_steps) == (48, 6, 12)


# tables

def test_tables_are_a_function_of_the_records(colors, tmp_path):
    for model in ("pixels?img_size=32", SMALL):
        score_knn(model, str(colors), workers=0).write(tmp_path / "results")
    (tmp_path / "results" / "broken.json").write_text("{")
    text, paths, problems = make_tables(tmp_path / "results", tmp_path / "out")
    assert "Raw pixels" in text and "Random network" in text
    assert [path.name for path in paths] == ["table.md", "table.csv", "table.tex"]
    assert len(problems) == 1 and "broken.json" in problems[0]
    before = [path.read_bytes() for path in paths]
    again = make_tables(tmp_path / "results", tmp_path / "out")
    assert (again[0], [path.read_bytes() for path in again[1]]) == (text, before)
    assert len(read_results(tmp_path / "results")[0]) == 2
