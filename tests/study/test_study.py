"""Studies: the file, the runs and who does them, the plan, and a small one from beginning to end."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml
from cases import each
from scipy import stats

import patchssl as package
from patchssl.eval.records import read_results
from patchssl.pretrain.recipe import shipped_names
from patchssl.pretrain.schedules import unfinished
from patchssl.report.tables.seeds import Measure
from patchssl.runtime.console import Console
from patchssl.runtime.errors import DataError, Interrupted, UsageError
from patchssl.study import command
from patchssl.study import run as module
from patchssl.study.config import load_study, parse_study
from patchssl.study.copies import write_originals
from patchssl.study.folder import RunOutcome, configurations, runs_of, study_folder
from patchssl.study.plan import RunCost, plan_study
from patchssl.study.summary import StudySummary, summarize
from patchssl.study.tables import study_text

ROOT = Path(package.__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
SMALL = {"optim.epochs": 2, "optim.batch_size": 8, "optim.warmup_epochs": 0.5, "model.depth": 1, "model.embed_dim": 24,
         "model.num_heads": 3, "views.num_local": 2, "head.num_prototypes": 32, "head.hidden": 32,
         "head.bottleneck": 16, "run.workers": 0, "run.threads": 1, "run.log_seconds": 0.001,
         "run.knn_every_epochs": 1}
TINY = {"name": "tiny", "recipe": "quickstart", "settings": SMALL, "reference": "dino", "seeds": [0, 1],
        "variants": {"dino": {"method": "dino", "photometric.patch_share": 0}, "pwself": None},
        "ablations": {"pwself-random-matches": {"loss.rule": "random"}}, "evaluations": ["knn"]}
QUIET = Console(quiet=True)


def save(path, **changes):
    path.write_text(yaml.safe_dump(TINY | changes, sort_keys=False))
    return path


def start(*arguments, cwd):
    return subprocess.Popen([sys.executable, "-m", "patchssl", "study", *map(str, arguments)], cwd=cwd,
                            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path, process, size=0):
    limit = time.monotonic() + 120
    while not (path.exists() and path.stat().st_size > size):
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.01)


def numbers(root):
    """What the records below `root` say, by model and task, durations left out."""
    records, problems = read_results(root / "records")
    assert not problems
    return {(record.model, record.task): dataclasses.replace(record, duration=0.0) for record in records}


@pytest.fixture(scope="module")
def whole(colors, tmp_path_factory):
    """The tiny study, run without being disturbed; do not write into it."""
    folder = tmp_path_factory.mktemp("whole")
    out = folder / "out"
    asked = command.ask(str(save(folder / "tiny.yaml")), out, str(colors), only=(), seeds=(), ablations=False,
                        device="cpu", planning=False)
    answer = command.run(asked, QUIET)
    assert not answer.progress.failed and not answer.progress.busy
    return out


# the file

def test_the_studies_that_come_with_the_package_are_the_core_comparison():
    names = shipped_names(resources.files("patchssl.study") / "studies")
    assert names == ["cifar10", "fashion-mnist", "imagenet100", "imagenet1k", "imagenette", "textures"]
    for name in names:
        study = load_study(name)
        assert len(study.seeds) == 5 and study.reference == "dino"
        recipes = {variant: study.recipe_of(variant) for variant in study.all_variants()}
        core = [variant for variant in study.variants if variant != "dino-patch-color"]
        assert core == ["dino", "ibot", "pwself", "pwself-whole-color", "pwself-random-matches"]
        assert [recipes[variant].method for variant in core[:3]] == ["dino", "ibot", "pwself"]
        assert {recipes[variant].patch_color for variant in ("dino", "ibot", "pwself-whole-color")} == {"none"}
        if control := recipes.get("dino-patch-color"):  # DINO's loss on views with pwself's color
            assert (control.loss.patch_weight, control.loss.weighting) == (0, "balanced")
            assert control.photometric == recipes["pwself"].photometric
        assert recipes["pwself-random-matches"].loss.rule == "random"
        images = {(r.optim.epochs, r.optim.batch_size, r.max_images) for r in recipes.values()}
        assert len(images) == 1  # equal images, ablations included
        backbones = {(r.model, r.views, r.head) for r in recipes.values()}
        assert len(backbones) == 1
        assert len({r.model_copy(update={"run": None}).model_dump_json() for r in recipes.values()}) == len(recipes)


WRONG = {
    "key": ({"seed": [0]}, "study key 'seed' is unknown; did you mean 'seeds'?"),
    "key of a part": ({"copydays": {"orignals": 3}}, "did you mean 'copydays.originals'?"),
    "setting": ({"settings": {"optim.epoch": 3}}, "study tiny, variant dino: recipe key 'optim.epoch' is unknown"),
    "setting of a variant": ({"ablations": {"wide": {"model.embed_dims": 3}}}, "variant wide: recipe key"),
    "value of a variant": ({"ablations": {"wide": {"loss.rule": "centre"}}}, "variant wide: "),
    "combination": ({"variants": {"dino": {"method": "dino", "photometric.patchwise": "layered"}}},
                    "photometric.patchwise = layered"),
    "contrast": ({"contrasts": [["pwself", "dinoo"]]}, "variant of a contrast 'dinoo' is unknown"),
    "reference": ({"reference": "dinoo"}, "reference 'dinoo' is unknown; did you mean 'dino'?"),
    "seeds": ({"seeds": [1, 1]}, "one of them stands there twice"),
    "no seeds": ({"seeds": []}, "seeds"),
    "negative seed": ({"seeds": [-1]}, "seeds.0 = -1"),
    "seed beyond torch's": ({"seeds": [0, 2**64]}, f"seeds.1 = {2**64}"),
    "evaluation": ({"evaluations": ["knnn"]}, "evaluation 'knnn' is unknown; did you mean 'knn'?"),
    "two of a name": ({"ablations": {"dino": {"loss.rule": "paper"}}}, "both among variants and among ablations"),
    "name": ({"name": "../elsewhere"}, "name = '../elsewhere'"),
    "variant's name": ({"ablations": {"a/b": {}}}, "a/b"),
    "untrained": ({"ablations": {"untrained": {}}}, "no variant can be called untrained"),
    "recipe": ({"recipe": "quickstrat"}, "did you mean 'quickstart'?"),
    "share": ({"validation_share": 1.0}, "validation_share = 1.0"),
}


@each("case", WRONG)
def test_what_is_wrong_in_a_study_is_named(patchssl, tmp_path, case):
    changes, sentence = WRONG[case]
    answer = patchssl("study", save(tmp_path / "tiny.yaml", **changes), "--data", "textures", "--dry-run")
    assert answer.code == 2
    assert sentence in answer.err


def test_a_variant_or_setting_that_stands_twice_is_named(tmp_path):
    text = save(tmp_path / "tiny.yaml").read_text()
    (tmp_path / "tiny.yaml").write_text(text + "recipe: cifar10\n")
    last = len(text.splitlines()) + 1
    with pytest.raises(UsageError, match=rf"tiny.yaml: key 'recipe' stands twice, in lines 2 and {last};"):
        load_study(tmp_path / "tiny.yaml")
    with pytest.raises(UsageError, match=r"key 'optim\.lr' stands twice, in line 3"):
        parse_study("name: a\nrecipe: quickstart\nsettings: {optim.lr: 1, optim.lr: 2}\n")


def test_the_command_names_what_it_does_not_know(patchssl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = save(tmp_path / "tiny.yaml")
    assert "did you mean 'textures'?" in patchssl("study", "texture").err
    assert "give --data DIR" in patchssl("study", file).err
    assert "did you mean 'pwself'?" in patchssl("study", file, "--data", "textures", "--only", "pwsef").err
    assert "seed 7 is none of study tiny: 0, 1" in patchssl("study", file, "--data", "textures", "--only-seed", 7).err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_a_recipe_of_ones_own_lies_beside_the_study(tmp_path):
    (tmp_path / "mine.yaml").write_text("method: dino\nphotometric: {patch_share: 0}\noptim: {epochs: 7}\n")
    study = load_study(save(tmp_path / "tiny.yaml", recipe="mine.yaml", settings={}))
    assert study.recipe_of("dino").optim.epochs == 7


def test_runs_come_seed_after_seed_and_ablations_last():
    study = parse_study(yaml.safe_dump(TINY))
    names = [run.name for run in runs_of(study, ablations=True)]
    assert names == ["dino-0", "pwself-0", "untrained-0", "dino-1", "pwself-1", "untrained-1",
                     "pwself-random-matches-0", "pwself-random-matches-1"]
    assert [run.name for run in runs_of(study)] == names[:6]
    assert [run.name for run in runs_of(study, ["pwself-random-matches"], [1])] == ["pwself-random-matches-1"]


# the plan

def test_a_plan_warns_of_warm_ups_longer_than_the_runs(tmp_path, colors):
    settings = {**SMALL, "optim.warmup_epochs": 9}
    folder = study_folder(load_study(save(tmp_path / "tiny.yaml", settings=settings)), tmp_path / "out", str(colors))
    runs = runs_of(folder.study)
    costs = {run.variant: RunCost(1, 1, 1.0, None, 0) for run in runs}
    plan = plan_study(folder, runs, device="cpu", known=costs)
    epochs = runs[0].recipe.optim.epochs
    (sentence, variants), = plan.as_dict()["warnings"].items()
    assert f"optim.warmup_epochs = 9 is too long for optim.epochs = {epochs}" in sentence
    assert variants == ["dino", "pwself"]
    assert f"warning: dino, pwself: {sentence}" in plan.text()


def test_the_shipped_studies_end_their_warm_ups():
    for name in shipped_names(resources.files("patchssl.study") / "studies"):
        study = load_study(name)
        for variant in study.all_variants():
            assert list(unfinished(study.recipe_of(variant))) == [], (name, variant)


def test_what_a_study_costs_is_the_sum_of_what_is_missing(tmp_path, colors):
    folder = study_folder(load_study(save(tmp_path / "tiny.yaml")), tmp_path / "out", str(colors))
    runs = runs_of(folder.study)
    for run, train in ((runs[0], 100.0), (runs[1], 130.0), (runs[2], 0.0)):
        folder.keep(run, train_seconds=train, score_seconds=20.0, images=96, updates=12)
    plan = plan_study(folder, runs, device="cpu")
    assert plan.seconds == (100 + 20) + (130 + 20) + (0 + 20)
    assert [run.name for run in plan.missing] == ["dino-1", "pwself-1", "untrained-1"]
    assert plan.left(2) == "about 2:25 left for 2 processes"
    assert "6 runs, 3 done, 0 failed, 3 to run" in plan.text() and "measured on 1" in plan.text()


def test_a_plan_counts_updates_and_can_do_without_the_images(tmp_path, patchssl, colors):
    file = save(tmp_path / "tiny.yaml", stand_in={"images": 1003, "height": 40, "width": 50})
    there = json.loads(patchssl("study", file, "--data", colors, "--dry-run", "--json", "--out", tmp_path / "x").out)
    assert there["variants"]["pwself"]["updates"] == 2 * (48 // 8)
    assert there["variants"]["pwself"]["images"] == 12 * 8
    assert there["scoring_counted"] is False and there["missing"] == there["cells"]
    answer = patchssl("study", file, "--dry-run", "--json", "--out", tmp_path / "x")
    plan = json.loads(answer.out)
    assert plan["variants"]["dino"]["updates"] == 2 * (1003 // 8)
    assert plan["variants"]["dino"]["train"] > there["variants"]["dino"]["train"]
    assert not (tmp_path / "x").exists()
    text = patchssl("study", file, "--dry-run", "--out", tmp_path / "x").out
    assert "on 1,003 images of 50 x 40 pixels, assumed" in text
    assert "250 updates" in text and "20-NN top-1" in text and "not run" in text


# a small study from beginning to end

def test_every_run_leaves_a_record_with_its_variant_and_the_tables_have_a_row_for_each(whole):
    records = numbers(whole)
    assert {model for model, _ in records} == {f"{v}-{s}" for v in ("dino", "pwself", "untrained") for s in (0, 1)}
    assert {record.variant for record in records.values()} == {"dino", "pwself", "untrained"}
    rows = [line for line in (whole / "study.md").read_text().splitlines() if line.startswith("| pwself ")]
    assert len(rows) == 4  # scores, differences, cost, differences in training
    found = json.loads((whole / "study.json").read_text())
    assert found["configurations_tried"] == 2 and found["reference"] == "dino"
    pwself = next(variant for variant in found["variants"] if variant["variant"] == "pwself")
    assert pwself["images"] == 96 and pwself["seeds"] == [0, 1]
    top1 = {seed: records[f"pwself-{seed}", "knn"].metrics["top1@20"] for seed in (0, 1)}
    against = {seed: records[f"dino-{seed}", "knn"].metrics["top1@20"] for seed in (0, 1)}
    measure = pwself["measures"][0]
    assert measure["by_seed"] == {str(seed): value for seed, value in top1.items()}
    assert measure["difference"]["mean"] == pytest.approx(sum(top1[s] - against[s] for s in (0, 1)) / 2)
    table = (whole / "table.md").read_text()
    assert "| DINO " in table and "| PW-Self " in table and "(n = 2)" in table


def test_published_numbers_do_not_stand_beside_a_study_that_only_has_the_name_of_a_set(whole, colors):
    study = parse_study(yaml.safe_dump(TINY | {"name": "imagenet1k"}))
    folder = study_folder(study, whole, str(colors))
    summary = summarize(folder, runs_of(study))
    assert folder.results(runs_of(study)) and "## Published" not in study_text(summary)
    empty = dataclasses.replace(summary, folder=dataclasses.replace(folder, root=whole / "nothing"))
    assert "## Published" in study_text(empty)


def test_the_figure_has_every_variant_but_the_untrained_one_beside_the_reference(whole, tmp_path, patchssl):
    answer = patchssl("plot", "study", whole, "--out", tmp_path / "study.svg")
    assert answer.code == 0, answer.err
    drawn = (tmp_path / "study.svg").read_text("utf-8")
    dino, = (v for v in json.loads((whole / "study.json").read_text())["variants"] if v["variant"] == "dino")
    for measure in dino["measures"]:
        assert f"<!-- dino: {100 * measure['mean']:.1f} % -->" in drawn
    assert "<!-- pwself -->" in drawn and "untrained" not in drawn
    answer = patchssl("plot", "study", whole, "--compare", "pwself", "--out", tmp_path / "study.svg")
    assert answer.code == 2 and "'pwself'" in answer.err and "dino" in answer.err  # nobody is compared with it


def test_what_a_figure_cannot_be_made_of_is_said(tmp_path, patchssl):
    answer = patchssl("plot", "study", tmp_path)
    assert (answer.code, "has no study.json" in answer.err) == (2, True)
    (tmp_path / "study.json").write_text('{"reference": "dino", "variants": [{"variant": "dino", "measures": 3}]}')
    answer = patchssl("plot", "study", tmp_path)
    assert (answer.code, "study.json is damaged (variants.0.measures" in answer.err) == (4, True)
    (tmp_path / "study.json").write_text('{"reference": "dino", "variants": []}')
    answer = patchssl("plot", "study", tmp_path)
    assert (answer.code, "nothing to draw" in answer.err) == (2, True)


def test_what_is_bold_in_the_tables_is_significant_in_the_json():
    """Five paired seeds, one variant 10 points better in every one, one equal but for noise."""
    contrasts = [["dino", "pwself"], ["pwself", "pwself-random-matches"]]  # the latter was not run
    study = parse_study(yaml.safe_dump(TINY | {"seeds": [0, 1, 2, 3, 4], "contrasts": contrasts}))
    folder = study_folder(study, Path("nowhere"), "textures")
    base = {seed: 0.3 + 0.01 * seed for seed in study.seeds}
    values = {"dino": base, "pwself": {seed: value + 0.1 + 0.001 * seed for seed, value in base.items()},
              "untrained": {seed: value + (-1) ** seed * 0.01 for seed, value in base.items()}}
    measure = Measure("20-NN top-1", "knn", "textures", "native", "top1@20", values)
    runs = {name: [run for run in runs_of(study) if run.variant == name] for name in values}
    summary = StudySummary(folder, runs, {}, [measure], [], {}, tried=2)
    said = {v["variant"]: v["measures"][0]["difference"] for v in summary.as_dict()["variants"]}
    assert {name: gap and gap["significant"] for name, gap in said.items()} == {
        "dino": None, "pwself": True, "untrained": False}
    assert study_text(summary).count("**+10.2 [") == 1
    contrast, = summary.as_dict()["contrasts"]
    assert contrast["table"] == "Differences between variants"
    assert (contrast["variants"], contrast["significant"], contrast["n"]) == (["dino", "pwself"], True, 5)
    assert contrast["mean"] == pytest.approx(-0.102)
    assert re.search(r"\| dino +\| pwself +\| \*\*-10\.2 \[", study_text(summary))


@pytest.fixture
def ablated(whole, colors, tmp_path, patchssl):
    """The folder of the tiny study after one run of its ablation was asked for, and what the command said."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    answer = patchssl("study", save(tmp_path / "tiny.yaml", ablated="pwself"), "--data", colors, "--out", out,
                      "--only", "pwself-random-matches", "--only-seed", 1)
    assert answer.code == 0, answer.err
    return out, answer


