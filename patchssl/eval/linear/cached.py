"""Many linear probes trained together on features that were computed once.

Probes differ in what they see, their learning rate and their weight decay. Those that see the same features share
one matrix product a step, forward and back, and all of them share the order of the images. Features are whitened
first: the classifiers are still linear, but few epochs bring them near their optimum (of small networks, features that
were only standardized left 5 to 12 points of held-out accuracy behind). Softmax regression is convex, so all start
from zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from patchssl.eval.linear.scores import ProbeOutcome, Scaling, best_of, epoch_order, hold_out, join_outputs
from patchssl.runtime.errors import UsageError
from patchssl.runtime.progress import Progress, shifted

_ROWS = 4096  # images at a time where nothing is trained
_LOGITS_AT_A_TIME = 2**25  # 128 MiB of float32
MOST_WIDE = 2**14  # numbers of an image: their covariance takes 2 GiB in double precision
_KEPT = 2**30  # 4 GiB: whitened features up to that many numbers are kept, those of a larger set made batch by batch


class GridProbe(NamedTuple):
    """One cell of the grid."""

    input: str  # such as class:1, class:4, class:4 + mean_patch
    learning_rate: float
    weight_decay: float


def grid(settings: Mapping[str, Any]) -> list[GridProbe]:
    """All probes that the settings of a protocol name; those of one input follow each other."""
    cells = itertools.product(settings["inputs"], settings["learning_rates"], settings["weight_decays"])
    return [GridProbe(*cell) for cell in cells]


def cached_probe(train: Mapping[str, Tensor], labels: Tensor, test: Mapping[str, Tensor], classes: tuple[str, ...],
                 settings: Mapping[str, Any], *, seed: int = 0, device: torch.device | None = None,
                 progress: Progress | None = None) -> ProbeOutcome:
    """The best probe of the grid, chosen on images held out of `train`, and its logits of `test`.

    `train` and `test` map the protocol's outputs to features (N, D) and (Q, D); `labels` (N,) are ids into `classes`.
    The chosen probe is trained again on all of `train`; labels of the test images are no argument. UsageError for
    features too wide to be whitened.
    """
    require_narrow(sum(features.shape[1] for features in train.values()))
    where = device or torch.device("cpu")
    columns = input_columns({output: features.shape[1] for output, features in train.items()})
    fit, held = hold_out(labels, settings["held_out"], seed, classes)
    probes = grid(settings)
    data = Data(_at_home(join_outputs(train), where), labels.to(where), columns, len(classes))
    steps = [math.prod(length(count, settings)) for count in (len(fit), len(labels))]
    shown = None if progress is None else shifted(progress, 0, sum(steps))
    candidates = train_grid(data, fit, probes, settings, seed=seed, device=where, progress=shown)
    accuracy, loss = _judge(data, candidates, held)
    chosen = best_of(accuracy, loss)
    shown = None if progress is None else shifted(progress, steps[0], sum(steps))
    final = train_grid(data, torch.arange(len(labels)), [probes[chosen]], settings, seed=seed, device=where,
                       progress=shown)
    logits = torch.cat([part.cpu() for part in final.logits(join_outputs(test))])[:, 0]
    return ProbeOutcome(logits, {
        "chosen": dict(probes[chosen]._asdict()),
        "selection": {"by": settings["selection"], "num_probes": len(probes), "num_held_out": len(held),
                      "accuracy": float(accuracy[chosen]), "loss": float(loss[chosen]),
                      "accuracy_of_each": [{**probe._asdict(), "accuracy": float(share)}
                                           for probe, share in zip(probes, accuracy.tolist(), strict=True)]}})


def require_narrow(width: int) -> None:
    """UsageError for features of more than `MOST_WIDE` numbers an image."""
    if width > MOST_WIDE:
        raise UsageError(f"features of {width:,} numbers an image are too wide for this protocol, which whitens "
                         f"{MOST_WIDE:,} at most, as that takes memory with their square; choose the protocol logreg, "
                         "or for raw pixels a smaller size and native, as in pixels?img_size=32")


class Data(NamedTuple):
    """Features that probes are trained on: where each input's columns lie, and how many classes there are."""

    features: Tensor  # (N, F) all outputs side by side
    labels: Tensor  # (N,)
    columns: Mapping[str, slice]  # input -> columns of `features`
    num_classes: int


