"""What a run would cost, measured on a few of its updates: the answer of `--dry-run`."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patchssl.data.images import ImageSet
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.dataset import make_loader
from patchssl.pretrain.network import starting_backbone
from patchssl.pretrain.run.setup import foreseen, make_engine, require_shares, training_images
from patchssl.runtime.device import peak_memory
from patchssl.runtime.seeds import require_seed

_MEASURED = 5  # updates, after one that warms up
_SLOW = 20.0  # seconds of measuring, after which fewer are enough


@dataclass(frozen=True)
class RunEstimate:
    """What a run would cost: the answer of `--dry-run`."""

    images: int
    epochs: int
    steps_per_epoch: int
    total_steps: int
    parameters: int
    seconds_per_step: float
    estimated_seconds: float
    least_seconds: float  # as the fastest and the slowest of the measured updates say
    most_seconds: float
    peak_memory_bytes: int
    measured_batch: int
    warnings: tuple[str, ...] = ()  # what the run will not do although the recipe speaks of it

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        whole, most = in_words(self.least_seconds), in_words(self.most_seconds)
        between, memory = whole if whole == most else f"{whole} to {most}", self.peak_memory_bytes / 2**30
        warnings = "".join(f"\nwarning: {sentence}" for sentence in self.warnings)
        return (f"{self.images:,} images, {self.epochs} epochs of {self.steps_per_epoch:,} updates: "
                f"{self.total_steps:,} in all\n"
                f"{self.parameters:,} parameters in the student, head included\n"
                f"{in_words(self.seconds_per_step)} an update, about {between} in all, {memory:.2g} GiB of memory "
                f"(measured on batches of {self.measured_batch} images, scaled){warnings}")


def plan_run(recipe: Recipe, data: str | Path | None, seed: int, device: str | None = None, *,
             images: ImageSet | None = None) -> RunEstimate:
    """What the run would cost, from a few updates on a few of its images; nothing is written.

    `images`, where there are any, stand for those of `data`. Measured is a part of a batch, or as many of its images
    as take little time: parts that are accumulated share their memory and add their times.
    """
    require_seed(seed)
    require_shares(recipe)
    images = training_images(recipe, data, seed) if images is None else images
    part = recipe.optim.batch_size // recipe.optim.accumulate
    batch_size = min(part, 64 if recipe.views.global_size <= 64 else 8)
    whole, small = (recipe.model_copy(update={"optim": recipe.optim.model_copy(update=values)})
                    for values in ({"accumulate": 1}, {"batch_size": batch_size}))
    full = make_engine(whole, images, seed, device, starting_backbone(recipe))
    weights = peak_memory(full.device)
    batches = iter(make_loader(small, images, seed, full.num_drop_path, workers=0))
    times = []
    for _ in range(min(1 + _MEASURED, full.total_steps)):
        began = time.perf_counter()
        full.train_step(next(batches))
        times.append(time.perf_counter() - began)
        if len(times) > 1 and sum(times) > _SLOW:
            break
    least, seconds, most = (of(times[1:] or times) * recipe.optim.batch_size / batch_size
                            for of in (min, statistics.median, max))
    memory = int(weights + max(0, peak_memory(full.device) - weights) * part / batch_size)
    parameters = sum(p.numel() for p in full.student.parameters())
    return RunEstimate(len(images), recipe.optim.epochs, full.steps_per_epoch, full.total_steps, parameters, seconds,
                       seconds * full.total_steps, least * full.total_steps, most * full.total_steps, memory,
                       batch_size, foreseen(recipe, images))


def in_words(seconds: float) -> str:
    """A time of which two digits are known, in the unit that suits it.

    >>> [in_words(seconds) for seconds in (0.0234, 59, 150, 7000, 386_000_000)]
    ['0.023 s', '59 s', '2.5 minutes', '1.9 hours', '4,500 days']
    """
    units = (("days", 86_400, 172_800), ("hours", 3600, 5400), ("minutes", 60, 90), ("s", 1, 0))
    unit, each = next((unit, each) for unit, each, least in units if seconds >= least)
    return f"{float(f'{seconds / each:.2g}'):,.10g} {unit}"