def test_ablations_are_set_beside_the_variant_they_change_in_a_table_of_their_own(ablated, whole, tmp_path, patchssl):
    out, _ = ablated
    found = {v["variant"]: v for v in json.loads((out / "study.json").read_text())["variants"]}
    assert {name: v["compared_with"] for name, v in found.items()} == {
        "untrained": "dino", "dino": None, "pwself": "dino", "pwself-random-matches": "pwself"}
    ablation, pwself = (found[name]["measures"][0] for name in ("pwself-random-matches", "pwself"))
    assert (ablation["difference"]["n"], ablation["title"]) == (1, pwself["title"])
    assert ablation["difference"]["mean"] == pytest.approx(ablation["by_seed"]["1"] - pwself["by_seed"]["1"])
    before, now = ((folder / "study.md").read_text() for folder in (whole, out))
    core = "## Differences to dino, paired by seed"
    assert now.partition(core)[2].partition("##")[0] == before.partition(core)[2].partition("##")[0]
    section = now.partition("## Ablations: differences to pwself, paired by seed")[2].partition("##")[0]
    assert section.count("\n| pwself-random-matches") == 1 and "\n| pwself " not in section
    assert "\n| pwself-random-matches" in now.partition("## Ablations: differences to dino, paired by seed")[2]
    answer = patchssl("plot", "study", out, "--compare", "pwself", "--out", tmp_path / "study.svg")
    assert answer.code == 0, answer.err
    drawn = (tmp_path / "study.svg").read_text("utf-8")
    assert "<!-- pwself-random-matches -->" in drawn and "<!-- dino" not in drawn


