"""Values that change during a run, as pure functions of the step.

Indexed by i / len as in DINO's `cosine_scheduler`, so the final value itself is never reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from patchssl.pretrain.config import LossConfig, Recipe


class StepValues(NamedTuple):
    """What one update uses."""

    lr: float
    weight_decay: float
    teacher_momentum: float
    teacher_temp: float
    patch_teacher_temp: float
    patch_weight: float
    last_layer_frozen: bool
    backbone_frozen: bool


def cosine(step: int, *, steps: int, start: float, end: float) -> float:
    """Half cosine from `start` at step 0 towards `end` at `steps`, as in DINO.

    >>> [round(cosine(i, steps=2, start=1.0, end=0.0), 2) for i in range(2)]
    [1.0, 0.5]
    """
    if not 0 <= step < steps:
        raise ValueError(f"step {step} is outside a schedule of {steps} steps")
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def linear(step: int, *, steps: int, start: float, end: float) -> float:
    """Line that starts at `start` and is at `end` on its last step, as numpy's linspace.

    >>> [linear(i, steps=3, start=0.0, end=1.0) for i in range(4)]
    [0.0, 0.5, 1.0, 1.0]
    """
    if step >= steps - 1:
        return end if steps > 1 or step >= steps else start
    return start + (end - start) * step / (steps - 1)


def warmup_cosine(step: int, *, steps: int, warmup: int, peak: float, end: float) -> float:
    """Linear from 0 to `peak` over `warmup` steps, then a half cosine towards `end`.

    >>> [warmup_cosine(i, steps=5, warmup=3, peak=2.0, end=0.0) for i in range(5)]
    [0.0, 1.0, 2.0, 2.0, 1.0]
    """
    if step < warmup:
        return linear(step, steps=warmup, start=0.0, end=peak)
    return cosine(step - warmup, steps=steps - warmup, start=peak, end=end)


def values_at(step: int, recipe: Recipe, steps_per_epoch: int) -> StepValues:
    """All scheduled values of update `step`, counted from 0 over the whole run."""
    optim, loss = recipe.optim, recipe.loss
    steps = optim.epochs * steps_per_epoch
    warmup = min(int(optim.warmup_epochs * steps_per_epoch), steps - 1)
    epoch = step // steps_per_epoch
    return StepValues(
        lr=warmup_cosine(step, steps=steps, warmup=warmup, peak=optim.lr * optim.batch_size / 256, end=optim.min_lr),
        weight_decay=cosine(step, steps=steps, start=optim.weight_decay, end=optim.weight_decay_end),
        teacher_momentum=cosine(step, steps=steps, start=optim.teacher_momentum, end=optim.teacher_momentum_end),
        teacher_temp=_teacher_temp(epoch, loss, loss.teacher_temp),
        # without masks nothing is compared, and iBOT's warm-up waits
        patch_teacher_temp=_teacher_temp(max(0, epoch - recipe.masks.start_epoch), loss,
                                         loss.patch_teacher_temp or loss.teacher_temp),
        patch_weight=_patch_weight(step, recipe, steps_per_epoch),
        last_layer_frozen=step < recipe.head.freeze_last_layer_epochs * steps_per_epoch,
        backbone_frozen=recipe.init is not None and step < optim.freeze_backbone_epochs * steps_per_epoch,
    )


def _teacher_temp(epoch: int, loss: LossConfig, end: float) -> float:
    return linear(epoch, steps=math.ceil(loss.teacher_temp_warmup_epochs), start=loss.teacher_temp_start, end=end)


def _patch_weight(step: int, recipe: Recipe, steps_per_epoch: int) -> float:
    """Rises in a line from 0 to the recipe's weight over the warm-up; 0 for a method without patch term."""
    if recipe.method == "dino":
        return 0.0
    warmup = recipe.loss.patch_warmup_epochs * steps_per_epoch
    return recipe.loss.patch_weight * (min(1.0, step / warmup) if warmup else 1.0)


def unfinished(recipe: Recipe) -> Iterator[str]:
    """A sentence for each part of the schedules that `optim.epochs` leaves no time for.

    Too long is a learning rate's warm-up, a freezing or a wait for masks of as many epochs as the run or more, a
    temperature's warm-up likewise (in whole epochs, as it is counted; it would be over in the last one), and a patch
    weight's warm-up of more epochs: of as many, it is over when the run is. What a run does not use is not looked at.
    """
    optim, loss, epochs = recipe.optim, recipe.loss, recipe.optim.epochs
    tenth = f"{epochs / 10:g}"
    if optim.warmup_epochs >= epochs:
        yield _too_long("optim.warmup_epochs", optim.warmup_epochs, epochs, "the learning rate only rises, and never "
                        "falls", tenth)
    yield from _unfinished_temperatures(recipe)
    if recipe.method != "dino" and loss.patch_weight and loss.patch_warmup_epochs > epochs:
        share = epochs / loss.patch_warmup_epochs
        yield _too_long("loss.patch_warmup_epochs", loss.patch_warmup_epochs, epochs, "the patch term gets to "
                        f"{share * loss.patch_weight:.2g} of loss.patch_weight = {loss.patch_weight:g}", str(epochs))
    if recipe.head.freeze_last_layer_epochs >= epochs:
        yield _too_long("head.freeze_last_layer_epochs", recipe.head.freeze_last_layer_epochs, epochs,
                        "the prototypes never learn", tenth)
    if recipe.init is not None and optim.freeze_backbone_epochs >= epochs:
        yield _too_long("optim.freeze_backbone_epochs", optim.freeze_backbone_epochs, epochs,
                        f"the backbone never learns and stays that of init = {recipe.init}", tenth)
    if recipe.masked and recipe.masks.start_epoch >= epochs:
        yield _too_long("masks.start_epoch", recipe.masks.start_epoch, epochs, "no view is ever masked, and no patch "
                        "compared", "0")


def _unfinished_temperatures(recipe: Recipe) -> Iterator[str]:
    """The same for the teacher's temperature: of class tokens, or else of patch tokens, whose warm-up may wait."""
    loss, epochs, key = recipe.loss, recipe.optim.epochs, "loss.teacher_temp_warmup_epochs"
    warmup, last = math.ceil(loss.teacher_temp_warmup_epochs), epochs - 1
    instead = str(epochs // 10)  # counted in whole epochs
    if warmup >= epochs and loss.teacher_temp != loss.teacher_temp_start:
        yield _too_long(key, loss.teacher_temp_warmup_epochs, epochs, "the teacher's temperature changes up "
                        f"to the last epoch, where it is {_teacher_temp(last, loss, loss.teacher_temp):.3g} "
                        f"(loss.teacher_temp = {loss.teacher_temp:g})", instead)
        return
    wait, end = recipe.masks.start_epoch, loss.patch_teacher_temp or loss.teacher_temp
    if recipe.method != "dino" and last >= wait and wait + warmup >= epochs and warmup and (
            end != loss.teacher_temp_start):
        also = f", {epochs - wait} epochs after masks.start_epoch" if wait else ""
        yield _too_long(key, loss.teacher_temp_warmup_epochs, epochs, "the teacher's temperature of patch tokens "
                        f"changes up to the last epoch{also}, where it is {_teacher_temp(last - wait, loss, end):.3g} "
                        f"instead of {end:g}", instead)


def _too_long(key: str, value: float, epochs: int, what: str, instead: str) -> str:
    return (f"{key} = {value:g} is too long for optim.epochs = {epochs}: {what}; ask for more epochs, or for "
            f"{key}={instead}")
