"""Whole runs of a tiny network: that they learn, repeat, stop, go on, and refuse what would spoil them."""

import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import each
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import patchssl
from patchssl.data.open import open_images
from patchssl.data.textures import textures
from patchssl.models.checkpoint import load_checkpoint
from patchssl.pretrain.dataset import ViewDataset
from patchssl.pretrain.recipe import load_recipe, parse_recipe
from patchssl.pretrain.run.clock import Clock
from patchssl.pretrain.run.estimate import plan_run
from patchssl.pretrain.run.loop import _loader_let_go
from patchssl.pretrain.run.start import pretrain, resume
from patchssl.runtime.errors import CheckpointError, DataError, Interrupted, NotFiniteError, PatchSSLError, UsageError

RECIPE = """
model: {arch: vit_tiny_patch16_224, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 3, drop_path: 0.2}
views: {num_global: 2, num_local: 2, global_size: 24, local_size: 16}
photometric: {patchwise: layered, patch_share: 0.5, blur: [0, 0, 0]}
head: {num_prototypes: 32, hidden: 32, bottleneck: 16, freeze_last_layer_epochs: 0}
loss: {centering: sinkhorn, teacher_temp: 0.02, teacher_temp_start: 0.02}
optim: {epochs: 3, batch_size: 5, warmup_epochs: 0, lr: 0.05, teacher_momentum: 0.9}
run: {workers: 0, threads: 1, log_seconds: 1.0e-9}
"""
STEPS = 12  # 3 epochs of 4 updates


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A flat folder of 24 textures."""
    folder = tmp_path_factory.mktemp("images")
    for number, pixels in enumerate(textures("val")[0][::62][:24]):
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(autouse=True)
def one_thread_and_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def recipe(*overrides):
    return parse_recipe(RECIPE, overrides)


class Listener:
    """Progress that remembers, and once `at` updates are made calls `then`."""

    def __init__(self, at=None, then=None):
        self.rows, self.sentences, self.at, self.then = [], [], at, then

    def update(self, done, total, row):
        assert done == row["step"] <= total
        self.rows.append(row)
        if done == self.at:
            self.then()

    def say(self, sentence):
        self.sentences.append(sentence)


def interrupting(at, number=signal.SIGINT):
    return Listener(at, lambda: os.kill(os.getpid(), number))


def tensors_of(value, name=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors_of(inner, f"{name}/{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from tensors_of(inner, f"{name}/{number}")
    else:
        yield name, value


def state(folder):
    """All numbers of the newest checkpoint that training depends on, by name."""
    checkpoint = load_checkpoint(Path(folder))
    parts = {name: checkpoint[name] for name in ("student", "teacher", "centers", "optimizer", "steps_done")}
    return dict(tensors_of(parts))


def same(first, second):
    first, second = state(first), state(second)
    assert first.keys() == second.keys()
    return all(torch.equal(a, second[name]) if isinstance(a, torch.Tensor) else a == second[name]
               for name, a in first.items())


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nobody interrupted."""
    return pretrain(recipe(), data, tmp_path_factory.mktemp("runs") / "whole", seed=3)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_a_healthy_run_does_not_cry_wolf(data):
    listener = Listener()
    folder = pretrain(recipe("optim.epochs=10", "optim.lr=0.02", "model.drop_path=0", "photometric.jitter=0"), data,
                      "run", seed=0, progress=listener)
    losses = [row["loss"] for row in rows_of(folder)]
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])
    assert [sentence for sentence in listener.sentences if "warning" in sentence] == []
    assert "24" in listener.sentences[0]  # what was understood as data


def test_log_rows_are_whole(whole):
    text = (whole / "log.jsonl").read_text()
    rows = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
            for line in text.splitlines()]
    assert text.endswith("\n")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["epoch"] for row in rows] == [step / 4 for step in range(1, STEPS + 1)]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert {"loss", "class_loss", "patch_loss", "teacher_entropy", "feature_spread", "effective_rank", "lr",
            "matched_share_global", "matched_share_local", "images_per_second", "seconds"} <= set(rows[0])
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_a_run_folder_tells_how_it_was_made(whole, data):
    assert sorted(path.name for path in whole.iterdir()) == [
        "checkpoint.pth", "log.jsonl", "recipe.yaml", "run.json"]
    assert load_recipe(whole / "recipe.yaml") == recipe(f"data={data}")
    facts = json.loads((whole / "run.json").read_text())
    assert (facts["data"], facts["seed"], facts["device"]) == (str(data), 3, "cpu")
    assert len(facts["fingerprint"]) == 64
    assert facts["versions"]["torch"] == torch.__version__