def test_the_tables_keep_what_a_call_did_not_ask_for(ablated, whole, colors, tmp_path, patchssl):
    out, answer = ablated
    assert "1 runs, 0 done" in answer.err
    assert "7 of 7 cells" in (out / "study.md").read_text()
    assert numbers(whole).items() < numbers(out).items()
    text = (out / "study.md").read_bytes()
    again = patchssl("study", tmp_path / "tiny.yaml", "--data", colors, "--out", out)
    assert again.code == 0 and "6 done, 0 failed, 0 to run" in again.err
    assert (out / "study.md").read_bytes() == text


def test_tests_of_ablations_do_not_weaken_those_of_the_core():
    """p = 0.03 passes alone and not among two: an ablation beside it must not make it one of two."""
    contrasts = [["pwself", "dino"], ["pwself-random-matches", "dino"]]
    study = parse_study(yaml.safe_dump(TINY | {"seeds": [0, 1, 2, 3, 4], "untrained": False, "ablated": "dino",
                                               "contrasts": contrasts}))
    base = dict.fromkeys(study.seeds, 0.3)
    gaps = [0.01, 0.02, 0.005, 0.02, 0.003]
    better = {seed: 0.3 + gap for seed, gap in enumerate(gaps)}
    p = stats.ttest_1samp(gaps, 0).pvalue
    assert 0.025 < p < 0.05
    values = {"dino": base, "pwself": better, "pwself-random-matches": better}
    runs = {name: [run for run in runs_of(study, ablations=True) if run.variant == name] for name in values}
    measure = Measure("20-NN top-1", "knn", "textures", "native", "top1@20", values)
    summary = StudySummary(study_folder(study, Path("nowhere"), "textures"), runs, {}, [measure], [], {}, tried=3)
    found = summary.as_dict()
    said = {v["variant"]: v["measures"][0]["difference"] for v in found["variants"]}
    assert said["pwself"]["significant"] and said["pwself-random-matches"]["significant"]
    assert [(c["variants"], c["significant"]) for c in found["contrasts"]] == [(pair, True) for pair in contrasts]
    headings = re.findall(r"^## (.*), paired by seed$", study_text(summary), re.MULTILINE)
    assert headings == ["Differences to dino", "Differences between variants", "Ablations: differences to dino",
                        "Ablations: differences between variants"]
    assert study_text(summary).count("**+1.2 [") == len(headings)


