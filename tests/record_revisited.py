"""Record what official code says of a small made set: data/revisited_parity.json.

    python tests/record_revisited.py DINO REVISITOP

The arguments are clones of facebookresearch/dino and filipradenovic/revisitop. DINO's eval_image_retrieval.py runs as
it is, on a CPU, with a smaller network; then revisitop's loading, cropping and scoring around the same network. Tests
read `make_sets`, `save_weights` and `RECORD` from here; they need no clone.
"""

from __future__ import annotations

import json
import os
import pickle
import runpy
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
RECORD = HERE / "data" / "revisited_parity.json"
filled = runpy.run_path(str(HERE / "record_official.py"))["filled"]
RUNS = {"roxford5k": ["--imsize", "224", "--multiscale", "False"],
        "rparis6k": ["--imsize", "512", "--multiscale", "True"]}
LEVELS = {"easy": (["easy"], ["junk", "hard"]), "medium": (["easy", "hard"], ["junk"]),
          "hard": (["hard"], ["junk", "easy"])}
SIZES = [(560, 420), (420, 560), (333, 251), (1200, 300), (128, 96), (600, 601)]
ROTATED = 6  # an EXIF orientation, which the official code does not look at


def grid(name, cells, width, height):
    """(height, width, 3) int64 from 0 to 255: colors that depend on `name`, in so many cells on either side."""
    colors = np.floor((filled(f"image {name}", (cells, cells, 3)) / 3.4642 + 0.5) * 256).clip(0, 255).astype(np.int64)
    return colors[np.arange(height)[:, None] * cells // height, np.arange(width) * cells // width]


def make_image(number, landmark, strength, box=None):
    """Clutter of its own, over it in `box` or everywhere the colors of `landmark`, `strength` eighths strong."""
    width, height = SIZES[number % len(SIZES)]
    pixels = grid(f"clutter {number}", 24, width, height)
    left, top, right, bottom = box or (0, 0, width, height)
    part = pixels[top:bottom, left:right]
    shown = grid(f"scene {landmark}", 6, right - left, bottom - top)
    pixels[top:bottom, left:right] = (strength * shown + (8 - strength) * part) // 8
    return Image.fromarray(pixels.astype(np.uint8))


def make_sets(root):
    """ROOT/NAME with gnd_NAME.pkl and jpg/ for both names: 5 queries, 30 images in the database.

    The last query has no easy image.
    """
    first, *others = RUNS
    folder = Path(root) / first
    (folder / "jpg").mkdir(parents=True)
    truth = {"imlist": [], "qimlist": [], "gnd": []}
    order = [7 * index % 30 for index in range(30)]  # labels are not in the order of the database
    kinds = {label: order[start : start + 10] for start, label in ((0, "easy"), (10, "hard"), (20, "junk"))}
    places = {}
    for query in range(5):
        labels = {"easy": kinds["easy"][2 * query : 2 * query + 2], "hard": kinds["hard"][2 * query : 2 * query + 2],
                  "junk": kinds["junk"][query : query + 1]}
        places |= {index: (query, strength) for label, strength in (("easy", 5), ("hard", 3), ("junk", 4))
                   for index in labels[label]}
        if query == 4:
            labels["easy"] = []
        width, height = SIZES[(query + 30) % len(SIZES)]
        box = [width // 8, height // 6, width * 3 // 4, height * 5 // 6]
        image = make_image(query + 30, query, 6, box)
        exif = Image.Exif()
        exif[0x0112] = ROTATED if query == 1 else 1
        image.save(folder / "jpg" / f"query_{query}.jpg", "PNG", exif=exif, compress_level=1)
        truth["qimlist"].append(f"query_{query}")
        truth["gnd"].append({"bbx": [side + 0.3 for side in box], **labels})
    for index in range(30):
        image = make_image(index, *places.get(index, (100 + index, 4)))
        image = image.convert("L") if index == 11 else image
        image.save(folder / "jpg" / f"image_{index:02}.jpg", "PNG", compress_level=1)
        truth["imlist"].append(f"image_{index:02}")
    (folder / f"gnd_{first}.pkl").write_bytes(pickle.dumps(truth, protocol=2))
    for name in others:
        shutil.copytree(folder, Path(root) / name)
        (Path(root) / name / f"gnd_{first}.pkl").rename(Path(root) / name / f"gnd_{name}.pkl")


def save_weights(path):
    """A small network of DINO's, filled by index arithmetic, as its training saves a bare backbone."""
    import torch

    shapes = json.loads(str(np.load(HERE / "data" / "official_outputs.npz")["shapes"]))["dino"]
    torch.save({name: torch.from_numpy(filled(name, shape)) for name, shape in shapes.items()}, path)
    return path


def on_a_cpu():
    """Stand-ins for a GPU and for names that numpy and Pillow no longer have."""
    import torch

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": "29617"}
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *rest, **options: self
    torch.cuda.set_device = lambda *rest: None
    start = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda backend, **options: start("gloo", **options)
    np.in1d, Image.ANTIALIAS = np.isin, Image.Resampling.LANCZOS


def run_dino(root, weights, name):
    """What eval_image_retrieval.py computes: similarities (queries, database) and both of its levels."""
    import eval_knn
    import torch
    import utils

    features, levels = [], []
    extract, score = eval_knn.extract_features, utils.compute_map
    eval_knn.extract_features = lambda *rest, **options: features.append(extract(*rest, **options)) or features[-1]
    utils.compute_map = lambda *rest: levels.append(score(*rest)) or levels[-1]
    script = Path(utils.__file__).with_name("eval_image_retrieval.py")
    sys.argv = [str(script), "--data_path", str(root), "--dataset", name, *RUNS[name], "--arch", "vit_tiny",
                "--pretrained_weights", str(weights), "--num_workers", "0", "--use_cuda", "False"]
    runpy.run_path(str(script), run_name="__main__")
    eval_knn.extract_features, utils.compute_map = extract, score
    torch.distributed.destroy_process_group()
    database, queries = (torch.nn.functional.normalize(part).numpy() for part in features)
    return {"similarity": plain(queries @ database.T), **{level: named(found) for level, found in
                                                         zip(("medium", "hard"), levels, strict=True)}}


def run_revisitop(root, network, compute_map):
    """Queries cut as in example_process_images.py, 1024 px by its authors' rule, DINO's multi_scale, all levels."""
    import torch
    import utils
    from torchvision.transforms import functional as to

    folder, features = Path(root) / "rparis6k", {}
    truth = pickle.loads((folder / "gnd_rparis6k.pkl").read_bytes())
    boxes = [entry["bbx"] for entry in truth["gnd"]] + [None] * len(truth["imlist"])
    for name, box in zip(truth["qimlist"] + truth["imlist"], boxes, strict=True):
        image = Image.open(folder / "jpg" / f"{name}.jpg").convert("RGB")
        side, whole = 1024, max(image.size)
        if box is not None:
            image = image.crop(box)
            side = 1024 * max(image.size) / whole
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        normalized = to.normalize(to.to_tensor(image), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        with torch.no_grad():
            features[name] = utils.multi_scale(normalized[None], network)[0].numpy()
    similarity = np.array([[features[a] @ features[b] for b in truth["imlist"]] for a in truth["qimlist"]])
    ranks, found = np.argsort(-similarity.T, axis=0), {}
    for level, (positive, junk) in LEVELS.items():
        labels = [{"ok": np.concatenate([entry[label] for label in positive]),
                   "junk": np.concatenate([entry[label] for label in junk])} for entry in truth["gnd"]]
        found[level] = named(compute_map(ranks, labels, [1, 5, 10]))
    return {"similarity": plain(similarity), **found}


def named(found):
    mean, aps, precisions, _ = found
    return {"map": float(mean), "mp": [float(value) for value in precisions],
            "aps": [None if np.isnan(ap) else float(ap) for ap in aps]}


def smallest_gap(similarity, truth):
    """Between a positive image and one of another label: what rounding must not bridge."""
    gaps = []
    for row, entry in zip(similarity, truth, strict=True):
        for label in ("easy", "hard"):
            others = np.setdiff1d(np.arange(len(row)), [*entry[label], *entry["junk"]])
            gaps += [abs(row[others] - row[index]).min() for index in entry[label]]
    return min(gaps)


def plain(similarity):
    return [[round(float(value), 7) for value in row] for row in similarity]


def main(dino, revisitop):
    sys.path[:0] = [str(dino), str(revisitop / "python")]
    on_a_cpu()
    import torch
    import vision_transformer
    from evaluate import compute_map

    small = partial(vision_transformer.VisionTransformer, img_size=[96], embed_dim=64, depth=4, num_heads=1,
                    qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6))
    vision_transformer.vit_tiny = small
    with tempfile.TemporaryDirectory() as root:
        weights = save_weights(Path(root) / "small.pth")
        record = {}
        make_sets(root)
        for name in RUNS:
            record[name] = run_dino(root, weights, name)
        network = small(patch_size=16, num_classes=0).eval()
        network.load_state_dict(torch.load(weights))
        record["revisitop"] = run_revisitop(root, network, compute_map)
        truth = pickle.loads((Path(root) / "rparis6k" / "gnd_rparis6k.pkl").read_bytes())["gnd"]
    RECORD.write_text(json.dumps(record) + "\n")
    for name, found in record.items():
        print(name, {level: round(100 * found[level]["map"], 2) for level in LEVELS if level in found},
              f"smallest gap {smallest_gap(np.array(found['similarity']), truth):.1e}")


if __name__ == "__main__":
    main(*(Path(clone).resolve() for clone in sys.argv[1:3]))
