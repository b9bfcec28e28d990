"""What must not end a run: side measurements that fail, images that cannot be read, folders that moved."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patchssl.data.textures import textures
from patchssl.models.checkpoint import load_checkpoint
from patchssl.pretrain.recipe import parse_recipe
from patchssl.pretrain.run.log import MetricLog, TensorBoardWriter, read_rows
from patchssl.pretrain.run.start import pretrain, resume
from patchssl.runtime.errors import DataError, FolderInUse, NotFiniteError, UsageError
from patchssl.runtime.lock import locked
from patchssl.workflows.probe import make_probe

RECIPE = """
model: {arch: vit_tiny_patch16_224, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 3, drop_path: 0}
views: {num_global: 2, num_local: 0, global_size: 24, local_size: 16}
photometric: {patchwise: none, blur: [0, 0, 0]}
head: {num_prototypes: 32, hidden: 32, bottleneck: 16, freeze_last_layer_epochs: 0}
optim: {epochs: 3, batch_size: 10, warmup_epochs: 0, lr: 0.01}
run: {workers: 0, threads: 1, log_seconds: 1.0e-9, knn_every_epochs: 1}
"""


class Heard:
    """Progress that remembers what is said."""

    def __init__(self):
        self.said = []

    def say(self, sentence):
        self.said.append(sentence)

    def update(self, done, total, row):
        pass


def recipe(*overrides):
    return parse_recipe(RECIPE, overrides)


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path):
    """40 textures in two folders, 20 of each class."""
    for number, pixels in enumerate(textures("val")[0][::37][:40]):
        folder = tmp_path / "images" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return tmp_path / "images"


def damage(folder, *names):
    for name in names:
        path = next(folder.rglob(name))
        path.write_bytes(path.read_bytes()[:60])


# a k-NN that fails

@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), DataError("no images"),
                                   RuntimeError("x"), OSError(28, "No space left on device")])
def test_a_knn_that_fails_is_said_and_logged_and_the_run_goes_on(data, fault):
    def probe(backbone):
        assert (Path("run") / "checkpoint.pth").exists()  # saved before
        raise fault

    heard = Heard()
    pretrain(recipe("run.tensorboard=true"), data, "run", progress=heard, make_knn=lambda *_: probe)
    assert load_checkpoint(Path("run"))["steps_done"] == 12
    failed = {row["step"]: row["knn_failed"] for row in read_rows(Path("run/log.jsonl")) if "knn_failed" in row}
    assert [*failed] == [4, 8, 12]
    assert sum("the run goes on without it" in sentence for sentence in heard.said) == 3
    resume("run", make_knn=lambda *_: lambda _: 0.5)  # made up for
    assert read_rows(Path("run/log.jsonl"))[-1]["knn_top1"] == 0.5


def test_the_knn_leaves_out_what_cannot_be_read(data, caplog):
    damage(data, "03.png", "10.png")
    heard = Heard()
    pretrain(recipe("run.unreadable_share=0.1"), data, "run", progress=heard, make_knn=make_probe)
    assert all(0 <= row["knn_top1"] <= 1 for row in read_rows(Path("run/log.jsonl")) if row["step"] % 4 == 0)
    left_out = [record.args for record in caplog.records if "the k-NN in training leaves out" in record.msg]
    assert sum(bad for bad, _ in left_out) == 2  # once for each part, not in every epoch
    assert not any("knn_failed" in row for row in read_rows(Path("run/log.jsonl")))


# logs that fail

def test_rows_wait_for_a_disk_that_is_full(tmp_path, caplog):
    book = MetricLog(tmp_path, 0, tensorboard=False)
    book.append({"step": 1})
    (tmp_path / "log.jsonl").rename(tmp_path / "kept")
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    for step in (2, 3):
        book.append({"step": step})
    book.complete_last({"knn_top1": 0.5})
    assert len(caplog.records) == 1 and "its rows wait until it can be" in caplog.text
    (tmp_path / "kept").rename(tmp_path / "log.jsonl")
    book.append({"step": 4})
    book.close()
    assert read_rows(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3, "knn_top1": 0.5}, {"step": 4}]


def test_tensorboard_that_fails_is_given_up(data, caplog, monkeypatch):
    def add(self, row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardWriter, "add", add)
    pretrain(recipe("run.tensorboard=true", "run.knn_every_epochs=0"), data, "run")
    assert len(read_rows(Path("run/log.jsonl"))) == 12
    assert caplog.text.count("TensorBoard's files lack what comes from now on") == 1


# images that cannot be read

def test_too_many_unreadable_images_save_the_run_and_every_advice_leads_on(data):
    whole = data.parent / "whole"
    shutil.copytree(data, whole)
    damage(data, "05.png", "06.png")
    asked = recipe("run.knn_every_epochs=0", "run.unreadable_share=0.03", "optim.epochs=8")
    with pytest.raises(DataError) as caught:
        pretrain(asked, data, "run", seed=1)
    text = str(caught.value)
    assert "2 of 40 images cannot be read (0.05 of all), more than run.unreadable_share = 0.03 allows" in text
    assert "patchssl pretrain --resume run --allow-changes" in text
    assert "patchssl pretrain --resume run run.unreadable_share=0.1\n" in text
    saved = load_checkpoint(Path("run"))["steps_done"]
    assert f"at update {saved}, saved" in text
    listed = [json.loads(line) for line in Path("run/unreadable.jsonl").read_text().splitlines()]
    assert {Path(row["name"]).name for row in listed} == {"05.png", "06.png"} and all(row["reason"] for row in listed)
    shutil.copytree("run", "removed")
    shutil.copytree("run", "repaired")

    resume("run", ("run.unreadable_share=0.1",))
    assert load_checkpoint(Path("run"))["steps_done"] == 32

    for name in ("05.png", "06.png"):
        next(data.rglob(name)).unlink()
    with pytest.raises(UsageError, match=r"has changed since removed began .*give --allow-changes"):
        resume("removed")
    heard = Heard()
    resume("removed", allow_changes=True, progress=heard)
    assert any("another run than the one that was begun" in sentence for sentence in heard.said)
    facts = json.loads(Path("removed/run.json").read_text())
    assert facts["changes"][-1]["step"] == saved and facts["changes"][-1]["images"][1] == facts["fingerprint"]
    assert load_checkpoint(Path("removed"))["steps_done"] == 24  # 8 epochs of 38 images
    assert resume("removed") == Path("removed")  # no longer asked

    shutil.rmtree(data)
    shutil.copytree(whole, data)
    resume("repaired", allow_changes=True)
    assert read_rows(Path("repaired/log.jsonl"))[-1]["unreadable_images"] == 0


def test_what_is_skipped_is_named_with_its_reason(data):
    damage(data, "05.png")
    heard = Heard()
    pretrain(recipe("run.unreadable_share=0.1", "run.knn_every_epochs=0"), data, "run", progress=heard)
    (said,) = [sentence for sentence in heard.said if "cannot be read" in sentence]
    assert "05.png cannot be read (" in said and "run/unreadable.jsonl lists" in said


# what a run is told, or tells

def test_a_relative_init_is_found_from_another_folder(data, tmp_path, monkeypatch):
    pretrain(recipe("optim.epochs=1", "run.knn_every_epochs=0"), data, "first")
    pretrain(recipe("optim.epochs=1", "run.knn_every_epochs=0", "init=first#teacher"), data, "second")
    for path in Path("second").glob("checkpoint*.pth"):  # as if killed before the first
        path.unlink()
    other = tmp_path / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(other)
    resume("../second")
    assert load_checkpoint(tmp_path / "second")["steps_done"] == 4


def test_no_checkpoint_is_praised_that_is_not_there(data):
    with pytest.raises(NotFiniteError, match=r"no checkpoint was saved before it; try a lower optim\.lr"):
        pretrain(recipe("optim.lr=1e38", "optim.clip_grad=0", "run.knn_every_epochs=0"), data, "run")


# one folder, one owner

def test_a_folder_that_another_process_writes_is_refused(data):
    settings = recipe("run.knn_every_epochs=0", "optim.epochs=1")
    pretrain(settings, data, "run")
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    with locked(Path("run")):
        with pytest.raises(FolderInUse, match=f"run is in use by process {os.getpid()}, .*; choose another --out"):
            pretrain(settings, data, "run")
        with pytest.raises(FolderInUse, match="run is in use by process"):
            resume("run", ("optim.epochs=2",), allow_changes=True)
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before


@pytest.mark.slow
def test_of_two_commands_for_one_folder_one_ends_with_a_sentence(data, tmp_path):
    (tmp_path / "small.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "patchssl", "pretrain", "small.yaml", "optim.epochs=200", "--data", str(data),
               "--out", "run", "--device", "cpu"]
    both = [subprocess.Popen([*command, "--seed", str(seed)], stderr=subprocess.PIPE, text=True) for seed in (0, 1)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], said
    loser = next(text for process, text in zip(both, said, strict=True) if process.returncode)
    winner = next(process for process in both if not process.returncode)
    assert f"run is in use by process {winner.pid}" in loser and "choose another --out" in loser
    assert len(np.unique([row["step"] for row in read_rows(Path("run/log.jsonl"))])) == 800
