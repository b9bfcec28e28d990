"""The linear probe as facebookresearch/dino trains it, eval_linear.py: fresh random crops in every epoch.

One thing of it cannot be recommended, and the record says so: the epoch is chosen by the test images.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms

from patchssl.data.images import ImageSet
from patchssl.data.unreadable import raise_unreadable
from patchssl.eval.linear.scores import ProbeOutcome, headline_ranks, true_ranks
from patchssl.eval.pooling import compute_outputs
from patchssl.eval.transforms import normalize_images
from patchssl.models.backbone import Backbone
from patchssl.models.checkpoint import NEWEST, PREVIOUS, load_checkpoint, save_checkpoint
from patchssl.runtime.distributed import all_gather_objects, rank, world_size
from patchssl.runtime.errors import CheckpointError, NotFiniteError, UnreadableImage, UsageError
from patchssl.runtime.loader import BatchLoader
from patchssl.runtime.progress import Progress, shifted

log = logging.getLogger(__name__)

_ROWS = 4096  # test images at a time


@dataclass
class Probe:
    """The linear layer and all that its training has to remember."""

    layer: nn.Linear
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    top1_by_epoch: list[float] = field(default_factory=list)  # on the test images, as fractions
    best: dict[str, Tensor] = field(default_factory=dict)  # the layer's state after the best epoch

    def state_dict(self) -> dict[str, Any]:
        return {"linear": self.layer.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(), "top1_by_epoch": self.top1_by_epoch, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.layer.load_state_dict(state["linear"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.top1_by_epoch, self.best = list(state["top1_by_epoch"]), dict(state["best"])


def dino_probe(training: ProbeTraining, test: Mapping[str, Tensor], test_labels: Tensor, *, folder: Path | None = None,
               facts: Mapping[str, Any] | None = None, progress: Progress | None = None) -> ProbeOutcome:
    """Train as DINO does and give the logits of the best test epoch.

    `test` maps the protocol's outputs to features (Q, D) of the test images' center crops, which are the same in
    every epoch. With a `folder`, every epoch leaves a checkpoint there and a killed training resumes from it;
    `facts` say what is trained, and must be those of the checkpoint. `progress` counts crops of all epochs.
    DataError lists all training images that cannot be read; UsageError for another training's checkpoint;
    NotFiniteError when the training diverges.
    """
    seen = join_dino(test, training.settings).to(training.device)
    probe = make_probe(seen.shape[1], training)
    if folder is not None:
        _resume(probe, folder, facts or {})
    was_training = training.backbone.training
    training.backbone.to(training.device).eval()
    try:
        _train(probe, training, seen, test_labels, folder, facts or {}, progress)
    finally:
        training.backbone.train(was_training)
    best, last = (_logits(state, seen) for state in (probe.best, probe.layer.state_dict()))
    return ProbeOutcome(best, {
        "selection": {"by": training.settings["selection"], "best_epoch": _best_epoch(probe) + 1,
                      "epochs": training.settings["epochs"]},
        "last_epoch": {name: _share(last, test_labels, k) for name, k in headline_ranks(last).items()},
        "top1_by_epoch": probe.top1_by_epoch})


def _train(probe: Probe, training: ProbeTraining, seen: Tensor, test_labels: Tensor, folder: Path | None,
           facts: Mapping[str, Any], progress: Progress | None) -> None:
    """The epochs that are left, each with its score and its checkpoint."""
    epochs, count = training.settings["epochs"], len(training.images)
    start = len(probe.top1_by_epoch)
    if progress is not None and start:
        progress(start * count, epochs * count)
    batches = dino_batches(training, range(start, epochs))
    for epoch in range(start, epochs):
        shown = None if progress is None else shifted(progress, epoch * count, epochs * count)
        _train_epoch(probe, training, batches, shown)
        if not all(tensor.isfinite().all() for tensor in probe.layer.state_dict().values()):
            raise NotFiniteError(f"the linear layer is not finite after epoch {epoch + 1}: its training has diverged, "
                                 "or the network gave features that are not finite for one of the crops")
        _judge(probe, seen, test_labels)
        if folder is not None and rank() == 0:
            try:
                save_checkpoint(folder, {"task": "linear", "facts": dict(facts), **probe.state_dict()})
            except CheckpointError as error:  # who loses no process needs none
                log.warning("epoch %s is not kept, after a kill it is trained again: %s", epoch + 1,
                            str(error).partition(";")[0])


def make_probe(width: int, training: ProbeTraining) -> Probe:
    """An untrained probe of `width` features: weights N(0, 0.01) by the seed, biases zero."""
    settings = training.settings
    layer = nn.Linear(width, training.num_classes)
    generator = torch.Generator().manual_seed(training.seed)
    with torch.no_grad():
        layer.weight.normal_(0, settings["initial_deviation"], generator=generator)
        layer.bias.zero_()
    layer.to(training.device)
    rate = settings["learning_rate"] * settings["batch"] / settings["learning_rate_is_per"]
    optimizer = torch.optim.SGD(layer.parameters(), rate, momentum=settings["momentum"],
                                weight_decay=settings["weight_decay"])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings["epochs"], eta_min=0)
    return Probe(layer, optimizer, scheduler)


def join_dino(found: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """The outputs of a pass as DINO's probe sees them: one alone, or two interleaved (class0, mean0, class1, ...)."""
    parts = [found[output] for output in settings["outputs"]]
    return torch.stack(parts, dim=2).flatten(1) if len(parts) == 2 else parts[0]


