"""Record what DINO's own script answers on a small set that everybody can make: data/copydays_parity.json.

    python tests/record_copydays.py DINO

DINO is a clone of facebookresearch/dino. Its eval_copy_detection.py runs as it is but for three things: `.cuda()`
does nothing, the process group is one process on gloo, and the numbers of images, 157 and 229, are the set's own.
Tests read `write_set`, `ARCHITECTURE` and `OUTPUT` from here; they need no clone.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import runpy
import sys
import tempfile
import zlib
from functools import partial
from math import isqrt
from pathlib import Path

import numpy as np
from PIL import Image

OUTPUT = Path(__file__).parent / "data" / "copydays_parity.json"
ARCHITECTURE = {"img_size": [224], "embed_dim": 24, "depth": 2, "num_heads": 3, "qkv_bias": True}
VARIANTS = {"dino": ("distractors", "whitening"), "dino-nodistractors": ("whitening",),
            "dino-nowhitening": ("distractors",), "dino-plain": ()}
QUALITIES, PERCENTS = (3, 5, 8, 10, 15, 20, 30, 50, 75), (10, 15, 20, 30, 40, 50, 60, 70, 80)
BLOCKS = ["original", "strong", *(f"jpegqual/{q}" for q in QUALITIES), *(f"crops/{p}" for p in PERCENTS)]
NUM_ORIGINALS, NUM_STRONG, NUM_DISTRACTORS, NUM_WHITENING = 22, 33, 30, 120
filled = runpy.run_path(str(Path(__file__).with_name("record_official.py")))["filled"]


def weight(name, shape):
    """A tensor of the network; positions count less than pictures, so that features differ."""
    return filled(name, shape) * np.float32(0.1 if name in ("pos_embed", "cls_token") else 1)


def picture(name, rows=5, columns=7, cell=14):
    """(70, 98, 3) uint8 that depends on `name` alone: random colors on a grid, interpolated."""

    def grid(of):
        values = np.arange((rows + 1) * (columns + 1) * 3, dtype=np.uint64) + np.uint64(zlib.crc32(of.encode()) << 20)
        values = (values ^ (values >> np.uint64(17))) * np.uint64(0xBF58476D1CE4E5B9)
        return (values >> np.uint64(56)).astype(np.int64).reshape(rows + 1, columns + 1, 3)

    corners = grid(name)
    y, x = np.mgrid[: rows * cell, : columns * cell]
    (top, down), (left, across) = divmod(y, cell), divmod(x, cell)
    down, across = down[..., None], across[..., None]
    upper = corners[top, left] * (cell - across) + corners[top, left + 1] * across
    lower = corners[top + 1, left] * (cell - across) + corners[top + 1, left + 1] * across
    return ((upper * (cell - down) + lower * down) // cell**2).astype(np.uint8)


def coarse(pixels, quality):
    """A quarter of either side, in few gray levels: what stands for a JPEG file of this `quality`."""
    rows, columns = pixels.shape[0] // 4, pixels.shape[1] // 4
    small = pixels[: 4 * rows, : 4 * columns].reshape(rows, 4, columns, 4, 3).astype(np.int64).sum(axis=(1, 3)) // 16
    step = 2 + 240 // quality
    return (small // step * step).astype(np.uint8)


def cropped(pixels, percent):
    """Without `percent` of the area, at the lower right."""
    height, width = (isqrt(side * side * (100 - percent) // 100) for side in pixels.shape[:2])
    return pixels[-height:, -width:]


def strong(pixels, number):
    """One of six ways in which a picture is hard to recognize."""
    inset = np.full_like(pixels, 60)
    inset[20:55, 10:59] = pixels[::2, ::2]
    return [255 - pixels, pixels[:, ::-1], np.rot90(pixels), pixels[..., ::-1], inset, pixels // 3][number % 6]


def write_set(root):
    """The set below `root` in Copydays' layout; PNG files called .jpg, whose pixels no decoder changes."""
    root = Path(root)

    def save(name, pixels):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(pixels)).save(root / f"{name}.jpg", "PNG")

    for number in range(NUM_ORIGINALS):
        stem, pixels = f"{3000 + number}00", picture(f"source {number}")
        save(f"original/{stem}", pixels)
        for quality in QUALITIES:
            save(f"jpegqual/{quality}/{stem}", coarse(pixels, quality))
        for percent in PERCENTS:
            save(f"crops/{percent}/{stem}", cropped(pixels, percent))
        for copy in range(1, 2 + number % 2):
            save(f"strong/{stem[:4]}{copy:02d}", strong(pixels, 2 * number + copy))
    for kind, count in (("distractors", NUM_DISTRACTORS), ("whitening", NUM_WHITENING)):
        for number in range(count):
            save(f"{kind}/{number:03d}", picture(f"{kind} {number}"))
    return root


