"""All benchmarks at once: what is found, what is run, what is left alone; and what the command line adds."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from cases import each
from PIL import Image

import patchssl as package
from patchssl.data.images import FileImages
from patchssl.data.open import open_images, open_pair
from patchssl.eval import features, suite
from patchssl.eval.cache import FeatureCache
from patchssl.eval.cells import TaskOptions
from patchssl.eval.copydays import evaluate_copydays
from patchssl.eval.faiss import IndexPlan
from patchssl.eval.knn import task as knn_task
from patchssl.eval.knn.task import evaluate_knn
from patchssl.eval.linear.task import evaluate_linear
from patchssl.eval.patches import evaluate_patches
from patchssl.eval.records import read_results
from patchssl.eval.revisited.task import evaluate_revisited
from patchssl.eval.score import SuiteSummary, evaluate, headline, make_options
from patchssl.eval.suite import plan_suite, run_suite
from patchssl.eval.tasks import ComputeOptions, default_tasks
from patchssl.models.backbone import Backbone
from patchssl.models.load import load_backbone
from patchssl.models.pixels import RawPixels
from patchssl.runtime.errors import DataError, UsageError
from patchssl.sets.make import make_copydays, make_revisited

CPU = torch.device("cpu")
SMALL = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=24&depth=2&num_heads=3"


def save_photographs(folder, count):
    """Images of smooth random colors, all different."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((160, 128), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def everything(tmp_path_factory, colors):
    """A folder with a classification set, a Copydays set, a revisited set, and something else."""
    root = tmp_path_factory.mktemp("everything")
    make_copydays(save_photographs(root / "photographs", 20), root / "copies", size=128)
    make_revisited(root / "photographs", root / "landmarks", num_queries=3, size=128)
    shutil.copytree(colors, root / "colors")
    (root / "notes").mkdir()
    (root / "notes" / "todo.txt").write_text("nothing to see")
    return root


@pytest.fixture
def options(tmp_path):
    return ComputeOptions(CPU, batch_size=16, workers=0, cache=FeatureCache(tmp_path / "cache"))


def labels(cells):
    return [cell.label() for cell in cells]


def test_everything_that_can_be_run_is_found(everything, options):
    plan = plan_suite(load_backbone(SMALL), str(everything), default_tasks(), None, options)
    assert sorted(labels(plan.run)) == ["copydays on copies (native)", "knn on colors (native)",
                                        "linear on colors (native)", "revisited on made (native)"]
    assert plan.done == ()
    blocks = 20 * 19 + len(list((everything / "copies" / "strong").iterdir()))
    landmarks = len(list((everything / "landmarks" / "jpg").iterdir()))
    assert plan.images == 60 + blocks + landmarks  # the 60 of colors once: k-NN and the probe share them
    assert plan.seconds > 0
    assert f"{plan.images:,} images to compute features of" in plan.text()
    assert json.loads(json.dumps(plan.as_dict()))["images"] == plan.images


@pytest.mark.parametrize(("place", "found"), [("copies", ["copydays on copies (native)"]),
                                              ("landmarks", ["revisited on made (native)"]),
                                              ("colors", ["knn on colors (native)", "linear on colors (native)"])])
def test_a_set_by_itself_is_enough(everything, options, place, found):
    assert labels(plan_suite(load_backbone(SMALL), str(everything / place), default_tasks(), None,
                             options).run) == found


def test_a_named_set(options):
    plan = plan_suite(load_backbone(SMALL), "textures", ["knn"], None, options)
    assert labels(plan.run) == ["knn on textures (native)"]
    assert plan.images == 7500


def test_copydays_without_distractors_is_run_under_the_protocol_that_needs_none(everything, options):
    backbone = load_backbone("random:vit_tiny_patch16_224?depth=1&embed_dim=24&num_heads=3")  # of 224 pixels
    plan = plan_suite(backbone, str(everything / "copies"), default_tasks(), None, options)
    assert labels(plan.run) == ["copydays on copies (dino-plain)"]


