"""Time and memory of one update by the official training code and by ours, as Markdown.

    python tests/time_official.py DINO PWSELF [--arch vit_tiny] [--prototypes 10000] [--images 2] [--rounds 3]

DINO is a clone of facebookresearch/dino, PWSELF one of alijavidani/Local_Global_Representation_Learning. Both run their
own `train_one_epoch` in float32 on views of noise (2 x 224 + 8 x 96 px, patches of 16) that are ready; ours colors them
first. Updates are timed in processor seconds of one thread; each process knows one code, and the codes take turns. What
needs a GPU does nothing, and the process group is one process on gloo. Needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import time
import types
from itertools import product
from pathlib import Path

import numpy as np

OFFICIAL = {"official dino": "main_dino.py", "official pwself": "patch_wise_dino.py"}
OURS = {"DINO": "dino", "PW-Self, 16 matches a pair": "ours", "PW-Self, all tokens": "all tokens"}
PEERS = {"DINO": "official dino", "PW-Self, 16 matches a pair": "official pwself",
         "PW-Self, all tokens": "official pwself"}
PATCH, TEMP = 16, 0.04
_record = runpy.run_path(str(Path(__file__).parent / "record_losses.py"))


class Alone:
    """What DistributedDataParallel is to the official code, for one process: something with a `module`."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *views):
        return self.module(*views)

    def __getattr__(self, name):
        return getattr(self.module, name)


class Clocked(list):
    """Batches that note the time at which each is asked for, and the end of the last one."""

    def __iter__(self):
        self.seconds = []
        for batch in super().__iter__():
            began = time.process_time()
            yield batch
            self.seconds.append(time.process_time() - began)


def batches(script, way, images, count):
    """Views of noise as the official loaders give them."""
    import torch

    from patchssl.bench.step import noise_batch, step_recipe

    views = [torch.randn(images, 3, size, size) for size in [224] * 2 + [96] * 8]
    if way == "official dino":
        return Clocked([(views, None)] * count)
    geometry = noise_batch(step_recipe("all tokens", "vit_tiny_patch16_224", 64, images), 0)
    boxes, mirrored = geometry.boxes[0].round().int().tolist(), geometry.mirrored[0].tolist()
    pairs = _record["correspondences"](script, boxes, mirrored, PATCH)
    return Clocked([(views, pairs, None)] * count)


def official_updates(clone, way, arch, prototypes, images, updates):
    """Processor seconds of every update but the first, and the growth of the resident memory."""
    import torch
    import torch.distributed as dist

    from patchssl.bench.patchterm import peak_so_far

    torch.set_num_threads(1)
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.cuda.synchronize = lambda *args: None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    script = _record["module"](clone, OFFICIAL[way])
    script.utils.SmoothedValue.synchronize_between_processes = lambda self: None
    data = batches(script, way, images, 1 + updates)
    before = peak_so_far(torch.device("cpu"))
    student, teacher = (script.utils.MultiCropWrapper(vit, script.DINOHead(vit.embed_dim, prototypes)) for vit in (
        script.vits.__dict__[arch](patch_size=PATCH, drop_path_rate=rate) for rate in (0.1, 0.0)))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    sizes = (PATCH,) if way == "official pwself" else ()
    loss = script.DINOLoss(*sizes, prototypes, 10, TEMP, TEMP, 0, 1)
    optimizer = torch.optim.AdamW(script.utils.get_params_groups(student))
    schedules = (np.full(1 + updates, value) for value in (1e-5, 0.04, 0.996))
    args = types.SimpleNamespace(clip_grad=3.0, freeze_last_layer=0, epochs=1, batch_size_per_gpu=images,
                                 local_crops_number=8, patch_size=PATCH, global_scale=224, local_scale=96)
    script.train_one_epoch(Alone(student), teacher, teacher, loss, data, optimizer, *schedules, 0, None, args)
    dist.destroy_process_group()
    return {"seconds of each": data.seconds[1:], "peak MiB": peak_so_far(torch.device("cpu")) - before}


def our_updates(way, arch, prototypes, images, updates):
    """As `patchssl bench step` measures them."""
    from patchssl.bench.step import ARCHS, measure_step

    return measure_step(way, ARCHS[arch], prototypes, images, updates, "cpu")


def in_a_process(way, asked):
    """One turn of one code."""
    clones = [str(asked.dino), str(asked.pwself)]
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, *clones, "--arch", asked.arch, "--prototypes",
                           str(asked.prototypes), "--images", str(asked.images), "--updates",
                           str(asked.updates), "--way", way], check=True,
                          stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout.splitlines()[-1])


def one_turn(way, asked):
    """What `in_a_process` starts."""
    clone = asked.dino if way == "official dino" else asked.pwself
    with contextlib.redirect_stdout(io.StringIO()):
        found = (official_updates(clone.resolve(), way, asked.arch, asked.prototypes, asked.images, asked.updates)
                 if way in OFFICIAL else our_updates(way, asked.arch, asked.prototypes, asked.images, asked.updates))
    print(json.dumps({key: found[key] for key in ("seconds of each", "peak MiB")}))


def table(turns):
    """A row per code of ours beside the official one."""
    seconds = {way: np.concatenate([turn["seconds of each"] for turn in all_]) for way, all_ in turns.items()}
    peak = {way: np.median([turn["peak MiB"] for turn in all_]) for way, all_ in turns.items()}
    yield "| ours | ms per update | MiB | official | ms per update | MiB | time, ours / official | memory |"
    yield "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |"
    for name, way in OURS.items():
        peer = PEERS[name]
        cells = [f"{1e3 * np.median(seconds[w]):,.0f} [{1e3 * seconds[w].min():,.0f}, {1e3 * seconds[w].max():,.0f}] "
                 f"| {peak[w]:,.0f}" for w in (way, peer)]
        yield (f"| {name} | {cells[0]} | `{OFFICIAL[peer]}` | {cells[1]} "
               f"| {np.median(seconds[way]) / np.median(seconds[peer]):.2f} | {peak[way] / peak[peer]:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dino", type=Path)
    parser.add_argument("pwself", type=Path)
    parser.add_argument("--arch", default="vit_tiny", choices=["vit_tiny", "vit_small"])
    for name, value in (("prototypes", 10_000), ("images", 2), ("rounds", 3), ("updates", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way:
        return one_turn(asked.way, asked)
    turns = {way: [] for way in (*OFFICIAL, *OURS.values())}
    for number, way in product(range(asked.rounds), turns):
        print(f"round {number + 1} of {asked.rounds}: {way}", file=sys.stderr)
        turns[way].append(in_a_process(way, asked))
    print(f"{asked.arch}, {asked.prototypes:,} prototypes, {asked.images} images an update:\n")
    print("\n".join(table(turns)))
    return None


if __name__ == "__main__":
    main()
