"""Runs by two processes as torchrun starts them: stopped, killed, resumed, refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

SMALL = ["quickstart", "--data", "textures", "max_images=96", "optim.epochs=4", "optim.batch_size=24",
         "views.num_local=2", "head.num_prototypes=64", "run.workers=1", "run.log_seconds=0.2", "run.threads=1",
         "optim.warmup_epochs=0"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "patchssl"]


def start(folder, *arguments, processes=2):
    command = TORCHRUN if processes == 2 else [sys.executable, "-m", "patchssl"]
    return subprocess.Popen([*command, "pretrain", *arguments], cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)


def finish(process):
    """Standard output and error of a process that has to end by itself."""
    try:
        return process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def done(folder, *arguments, processes=2):
    process = start(folder, *arguments, processes=processes)
    out, err = finish(process)
    assert process.returncode == 0, err[-3000:]
    return out


def rows(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights(run):
    return torch.load(run / "checkpoint.pth", weights_only=True)["student"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the run `whole` of two processes."""
    folder = tmp_path_factory.mktemp("processes")
    assert done(folder, *SMALL, "--out", "whole").splitlines()[0] == "whole"
    return folder


def test_one_process_and_two_make_one_run(place):
    done(place, *SMALL, "--out", "alone", processes=1)
    assert rows(place / "alone")[-1]["loss"] == pytest.approx(rows(place / "whole")[-1]["loss"], rel=1e-4)
    assert [row["step"] for row in rows(place / "whole")] == sorted({row["step"] for row in rows(place / "whole")})


@pytest.mark.parametrize("sharded", [False, True])
def test_a_signal_saves_one_agreed_update_in_all_processes(place, sharded):
    run, more = f"stopped-{sharded}", ["--shard", "run.knn_every_epochs=0"] if sharded else []
    process = start(place, *SMALL, "optim.epochs=400", "--out", run, *more)
    wait_for(place / run / "log.jsonl", process)
    process.send_signal(signal.SIGTERM)  # to torchrun, which hands it to both
    _, err = finish(process)
    assert process.returncode != 0
    saved = re.findall(r"by SIGTERM at update (\d+) of 1600, saved; resume with: patchssl pretrain --resume", err)
    checkpoint = torch.load(place / run / "checkpoint.pth", weights_only=True)
    assert saved and {int(step) for step in saved} == {checkpoint["steps_done"]}
    again = start(place, "--resume", run)  # goes on by itself
    lines = len(rows(place / run))
    while again.poll() is None and len(rows(place / run)) <= lines:
        time.sleep(0.05)
    again.send_signal(signal.SIGTERM)
    assert f"resuming {run} at update {checkpoint['steps_done']}" in finish(again)[1]


def test_a_killed_process_ends_the_other_and_the_resumed_run_is_bit_identical(place):
    process = start(place, *SMALL, "run.checkpoint_minutes=1e-9", "--out", "killed")
    wait_for(place / "killed" / "checkpoint.pth", process)
    victim = children_of(process.pid)[-1]
    os.kill(victim, signal.SIGKILL)
    _, err = finish(process)
    assert process.returncode != 0
    assert "should not happen" not in err
    assert torch.load(place / "killed" / "checkpoint.pth", weights_only=True)["steps_done"] < 16
    done(place, "--resume", "killed")
    found, whole = weights(place / "killed"), weights(place / "whole")
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_processes_whose_torchrun_was_killed_save_and_stop(place):
    process = start(place, *SMALL, "optim.epochs=4000", "--out", "orphaned")
    wait_for(place / "orphaned" / "log.jsonl", process)
    left = children_of(process.pid)
    process.kill()
    _, err = process.communicate(timeout=100)  # its end is that of the last process that writes to it
    assert not [pid for pid in left if Path(f"/proc/{pid}").exists() and children_of(pid)]
    assert "torchrun is gone" in err and "saved; resume with" in err
    assert torch.load(place / "orphaned" / "checkpoint.pth", weights_only=True)["steps_done"] > 0


@pytest.mark.parametrize(("change", "words"), [
    ("optim.batch_size=25", "optim.batch_size = 25 cannot be shared out evenly to 2 processes; choose a multiple of 2"),
    ("optim.accumulate=8", "optim.accumulate = 8 cannot cut the 12 images that each of 2 processes gets"),
])
def test_what_cannot_be_shared_is_refused_by_name(place, change, words):
    process = start(place, *SMALL, change, "--out", "refused")
    _, err = finish(process)
    assert process.returncode != 0
    assert words in err and "Traceback (most recent call last):\n  File \"<frozen runpy>" not in err.split(words)[0]
    assert not (place / "refused").exists()


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def children_of(pid):
    found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()
             and parent_of(entry) == pid]
    return sorted(found)


def parent_of(entry):
    try:
        return int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None