def test_a_second_call_does_nothing_and_says_the_same(whole, colors, patchssl):
    file = whole.parent / "tiny.yaml"
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.json") if path.parent != whole}
    text = (whole / "study.md").read_bytes()
    answer = patchssl("study", file, "--data", colors, "--out", whole)
    assert answer.code == 0
    assert "6 done, 0 failed, 0 to run" in answer.err and "run 1 of" not in answer.err
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*.json") if path.parent != whole}
    assert (whole / "study.md").read_bytes() == text


def test_one_run_made_again_gives_the_same_record(whole, colors, tmp_path, patchssl):
    file = whole.parent / "tiny.yaml"
    answer = patchssl("study", file, "--data", colors, "--out", tmp_path / "again", "--only", "pwself",
                      "--only-seed", 1)
    assert answer.code == 0, answer.err
    again = numbers(tmp_path / "again")
    assert list(again) == [("pwself-1", "knn")]
    assert again["pwself-1", "knn"] == numbers(whole)["pwself-1", "knn"]


def test_another_recipe_in_the_same_folder_is_refused_by_name(whole, colors, tmp_path, patchssl):
    file = save(tmp_path / "tiny.yaml", settings=SMALL | {"optim.lr": 0.5, "run.log_seconds": 3})
    answer = patchssl("study", file, "--data", colors, "--out", whole)
    assert answer.code == 2
    assert "optim.lr was 0.008, now 0.5" in answer.err and "log_seconds" not in answer.err


