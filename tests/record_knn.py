"""Record what DINO's own k-NN script answers: data/knn_parity.json, and features that it scored, data/knn_parity.npz.

    python tests/record_knn.py DINO FASHION PHOTOGRAPHS KEEP

DINO is a clone of facebookresearch/dino, FASHION a folder with Fashion-MNIST's IDX files, PHOTOGRAPHS one with JPEG
files of 1,000 pixels and more. Sets, weights and official features stay in the new folder KEEP, for the same runs of
patchssl. eval_knn.py runs as it is but for two things: `.cuda()` does nothing, and the process group is one process on
gloo. As it sorts classes of equal votes, such as none, in no certain order, it scores the same features again with
torch's stable sort. Tests read `write_set`, `write_weights` and `OUTPUT` from here; they need no clone.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import runpy
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
OUTPUT = HERE / "data" / "knn_parity.json"
SMALL = {"img_size": [96], "embed_dim": 64, "depth": 4, "num_heads": 1, "qkv_bias": True}
CLASSES, SPLITS = 12, {"train": 18, "val": 9}  # images of a class: enough for k = 200, and 100 to test on
FASHION = {"train": ("train", 100), "val": ("t10k", 30)}  # images of a class
CROPS = {"train": 15, "val": 7}  # of a photograph
NUM_KEPT, NUM_SHOWN = 64, 6  # numbers of a feature that are recorded; images of the small set whose features are
_recorders = {name: runpy.run_path(str(HERE / f"record_{name}.py")) for name in ("official", "copydays")}
filled = _recorders["official"]["filled"]
picture = partial(_recorders["copydays"]["picture"], rows=2, columns=3, cell=35)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, "PNG", compress_level=1)


def write_set(root):
    """Class folders of images below `root`: the class's picture and another, of many shapes, some of them gray."""
    for split, count in SPLITS.items():
        for label in range(CLASSES):
            shared = picture(f"class {label}") // 2
            for number in range(count):
                pixels = shared + picture(f"{split} {label} {number}") // 2
                pixels = pixels[number % 5 : 70 - label, 2 * label :]
                pixels = pixels.swapaxes(0, 1) if number % 3 == 1 else pixels
                save(Path(root) / split / f"class{label:02}" / f"{number:02}.png",
                     pixels[..., 1] if number % 7 == 3 else pixels)
    return Path(root)


def write_fashion(root, source):
    """The first images of every class of Fashion-MNIST's two splits as class folders."""
    def read(name, header):
        raw = next(path for path in (source / f"{name}.gz", source / name) if path.exists())
        with (gzip.open if raw.suffix == ".gz" else open)(raw, "rb") as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    for split, (prefix, count) in FASHION.items():
        pixels = read(f"{prefix}-images-idx3-ubyte", 16).reshape(-1, 28, 28)
        labels = read(f"{prefix}-labels-idx1-ubyte", 8)
        for label in range(10):
            for number in np.flatnonzero(labels == label)[:count]:
                save(root / split / f"{label}" / f"{number:05}.png", pixels[number])
    return root


def write_photographs(root, source):
    """Crops of 160 to 640 pixels on a side, a class for every JPEG file below `source`, by name."""
    rng = np.random.default_rng(0)
    for path in sorted(source.rglob("*.jpg"), key=lambda path: path.name):
        image = Image.open(path).convert("RGB")
        for split, count in CROPS.items():
            for number in range(count):
                width, height = rng.integers(160, 641, 2)
                left, top = rng.integers(0, image.width - width), rng.integers(0, image.height - height)
                save(root / split / path.stem / f"{number:02}.png",
                     np.asarray(image.crop((left, top, left + width, top + height))))
    return root


def write_weights(path, shapes):
    """Position embeddings of standard deviation 1 and lively weights, all by their names, as an official file."""
    import torch

    torch.save({name: torch.from_numpy(filled(name, shape)) for name, shape in shapes.items()}, path)
    return path


