"""Record what DINO's own linear probe gives for a network and images that everybody can make: data/linear_parity.npz.

    python tests/record_linear.py DINO

The argument is a clone of facebookresearch/dino. Its eval_linear.py runs whole, on a CPU; only the random numbers of
its crops and its initial weights are replaced, by those of patchssl. Tests read what follows from here; they need no
clone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import runpy
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from patchssl.data.open import open_pair
from patchssl.eval.linear.dino import ProbeTraining, RandomCrops, make_probe
from patchssl.eval.linear.task import linear_protocol
from patchssl.eval.protocols import Protocol
from patchssl.models.load import load_backbone

OUTPUTS = Path(__file__).parent / "data" / "linear_parity.npz"
CASES = {"class tokens of four blocks": (["class:4"], 4, False),
         "class and mean patch token": (["class:1", "mean_patch"], 1, True)}  # outputs, n_last_blocks, avgpool
NETWORK = {"img_size": [96], "patch_size": 16, "embed_dim": 64, "depth": 4, "num_heads": 1, "qkv_bias": True,
           "norm_layer": partial(torch.nn.LayerNorm, eps=1e-6)}
EPOCHS, BATCH, CLASSES, TRAIN, TEST = 3, 8, 6, 5, 2  # five images of a class to train on, two to test on
LEARNING_RATE = 0.5  # far above DINO's: so few images would move nothing

filled = runpy.run_path(str(Path(__file__).with_name("record_official.py")))["filled"]


def write_images(root):
    """Class folders of images of several sizes, in colors by class, from integer arithmetic."""
    for split, count in (("train", TRAIN), ("val", TEST)):
        for label in range(CLASSES):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                height, width = 40 + 7 * number, 66 - 9 * (label % 3)
                name = f"{split} {label} {number}"
                noise = filled(f"image {name}", (height, width, 3)) * 28 + filled(f"image tint {name}", (3,)) * 20
                rows = np.arange(height)[:, None] // (2 + label) % 2 * 60
                pixels = 110 + 30 * np.eye(3)[label % 3] + noise + rows[..., None]
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return root


def write_network(path):
    """DINO's network of `record_official`, its weights by their names, as an official file."""
    recorded = np.load(OUTPUTS.with_name("official_outputs.npz"))
    shapes = json.loads(str(recorded["shapes"]))["dino"]
    torch.save({name: torch.from_numpy(filled(name, shape)) for name, shape in shapes.items()}, path)
    return path


def training_of(backbone, train, outputs, **changed):
    """The training of a case: DINO's settings but for its length, batch and learning rate."""
    own = {"outputs": outputs, "epochs": EPOCHS, "batch": BATCH, "learning_rate": LEARNING_RATE, **changed}
    plan = Protocol("linear", "dino", 1, {**linear_protocol("dino", backbone).settings, **own})
    return ProbeTraining(backbone, train, torch.as_tensor(train.labels), len(train.classes), plan.plain_settings(),
                         seed=0)


def official_logits(clone, data, weights, network, training, last_blocks, avgpool):
    """Logits (epochs, test images, classes) of eval_linear.py on the folder `data`, and its own words on accuracy.

    Replaced: cuda, the crops (`training`'s own, by epoch and index) and the initial weights of the layer.
    """
    sys.path.insert(0, str(clone))
    import eval_linear as official
    import utils
    import vision_transformer

    vision_transformer.vit_parity = lambda patch_size, num_classes: vision_transformer.VisionTransformer(
        **{**network, "patch_size": patch_size}, num_classes=num_classes)
    crops, logits = RandomCrops(training.images, training.settings, training.seed), []
    initial = make_probe(network["embed_dim"] * (last_blocks + avgpool), training).layer.state_dict()
    settings = training.settings
    official.args = args = argparse.Namespace(
        arch="vit_parity", patch_size=network["patch_size"], n_last_blocks=last_blocks, avgpool_patchtokens=avgpool,
        pretrained_weights=str(weights), checkpoint_key="teacher", epochs=settings["epochs"],
        lr=settings["learning_rate"], batch_size_per_gpu=settings["batch"], gpu=None, data_path=str(data),
        num_workers=0, val_freq=1, output_dir=tempfile.mkdtemp(), num_labels=training.num_classes, evaluate=False)
    torch.distributed.init_process_group("gloo", init_method=f"file://{args.output_dir}/group", rank=0, world_size=1)
    with contextlib.ExitStack() as stack:
        for replacement in replacements(official, utils, crops, initial, logits):
            stack.enter_context(replacement)
        official.eval_linear(args)
    torch.distributed.destroy_process_group()
    sys.path.remove(str(clone))
    per_epoch = np.split(np.concatenate(logits), settings["epochs"])
    return np.stack(per_epoch), (Path(args.output_dir) / "log.txt").read_text()


def replacements(official, utils, crops, initial, logits):
    """What lets eval_linear.py run on one CPU, with given crops and initial weights; test logits go into `logits`."""
    sampler, classifier = torch.utils.data.distributed.DistributedSampler, official.LinearClassifier
    wrapped, set_epoch, make = torch.nn.parallel.DistributedDataParallel, sampler.set_epoch, classifier.__init__
    now = {}

    class Folder(official.datasets.ImageFolder):
        """Of train/, the crops of patchssl, then the last two steps of DINO's own transform."""

        def __getitem__(self, index):
            if Path(self.root).name != "train":
                return super().__getitem__(index)
            pixels = crops[now["epoch"], index].permute(1, 2, 0).numpy()
            for step in self.transform.transforms[-2:]:
                pixels = step(pixels)
            return pixels, self.targets[index]

    def remember(self, epoch):
        set_epoch(self, epoch)
        now["epoch"] = epoch

    def start(self, *arguments, **options):
        make(self, *arguments, **options)
        self.linear.load_state_dict(initial)
        self.register_forward_hook(lambda layer, _, found: None if layer.training else logits.append(found.numpy()))

    for place, name, own in [
            (torch.Tensor, "cuda", lambda self, *_, **__: self), (torch.nn.Module, "cuda", lambda self, *_: self),
            (torch.cuda, "synchronize", lambda: None),
            (torch.nn.parallel, "DistributedDataParallel", lambda module, device_ids: wrapped(module)),
            (utils.SmoothedValue, "synchronize_between_processes", lambda self: None),  # of one process
            (utils, "init_distributed_mode", lambda args: None), (sampler, "set_epoch", remember),
            (official.datasets, "ImageFolder", Folder), (classifier, "__init__", start)]:
        yield mock.patch.object(place, name, own)


def main(clone):
    with tempfile.TemporaryDirectory() as folder:
        data, weights = write_images(Path(folder) / "set"), write_network(Path(folder) / "network.pth")
        train, _ = open_pair(data)
        backbone, record = load_backbone(str(weights)), {}
        for case, (outputs, last_blocks, avgpool) in CASES.items():
            training = training_of(backbone, train, outputs)
            record[case], log = official_logits(clone, data, weights, NETWORK, training, last_blocks, avgpool)
            record[f"{case}/acc1"] = np.array([json.loads(line)["test_acc1"] for line in log.splitlines()])
            print(case, record[case].shape, log, sep="\n")
    np.savez_compressed(OUTPUTS, **record)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