def test_the_run_folder_is_a_backbone(whole):
    backbone = patchssl.load_backbone(str(whole))
    assert (backbone.name, backbone.method, backbone.seed) == ("whole", "pwself", 3)
    assert (backbone.pretrain_epochs, backbone.image_size, backbone.patch_size) == (3, 24, 8)
    weights = load_checkpoint(whole)["teacher"]["backbone.blocks.0.mlp.fc1.weight"]
    assert torch.equal(backbone.module.blocks[0].mlp.fc1.weight, weights)
    student = patchssl.load_backbone(f"{whole}#student")
    images = torch.randn(2, 3, 24, 24)
    assert not torch.equal(student.tokens(images), backbone.tokens(images))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seed_gives_the_same_weights_whatever_the_workers(whole, data, workers):
    torch.manual_seed(workers)
    again = pretrain(recipe(f"run.workers={workers}"), data, "again", seed=3)
    assert same(whole, again)
    assert [row["loss"] for row in rows_of(again)] == [row["loss"] for row in rows_of(whole)]


def test_another_seed_gives_other_weights(whole, data):
    assert not same(whole, pretrain(recipe(), data, "other", seed=4))


@pytest.mark.parametrize(("stops", "workers"), [([6], 0), ([3, 4, 11], 0), ([6], 1), ([12], 0)])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(whole, data, stops, workers):
    with pytest.raises(Interrupted):
        pretrain(recipe(f"run.workers={workers}"), data, "run", seed=3, progress=interrupting(stops[0]))
    for stop in stops[1:]:
        torch.manual_seed(stop)
        with pytest.raises(Interrupted):
            resume("run", progress=interrupting(stop))
    resume("run")
    assert same(whole, "run")
    assert [row["step"] for row in rows_of(Path("run"))] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows_of(Path("run"))] == [row["loss"] for row in rows_of(whole)]


