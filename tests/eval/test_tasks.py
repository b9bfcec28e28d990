"""A benchmark is data: what is registered is seen by commands, tables, studies and page, with no other file touched."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from patchssl import load_backbone
from patchssl.cli.doctor import diagnose
from patchssl.eval.cells import Cell
from patchssl.eval.protocols import Protocol
from patchssl.eval.records import joined, make_record
from patchssl.eval.score import evaluate
from patchssl.eval.tasks import ComputeOptions, Task, all_tasks, find_task, register, registered, study_measures
from patchssl.report.tables.seeds import measures_of
from patchssl.runtime.errors import DataError, UsageError
from patchssl.study.config import parse_study

NETWORK = "random:vit_tiny_patch16_224?img_size=16&patch_size=8&depth=1&embed_dim=24"
PLAN = Protocol("wide", "plain", 1, {"what": "share of images that are wider than high"})


def find_wide(backbone, place, options):
    """Labels are not needed, but here they are asked for, so that something can be missing."""
    def make():
        _, val = place.labeled_pair
        return Cell("wide", place.data, val.name, PLAN, len(val), backbone.weights_sha256, place.decode_seconds,
                    lambda: joined([val.fingerprint]))

    yield f"wide on {place.data}", make


def score_wide(backbone, data, protocol, compute, *, looked_at=False):
    from patchssl.data import open_pair

    _, val = open_pair(data)
    compute.say(f"{len(val)} images are looked at")
    shapes = [val.pixels(index).shape for index in range(len(val))]
    return make_record(backbone, PLAN, dataset=val.name,
                       fingerprints=(val.fingerprint,), detail={}, device="cpu", duration=0.1,
                       metrics={"share": sum(width > height for height, width, _ in shapes) / len(shapes)})


TOY = Task(name="wide", titles={"wide": "Wide images"}, protocols=("plain",), headlines=("share",),
           words={"share": "images wider than high"}, measures={"share": "wide images"}, needs="images",
           find=find_wide, score=score_wide)


@pytest.fixture
def toy():
    with registered(TOY):
        yield


def test_a_registered_task_has_a_command_a_table_and_a_place_on_the_page(toy, patchssl, colors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "Wide images: needs images." in patchssl("eval", "--help").out
    alone = patchssl("eval", "wide", NETWORK, "--data", colors, "--json")
    assert alone.code == 0, alone.err
    assert json.loads(alone.out)["metrics"] == {"share": 1.0}
    assert "12 images are looked at" in alone.err
    tables = patchssl("tables").out
    assert "Wide images" in tables and "100.0" in tables
    page = patchssl("report", "--results", "results", "--out", "page")
    assert page.code == 0, page.err
    assert "Wide images" in Path("page", "index.html").read_text()


def test_a_registered_task_is_run_by_the_suite_and_by_evaluate(toy, patchssl, colors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = patchssl("eval", "all", NETWORK, "--data", colors, "--task", "wide", "--task", "knn")
    assert ended.code == 0, ended.err
    assert "images wider than high 100.0%" in ended.out.replace("  ", " ").replace("  ", " ")
    again = patchssl("eval", "all", NETWORK, "--data", colors, "--task", "wide", "--dry-run", "--json")
    assert [cell["task"] for cell in json.loads(again.out)["done"]] == ["wide"]
    frame = evaluate(load_backbone(NETWORK), colors, ["wide"])
    assert frame[["task", "metric", "value"]].values.tolist() == [["wide", "share", 1.0]]
    with pytest.raises(DataError, match="wide on"):
        evaluate(load_backbone(NETWORK), colors / "train", ["wide"])


def test_a_registered_task_can_be_an_evaluation_of_a_study(toy, colors):
    study = parse_study("name: toy\nrecipe: quickstart\nreference: a\nvariants: {a: }\nseeds: [0]\n"
                        "evaluations: [wide]\n")
    assert study.evaluations == ("wide",)
    record = score_wide(load_backbone(NETWORK), str(colors), None, ComputeOptions())
    (measure,) = measures_of([replace(record, variant="a", seed=0)])
    assert (measure.title, measure.values) == ("wide images", {"a": {0: 1.0}})


def test_the_doctor_names_registered_tasks(toy):
    (found,) = [finding for finding in diagnose({}) if finding.what == "benchmarks"]
    assert found.value == "knn, linear, copydays, revisited, wide; on request patches"


def test_outside_of_the_block_it_is_unknown_again(patchssl, colors):
    assert "wide" not in all_tasks() and ("wide", "share") not in study_measures()
    with pytest.raises(UsageError, match="task 'wide' is unknown; choose one of: copydays, knn, linear"):
        find_task("wide")
    with pytest.raises(UsageError, match="evaluation 'wide' is unknown"):
        parse_study("name: toy\nrecipe: quickstart\nreference: a\nvariants: {a: }\nseeds: [0]\nevaluations: [wide]\n")
    assert patchssl("eval", "wide", NETWORK, "--data", colors).code == 2


def test_names_are_taken_once():
    for name, title in (("knn", "own"), ("own", "rparis6k")):
        with pytest.raises(UsageError, match="is registered already"):
            register(Task(**{**vars(TOY), "name": name, "titles": {title: "x"}}))
    with pytest.raises(UsageError, match="names no protocol"):
        register(Task(**{**vars(TOY), "protocols": ()}))
    assert len(all_tasks()) == 5


def test_a_task_named_twice_runs_once_and_unknown_ones_are_named_first(patchssl, colors):
    asked = patchssl("eval", "all", NETWORK, "--data", colors, "--dry-run", "--json", "--task", "linear", "--task",
                     "knn",
                     "--task", "knn")
    assert [cell["task"] for cell in json.loads(asked.out)["run"]] == ["knn", "linear"]
    wrong = patchssl("eval", "all", NETWORK, "--data", colors, "--task", "bogus", "--index", "IVF4,Flat")
    assert "task 'bogus' is unknown" in wrong.err