@pytest.mark.slow
def test_all_benchmarks_on_a_share_of_train_that_is_held_out(tmp_path, colors, patchssl):
    file = save(tmp_path / "tiny.yaml", split="validation", validation_share=0.5, seeds=[3], untrained=False,
                variants={"dino": TINY["variants"]["dino"]}, tried=4, copydays={"originals": 20},
                evaluations=["knn", "linear", "patches", "copydays"])
    answer = patchssl("study", file, "--data", colors, "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    records = numbers(tmp_path / "out")
    assert sorted(task for _, task in records) == ["copydays", "knn", "linear", "patches"]
    assert records["dino-3", "knn"].dataset == "colors-holdout"
    assert records["dino-3", "knn"].detail["num_test"] == 24
    assert json.loads((tmp_path / "out" / "runs" / "dino-3" / "run.json").read_text())["dataset"] == "colors-holdout"
    found = json.loads(answer.out)
    assert found["configurations_tried"] == 5 and found["split"] == "validation"
    assert "the test images were not opened" in (tmp_path / "out" / "study.md").read_text()


def test_too_few_images_for_copy_detection_are_said_before_the_first_cell(tmp_path, colors, patchssl):
    answer = patchssl("study", save(tmp_path / "tiny.yaml", evaluations=["knn", "copydays"]), "--data", colors,
                      "--out", tmp_path / "out")
    assert answer.code == 4 and "has 12 images to score on, and copy detection needs 20 originals" in answer.err
    assert not (tmp_path / "out").exists()


def test_originals_too_small_for_copies_are_enlarged_in_whole(tmp_path):
    from PIL import Image
    from small_runs import make_images

    write_originals(make_images(5), tmp_path / "originals", 3, seed=0)
    sizes = [Image.open(path).size for path in sorted((tmp_path / "originals").iterdir())]
    assert sizes == [(80, 80)] * 3


@pytest.mark.slow
def test_a_run_that_diverges_is_named_the_rest_goes_on_and_the_code_says_so(tmp_path, colors, patchssl):
    wild = {"method": "dino", "photometric.patch_share": 0, "optim.lr": 1e30, "optim.clip_grad": 0}
    file = save(tmp_path / "tiny.yaml", variants={"wild": wild, "dino": TINY["variants"]["dino"]}, seeds=[0],
                untrained=False)
    for _ in range(2):  # the second time nothing is run: it would end the same way
        answer = patchssl("study", file, "--data", colors, "--out", tmp_path / "out")
        assert answer.code == 1
        assert "failed: wild-0: the loss is " in answer.out
        assert list(numbers(tmp_path / "out")) == [("dino-0", "knn")]
    assert "1 failed, 0 to run" in answer.err
    assert "Failed: wild-0" in (tmp_path / "out" / "study.md").read_text()


# several processes, and what happens to them

def test_a_run_that_another_process_has_is_left_to_it(tmp_path, colors):
    asked = command.ask(str(save(tmp_path / "tiny.yaml", seeds=[0])), tmp_path / "out", str(colors), only=(), seeds=(),
                        ablations=False, device="cpu", planning=False)
    with asked.folder.claimed("dino-0") as mine:
        assert mine
        answer = command.run(asked, QUIET)
    assert answer.progress.busy == ["dino-0"]
    assert answer.progress.done == ["pwself-0", "untrained-0"]
    assert "other processes are at dino-0" in answer.text()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, colors):
    folder = study_folder(load_study(save(tmp_path / "tiny.yaml")), tmp_path / "out", str(colors))
    (folder.root / "locks").mkdir(parents=True)
    code = ("import sys, time\nfrom pathlib import Path\nfrom patchssl.runtime.lock import locked\n"
            "with locked(Path(sys.argv[1]), file='dino-0.lock'):\n    print(True, flush=True)\n    time.sleep(600)\n")
    process = subprocess.Popen([sys.executable, "-c", code, folder.root / "locks"], text=True,
                               stdout=subprocess.PIPE)
    assert process.stdout.readline() == "True\n"
    with folder.claimed("dino-0") as mine:
        assert not mine
    process.kill()
    process.communicate()
    with folder.claimed("dino-0") as mine:
        assert mine