def test_a_resumed_run_of_ema_centers_does_too(data):
    paper = recipe("loss.centering=ema", "loss.weighting=paper", "loss.rule=paper", "loss.center_per_position=true",
                   "optim.epochs=2")
    straight = pretrain(paper, data, "straight", seed=1)
    with pytest.raises(Interrupted):
        pretrain(paper, data, "run", seed=1, progress=interrupting(5))
    assert same(straight, resume("run"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_of_shared_draws_does_too(data, workers):
    """It stops after the second of an epoch's four batches."""
    settings = ("views.shared_in_batch=true", "loss.matches_per_pair=2", "optim.epochs=2")
    straight = pretrain(recipe(*settings), data, "straight", seed=1)
    with pytest.raises(Interrupted):
        pretrain(recipe(*settings, f"run.workers={workers}"), data, "run", seed=1, progress=interrupting(6))
    assert same(straight, resume("run"))
    assert not same(straight, pretrain(recipe(*settings[1:]), data, "apart", seed=1))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_signal_saves_the_update_at_hand(data, number, code):
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        pretrain(recipe(), data, "run", seed=3, progress=interrupting(5, number))
    assert caught.value.exit_code == code
    assert re.search(rf"{number.name} at update 5 of {STEPS}, saved; .*--resume run", str(caught.value))
    assert load_checkpoint(Path("run"))["steps_done"] == 5
    assert signal.getsignal(number) is handler


def test_a_finished_run_has_nothing_to_go_on_with(whole):
    before = (whole / "checkpoint.pth").read_bytes()
    listener = Listener()
    assert resume(whole, progress=listener) == whole
    assert listener.rows == []
    assert (whole / "checkpoint.pth").read_bytes() == before


def test_a_run_killed_before_its_first_checkpoint_starts_anew(whole, data):
    with pytest.raises(Interrupted):
        pretrain(recipe(), data, "run", seed=3, progress=interrupting(5))
    Path("run/checkpoint.pth").rename("run/checkpoint.pth.partial")  # as if killed while writing it
    resume("run")
    assert same(whole, "run")
    assert len(rows_of(Path("run"))) == STEPS


def test_a_damaged_checkpoint_costs_the_way_from_the_one_before(whole, data, caplog):
    for stop in (4, 7):
        with pytest.raises(Interrupted):
            (resume("run", progress=interrupting(stop)) if stop > 4
             else pretrain(recipe(), data, "run", seed=3, progress=interrupting(stop)))
    newest = Path("run/checkpoint.pth")
    newest.write_bytes(newest.read_bytes()[:-100])
    listener = Listener()
    resume("run", progress=listener)
    assert "run/checkpoint.pth is truncated, damaged" in caplog.text
    assert listener.rows[0]["step"] == 5
    assert same(whole, "run")


@pytest.mark.slow
def test_a_kill_while_a_damaged_checkpoint_is_replaced_costs_nothing_more(whole, data):
    """The damaged newest one must not take the place of the whole one before it."""
    for stop in (4, 7):
        with pytest.raises(Interrupted):
            (resume("run", progress=interrupting(stop)) if stop > 4
             else pretrain(recipe(), data, "run", seed=3, progress=interrupting(stop)))
    run = Path("run")
    (run / "checkpoint.pth").write_bytes(b"PK")
    with pytest.raises(Interrupted):
        resume("run", progress=interrupting(6))
    assert sorted(path.name for path in run.glob("checkpoint*")) == [
        "checkpoint-previous.pth", "checkpoint.pth", "checkpoint.pth.damaged"]
    (run / "checkpoint.pth").replace(run / "checkpoint.pth.partial")  # as if killed between the two renames
    assert load_checkpoint(run)["steps_done"] == 4
    resume("run")
    assert same(whole, "run")


@pytest.mark.slow
@pytest.mark.parametrize("left", [["run.json"], ["run.json", "recipe.yaml.partial"], ["run.json", "recipe.yaml"],
                                  ["run.json", "recipe.yaml", "checkpoint.pth.partial"]], ids=" ".join)
def test_a_kill_while_the_run_begins_can_be_resumed(whole, tmp_path, left):
    run = tmp_path / "run"
    run.mkdir()
    for name in left:
        content = (whole / name.removesuffix(".partial")).read_bytes()
        (run / name).write_bytes(content[:99] if "partial" in name else content)
    resume(run)
    assert same(whole, run)
    assert {path.name for path in run.iterdir()} - set(left) <= {path.name for path in whole.iterdir()}
    assert load_recipe(run / "recipe.yaml") == load_recipe(whole / "recipe.yaml")


def test_a_kill_before_the_run_was_written_down_means_to_start_again(whole, data):
    Path("run").mkdir()
    Path("run/run.json.partial").write_text('{"data"')
    with pytest.raises(UsageError, match=r"run is not a run folder.*stopped before.*started again"):
        resume("run")
    assert same(whole, pretrain(recipe(), data, "run", seed=3))


def test_a_run_begun_anew_forgets_the_recipe_of_the_one_before(whole, data):
    pretrain(recipe("optim.lr=0.01"), data, "run")
    Path("run/checkpoint.pth").unlink()  # as if killed before it
    assert same(whole, pretrain(recipe(), data, "run", seed=3))
    assert load_recipe("run/recipe.yaml") == recipe(f"data={data}")


def test_a_log_that_was_cut_short_is_mended(whole, data):
    with pytest.raises(Interrupted):
        pretrain(recipe(), data, "run", seed=3, progress=interrupting(5))
    log = Path("run/log.jsonl")
    later = json.dumps(rows_of(Path("run"))[-1] | {"step": 7})  # written after the checkpoint that is left
    log.write_text(log.read_text() + later + "\n" + later[:40])
    resume("run")
    assert [row["step"] for row in rows_of(Path("run"))] == list(range(1, STEPS + 1))


def in_a_group_of_its_own(data, *overrides, pause=0.0):
    """Start the run in another process, the leader of a group; returns its id once three updates are made.

    `pause`: seconds that the run then waits, so that a signal to the group finds everybody there.
    """
    reader, writer = os.pipe()
    if not (child := os.fork()):
        code = 1
        try:
            os.setsid()
            listener = Listener(3, lambda: (os.write(writer, b"3"), time.sleep(pause)))
            pretrain(recipe(*overrides), data, "run", seed=3, progress=listener)
            code = 0
        except PatchSSLError as error:
            code = error.exit_code
        finally:
            os._exit(code)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"3"
    finally:
        os.close(reader)
    return child


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_sigkill_at_any_moment_and_a_resumed_run_ends_the_same(whole, data):
    """Checkpoints after every update, workers, a kill of everything: the same weights in the end."""
    child = in_a_group_of_its_own(data, "run.workers=1", "run.checkpoint_minutes=1e-9")
    time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    assert exit_code(child) == -signal.SIGKILL
    assert 2 <= load_checkpoint(Path("run"))["steps_done"] <= STEPS
    resume("run")
    assert same(whole, "run")


@pytest.mark.slow
def test_sigterm_to_the_whole_group_saves_though_workers_get_it_too(data):
    """What a cluster's scheduler does."""
    child = in_a_group_of_its_own(data, "optim.epochs=3000", "run.workers=2", pause=0.5)
    os.killpg(child, signal.SIGTERM)
    assert exit_code(child) == 75
    assert load_checkpoint(Path("run"))["steps_done"] >= 3


def slow_after(monkeypatch, number):
    """Let SIGTERM come while a process waits for ever for its `number`-th image."""
    main, original, asked = os.getpid(), ViewDataset.__getitem__, []

    def read(dataset, key):
        asked.append(key)
        worker = torch.utils.data.get_worker_info()
        if len(asked) == number and (worker is None or worker.id == 0):  # once: a second signal kills
            os.kill(main, signal.SIGTERM)
            time.sleep(30 if os.getpid() == main else 1)
        return original(dataset, key)

    monkeypatch.setattr(ViewDataset, "__getitem__", read)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("after", [1, 17])
def test_a_signal_is_obeyed_while_images_are_waited_for(whole, data, monkeypatch, workers, after):
    """In the first batch, too, when there is nothing to save yet."""
    began = time.monotonic()
    with monkeypatch.context() as patch:
        slow_after(patch, after)
        with pytest.raises(Interrupted, match=r"by SIGTERM (at update \d+ of 12, saved|before the first update); "
                                              r"resume with: patchssl pretrain --resume run") as caught:
            pretrain(recipe(f"run.workers={workers}"), data, "run", seed=3)
    assert caught.value.exit_code == 75
    assert multiprocessing.active_children() == []  # or the end of this process would wait for them
    assert time.monotonic() - began < 20
    assert Path("run/checkpoint.pth").exists() == ("saved" in str(caught.value))
    if workers == 0:
        assert ("at update 3" if after == 17 else "before the first") in str(caught.value)
    resume("run")
    assert same(whole, "run")


def test_a_signal_while_the_data_is_opened_ends_the_run_before_it_began(data, monkeypatch):
    monkeypatch.setattr("patchssl.pretrain.run.setup.open_images", lambda data: os.kill(os.getpid(), signal.SIGUSR1))
    with pytest.raises(Interrupted, match="by SIGUSR1 before the first update, nothing is lost; start it again"):
        pretrain(recipe(), data, "run")
    assert not Path("run").exists()


def test_a_signal_during_the_knn_saves_and_the_resumed_run_makes_up_for_it(data):
    asked = []

    def probe(backbone):
        asked.append(backbone.features(torch.ones(1, 3, 24, 24)).sum().item())
        if len(asked) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the k-NN goes on")
        return asked[-1]

    every = recipe("run.knn_every_epochs=1", "run.tensorboard=true")
    with pytest.raises(Interrupted, match=f"at update 4 of {STEPS}, saved"):
        pretrain(every, data, "run", seed=3, make_knn=lambda *_: probe)
    assert [row["step"] for row in rows_of(Path("run"))] == [1, 2, 3, 4]
    assert "knn_top1" not in rows_of(Path("run"))[3]
    resume("run", make_knn=lambda *_: probe)
    undisturbed = pretrain(every, data, "undisturbed", seed=3, make_knn=lambda *_: probe)
    timeless = [[{key: value for key, value in row.items()
                  if key not in ("seconds", "images_per_second", "memory_bytes")} for row in rows_of(run)]
                for run in (Path("run"), undisturbed)]
    assert timeless[0] == timeless[1]
    assert [row["step"] for row in timeless[0] if "knn_top1" in row] == [4, 8, 12]
    assert same("run", undisturbed)
    events = [EventAccumulator(f"{run}/tensorboard").Reload().Scalars("knn_top1") for run in ("run", undisturbed)]
    shown = [[(event.step, event.value) for event in each] for each in events]
    assert shown[0] == shown[1]


def test_a_worker_that_was_killed_is_a_sentence_and_the_run_can_go_on(whole, data):
    """What the kernel does when memory runs out."""
    def kill_a_worker():
        (worker, *_) = multiprocessing.active_children()
        worker.kill()

    with pytest.raises(PatchSSLError, match=r"ended unexpectedly.*fewer run\.workers.*--resume run") as caught:
        pretrain(recipe("run.workers=2", "optim.epochs=100", "run.checkpoint_minutes=1e-9"), data, "run", seed=3,
                 progress=Listener(3, kill_a_worker))
    assert caught.value.exit_code == 1
    assert load_checkpoint(Path("run"))["steps_done"] >= 2


def test_the_word_of_a_lost_worker_does_not_break_into_the_end_of_the_loader(monkeypatch):
    """A connection to it may break first; then the loader is let go by an error, and no error may come out of that."""
    class Loader:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGCHLD)

    def read():
        loader = Loader()
        raise ConnectionResetError(str(type(loader)))

    def handler(number, frame):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    before = signal.signal(signal.SIGCHLD, handler)
    try:
        with pytest.raises(ConnectionResetError, match="Loader"), _loader_let_go():
            read()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert not lost


def test_a_worker_lost_while_a_checkpoint_is_written_is_said_too(data, monkeypatch):
    """torch tells of it wherever the main process is."""
    def save(value, file):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr("patchssl.models.checkpoint.torch.save", save)
    with pytest.raises(PatchSSLError, match=r"reads images ended unexpectedly.*pid 7"):
        pretrain(recipe("run.checkpoint_minutes=1e-9"), data, "run")


def test_a_failure_of_ones_own_in_a_worker_is_not_taken_for_a_lost_one(data, monkeypatch):
    def read(dataset, key):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(ViewDataset, "__getitem__", read)
    with pytest.raises(RuntimeError, match=r"in DataLoader worker process 0[\s\S]*a mistake"):
        pretrain(recipe("run.workers=1"), data, "run")


def test_a_full_disk_ends_the_run_and_spares_what_is_there(whole, data):
    """/dev/full answers as a full disk does, here while the checkpoint after the third update is written."""
    def fill():
        Path("run/checkpoint.pth.partial").symlink_to("/dev/full")

    with pytest.raises(CheckpointError) as caught:
        pretrain(recipe("run.checkpoint_minutes=1e-9"), data, "run", seed=3, progress=Listener(3, fill))
    assert str(caught.value) == (
        "run/checkpoint.pth could not be written (No space left on device); the checkpoint before it is intact, free "
        "some space, then resume with: patchssl pretrain --resume run")
    assert load_checkpoint(Path("run"))["steps_done"] == 2
    resume("run")
    assert same(whole, "run")


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_first_checkpoint(whole, data):
    with pytest.raises(CheckpointError, match=r"No space left on device\); no checkpoint was there before it, free"):
        pretrain(recipe("run.checkpoint_minutes=1e-9"), data, "run", seed=3,
                 progress=Listener(1, lambda: Path("run/checkpoint.pth.partial").symlink_to("/dev/full")))
    resume("run")
    assert same(whole, "run")


def test_a_loss_that_is_not_finite_ends_the_run_and_spares_the_checkpoint(data):
    with pytest.raises(Interrupted):
        pretrain(recipe(), data, "run", seed=3, progress=interrupting(5))
    before = Path("run/checkpoint.pth").read_bytes()
    path = Path("run/recipe.yaml")
    path.write_text(path.read_text().replace("lr: 0.05", "lr: 1.0e+36").replace("clip_grad: 3.0", "clip_grad: 0"))
    with pytest.raises(NotFiniteError, match=r"at update [67];.*run is untouched.*optim\.lr") as caught:
        resume("run", allow_changes=True)
    assert caught.value.exit_code == 3
    assert Path("run/checkpoint.pth").read_bytes() == before
    assert not Path("run/checkpoint-previous.pth").exists()


def test_a_folder_with_a_run_is_not_overwritten(whole, data):
    before = {path: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(UsageError, match=r"already holds a run; resume it with --resume"):
        pretrain(recipe(), data, whole)
    assert {path: path.read_bytes() for path in whole.iterdir()} == before


def test_changed_images_are_refused_on_resume(data, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for path in data.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    with pytest.raises(Interrupted):
        pretrain(recipe(), own, "run", progress=interrupting(3))
    (own / "07.png").unlink()
    with pytest.raises(UsageError, match=r"own has changed since run began"):
        resume("run")
    (own / "07.png").write_bytes((data / "07.png").read_bytes())
    assert resume("run") == Path("run")


@pytest.fixture
def bitmaps(data, tmp_path):
    """Images whose size in bytes does not depend on what they show."""
    (tmp_path / "own").mkdir()
    for path in data.iterdir():
        Image.open(path).convert("RGB").save(tmp_path / "own" / f"{path.stem}.bmp")
    return tmp_path / "own"


def replace_by_noise(path):
    content = path.read_bytes()
    path.write_bytes(content[:54] + np.random.default_rng(0).bytes(len(content) - 54))


def test_images_replaced_by_others_of_equal_size_are_refused_on_resume(bitmaps):
    with pytest.raises(Interrupted):
        pretrain(recipe(), bitmaps, "run", progress=interrupting(3))
    facts = json.loads(Path("run/run.json").read_text())
    assert facts["fingerprint_version"] == 2 and facts["fingerprint_covers"].startswith("all ")
    replace_by_noise(bitmaps / "07.bmp")
    with pytest.raises(UsageError, match=r"own has changed since run began"):
        resume("run")


def test_a_run_of_an_older_version_is_resumed_by_its_own_fingerprint(bitmaps):
    with pytest.raises(Interrupted):
        pretrain(recipe(), bitmaps, "run", progress=interrupting(3))
    facts = json.loads(Path("run/run.json").read_text())
    del facts["fingerprint_version"], facts["fingerprint_covers"]
    facts["fingerprint"] = open_images(bitmaps).first_fingerprint
    Path("run/run.json").write_text(json.dumps(facts | {"fingerprint_version": 3}))
    with pytest.raises(UsageError, match=r"fingerprint of version 3, of a newer patchssl"):
        resume("run")
    Path("run/run.json").write_text(json.dumps(facts))
    (bitmaps / "07.bmp").rename(bitmaps / "7.bmp")
    with pytest.raises(UsageError, match=r"own has changed since run began"):
        resume("run")
    (bitmaps / "7.bmp").rename(bitmaps / "07.bmp")
    assert resume("run") == Path("run")


@pytest.mark.slow
def test_unreadable_images_are_remembered_by_a_resumed_run(data, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for copy in range(5):
        for path in data.iterdir():
            (own / f"{copy}{path.name}").write_bytes(path.read_bytes())
    (own / "zzz.png").write_text("no image")
    settings = recipe("optim.epochs=2", "optim.batch_size=11")
    whole = pretrain(settings, own, "whole")
    with pytest.raises(Interrupted):
        pretrain(settings, own, "run", progress=interrupting(12))
    resume("run")
    counts = [[row["unreadable_images"] for row in rows_of(run)] for run in (whole, Path("run"))]
    assert counts[0] == counts[1] and counts[0][-1] == 1


def test_images_that_were_moved_are_found_by_their_new_name(data, tmp_path):
    own, moved = tmp_path / "own", tmp_path / "moved"
    own.mkdir()
    for path in data.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    with pytest.raises(Interrupted):
        pretrain(recipe(), own, "run", progress=interrupting(3))
    own.rename(moved)
    resume("run", (f"data={moved}",), progress=(listener := Listener()))
    assert listener.rows[0]["step"] == 4
    assert resume("run") == Path("run")  # by the new name from now on
    assert json.loads(Path("run/run.json").read_text())["data"] == str(moved)


def test_a_resumed_run_keeps_its_number_of_threads(data):
    """Sums are shared out to threads: 1 and 2 of them differ in the last bits."""
    torch.set_num_threads(2)
    with pytest.raises(Interrupted):
        pretrain(recipe("run.threads=0"), data, "run", seed=3, progress=interrupting(1))
    torch.set_num_threads(1)
    listener = interrupting(2)
    with pytest.raises(Interrupted):
        resume("run", progress=listener)
    assert torch.get_num_threads() == 2
    assert any("torch uses 2 threads, as when the run began" in sentence for sentence in listener.sentences)
    resume("run", ("run.threads=1",))  # whoever says so gets another number
    assert torch.get_num_threads() == 1


def test_a_run_finds_its_images_from_another_folder(data, monkeypatch, tmp_path):
    monkeypatch.chdir(data.parent)
    with pytest.raises(Interrupted):
        pretrain(recipe(), data.name, tmp_path / "run", progress=interrupting(3))
    monkeypatch.chdir(tmp_path)
    assert resume("run") == Path("run")


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_what_is_no_run_cannot_be_resumed(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=f"{folder} is not a run folder"):
        resume(folder)


def test_a_run_needs_data_and_enough_of_it(data):
    with pytest.raises(UsageError, match="no data was named"):
        pretrain(recipe(), out="run")
    with pytest.raises(UsageError, match=r"optim\.batch_size = 25 is more than the 24 images"):
        pretrain(recipe("optim.batch_size=25"), data, "run")
    assert not Path("run").exists()


def test_that_sinkhorn_balances_parts_is_said(data):
    for parts, said in ((1, 0), (5, 1)):
        listener = Listener()
        pretrain(recipe(f"optim.accumulate={parts}", "optim.epochs=1"), data, f"run-{parts}", progress=listener)
        assert len([s for s in listener.sentences if f"sinkhorn balances each of the {parts} parts" in s]) == said


@pytest.mark.slow
def test_a_signal_while_the_command_is_imported_is_answered(data):
    """Sent as soon as it is caught at all: importing torch takes seconds."""
    command = [sys.executable, "-m", "patchssl", "pretrain", "quickstart", "--data", str(data), "--out", "run"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    caught = "0"
    while process.poll() is None and not int(caught, 16) >> (signal.SIGUSR1 - 1) & 1:
        caught = Path(f"/proc/{process.pid}/status").read_text().split("SigCgt:")[1].split()[0]
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "stopped by SIGUSR1 before the first update, nothing is lost; start it again" in err
    assert not Path("run").exists()


def test_max_images_takes_a_seeded_part(data):
    folder = pretrain(recipe("max_images=14", "optim.epochs=1"), data, "run", seed=0)
    assert [row["step"] for row in rows_of(folder)] == [1, 2]
    assert resume(folder) == folder  # the same part is found again


def test_images_that_cannot_be_read_are_counted(data, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for copy in range(5):
        for path in data.iterdir():
            (own / f"{copy}{path.name}").write_bytes(path.read_bytes())
    (own / "zzz.png").write_text("no image")
    folder = pretrain(recipe("optim.epochs=1", "optim.batch_size=11"), own, "run")
    rows = rows_of(folder)
    assert len(rows) == 11
    assert rows[-1]["unreadable_images"] == 1  # each of the 121 was asked for
    (own / "zzy.png").write_text("no image")
    with pytest.raises(DataError, match=r"(?s)2 of 122 .*more than run.unreadable_share = 0.01 .*zz[yz]"):
        pretrain(recipe("optim.epochs=1", "optim.batch_size=11"), own, "other")


def test_default_folder_and_the_packages_own_call(data, tmp_path):
    (tmp_path / "small.yaml").write_text(RECIPE)
    folder = patchssl.pretrain("small.yaml", data, seed=5, overrides=("optim.epochs=1",))
    assert folder == Path("runs/small-5")
    assert (tmp_path / "runs" / "small-5" / "checkpoint.pth").exists()
    assert load_recipe(folder / "recipe.yaml").optim.epochs == 1


def test_the_probe_is_asked_when_due_and_changes_nothing(whole, data):
    asked = []

    def probe(backbone):
        asked.append((backbone.training, backbone.features(torch.zeros(1, 3, 24, 24)).shape))
        torch.manual_seed(0)
        torch.rand(7)
        return 0.25

    folder = pretrain(recipe("run.knn_every_epochs=2"), data, "run", seed=3, make_knn=lambda *_: probe)
    assert {row["step"]: row["knn_top1"] for row in rows_of(folder) if "knn_top1" in row} == {8: 0.25, 12: 0.25}
    assert asked == [(False, (1, 24))] * 2
    assert same(whole, folder)


def test_a_probe_is_due_though_no_log_row_is(data):
    asked = recipe("run.knn_every_epochs=1", "run.log_seconds=1000")
    folder = pretrain(asked, data, "run", make_knn=lambda *_: lambda _: 0.5)
    assert [(row["step"], row["knn_top1"]) for row in rows_of(folder)] == [(4, 0.5), (8, 0.5), (12, 0.5)]


def test_collapse_is_said_in_words(tmp_path):
    gray = tmp_path / "gray"
    gray.mkdir()
    for number in range(20):
        Image.new("RGB", (32, 32), (120, 120, 120)).save(gray / f"{number}.png")
    listener = Listener()
    color = ("patchwise=none", "jitter=0", "grayscale=0", "solarize=[0,0,0]")
    pretrain(recipe(*(f"photometric.{setting}" for setting in color)), gray, "run", progress=listener)
    said = [s for s in listener.sentences if s.startswith("warning: at update") and "features have collapsed" in s]
    assert len(said) == 1 < len(listener.rows)  # when it begins, not in every row


@pytest.mark.parametrize(("overrides", "steps"), [([], 12), (["optim.epochs=1", "max_images=5"], 1)])
def test_a_plan_counts_and_writes_nothing(data, tmp_path, overrides, steps):
    plan = plan_run(recipe(*overrides), data, seed=0)
    assert (plan.total_steps, plan.epochs * plan.steps_per_epoch) == (steps, steps)
    assert plan.images == (5 if overrides else 24)
    assert plan.estimated_seconds == pytest.approx(plan.seconds_per_step * steps)
    assert 0 < plan.seconds_per_step < 60
    assert plan.least_seconds <= plan.estimated_seconds <= plan.most_seconds
    assert 2**26 < plan.peak_memory_bytes < 2**35
    assert list(tmp_path.iterdir()) == []


@each(("least", "most", "words"), [(7300.0, 9100.0, "2 hours to 2.5 hours in all"), (31.2, 31.4, "about 31 s in all"),
                                   (386_000_000.0, 520_000_000.0, "4,500 days to 6,000 days in all")])
def test_a_plan_says_two_digits_and_a_range(data, least, most, words):
    plan = replace(plan_run(recipe(), data, seed=0), seconds_per_step=0.01234, least_seconds=least, most_seconds=most)
    assert words in plan.text() and "0.012 s an update" in plan.text()


def test_a_plan_measures_one_of_the_parts_that_are_accumulated(data):
    plan = plan_run(recipe("views.global_size=72", "optim.batch_size=24", "optim.accumulate=12"), data, seed=0)
    assert plan.measured_batch == 2
    assert plan.total_steps == 3


def test_a_plan_counts_the_students_parameters(data, whole):
    student = load_checkpoint(whole)["student"]
    assert plan_run(recipe(), data, seed=0).parameters == sum(value.numel() for value in student.values())


def test_the_time_of_a_knn_is_not_the_trainings(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(before=10.0, steps_done=0)
    now[0] = 5.0
    with clock.stopped():
        now[0] = 105.0
    now[0] = 107.0
    assert clock.seconds() == 10 + 5 + 2
    assert clock.seconds_per_step(7) == 1.0


# what is said, or refused, before anything is computed

def test_a_run_too_short_for_its_warm_ups_says_so_first_and_when_it_is_resumed(data):
    begun, resumed = Listener(at=1, then=lambda: os.kill(os.getpid(), signal.SIGINT)), Listener()
    with pytest.raises(Interrupted):
        pretrain(recipe("optim.warmup_epochs=3"), data, "run", progress=begun)
    resume("run", progress=resumed)
    for listener in (begun, resumed):
        said = [sentence for sentence in listener.sentences if sentence.startswith("warning: ")]
        assert said == ["warning: optim.warmup_epochs = 3 is too long for optim.epochs = 3: the learning rate only "
                        "rises, and never falls; ask for more epochs, or for optim.warmup_epochs=0.3"]


def test_a_run_that_has_the_time_warns_of_nothing(data):
    listener = Listener()
    pretrain(recipe(), data, "run", progress=listener)
    assert not [sentence for sentence in listener.sentences if "warning" in sentence]


def test_a_k_nn_without_labels_is_said(data):
    listener = Listener()
    pretrain(recipe("run.knn_every_epochs=1", "optim.epochs=1"), data, "run", progress=listener)
    said = [sentence for sentence in listener.sentences if "knn" in sentence]
    assert said == [f"warning: run.knn_every_epochs = 1, but {Path(data).name} has no labels: no k-NN is measured "
                    "while it trains; give images in class folders, or run.knn_every_epochs=0"]
    assert "no labels" in plan_run(recipe("run.knn_every_epochs=1"), data, seed=0).warnings[0]


def test_seeds_and_folders_that_cannot_be_are_refused_before_the_images_are_opened():
    for wrong, words in (({"seed": -1}, "negative"), ({"seed": 2**64}, "64 bits"), ({"seed": 0.5}, "no whole number"),
                         ({"out": ""}, "out is empty")):
        with pytest.raises(UsageError, match=words):
            pretrain(recipe(), "nowhere", **wrong)
    assert list(Path().iterdir()) == []


def test_the_largest_seed_trains(data):
    folder = pretrain(recipe("optim.epochs=1"), data, "run", seed=2**64 - 2)
    assert json.loads((folder / "run.json").read_text())["seed"] == 2**64 - 2