def run_official(clone, arguments, **replaced):
    """The names of eval_knn.py after a run on a CPU, and what it printed; `replaced` are methods of Tensor."""
    import torch
    import torch.distributed as dist
    import utils

    def one_process(args):
        args.gpu = args.rank = 0
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    command, printed = ["eval_knn.py", *map(str, arguments), "--num_workers", "0"], io.StringIO()
    with mock.patch.object(sys, "argv", command), contextlib.redirect_stdout(printed), \
            mock.patch.multiple(torch.Tensor, cuda=lambda tensor, *_, **__: tensor, **replaced), \
            mock.patch.object(torch.nn.Module, "cuda", lambda module: module), \
            mock.patch.object(utils, "init_distributed_mode", one_process):
        try:
            names = runpy.run_path(str(clone / "eval_knn.py"), run_name="__main__")
        finally:
            dist.destroy_process_group()
    return names, printed.getvalue()


def accuracies(printed):
    """Percent by the names that patchssl gives them, as the script prints them."""
    found = re.findall(r"(\d+)-NN classifier result: Top1: (\S+), Top5: (\S+)", printed)
    return {f"top{n}@{k}": float(value) for k, *values in found for n, value in zip((1, 5), values, strict=True)}


def scored(clone, folder):
    """The script's accuracies for the features that `folder` holds, by its own sort and by a stable one."""
    import torch

    sort = torch.Tensor.sort
    arguments = ["--load_features", folder]
    stable = run_official(clone, arguments, sort=lambda votes, dim, down: sort(votes, stable=True, dim=dim,
                                                                              descending=down))
    return {"official": accuracies(run_official(clone, arguments)[1]), "stable": accuracies(stable[1])}


def save_kept(names, folder):
    """The first numbers of features, float16, and labels; in `folder` the same for the script, as unit vectors."""
    import torch

    kept = {}
    folder.mkdir()
    for split in ("train", "test"):
        kept[split] = names[f"{split}_features"][:, :NUM_KEPT].half()
        torch.save(torch.nn.functional.normalize(kept[split].float()), folder / f"{split}feat.pth")
        kept[f"{split}_labels"] = names[f"{split}_labels"].to(torch.uint8)
        torch.save(names[f"{split}_labels"], folder / f"{split}labels.pth")
    return {name: tensor.numpy() for name, tensor in kept.items()}


def main(clone, fashion, photographs, keep):
    sys.path.insert(0, str(clone))
    import torch
    import vision_transformer as networks

    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    networks.vit_parity = partial(networks.VisionTransformer, **SMALL, norm_layer=norm)
    shapes = {arch: {name: list(tensor.shape) for name, tensor in vars(networks)[arch](patch_size=16, num_classes=0)
                     .state_dict().items()} for arch in ("vit_parity", "vit_tiny")}
    keep.mkdir(parents=True)
    weights = {arch: write_weights(keep / f"{arch}.pth", found) for arch, found in shapes.items()}
    sets = {"small": ("vit_parity", write_set(keep / "small")),
            "fashion-mnist": ("vit_tiny", write_fashion(keep / "fashion-mnist", fashion)),
            "photographs": ("vit_tiny", write_photographs(keep / "photographs", photographs))}
    record, arrays = {"shapes": shapes["vit_parity"], "whole": {}, "kept": {}}, {}
    for name, (arch, root) in sets.items():
        folder = keep / f"{name}-features"
        folder.mkdir()
        names, printed = run_official(clone, ["--data_path", root, "--arch", arch, "--pretrained_weights",
                                              weights[arch], "--dump_features", folder])
        assert "<All keys matched successfully>" in printed  # strict=False would hide it
        record["whole"][name] = scored(clone, folder)
        assert record["whole"][name]["official"] == accuracies(printed)
        if name == "small":
            arrays |= {f"small/{split}": names[f"{split}_features"][:NUM_SHOWN].numpy() for split in ("train", "test")}
        else:
            arrays |= {f"{name}/{part}": array for part, array in save_kept(names, keep / f"{name}-kept").items()}
            record["kept"][name] = scored(clone, keep / f"{name}-kept")
        print(name, tuple(names["train_features"].shape), tuple(names["test_features"].shape), record["whole"][name])
    OUTPUT.write_text(json.dumps(record, indent=1) + "\n")
    np.savez_compressed(OUTPUT.with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*(Path(argument).resolve() for argument in sys.argv[1:5]))