def input_columns(widths: Mapping[str, int]) -> dict[str, slice]:
    """Where every input lies among outputs side by side, whose `widths` are given in their order.

    >>> input_columns({"class:2": 6, "mean_patch": 3})
    {'class:2': slice(0, 6, None), 'class:2 + mean_patch': slice(0, 9, None), 'class:1': slice(3, 6, None), \
'class:1 + mean_patch': slice(3, 9, None)}
    """
    (name, width), *rest = widths.items()
    kind, _, blocks = name.partition(":")
    end = width + sum(extra for _, extra in rest)
    found: dict[str, slice] = {}
    for last in range(int(blocks), 0, -1) if kind == "class" else (1,):
        plain = f"class:{last}" if kind == "class" else name
        start = width - width // int(blocks or 1) * last
        found[plain] = slice(start, width)
        if rest:
            found[" + ".join([plain, *(extra for extra, _ in rest)])] = slice(start, end)
    return found


def length(count: int, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Epochs, and updates in each, on `count` images: `epochs` of the settings, or more for `least_updates`."""
    updates = math.ceil(count / settings["batch"])
    return max(settings["epochs"], math.ceil(settings["least_updates"] / updates)), updates


def whiten(covariance: Tensor, ridge: float) -> Tensor:
    """The (D, D) that makes features of this `covariance` (D, D) white, divided by the root of D.

    From the Cholesky factor of covariance + ridge: any other whitening is a rotation of this one, to which gradient
    descent from zero is blind. Divided, so that one learning rate suits inputs of every width.
    """
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    factor = torch.linalg.cholesky(covariance + ridge * eye)
    return (torch.linalg.solve_triangular(factor, eye, upper=False).T / math.sqrt(len(covariance))).float()


def covariance(data: Data, indices: Tensor, scaling: Scaling) -> Tensor:
    """Of the scaled features of the images `indices`: (F, F) float64 on the device of `scaling`."""
    total = torch.zeros(2 * [data.features.shape[1]], dtype=torch.float64, device=scaling.mean.device)
    for rows in indices.split(_ROWS):
        scaled = scaling(data.features[rows].to(total.device)).double()
        total += scaled.T @ scaled
    return total / len(indices)


class _Group:
    """Probes of one input: weights (D, probes * C) and biases (1, probes * C), with their momentum."""

    def __init__(self, probes: Sequence[GridProbe], columns: slice, whitening: Tensor, num_classes: int) -> None:
        self.count, self._columns, self._whitening = len(probes), columns, whitening
        shape, device = (len(whitening), len(probes) * num_classes), whitening.device
        self.weight, self.weight_momentum = (torch.zeros(shape, device=device) for _ in range(2))
        self.bias, self.bias_momentum = (torch.zeros(1, shape[1], device=device) for _ in range(2))
        rates, decays = (torch.tensor(values, dtype=torch.float32).repeat_interleave(num_classes).to(device)
                         for values in ([p.learning_rate for p in probes], [p.weight_decay for p in probes]))
        self.rates, self.decays = rates, decays if decays.any() else None

    def see(self, scaled: Tensor) -> Tensor:
        """The whitened input (B, D) of scaled features (B, F)."""
        return scaled[:, self._columns] @ self._whitening

    def logits(self, seen: Tensor) -> Tensor:
        """(B, probes, C)."""
        return torch.addmm(self.bias, seen, self.weight).unflatten(1, (self.count, -1))

    def step(self, seen: Tensor, targets: Tensor, factor: float, momentum: float) -> None:
        """One update of SGD; `targets` (B, 1, C) one-hot, `factor` scales all learning rates."""
        # of the mean cross-entropy: (softmax - target) / B
        slope = self.logits(seen).softmax(dim=-1).sub_(targets).div_(len(seen)).flatten(1)
        self.weight_momentum.mul_(momentum).addmm_(seen.T, slope)
        if self.decays is not None:
            self.weight_momentum.addcmul_(self.weight, self.decays)
        self.bias_momentum.mul_(momentum).add_(slope.sum(dim=0, keepdim=True))
        self.weight.addcmul_(self.weight_momentum, self.rates, value=-factor)
        self.bias.addcmul_(self.bias_momentum, self.rates, value=-factor)


class Trained:
    """Probes after training, in the order they were given."""

    def __init__(self, groups: Sequence[_Group], scaling: Scaling) -> None:
        self._groups, self._scaling = groups, scaling

    @torch.inference_mode()
    def logits(self, features: Tensor) -> Iterator[Tensor]:
        """(B, probes, C) for one block of `features` (N, F) after the other."""
        widest = sum(group.weight.shape[1] for group in self._groups)
        for rows in features.split(max(1, _LOGITS_AT_A_TIME // widest)):
            scaled = self._scaling(rows.to(self._scaling.mean.device))
            yield torch.cat([group.logits(group.see(scaled)) for group in self._groups], dim=1)


@torch.inference_mode()
def train_grid(data: Data, indices: Tensor, probes: Sequence[GridProbe], settings: Mapping[str, Any], *, seed: int = 0,
               device: torch.device | None = None, progress: Progress | None = None) -> Trained:
    """Train `probes`, those of one input next to each other, on the images `indices` of `data`, all at once.

    SGD with momentum on the mean cross-entropy plus weight decay / 2 times the squared weights (not the biases),
    the learning rate falling to 0 as half a cosine. Features are standardized and whitened by these images.
    """
    where = device or torch.device("cpu")
    scaling = Scaling.fit(data.features, indices).to(where)
    scatter = covariance(data, indices, scaling)
    groups = []
    for name, same in itertools.groupby(probes, key=lambda probe: probe.input):
        columns = data.columns[name]
        whitening = whiten(scatter[columns, columns], settings["ridge"])
        groups.append(_Group(list(same), columns, whitening, data.num_classes))
    batches = _Batches(data, indices, groups, scaling)
    epochs, updates = length(len(indices), settings)
    done, total = 0, epochs * updates
    for epoch in range(epochs):
        for rows in epoch_order(seed, epoch, len(indices)).split(settings["batch"]):
            targets = F.one_hot(data.labels[indices[rows]], data.num_classes).float().unsqueeze(1)
            factor = (1 + math.cos(math.pi * done / total)) / 2
            for group, seen in zip(groups, batches.of(rows), strict=True):
                group.step(seen, targets, factor, settings["momentum"])
            done += 1
            if progress is not None:
                progress(done, total)
    return Trained(groups, scaling)


class _Batches:
    """What every group sees of the images `indices`: whitened once where that fits into memory, else by batch."""

    def __init__(self, data: Data, indices: Tensor, groups: Sequence[_Group], scaling: Scaling) -> None:
        self._data, self._indices, self._groups, self._scaling = data, indices, groups, scaling
        fits = len(indices) * sum(len(group.weight) for group in groups) <= _KEPT
        self._kept = [torch.empty(len(indices), len(group.weight), device=group.weight.device)
                      for group in groups if fits]
        for rows in torch.arange(len(indices)).split(_ROWS) if fits else ():
            for kept, seen in zip(self._kept, self._made(rows), strict=True):
                kept[rows] = seen

    def of(self, rows: Tensor) -> list[Tensor]:
        """(B, D) for every group, of the images at `rows` among the indices."""
        return [seen[rows] for seen in self._kept] or self._made(rows)

    def _made(self, rows: Tensor) -> list[Tensor]:
        scaled = self._scaling(self._data.features[self._indices[rows]].to(self._scaling.mean.device))
        return [group.see(scaled) for group in self._groups]


def _judge(data: Data, trained: Trained, held: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy and mean cross-entropy (P,) of every probe on the images `held`."""
    correct: list[Tensor] = []
    loss: list[Tensor] = []
    for logits in trained.logits(data.features[held]):
        start = sum(len(part) for part in correct)
        true = data.labels[held[start : start + len(logits)]].unsqueeze(1).expand(-1, logits.shape[1])
        correct.append(logits.argmax(dim=-1) == true)
        loss.append(F.cross_entropy(logits.flatten(0, 1), true.flatten(), reduction="none").view(true.shape))
    return torch.cat(correct).double().mean(dim=0).cpu(), torch.cat(loss).double().mean(dim=0).cpu()


def _at_home(features: Tensor, device: torch.device) -> Tensor:
    """`features` on the `device` where they take at most half of its free memory; else they stay, and batches move."""
    if device.type != "cuda":
        return features
    free, _ = torch.cuda.mem_get_info(device)
    return features.to(device) if features.nbytes <= free // 2 else features