def test_named_folders_belong_to_the_plan_and_to_what_a_record_is_of(everything, options, tmp_path):
    backbone = load_backbone("random:vit_tiny_patch16_224?depth=1&embed_dim=24&num_heads=3")  # of 224 pixels
    data, results = str(everything / "copies"), tmp_path / "results"
    four, five = (save_photographs(tmp_path / name, count) for name, count in (("four", 4), ("five", 5)))

    def plan(**choices):
        return plan_suite(backbone, data, ["copydays"], results, options, choices=TaskOptions(**choices))

    blocks = plan().images
    first = plan(distractors=four)
    assert labels(first.run) == ["copydays on copies (dino-nowhitening)"]
    assert (first.images, first.left_out) == (blocks + 4, {})
    (result,), failed = run_suite(backbone, first, options, keep=lambda result: result.write(results))
    assert (result.detail["num_distractors"], failed) == (4, {})
    assert labels(plan(distractors=four).done) == labels(first.run)
    assert labels(plan(distractors=five).run) == labels(first.run)
    assert labels(plan().run) == ["copydays on copies (dino-plain)"]
    assert labels(plan(whitening=five).run) == ["copydays on copies (dino-nodistractors)"]
    both = plan(distractors=four, whitening=five)
    assert (labels(both.run), both.images) == (["copydays on copies (dino)"], blocks + 9)