@pytest.mark.slow
def test_two_processes_share_the_runs_and_end_as_one_would(tmp_path, colors, whole):
    file = save(tmp_path / "tiny.yaml")
    both = [start(file, "--data", colors, "--out", tmp_path / "out", "--only-seed", 1, cwd=tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    names = [run.name for run in runs_of(load_study(file), (), [1])]
    done = [[name for name in names if f"{name}: run " in err] for _, err in said]
    assert sorted(done[0] + done[1]) == sorted(names)  # each by one of them
    assert numbers(tmp_path / "out") == {key: record for key, record in numbers(whole).items() if key[0] in names}


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_and_ends_as_if_it_had_not_been(tmp_path, colors, whole, patchssl):
    file = save(tmp_path / "tiny.yaml", settings=SMALL | {"run.checkpoint_minutes": 1e-9})
    process = start(file, "--data", colors, "--out", tmp_path / "out", "--device", "cpu", cwd=tmp_path)
    wait_for(tmp_path / "out" / "runs" / "pwself-0" / "checkpoint.pth", process)
    process.kill()
    process.communicate()
    left = numbers(tmp_path / "out")
    assert 1 <= len(left) < 6
    answer = patchssl("study", file, "--data", colors, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert "dino-0: run" not in answer.err and "resuming" in answer.err
    assert numbers(tmp_path / "out") == numbers(whole)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, colors):
    file = save(tmp_path / "tiny.yaml", settings=SMALL | {"optim.epochs": 100000}, seeds=[0])
    out = tmp_path / "out"
    process = start(file, "--data", colors, "--out", out, "--only", "dino", cwd=tmp_path)
    wait_for(out / "runs" / "dino-0" / "log.jsonl", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "saved" in err and "resume the study by the same command" in err and "Traceback" not in err
    assert (out / "runs" / "dino-0" / "checkpoint.pth").is_file()
    assert not (out / "cells").exists()


@pytest.mark.slow
def test_what_goes_wrong_in_one_run_is_named_and_tried_again(tmp_path, colors, monkeypatch):
    asked = command.ask(str(save(tmp_path / "tiny.yaml", seeds=[0])), tmp_path / "out", str(colors), only=(), seeds=(),
                        ablations=False, device="cpu", planning=False)
    with monkeypatch.context() as patch:
        whole, tried = module.pretrain_with_probe, []

        def out_of_memory(recipe, *arguments, **options):
            tried.append(recipe.method)
            if recipe.method == "dino":
                raise torch.OutOfMemoryError("none left")
            return whole(recipe, *arguments, **options)

        patch.setattr(module, "pretrain_with_probe", out_of_memory)
        answer = command.run(asked, QUIET)
    assert tried == ["dino", "pwself"]
    assert answer.progress.failed == {"dino-0": "OutOfMemoryError: none left"}
    assert answer.progress.done == ["pwself-0", "untrained-0"]
    assert command.run(asked, QUIET).progress.failed == {}


@pytest.mark.slow
def test_ctrl_c_while_a_run_is_scored_costs_its_scoring_only(tmp_path, colors, monkeypatch):
    asked = command.ask(str(save(tmp_path / "tiny.yaml")), tmp_path / "out", str(colors), only=("dino",), seeds=(0,),
                        ablations=False, device="cpu", planning=False)

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "run_suite", stop)
        with pytest.raises(Interrupted, match="while dino-0 was scored, nothing is lost") as told:
            command.run(asked, QUIET)
    assert told.value.exit_code == 130
    trained = (asked.folder.run_folder(asked.runs[0]) / "checkpoint.pth").stat().st_mtime_ns
    assert command.run(asked, QUIET).progress.done == ["dino-0"]
    assert (asked.folder.run_folder(asked.runs[0]) / "checkpoint.pth").stat().st_mtime_ns == trained


def test_a_damaged_outcome_is_named_and_the_run_scored_again(tmp_path, colors, patchssl, caplog):
    file = save(tmp_path / "tiny.yaml")
    (tmp_path / "out" / "cells").mkdir(parents=True)
    (tmp_path / "out" / "cells" / "dino-0.json").write_text('{"variant": "dino"}')
    answer = patchssl("study", file, "--data", colors, "--out", tmp_path / "out", "--dry-run")
    assert (answer.code, "6 runs, 0 done" in answer.out) == (0, True)
    assert "dino-0.json is damaged (seed: Field required), so the run counts as not scored" in caplog.text


# what is counted

def test_configurations_are_counted_whatever_their_seeds_in_searches_too(tmp_path, whole, colors):
    assert configurations(whole) == 2
    assert configurations(tmp_path / "nowhere") == 0
    with pytest.raises(UsageError, match="searches"):
        parse_study(yaml.safe_dump(TINY | {"searches": ["../x"]}))
    study = parse_study(yaml.safe_dump(TINY | {"searches": [whole.name], "tried": 10}))
    folder = study_folder(study, tmp_path / "final", str(colors))
    shutil.copytree(whole, tmp_path / whole.name)
    assert command.summarize(folder, runs_of(study)).tried == 10 + 2
    shutil.copytree(whole / "runs" / "dino-0", tmp_path / "final" / "runs" / "dino-7")  # the same recipe once more
    assert command.summarize(folder, runs_of(study)).tried == 10 + 2


def test_settings_that_an_older_version_did_not_know_make_no_other_configuration(tmp_path):
    for name, recipe in {"a": {"method": "pwself"}, "b": {"method": "pwself", "masks": {"matched": False}},
                         "c": {"method": "pwself", "masks": {"matched": True}}, "d": {"method": "mine"}}.items():
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"recipe": recipe}))
    assert configurations(tmp_path) == 3
    (tmp_path / "runs" / "a" / "run.json").write_text("[")
    with pytest.raises(DataError, match=r"run\.json is damaged"):
        configurations(tmp_path)