def _train_epoch(probe: Probe, training: ProbeTraining, batches: Iterator[LabeledBatch],
                 progress: Progress | None) -> None:
    """One epoch; past an unreadable image nothing is learned, images are only decoded, to name all of them."""
    probe.layer.train()
    bad: list[tuple[str, str]] = []
    done, labels = 0, training.labels.to(training.device)
    while done < len(training.images):
        batch = next(batches)
        own = [features(training, chunk) for chunk in batch.chunks] if not (bad or batch.bad) else []
        dealt = all_gather_objects((own, batch.bad))
        bad += [name for _, names in dealt for name in names]
        if not bad:
            loss = F.cross_entropy(probe.layer(_reassembled([parts for parts, _ in dealt]).to(training.device)),
                                   labels[batch.indices])
            probe.optimizer.zero_grad()
            loss.backward()
            probe.optimizer.step()
        done += len(batch.indices)
        if progress is not None:
            progress(done, len(training.images))
    raise_unreadable([UnreadableImage(*names) for names in sorted(set(bad))], len(training.images))
    probe.scheduler.step()


def _reassembled(dealt: Sequence[Sequence[Tensor]]) -> Tensor:
    """The chunks of a batch in their order, from those of every process: the first, the second process's first, ..."""
    count = sum(map(len, dealt))
    return torch.cat([dealt[number % len(dealt)][number // len(dealt)] for number in range(count)])


@torch.no_grad()
def features(training: ProbeTraining, pixels: Tensor) -> Tensor:
    """What the probe sees (b, D) of crops (b, 3, S, S) uint8; on a GPU in bfloat16 and handed over by the CPU."""
    net, device = training.backbone, training.device
    images = normalize_images(pixels.to(device, non_blocking=True), net.mean, net.std)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        found = compute_outputs(net, images, training.settings["outputs"])
    joined = join_dino(found, training.settings).float()
    return joined if world_size() == 1 else joined.cpu()


@torch.no_grad()
def _judge(probe: Probe, seen: Tensor, labels: Tensor) -> None:
    """Note the top-1 of an epoch on the test images, and keep the layer if it is the best so far."""
    probe.layer.eval()
    probe.top1_by_epoch.append(_share(_logits(probe.layer.state_dict(), seen), labels, 1))
    if _best_epoch(probe) == len(probe.top1_by_epoch) - 1:
        probe.best = copy.deepcopy(probe.layer.state_dict())


def _best_epoch(probe: Probe) -> int:
    """Of epochs that are equally good, the first."""
    return int(np.argmax(probe.top1_by_epoch))


@torch.no_grad()
def _logits(state: Mapping[str, Tensor], seen: Tensor) -> Tensor:
    weight, bias = state["weight"].to(seen.device), state["bias"].to(seen.device)  # a resumed best one is on the CPU
    return torch.cat([F.linear(rows, weight, bias).cpu() for rows in seen.split(_ROWS)])


def _share(logits: Tensor, labels: Tensor, k: int) -> float:
    return float((true_ranks(logits, labels) < k).double().mean())


def _resume(probe: Probe, folder: Path, facts: Mapping[str, Any]) -> None:
    """Resume from the checkpoint in `folder`, if there is one; UsageError if it is of another training."""
    if not any((folder / name).exists() for name in (NEWEST, PREVIOUS)):
        return
    state = load_checkpoint(folder, of_run=False)
    if state.get("task") != "linear" or "facts" not in state:
        raise UsageError(f"{folder} holds a checkpoint, but not of a linear probe; choose another folder")
    if differing := sorted(name for name in {*facts, *state["facts"]} if facts.get(name) != state["facts"].get(name)):
        there, here = ({name: source.get(name) for name in differing} for source in (state["facts"], facts))
        raise UsageError(f"{folder} holds the checkpoint of another probe: there {there}, asked for was {here}; choose "
                         "another folder, or remove that checkpoint")
    try:
        probe.load_state_dict(state)
    except (LookupError, AttributeError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"the checkpoint in {folder} does not fit its probe ({error}); remove it to start "
                              "anew") from None


class ProbeTraining(NamedTuple):
    """What a probe is trained on, and how; `settings` are those of the protocol."""

    backbone: Backbone
    images: ImageSet
    labels: Tensor  # (N,)
    num_classes: int
    settings: Mapping[str, Any]
    seed: int = 0
    device: torch.device = torch.device("cpu")
    batch_size: int = 64  # images per forward pass; a step's batch is the protocol's
    workers: int = 0


class LabeledBatch(NamedTuple):
    """One step's batch: which images, and the crops that this process computes."""

    indices: list[int]  # of the whole batch
    chunks: list[Tensor]  # every world-size-th chunk: (b, 3, S, S) uint8
    bad: list[tuple[str, str]]  # name and reason of what cannot be read


def dino_batches(training: ProbeTraining, epochs: range) -> Iterator[LabeledBatch]:
    """The batches of all steps of `epochs`, in chunks of `batch_size` that processes deal among themselves."""
    keys = (chunk for epoch, indices in _steps(training, epochs) for chunk in _own_chunks(training, epoch, indices))
    loader = iter(BatchLoader(RandomCrops(training.images, training.settings, training.seed), keys, _collate,
                              workers=training.workers, pin_memory=training.device.type == "cuda"))
    for epoch, indices in _steps(training, epochs):
        found = [next(loader) for _ in _own_chunks(training, epoch, indices)]
        yield LabeledBatch(indices, [pixels for pixels, _ in found], [name for _, bad in found for name in bad])


def _steps(training: ProbeTraining, epochs: range) -> Iterator[tuple[int, list[int]]]:
    """The epoch and the indices of every batch, ordered as torch's DistributedSampler orders one process's images."""
    for epoch in epochs:
        generator = torch.Generator().manual_seed(training.seed + epoch)
        for batch in torch.randperm(len(training.images), generator=generator).split(training.settings["batch"]):
            yield epoch, batch.tolist()


def _own_chunks(training: ProbeTraining, epoch: int, indices: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Keys (epoch, index) of the chunks of a batch that this process computes."""
    size = training.batch_size
    chunks = [indices[at : at + size] for at in range(0, len(indices), size)]
    return [[(epoch, index) for index in chunk] for chunk in chunks[rank() :: world_size()]]


class RandomCrops(Dataset[Any]):
    """Crops (3, S, S) uint8 by (epoch, index): torchvision's RandomResizedCrop and RandomHorizontalFlip of PIL images.

    An unreadable image is its (name, reason), so that workers can send it.
    """

    def __init__(self, images: ImageSet, settings: Mapping[str, Any], seed: int) -> None:
        self._images, self._seed = images, seed
        self._draw = transforms.Compose([
            transforms.RandomResizedCrop(settings["train_crop"], tuple(settings["train_scale"]),
                                         tuple(settings["train_aspect"]),
                                         transforms.InterpolationMode(settings["train_interpolation"])),
            transforms.RandomHorizontalFlip(settings["train_mirror"])])

    def __getitem__(self, key: tuple[int, int]) -> Tensor | tuple[str, str]:
        epoch, index = key
        try:
            image = Image.fromarray(self._images.pixels(index))
        except UnreadableImage as error:
            return error.name, error.reason
        state = np.random.SeedSequence([self._seed, epoch, index]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(state[0]))
            drawn = np.array(self._draw(image))
        return torch.from_numpy(drawn).permute(2, 0, 1).contiguous()


def _collate(items: Sequence[Tensor | tuple[str, str]]) -> tuple[Tensor, list[tuple[str, str]]]:
    crops = [item for item in items if isinstance(item, Tensor)]
    pixels = torch.stack(crops) if crops else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    return pixels, [item for item in items if not isinstance(item, Tensor)]
