"""Checkpoints under kills, damage, full disks and hostile files."""

import logging
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cases import each

import patchssl
from patchssl.models.checkpoint import load_checkpoint, require_format, save_checkpoint
from patchssl.runtime.errors import CheckpointError

NEWEST, PREVIOUS = "checkpoint.pth", "checkpoint-previous.pth"


def content(step):
    """A checkpoint whose parts all say which one it is."""
    return {"steps_done": step, "teacher": {"backbone.w": torch.full((30, 40), float(step))},
            "student": {}, "network": {}, "origin": {"seed": step},
            "optimizer": {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{"lr": 0.1}]}}


def is_whole(checkpoint, step):
    weights = checkpoint["teacher"]["backbone.w"]
    return (checkpoint["steps_done"] == step and torch.equal(weights, torch.full((30, 40), float(step)))
            and float(checkpoint["optimizer"]["state"][0]["step"]) == step
            and checkpoint["optimizer"]["param_groups"] == [{"lr": 0.1}])


def save_steps(folder, *steps):
    for step in steps:
        save_checkpoint(folder, content(step))
    return folder


def test_what_is_saved_comes_back(tmp_path):
    path = save_checkpoint(tmp_path / "new" / "run", content(3))
    assert path == tmp_path / "new" / "run" / NEWEST
    assert is_whole(load_checkpoint(path), 3)
    assert is_whole(load_checkpoint(path.parent), 3)