def without_patchwise(recipe):
    """A recipe as versions before `patchwise` wrote it down."""
    color = {key: value for key, value in recipe["photometric"].items() if key not in ("patchwise", "patch")}
    return recipe | {"photometric": color}


def test_color_of_before_patchwise_is_another_configuration_than_todays(tmp_path):
    """A share of views without `patchwise` was one of `replace`; of none, it is what `none` is today."""
    recipes = [("old", {"patch_share": 1.0}), ("replace", {"patchwise": "replace"}), ("layered", {}),
               ("old share", {"patch_share": 0.5}), ("old none", {"patch_share": 0}),
               ("none", {"patchwise": "none", "patch_share": 0}), ("layered of none", {"patchwise": "layered",
                                                                                       "patch_share": 0})]
    counts = []
    for name, color in recipes:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"recipe": {"method": "pwself", "photometric": color}}))
        counts.append(configurations(tmp_path))
    assert counts == [1, 1, 2, 3, 4, 4, 4]


@each("variant, refused", [("pwself", True), ("dino", False), ("whole", False)])
def test_a_run_of_before_patchwise_is_not_taken_for_a_layered_one(tmp_path, variant, refused):
    study = parse_study(yaml.safe_dump(TINY | {"variants": {
        "dino": {"method": "dino", "photometric.patch_share": 0}, "pwself": {"photometric.patchwise": "layered"},
        "whole": {"photometric.patch_share": 0}}}))
    folder = study_folder(study, tmp_path, "textures")
    run = next(run for run in runs_of(study) if run.variant == variant)
    folder.run_folder(run).mkdir(parents=True)
    (folder.run_folder(run) / "run.json").write_text(json.dumps(
        {"recipe": without_patchwise(run.recipe.model_dump(mode="json")), "data": folder.data}))
    if refused:
        with pytest.warns(FutureWarning, match="patchwise"), pytest.raises(
                UsageError, match=r"photometric\.patchwise was replace, now layered"):
            folder.begun(run)
    else:
        assert folder.begun(run)


def test_a_finished_run_without_its_log_is_said(tmp_path, colors, whole):
    shutil.copytree(whole, tmp_path / "out")
    study = parse_study(yaml.safe_dump(TINY))
    folder = study_folder(study, tmp_path / "out", str(colors))
    run = runs_of(study)[0]
    (folder.run_folder(run) / "log.jsonl").unlink()
    with pytest.raises(DataError, match=r"has no log\.jsonl any more"):
        module.do_run(folder, run, device="cpu", console=QUIET)


def test_an_outcome_is_read_as_it_was_written(tmp_path, colors):
    folder = study_folder(load_study(save(tmp_path / "tiny.yaml")), tmp_path / "out", str(colors))
    run = runs_of(folder.study)[0]
    assert folder.outcome(run) is None
    kept = folder.keep(run, weights="ab" * 32, train_seconds=1.5, score_seconds=0.25, images=96, updates=12)
    assert folder.outcome(run) == kept and isinstance(kept, RunOutcome) and kept.seconds == 1.75
