"""The quickstart end to end: on a small folder in seconds, and shortened on the embedded textures."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

import patchssl as package
from patchssl.eval.records import read_results
from patchssl.pretrain.recipe import dump_recipe, load_recipe
from patchssl.workflows.quickstart import untrained_copy

pytestmark = pytest.mark.slow

FIGURES = {"curves.png", "attention.png", "matches.png", "views.png"}
METHODS = {"Raw pixels", "Random network", "PW-Self"}


def table_rows(path):
    """Method -> 20-NN top-1 in percent, from the table as CSV."""
    table = pd.read_csv(path)
    return table[table.metric == "top1@20"].set_index("method")["percent"].to_dict()


def check_all_is_there(out):
    """Records, table, figures and run of a finished quickstart in `out`; returns the records by method."""
    records, problems = read_results(out / "results")
    assert problems == []
    by_method = {record.method: record for record in records}
    assert set(by_method) == {"pixels", "random", "pwself"} and len(records) == 3
    assert len({record.protocol_fingerprint for record in records}) == 1
    assert len({record.dataset_fingerprint for record in records}) == 1
    table = table_rows(out / "table.csv")
    assert set(table) == METHODS
    for method, name in (("pixels", "Raw pixels"), ("random", "Random network"), ("pwself", "PW-Self")):
        assert table[name] == pytest.approx(100 * by_method[method].metrics["top1@20"], abs=1e-4)
    markdown = (out / "table.md").read_text()
    assert all(name in markdown for name in METHODS)
    assert {path.name for path in (out / "figures").iterdir()} == FIGURES
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (out / "figures").iterdir())
    assert {"checkpoint.pth", "recipe.yaml", "run.json", "log.jsonl"} <= {path.name for path in (out / "run").iterdir()}
    return by_method


@pytest.fixture(scope="module")
def finished(colors, tiny, tmp_path_factory):
    """A finished quickstart on `colors`: its folder and the words it was asked with."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    asked = [f"data={colors}", *tiny, "--out", str(out)]
    done = subprocess.run([sys.executable, "-m", "patchssl", "quickstart", *asked, "--json"], capture_output=True,
                          text=True, check=False, env=environment(), cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return out, asked, json.loads(done.stdout)


def environment():
    return os.environ | {"PYTHONPATH": str(Path(package.__file__).parents[1])}


def test_all_is_there_and_the_summary_says_where(finished):
    out, _, summary = finished
    records = check_all_is_there(out)
    assert summary["run"] == str(out / "run")
    assert all(Path(path).is_file() for path in summary["files"])
    assert FIGURES | {"table.md", "table.csv"} <= {Path(path).name for path in summary["files"]}
    top1 = {name: record.metrics["top1@20"] for name, record in records.items()}
    assert summary["top1"] == {"raw pixels": top1["pixels"], "random network": top1["random"],
                               "pretrained": top1["pwself"]}
    assert summary["gain"] == pytest.approx(top1["pwself"] - top1["random"])


def test_the_random_network_is_the_one_that_the_run_began_with(finished, colors):
    from patchssl.data.open import open_images
    from patchssl.pretrain.run.setup import make_engine

    out, asked, _ = finished
    recipe = load_recipe("quickstart", [word for word in asked if "=" in word])
    fresh = make_engine(recipe, open_images(colors), 0, "cpu").teacher.backbone.eval()
    images = torch.randn(2, 3, 32, 32)
    twin = untrained_copy(out / "run", torch.device("cpu"))
    assert torch.equal(twin.features(images), fresh.features(images))
    assert not torch.equal(twin.features(images), package.load_backbone(str(out / "run")).features(images))


def test_running_it_again_keeps_the_run(finished, patchssl):
    out, asked, _ = finished
    weights, table = (out / "run" / "checkpoint.pth").read_bytes(), (out / "table.md").read_bytes()
    answer = patchssl("quickstart", *asked)
    assert answer.code == 0, answer.err
    assert (out / "run" / "checkpoint.pth").read_bytes() == weights
    assert (out / "table.md").read_bytes() == table
    assert "| PW-Self" in answer.out and re.search(r"gained [+-]\d+\.\d points of 20-NN top-1", answer.out)
    for path in (out / "run", out / "table.md", out / "figures" / "attention.png"):
        assert str(path) in answer.out


@pytest.mark.parametrize(("change", "named"), [
    (["optim.epochs=3"], "optim.epochs was 2, now 3"),
    (["--seed", "1"], "seed was 0, now 1"),
    (["loss.rule=paper", "optim.lr=0.5"], "loss.rule was center, now paper; optim.lr was"),
])
def test_another_recipe_in_the_same_folder_is_refused_by_name(finished, patchssl, change, named):
    out, asked, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    answer = patchssl("quickstart", *asked, *change)
    assert (answer.code, answer.out) == (2, "")
    assert named in answer.err and "another --out" in answer.err
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_data_that_cannot_be_scored_is_refused_before_pretraining(colors, photo, tmp_path, patchssl, tiny):
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for index in range(10):
            (tmp_path / "data" / split / f"{index}.png").write_bytes(photo.read_bytes())
    answer = patchssl("quickstart", f"data={tmp_path / 'data'}", *tiny, "--out", tmp_path / "out")
    assert answer.code == 4
    assert "needs labels" in answer.err and not (tmp_path / "out").exists()


def test_ctrl_c_then_the_same_command_goes_on_to_the_same_weights(finished, tmp_path, patchssl):
    _, asked, _ = finished
    out = tmp_path / "out"
    asked = [*asked[:-1], str(out), "optim.epochs=40"]
    process = subprocess.Popen([sys.executable, "-m", "patchssl", "quickstart", *asked], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=environment(), cwd=tmp_path)
    log = out / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, ""), err
    assert "saved" in err and not (out / "table.md").exists()
    stopped = int(re.search(r"at update (\d+) of 240", err)[1])
    answer = patchssl("quickstart", *asked)
    assert answer.code == 0, answer.err
    assert f"at update {stopped} of 240" in answer.err
    check_all_is_there(out)
    through = patchssl("pretrain", "quickstart", *asked[:-3], "optim.epochs=40", "--out", tmp_path / "through")
    assert through.code == 0, through.err
    one, other = (package.load_backbone(str(run)) for run in (out / "run", tmp_path / "through"))
    assert one.weights_sha256 == other.weights_sha256
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 241))


def test_a_shortened_quickstart_on_the_textures(tmp_path, patchssl, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["optim.epochs=1", "max_images=512", "head.num_prototypes=64", "run.workers=1", "run.knn_every_epochs=0"]
    answer = patchssl("quickstart", *short)
    assert answer.code == 0, answer.err
    records = check_all_is_there(tmp_path / "quickstart")
    assert 0.10 <= records["pixels"].metrics["top1@20"] <= 0.18  # the difficulty of the set is fixed
    assert records["random"].metrics["top1@20"] <= 0.16
    assert records["pwself"].detail["num_train"] == 6000 and records["pwself"].detail["num_test"] == 1500
    recipe = (tmp_path / "quickstart" / "run" / "recipe.yaml").read_text()
    assert recipe == dump_recipe(load_recipe("quickstart", short))