def test_a_named_folder_is_never_dropped_in_silence(everything, options, tmp_path):
    backbone, data = load_backbone(SMALL), str(everything)
    more, empty = save_photographs(tmp_path / "more", 4), tmp_path / "empty"
    empty.mkdir()
    plan = plan_suite(backbone, data, ["copydays"], None, options, choices=TaskOptions(whitening=more))
    assert labels(plan.run) == ["copydays on copies (native)"]
    assert "no benchmark that is found here has a use for it" in plan.left_out[f"--whitening {more}"]
    with pytest.raises(DataError, match=r"--distractors .*nowhere: there is no such folder"):
        plan_suite(backbone, data, default_tasks(), None, options,
                   choices=TaskOptions(distractors=tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="--distractors: for copydays, which is not among the tasks knn"):
        plan_suite(backbone, data, ["knn"], None, options, choices=TaskOptions(distractors=more))
    large = load_backbone("random:vit_tiny_patch16_224?depth=1&embed_dim=24&num_heads=3")
    with pytest.raises(DataError, match="empty holds no image for distractors"):
        plan_suite(large, data, ["copydays"], None, options, choices=TaskOptions(distractors=empty))


def test_distractors_of_revisited_sets_make_records_of_their_own(everything, options, tmp_path):
    backbone, results = load_backbone(SMALL), tmp_path / "results"
    more = save_photographs(tmp_path / "more", 4)

    def plan(**choices):
        return plan_suite(backbone, str(everything), ["revisited"], results, options, choices=TaskOptions(**choices))

    alone, both = plan(), plan(revisited_distractors=more)
    assert labels(both.run) == ["revisited on made (native)", "revisited on made+more (native)"]
    assert both.images == alone.images + 4  # the set itself is passed once, the cache serves both
    found, _ = run_suite(backbone, both, options, keep=lambda result: result.write(results))
    assert [result.detail["num_distractors"] for result in found] == [0, 4]
    assert labels(plan(revisited_distractors=more).done) == labels(both.run)
    own = everything / "landmarks" / "jpg"
    refused = plan_suite(backbone, str(everything), ["revisited"], None, options,
                         choices=TaskOptions(revisited_distractors=own))
    assert labels(refused.run) == labels(alone.run)
    assert any("holds the images of the set" in why for why in refused.left_out.values())


def test_an_index_is_for_knn_alone_and_its_recall_is_in_the_record(everything, options, tmp_path):
    backbone, data, results = load_backbone(SMALL), str(everything / "colors"), tmp_path / "results"

    def plan(**index):
        return plan_suite(backbone, data, ["knn", "linear"], results, options,
                          choices=TaskOptions(search=IndexPlan(**index)))

    approximate = plan(index="HNSW4", search_params="efSearch=8")
    assert labels(approximate.run) == ["knn on colors (native-HNSW4-efSearch=8)", "linear on colors (native)"]
    found, failed = run_suite(backbone, approximate, options, keep=lambda result: result.write(results))
    assert 0 < found[0].detail["search"]["recall"]["recall@20"] <= 1
    assert failed == {}
    assert labels(plan(index="HNSW4", search_params="efSearch=8").done) == labels(approximate.run)
    assert labels(plan().run) == ["knn on colors (native)"]
    with pytest.raises(UsageError, match="'IVF64,Flat' sorts vectors into 64 clusters, and 48 are there"):
        plan(index="IVF64,Flat")
    with pytest.raises(UsageError, match="'Tree' cannot be made"):
        plan(index="Tree")
    with pytest.raises(UsageError, match=r"--index.*for knn"):
        plan_suite(backbone, data, ["linear"], None, options, choices=TaskOptions(search=IndexPlan("HNSW4")))


def test_a_record_of_other_images_under_the_same_name_does_not_count(everything, options, tmp_path):
    backbone, results = load_backbone(SMALL), tmp_path / "results"
    for task, folder in (("knn", "colors"), ("revisited", "landmarks"), ("copydays", "copies")):
        root = tmp_path / folder
        shutil.copytree(everything / folder, root)
        plan = plan_suite(backbone, str(root), [task], results, options)
        run_suite(backbone, plan, options, keep=lambda result: result.write(results))
        assert labels(plan_suite(backbone, str(root), [task], results, options).done) == labels(plan.run)
        path = sorted(path for path in root.rglob("*") if path.suffix in (".png", ".jpg"))[0]
        Image.fromarray(np.zeros((30, 31, 3), dtype=np.uint8)).save(path)
        assert labels(plan_suite(backbone, str(root), [task], results, options).run) == labels(plan.run)


def test_what_is_wrong_with_a_set_is_said_for_raw_pixels_too(everything, options, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(everything / "copies", root / "copies")
    shutil.copytree(everything / "landmarks", root / "landmarks")
    next((root / "copies" / "crops" / "50").iterdir()).unlink()
    (root / "landmarks" / "gnd_broken.pkl").write_bytes(b"no pickle")
    plan = plan_suite(RawPixels(16), str(root), ["copydays", "revisited"], None, options)
    assert labels(plan.run) == ["revisited on made (native)"]
    copies, landmarks = plan.left_out.values()
    assert "crops/50" in copies and "gnd_broken.pkl" in landmarks


def test_nothing_to_run_says_why(everything, options):
    with pytest.raises(DataError, match=r"notes holds nothing that copydays can be run on .*Copydays' blocks"):
        plan_suite(load_backbone(SMALL), str(everything / "notes"), ["copydays"], None, options)
    with pytest.raises(UsageError, match=r"'retrieval'.*revisited"):
        plan_suite(load_backbone(SMALL), str(everything), ["retrieval"], None, options)


def test_a_broken_set_is_left_out_by_name_and_the_rest_is_run(everything, options, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(everything / "copies", root / "copies")
    shutil.copytree(everything / "colors", root / "colors")
    next((root / "copies" / "crops" / "50").iterdir()).unlink()
    plan = plan_suite(load_backbone(SMALL), str(root), ["copydays", "knn"], None, options)
    assert labels(plan.run) == ["knn on colors (native)"]
    (why,) = plan.left_out.values()
    assert "crops/50" in why


@pytest.mark.slow
def test_records_are_those_of_the_single_benchmarks_and_come_one_by_one(everything, options, tmp_path):
    backbone, kept = load_backbone(SMALL), []
    plan = plan_suite(backbone, str(everything), default_tasks(), None, options)
    results, failed = run_suite(backbone, plan, options, keep=kept.append)
    assert failed == {} and kept == results
    alone = {cell.task: suite.run_cell(backbone, cell, ComputeOptions(CPU, batch_size=16,
                                                                      workers=0)) for cell in plan.run}
    for cell, result in zip(plan.run, results, strict=True):
        assert result.metrics == pytest.approx(alone[cell.task].metrics)
        assert result.dataset_fingerprint == alone[cell.task].dataset_fingerprint


def test_knn_and_the_probe_decode_every_image_once(everything, options, monkeypatch):
    backbone = load_backbone(SMALL)
    plan = plan_suite(backbone, str(everything / "colors"), default_tasks(), None, options)
    decoded = []
    original = features._TransformedImages.__getitem__
    monkeypatch.setattr(features._TransformedImages, "__getitem__",
                        lambda images, index: decoded.append(index) or original(images, index))
    run_suite(backbone, plan, options)
    assert len(decoded) == 60
    run_suite(backbone, plan, options)
    assert len(decoded) == 60


@pytest.mark.parametrize("cached", [True, False], ids=["one pass for both", "a pass each"])
def test_the_files_of_a_set_are_looked_at_once_for_all_its_benchmarks(everything, options, monkeypatch, cached):
    backbone, looks, look = load_backbone(SMALL), [], FileImages.quick_check
    monkeypatch.setattr(FileImages, "quick_check", lambda images, index: looks.append(index) or look(images, index))
    options = options if cached else replace(options, cache=None)
    plan = plan_suite(backbone, str(everything / "colors"), ["knn", "linear", "patches"], None, options)
    tasks = [cell.task for cell in plan.run]
    looks.clear()
    _, failed = run_suite(backbone, plan, options)
    before = 12 * (tasks[0] == "patches")  # it looks at the val images alone
    assert failed == {} and sorted(tasks) == ["knn", "linear", "patches"]
    assert len(looks) == 60 + before


def test_what_has_a_record_is_not_run_again(everything, options, tmp_path):
    backbone, data, results = load_backbone(SMALL), str(everything / "colors"), tmp_path / "results"
    plan = plan_suite(backbone, data, default_tasks(), results, options)
    first, _ = run_suite(backbone, plan, options, keep=lambda result: result.write(results))
    again = plan_suite(backbone, data, default_tasks(), results, options)
    assert (again.run, labels(again.done)) == ((), labels(plan.run))
    assert labels(plan_suite(backbone, data, default_tasks(), results, options, overwrite=True).run) == labels(plan.run)
    other = plan_suite(load_backbone(SMALL + "&seed=1"), data, default_tasks(), results, options)
    assert len(other.run) == 2  # other weights
    first[0].path(results).unlink()
    assert labels(plan_suite(backbone, data, default_tasks(), results, options).run) == labels(plan.run)[:1]


def test_patches_are_run_on_val_images_when_asked_for_and_need_no_labels(everything, options, tmp_path):
    backbone, results = load_backbone(SMALL), tmp_path / "results"
    plan = plan_suite(backbone, str(everything), ["patches"], results, options)
    assert labels(plan.run) == ["patches on colors (native)"]  # the only set with train/ and val/
    assert plan.images == 12
    for split, count in (("train", 2), ("val", 3)):
        save_photographs(tmp_path / "plain" / split, count)
    plan = plan_suite(backbone, str(tmp_path / "plain"), ["knn", "patches"], results, options)
    assert labels(plan.run) == ["patches on plain (native)"]
    assert "needs labels" in plan.left_out[f"knn on {tmp_path / 'plain'}"]
    (result,), failed = run_suite(backbone, plan, options, keep=lambda result: result.write(results))
    assert (result.task, result.detail["num_images"], failed) == ("patches", 3, {})
    assert f"exact matches {result.metrics['exact']:.1%}" in headline(result)
    again = plan_suite(backbone, str(tmp_path / "plain"), ["patches"], results, options)
    assert (again.run, labels(again.done)) == ((), labels(plan.run))
    with pytest.raises(DataError, match="photographs has no val images"):
        plan_suite(backbone, str(everything / "photographs"), ["patches"], results, options)


def test_one_failure_does_not_stop_the_rest(everything, options, monkeypatch):
    def fail(*_args, **_options):
        raise DataError("planted")

    backbone = load_backbone(SMALL)
    plan = plan_suite(backbone, str(everything / "colors"), default_tasks(), None, options)
    monkeypatch.setattr(knn_task, "evaluate_knn", fail)
    results, failed = run_suite(backbone, plan, options)
    assert [result.task for result in results] == ["linear"]
    assert failed == {"knn on colors (native)": "planted"}
    with pytest.raises(DataError, match="planted"):
        run_suite(backbone, plan, options, stop_at_errors=True)


def test_the_table_has_no_old_number_of_what_failed_now(everything, options, tmp_path, monkeypatch):
    backbone, data, results = load_backbone(SMALL), str(everything / "colors"), tmp_path / "results"
    plan = plan_suite(backbone, data, default_tasks(), None, options)
    run_suite(backbone, plan, options, keep=lambda result: result.write(results))
    done = SuiteSummary(plan_suite(backbone, data, default_tasks(), results, options), [], {}, results)
    assert [record.task for record in done.records()] == ["knn", "linear"]
    again = plan_suite(backbone, data, default_tasks(), results, options, overwrite=True)
    monkeypatch.setattr(knn_task, "evaluate_knn", lambda *_args,
                        **_options: (_ for _ in ()).throw(DataError("planted")))
    found, failed = run_suite(backbone, again, options)
    summary = SuiteSummary(again, found, failed, results)
    assert [record.task for record in summary.records()] == ["linear"]
    assert "20-NN" not in summary.text() and "planted" in summary.text()


@pytest.mark.parametrize("tasks", [["knn"], ["knn", "linear"]])
def test_unreadable_images_of_both_sets_are_listed(everything, options, tmp_path, tasks):
    data = shutil.copytree(everything / "colors", tmp_path / "colors")
    bad = [next(file for file in sorted((data / split).rglob("*")) if file.is_file()) for split in ("train", "val")]
    for file in bad:
        file.write_bytes(b"")
    backbone = load_backbone(SMALL)
    _, failed = run_suite(backbone, plan_suite(backbone, str(data), tasks, None, options), options)
    assert len(failed) == len(tasks)
    assert all(str(file) in why for file in bad for why in failed.values())


# from Python

def test_evaluate_gives_a_row_for_every_metric(colors, tiny_run):
    table = evaluate(str(tiny_run), colors)
    assert isinstance(table, pd.DataFrame)
    assert list(table.columns) == ["model", "task", "dataset", "protocol", "metric", "value"]
    assert set(table.task) == {"knn"} and set(table.dataset) == {"colors"} and set(table.protocol) == {"native"}
    assert "top1@20" in set(table.metric) and table.value.between(0, 1).all()
    same = evaluate(package.load_backbone(str(tiny_run)), str(colors), ["knn"], cached=False)
    pd.testing.assert_frame_equal(table, same)


def test_evaluate_runs_several_tasks(everything, tiny_run):
    table = package.evaluate(str(tiny_run), everything, ["knn", "copydays", "revisited"])
    assert set(table.task) == {"knn", "copydays", "revisited"}
    assert {"top1@20", "strong/map", "crops/80/map", "hard/map"} <= set(table.metric)


def test_evaluate_names_the_tasks_there_are(colors):
    with pytest.raises(UsageError, match=r"'retrieval'.*knn, linear, patches, revisited"):
        evaluate("pixels", colors, ["retrieval"])


@pytest.mark.slow
def test_convolutional_networks_and_pixels_are_scored_too(everything, options):
    for model in ("random:resnet18", "pixels?img_size=16"):
        table = evaluate(model, everything, default_tasks())
        assert set(table.task) == set(default_tasks()), model
        assert set(evaluate(model, everything, ["patches"]).metric) >= {"exact", "within1", "chance/exact"}


# from the command line

def test_eval_all_plans_runs_and_then_has_nothing_left(patchssl, everything, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("eval", "all", SMALL, "--data", everything, "--workers", "0")
    plan = patchssl(*arguments, "--dry-run")
    assert plan.code == 0, plan.err
    assert "to run: knn on colors (native), 60 images" in plan.out
    assert not (tmp_path / "results").exists()
    first = patchssl(*arguments)
    assert first.code == 0, first.err
    assert {"copydays", "knn", "linear", "revisited"} <= {line.split()[0] for line in first.out.splitlines()}
    records, problems = read_results(tmp_path / "results")
    assert (len(records), problems) == (4, [])
    again = patchssl(*arguments, "--json")
    summary = json.loads(again.out)
    assert (summary["run"], len(summary["done"]), len(summary["records"])) == ([], 4, 4)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*.json")}
    patchssl(*arguments, "--overwrite", "--task", "knn")
    assert [path.name for path, time in times.items() if path.stat().st_mtime_ns != time] == ["knn-colors@native.json"]
    more = save_photographs(tmp_path / "more", 4)
    planned = json.loads(patchssl(*arguments, "--revisited-distractors", more, "--dry-run", "--json").out)
    (cell,) = planned["run"]
    assert (cell["dataset"], cell["options"]) == ("made+more", {"distractors": str(more)})
    refused = patchssl(*arguments, "--distractors", tmp_path / "nowhere")
    assert refused.code == 4 and "there is no such folder" in refused.err


@each(("task", "options", "numbers"), [
    ("linear", ("--data", "colors", "--epochs", "2"), ["top-1"]),
    ("copydays", ("--data", "copies"), ["strong mAP", "pooled µAP"]),
    ("revisited", ("--data", "landmarks", "--set", "made"), ["easy mAP", "medium mAP", "hard mAP"]),
])
def test_every_benchmark_prints_its_numbers_and_writes_its_record(patchssl, everything, tmp_path, task, options,
                                                                  numbers):
    options = [everything / option if option in ("colors", "copies", "landmarks") else option for option in options]
    arguments = ("eval", task, SMALL, *options, "--workers", "0", "--results", tmp_path / "results")
    answer = patchssl(*arguments)
    assert answer.code == 0, answer.err
    assert [number for number in numbers if number not in answer.out] == []
    record = json.loads(patchssl(*arguments, "--json").out)
    assert record["task"] == task
    tables = patchssl("tables", "--results", tmp_path / "results")
    assert tables.code == 0, tables.err
    assert "Random network" in tables.out


def test_the_cache_says_what_it_holds_and_is_cleared(patchssl, everything, tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHSSL_CACHE", str(tmp_path / "cache"))
    assert json.loads(patchssl("cache", "--json").out)["entries"] == 0
    scored = ("eval", "knn", SMALL, "--data", everything / "colors", "--workers", "0", "--results", tmp_path / "out")
    patchssl(*scored, "--no-cache")
    assert json.loads(patchssl("cache", "--json").out)["entries"] == 0
    patchssl(*scored)
    held = json.loads(patchssl("cache", "--json").out)
    assert (held["entries"], held["bytes"]) == (2, 60 * 24 * 4)
    index = tmp_path / "cache" / "archives" / "0.npz"
    index.parent.mkdir()
    index.write_bytes(bytes(30))
    assert json.loads(patchssl("cache", "--json").out)["index_bytes"] == 30
    assert "2 entries" in patchssl("cache", "--clear").out
    left = json.loads(patchssl("cache", "--json").out)
    assert (left["bytes"], left["index_bytes"], index.exists()) == (0, 0, False)


def test_the_limit_of_the_cache_is_set_by_a_variable(patchssl, tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHSSL_CACHE", str(tmp_path / "cache"))
    assert json.loads(patchssl("cache", "--json").out)["limit_bytes"] == 20 * 2**30
    monkeypatch.setenv("PATCHSSL_CACHE_GIB", "0.5")
    assert "of at most 0.5 GiB" in patchssl("cache").out
    for wrong in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv("PATCHSSL_CACHE_GIB", wrong)
        refused = patchssl("cache")
        assert (refused.code, f"PATCHSSL_CACHE_GIB is '{wrong}'" in refused.err) == (2, True)


@pytest.mark.parametrize("task", ["knn", "all"])
def test_ctrl_c_says_what_there_is_to_go_on_from(patchssl, task, colors, tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setenv("PATCHSSL_CACHE", str(tmp_path / "cache"))  # nothing of it has been computed
    monkeypatch.setattr("patchssl.eval.features._forward", stop)
    stopped = patchssl("eval", task, SMALL, "--data", colors, "--results", tmp_path / "out", "--workers", "0")
    assert (stopped.code, stopped.out) == (130, "")
    assert "stopped by Ctrl-C; records that were written stay, and the same command resumes from" in stopped.err
    assert not (tmp_path / "out").exists() or not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_export_then_inspect_then_score(patchssl, tiny_run, colors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = json.loads(patchssl("eval", "knn", tiny_run, "--data", colors, "--workers", "0", "--json").out)
    made = patchssl("export", tiny_run, "--out", "out", "--format", "timm", "--format", "dino", "--license", "cc0-1.0",
                    "--json")
    assert made.code == 0, made.err
    assert json.loads(made.out)["weights_sha256"] == record["weights_sha256"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: cc0-1.0" in card and "colors" in card
    refused = patchssl("export", tiny_run, "--out", "out")
    assert refused.code == 2 and "--overwrite" in refused.err
    for model in ("out", "out/dino.pth?heads=3"):
        again = json.loads(patchssl("eval", "knn", model, "--data", colors, "--workers", "0", "--json").out)
        assert again["metrics"] == record["metrics"]
        assert again["weights_sha256"] == record["weights_sha256"]
    seen = json.loads(patchssl("inspect", tiny_run, "--json").out)
    assert record["weights_sha256"] in json.dumps(seen)


def test_what_cannot_be_loaded_is_inspected_with_exit_code_1(patchssl, tiny_run, tmp_path):
    checkpoint = torch.load(tiny_run / "checkpoint.pth", weights_only=True)
    del checkpoint["teacher"]["backbone.norm.bias"]
    torch.save(checkpoint, tmp_path / "cut.pth")
    answer = patchssl("inspect", tmp_path / "cut.pth")
    assert answer.code == 1
    assert "norm.bias" in answer.out
    refused = patchssl("eval", "knn", tmp_path / "cut.pth", "--data", "textures")
    assert refused.code == 1
    assert "1 missing: norm.bias" in refused.err


def test_models_are_listed_and_filtered(patchssl):
    everything = json.loads(patchssl("models", "--json").out)
    dino = patchssl("models", "*dino*")
    assert len(everything) > 50
    assert "timm:vit_small_patch16_224.dino" in dino.out and "74.5" in dino.out
    assert patchssl("models", "nothing-like-it").code == 2


def test_data_sets_are_made_and_checked(patchssl, tmp_path):
    photographs = save_photographs(tmp_path / "photographs", 2)
    made = patchssl("data", "make-copydays", photographs, tmp_path / "copies", "--size", "128")
    assert made.code == 0, made.err
    assert f"eval copydays MODEL --data {tmp_path / 'copies'}" in made.out
    assert " --ranks 2 (protocols count 20 ranks, which takes 20 originals)" in made.out
    refused = patchssl("eval", "copydays", SMALL, "--data", tmp_path / "copies", "--results", tmp_path / "results")
    assert refused.code == 4 and "a database of 2 images (originals), fewer than the first 20 ranks" in refused.err
    left_out = patchssl("eval", "all", SMALL, "--data", tmp_path / "copies", "--results", tmp_path / "results")
    assert left_out.code == 4 and "score it with --ranks 2" in left_out.err
    scored = patchssl("eval", "copydays", SMALL, "--data", tmp_path / "copies", "--results", tmp_path / "results",
                      "--ranks", "2", "--workers", "0")
    assert scored.code == 0 and "protocol native-2-ranks: strong mAP" in scored.out
    assert patchssl("data", "check", tmp_path / "copies").code == 0
    next((tmp_path / "copies" / "jpegqual" / "5").iterdir()).unlink()
    broken = patchssl("data", "check", tmp_path / "copies")
    assert broken.code == 4 and "jpegqual/5" in broken.out
    landmarks = patchssl("data", "make-revisited", photographs, tmp_path / "landmarks", "--size", "128", "--name",
                         "mine")
    assert landmarks.code == 0 and (tmp_path / "landmarks" / "gnd_mine.pkl").is_file()
    assert patchssl("data", "get", "cifar11", tmp_path).code == 2


def test_options_and_headline(colors, tiny_run):
    assert make_options("cpu", 3, 0, cached=False) == ComputeOptions(CPU, 3, 0, None)
    result = suite.run_cell(load_backbone(str(tiny_run)), plan_suite(
        load_backbone(str(tiny_run)), str(colors), ["knn"], None, make_options("cpu", 8, 0)).run[0],
                            ComputeOptions(CPU, 8, 0))
    assert headline(result).startswith("tiny on colors, protocol native: 20-NN top-1 ")


def test_the_best_test_epoch_is_called_so(patchssl, colors, tmp_path):
    arguments = ("--data", colors, "--epochs", "2", "--workers", "0", "--results", tmp_path)
    dino = patchssl("eval", "linear", SMALL, *arguments, "--protocol", "dino")
    assert re.search(r"protocol dino-2-epochs: top-1 .*, best test epoch [12] of 2\n", dino.out), dino.err
    assert re.search(r"top-1 \d+\.\d% \(95 % interval \d+\.\d% to \d+\.\d%\)", dino.out), dino.out
    assert "best test epoch" not in patchssl("eval", "linear", SMALL, *arguments).out


@each("task", ["knn", "linear", "copydays", "revisited", "all"])
def test_a_place_for_results_that_is_none_is_refused_at_once(patchssl, tmp_path, task):
    (tmp_path / "file").touch()
    more = ("--set", "made") if task == "revisited" else ()
    answer = patchssl("eval", task, "pixels", "--data", "nothing", *more, "--results", tmp_path / "file" / "deep")
    assert (answer.code, answer.out) == (4, "")
    assert f"{tmp_path / 'file'} is no folder" in answer.err


def test_a_folder_that_cannot_be_written_is_refused_at_once(patchssl, tmp_path, monkeypatch):
    real = os.access  # root may write anywhere, so the answer of the system is planted
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and real(path, mode))
    refused = patchssl("eval", "knn", "no such model", "--data", tmp_path, "--results", tmp_path / "new" / "folder")
    assert refused.code == 4 and f"nothing can be written in {tmp_path}" in refused.err


def test_few_shots_are_printed_with_their_spread(patchssl, colors, tmp_path):
    answer = patchssl("eval", "knn", "pixels?img_size=8", "--data", colors, "--shots", "2", "--draws", "3", "--results",
                      tmp_path)
    assert answer.code == 0, answer.err
    assert "fewshot2/top1@20 100.0% ± 0.0% (3 draws)" in answer.out
    (record,) = read_results(tmp_path)[0]
    assert (record.protocol, record.detail["fewshot"]["fewshot2/top1@20"]["draws"]) == ("native-fewshot", 3)
    tables = patchssl("tables", "--results", tmp_path)
    assert "20-NN 2-shot top-1, % (native-fewshot)" in tables.out and "100.0 ± 0.0 (3 draws)" in tables.out


@pytest.mark.slow
def test_two_processes_write_the_record_of_one(everything, tmp_path):
    def scored(*launcher, folder):
        command = [sys.executable, *launcher, "-m", "patchssl", "eval", "copydays", SMALL, "--data",
                   str(everything / "copies"), "--workers", "0", "--no-cache", "--results", str(tmp_path / folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        (record,) = read_results(tmp_path / folder)[0]
        return record, done.stdout

    alone, _ = scored(folder="one")
    together, printed = scored("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", folder="two")
    assert (together.metrics, together.detail) == (alone.metrics, alone.detail)
    assert printed.count("strong mAP") == 1


class Unused(torch.nn.Module):
    """Tokens of zeros; computing them after all is noted."""

    calls = 0

    def forward(self, images):
        self.calls += 1
        return torch.zeros(len(images), 17, 3)


@each(("task", "damaged"), [
    ("knn", "colors/val/red/0.png"), ("linear", "colors/val/red/0.png"), ("dino probe", "colors/train/red/0.png"),
    ("patches", "colors/val/red/0.png"), ("copydays", "copies/crops/80/301900.jpg"),
    ("revisited", "landmarks/jpg/made_0002.jpg")])
def test_unreadable_images_are_listed_before_anything_is_computed(task, damaged, everything, tmp_path):
    root = tmp_path / "sets"
    shutil.copytree(everything, root)
    path = root / damaged
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    network = Unused()
    backbone = Backbone.from_module(network, patch_size=8, image_size=32)
    runs = {"knn": lambda: evaluate_knn(backbone, *open_pair(root / "colors")),
            "linear": lambda: evaluate_linear(backbone, *open_pair(root / "colors")),
            "dino probe": lambda: evaluate_linear(backbone, *open_pair(root / "colors"), "dino", epochs=1),
            "patches": lambda: evaluate_patches(backbone, open_images(root / "colors", "val")),
            "copydays": lambda: evaluate_copydays(backbone, root / "copies"),
            "revisited": lambda: evaluate_revisited(backbone, root / "landmarks", set_name="made")}
    with pytest.raises(DataError, match=rf"1 of [\d,]+ images cannot be read(.|\n)*{path.name}"):
        runs[task]()
    assert network.calls == 0