def test_the_last_two_are_kept_and_nothing_else(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [PREVIOUS, NEWEST]
    assert is_whole(load_checkpoint(tmp_path / PREVIOUS), 3)
    assert is_whole(load_checkpoint(tmp_path / NEWEST), 4)


def test_what_was_loaded_stays_when_the_file_is_replaced(tmp_path):
    loaded = load_checkpoint(save_steps(tmp_path, 1))
    save_steps(tmp_path, 2, 3, 4)
    assert is_whole(loaded, 1)


def test_half_a_file_left_by_a_kill_is_ignored_and_later_replaced(tmp_path):
    save_steps(tmp_path, 1)
    (tmp_path / f"{NEWEST}.partial").write_bytes((tmp_path / NEWEST).read_bytes()[:500])
    assert is_whole(load_checkpoint(tmp_path), 1)
    save_steps(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [PREVIOUS, NEWEST]


def test_a_kill_between_the_two_renames(tmp_path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / NEWEST).replace(tmp_path / f"{NEWEST}.partial")
    assert is_whole(load_checkpoint(tmp_path), 1)


KILLED = """
import sys, torch
from pathlib import Path
from patchssl.models.checkpoint import save_checkpoint
for step in range(1, 100_000):
    save_checkpoint(Path(sys.argv[1]), {"steps_done": step, "w": torch.full((300_000,), float(step)),
                                        **dict.fromkeys(("student", "teacher", "network", "origin"), {})})
    if step == 3:
        print("saving", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.05, 0.13])
def test_sigkill_while_saving_loses_at_most_the_newest(tmp_path, delay):
    environment = os.environ | {"PYTHONPATH": str(Path(patchssl.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE,
                          env=environment) as writer:
        assert writer.stdout.readline() == b"saving\n"
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
    found = load_checkpoint(tmp_path)
    assert found["steps_done"] >= 2
    assert torch.equal(found["w"], torch.full((300_000,), float(found["steps_done"])))


def flip(path, position):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 0x10
    path.write_bytes(raw)


def weights_position(path):
    return path.read_bytes().index(torch.full((10,), 2.0).numpy().tobytes()) + 1000


@each("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-400]),
    lambda path: path.write_bytes(path.read_bytes()[: 2 * len(path.read_bytes()) // 3]),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(bytes(len(path.read_bytes()))),  # what a power cut can leave
    lambda path: flip(path, weights_position(path)),
], ids=["end cut off", "third cut off", "empty", "zeros", "one bit of a weight"])
def test_a_damaged_newest_is_named_and_the_one_before_used(tmp_path, damage, caplog):
    caplog.clear()
    save_steps(tmp_path, 1, 2)
    damage(tmp_path / NEWEST)
    with caplog.at_level(logging.WARNING):
        assert is_whole(load_checkpoint(tmp_path), 1)
    (record,) = caplog.records
    assert re.match(rf"{tmp_path / NEWEST} is (truncated, )?damaged", record.getMessage())
    assert f"using {PREVIOUS}" in record.getMessage()


def test_any_wrong_byte_is_harmless_or_an_error_that_names_the_file(tmp_path):
    """What is read is what was written, or nothing; and no exception but ours, wherever the byte lies."""
    raw = save_checkpoint(tmp_path, content(2)).read_bytes()
    data = raw.index(torch.full((10,), 2.0).numpy().tobytes())
    rng, path, refused = random.Random(0), tmp_path / "wrong.pth", 0
    for position in [*rng.sample(range(data), 150), *rng.sample(range(data + 4800, len(raw)), 150)]:
        path.write_bytes(raw)
        flip(path, position)
        try:
            assert is_whole(load_checkpoint(path), 2)
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100


def test_no_whole_checkpoint_at_all(tmp_path):
    save_steps(tmp_path, 1, 2)
    for name in (NEWEST, PREVIOUS):
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=PREVIOUS):
        load_checkpoint(tmp_path)


def test_a_folder_without_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match=f"holds no {NEWEST}"):
        load_checkpoint(tmp_path)


class Hostile:
    """Creates a file when it is unpickled by a careless reader."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


def test_a_file_that_would_run_code_is_refused_unrun(tmp_path):
    victim = tmp_path / "created"
    save_checkpoint(tmp_path, content(1) | {"extra": Hostile(victim)})
    with pytest.raises(CheckpointError, match=r"asks to run .* was refused.* Nothing of it was executed"):
        load_checkpoint(tmp_path)
    assert not victim.exists()
    torch.load(tmp_path / NEWEST, weights_only=False)  # the bomb is a real one
    assert victim.exists()


def test_a_bare_pickle_is_refused_unrun(tmp_path):
    victim, path = tmp_path / "created", tmp_path / "bare.pth"
    path.write_bytes(pickle.dumps({"format": "patchssl", "teacher": Hostile(victim)}))
    with pytest.raises(CheckpointError, match=r"bare\.pth"):
        load_checkpoint(path)
    assert not victim.exists()


@each("other", [{"model": {}}, [1, 2], {"format": "other"}])
def test_somebody_elses_file(tmp_path, other):
    torch.save(other, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"file\.pth is not a checkpoint of patchssl"):
        load_checkpoint(tmp_path / "file.pth")


def test_a_file_of_a_later_version(tmp_path):
    save_checkpoint(tmp_path, content(1) | {"version": 7})
    with pytest.raises(CheckpointError, match="newer patchssl"):
        load_checkpoint(tmp_path)


@contextmanager
def files_no_larger_than(size):
    """As a full disk: the system refuses to write on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path):
    save_steps(tmp_path, 1, 2)
    with files_no_larger_than(2000), pytest.raises(CheckpointError) as caught:
        save_steps(tmp_path, 3)
    assert "could not be written" in str(caught.value)
    assert "intact" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [PREVIOUS, NEWEST]
    assert is_whole(load_checkpoint(tmp_path), 2)
    assert is_whole(load_checkpoint(tmp_path / PREVIOUS), 1)
    assert is_whole(load_checkpoint(save_steps(tmp_path, 4)), 4)


@each(("content", "words"), [
    ({"teacher": {}}, "is not a checkpoint of patchssl"), ([1], "is not a checkpoint of patchssl"),
    (None, "is not a checkpoint of patchssl"), ({"format": torch.ones(3)}, "is not a checkpoint of patchssl"),
    ({"format": "patchssl"}, "does not say which version"),
    ({"format": "patchssl", "version": "1"}, "does not say which version"),
    ({"format": "patchssl", "version": torch.ones(2)}, "does not say which version"),
    ({"format": "patchssl", "version": 2}, r"newer patchssl \(format 2, this one reads up to 1\)"),
])
def test_what_is_no_checkpoint_that_can_be_read(content, words):
    with pytest.raises(CheckpointError, match=rf"^run/checkpoint\.pth {words}|^run/checkpoint\.pth was .*{words}"):
        require_format(content, Path("run/checkpoint.pth"))
    require_format({"format": "patchssl", "version": 1}, Path("run/checkpoint.pth"))
