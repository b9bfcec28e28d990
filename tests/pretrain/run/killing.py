"""Kill a small run at random moments and resume it, many times, and compare its weights in the end.

By hand: `python tests/pretrain/run/killing.py [KILLS] [SEED]`, for example 25 kills; in the suite: test_kills.py.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from patchssl.models.checkpoint import load_checkpoint

# checkpoints after every update: a kill often meets one being written; workers; a k-NN; event files
RUN = ("optim.epochs={epochs}", "optim.batch_size=8", "optim.warmup_epochs=0.5", "max_images=44", "model.depth=1",
       "model.embed_dim=24", "model.num_heads=3", "model.patch_size=8", "views.global_size=32", "views.num_local=2",
       "views.local_size=16", "head.num_prototypes=32", "head.hidden=32", "head.bottleneck=16", "run.workers={workers}",
       "run.threads=1", "run.log_seconds=1e-9", "run.checkpoint_minutes=1e-9", "run.knn_every_epochs=5",
       "run.tensorboard=true")


def settings(epochs, workers=2):
    return [setting.format(epochs=epochs, workers=workers) for setting in RUN]


def start(folder, epochs):
    """Begin or resume the run in `folder`, as the leader of a process group."""
    there = (folder / "run.json").exists()
    arguments = ["--resume", folder] if there else ["quickstart", *settings(epochs), "--data", "textures",
                                                            "--out", folder]
    return subprocess.Popen([sys.executable, "-m", "patchssl", "pretrain", *map(str, arguments)], text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def finish(folder, epochs):
    process = start(folder, epochs)
    _, err = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run failed with code {process.returncode}: {err}")


def kill_at_random(folder, epochs, rng):
    """Start, wait until something of the run moves, then a random moment, and kill all of its processes.

    Returns the state that the folder was left in, or None when the run was faster.
    """
    process = start(folder, epochs)
    before, beginning = listing(folder), rng.random() < 0.2  # some kills come before the first update, or any file
    limit = time.monotonic() + (rng.uniform(0, 4) if beginning else 60)
    while process.poll() is None and time.monotonic() < limit and (beginning or listing(folder) == before):
        time.sleep(0.01)
    if not beginning:
        time.sleep(rng.uniform(0, 0.8))
        if rng.random() < 0.5:
            meet_a_save(folder, process, rng)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    if process.returncode == 0:
        return None
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(f"the run failed by itself with code {process.returncode}")
    return describe(folder)


def meet_a_save(folder, process, rng):
    """Wait for the next save and then some part of the milliseconds that it takes."""
    while process.poll() is None and not (folder / "checkpoint.pth.partial").exists():
        pass
    time.sleep(rng.uniform(0, 0.004))


def listing(folder):
    """Which checkpoints are there, and since when."""
    found = {}
    for name in ("checkpoint.pth", "checkpoint-previous.pth"):
        with contextlib.suppress(FileNotFoundError):
            found[name] = (folder / name).stat().st_mtime_ns
    return found


def describe(folder):
    """What a kill left behind, in words that can be counted."""
    if not (folder / "run.json").exists():
        return "no run yet"
    names = {path.name for path in folder.iterdir()}
    if "checkpoint.pth" not in names:
        return "between the two renames" if "checkpoint-previous.pth" in names else "before the first checkpoint"
    return "a checkpoint half written" if "checkpoint.pth.partial" in names else "whole"


def numbers(value, name=""):
    """Every leaf of a checkpoint by its path."""
    if isinstance(value, dict):
        return {full: leaf for key, inner in value.items() for full, leaf in numbers(inner, f"{name}/{key}").items()}
    if isinstance(value, list):
        return numbers(dict(enumerate(value)), name)
    return {name: value}


def differing(first, second):
    """Names in two runs' checkpoints whose values differ in any bit; times left out."""
    one, other = (numbers({key: value for key, value in load_checkpoint(folder).items()
                           if key not in ("seconds", "origin", "recipe")}) for folder in (first, second))
    assert one.keys() == other.keys() and len(one) > 50
    return [name for name, value in one.items()
            if not (torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name])]


def kill_and_resume(folder, kills, epochs, seed, say=print):
    """The run of `epochs` in `folder`, killed `kills` times; returns how often it was left in which state."""
    rng, left = random.Random(seed), Counter()
    while left.total() < kills:
        if (state := kill_at_random(folder, epochs, rng)) is None:
            raise SystemExit(f"the run was done after {left.total()} kills: ask for more epochs")
        left[state] += 1
        done = "-"
        if listing(folder):
            done = load_checkpoint(folder)["steps_done"]
        say(f"kill {left.total()} of {kills}: at update {done}, {state}")
    finish(folder, epochs)
    return left


def main(kills=25, seed=0):
    place = Path(tempfile.mkdtemp(prefix="patchssl-kills-"))
    epochs = 12 * kills
    try:
        print(f"{kills} kills of a run of {epochs} epochs, 5 updates each")
        left = kill_and_resume(place / "killed", kills, epochs, seed)
        finish(place / "whole", epochs)
        wrong = differing(place / "whole", place / "killed")
        print(f"left behind: {dict(left)}")
        print(f"DIFFERENT: {wrong}" if wrong else "the weights are bit-identical to those of the run nobody killed")
        return 1 if wrong else 0
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