def run_official(clone, arguments, num_originals, num_strong, networks=None):
    """Names of DINO's script after a run with these `arguments` on a CPU, and what it printed.

    `networks` joins its architectures.
    """
    import torch
    import torch.distributed as dist

    def one_process(args):
        args.gpu = args.rank = 0
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    source = (Path(clone) / "eval_copy_detection.py").read_text()
    for official, number in (("* 157", f"* {num_originals}"), ("[1] = 229", f"[1] = {num_strong}")):
        assert source.count(official) == 1
        source = source.replace(official, number)
    before, sys.argv = sys.argv, ["eval_copy_detection.py", *arguments, "--use_cuda", "0", "--num_workers", "0"]
    sys.path.insert(0, str(clone))
    vars(importlib.import_module("vision_transformer")).update(networks or {})
    importlib.import_module("utils").init_distributed_mode = one_process
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    names, printed = {"__name__": "__main__"}, io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(source, "eval_copy_detection.py", "exec"), names)
    finally:
        sys.argv = before
        dist.destroy_process_group()
    return names, printed.getvalue()


def summary(names, printed, originals):
    """The printed mAP by block, and the place of every query's original among the 20 results, -1 where it is none.

    `originals`: their ids, query by query.
    """
    maps = {block: float(value) for block, value in re.findall(r"eval on (\S+) mAP=([\d.]+)", printed)}
    hits = names["indices"].numpy() == np.asarray(originals)[:, None]
    return {"maps": maps, "places": np.where(hits.any(axis=1), hits.argmax(axis=1), -1).tolist()}


def originals_of(root):
    """The id of every query's original, block by block, by the rules of Copydays' names."""
    stems = sorted(path.stem for path in (Path(root) / "original").iterdir())
    return [[stem[:4] for stem in stems].index(path.stem[:4]) for block in BLOCKS
            for path in sorted((Path(root) / block).iterdir())]


def main(clone):
    import torch

    sys.path.insert(0, str(clone))
    build = importlib.import_module("vision_transformer").VisionTransformer
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    networks = {"vit_parity": lambda **given: build(**ARCHITECTURE, **given, norm_layer=norm)}
    shapes = {name: list(tensor.shape) for name, tensor in networks["vit_parity"](patch_size=16, num_classes=0)
              .state_dict().items()}
    record = {"shapes": shapes, "variants": {}}
    with tempfile.TemporaryDirectory() as folder:
        root, weights = write_set(Path(folder) / "set"), Path(folder) / "weights.pth"
        torch.save({name: torch.from_numpy(weight(name, shape)) for name, shape in shapes.items()}, weights)
        for variant, kinds in VARIANTS.items():
            extra = [part for kind in ("distractors", "whitening")
                     for part in (f"--{kind}_path", str(root / kind) if kind in kinds else "none")]
            arguments = ["--data_path", str(root), *extra, "--arch", "vit_parity", "--patch_size", "16",
                         "--imsize", "224", "--pretrained_weights", str(weights)]
            found = run_official(clone, arguments, NUM_ORIGINALS, NUM_STRONG, networks)
            record["variants"][variant] = summary(*found, originals_of(root))
            print(variant, record["variants"][variant]["maps"])
    OUTPUT.write_text(re.sub(r",\s+(?=-?\d)", ", ", json.dumps(record, indent=1)) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]).resolve())
