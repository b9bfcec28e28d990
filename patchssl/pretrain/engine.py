"""One update: views to color to losses to weights. Knows no file, no process group and no progress bar."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchssl.models.backbone import IMAGENET_MEAN, IMAGENET_STD, VitBackbone
from patchssl.pretrain.centering import Centers
from patchssl.pretrain.config import LossConfig, Recipe
from patchssl.pretrain.dataset import ViewBatch
from patchssl.pretrain.distill import Batch, Losses, Targets, student_losses, sync_num_pairs, teacher_targets
from patchssl.pretrain.health import class_health, effective_rank, feature_spread, patch_health
from patchssl.pretrain.network import Network, build_student, compile_blocks, network_from_file, network_to_file
from patchssl.pretrain.optim import clip_per_parameter, make_optimizer, set_step_values
from patchssl.pretrain.pairs import MatchPlan, plan_batch
from patchssl.pretrain.schedules import StepValues, values_at
from patchssl.pretrain.teacher import make_teacher, update_teacher
from patchssl.runtime.distributed import (
    all_reduce_mean,
    data_parallel,
    gradients_shared,
    load_whole_optimizer_state,
    load_whole_state,
    reshard,
    shard,
    whole_optimizer_state,
    whole_state,
)
from patchssl.views.color import apply_colors, layer_colors, normalize


class MicroBatch(NamedTuple):
    """What is known of one part of a batch before the update: its views, and what they are to agree on."""

    views: ViewBatch
    plan: MatchPlan


@dataclass(frozen=True)
class StepReport:
    """What one update found out; tensors stay on the device so that nobody waits for them.

    `losses` are means over the parts of an accumulated batch; `last`, targets and plan are the last part's.
    """

    losses: Losses
    last: Losses
    targets: Targets
    plan: MatchPlan
    grad_norm: Tensor
    student_temp: float
    centers: tuple[Tensor, ...]  # norms of the class tokens' and, where there is one, the patch tokens' center
    values: StepValues

    def row(self) -> dict[str, float]:
        """The log row: plain numbers, means over all processes, which call this together; waits for the device."""
        found = {
            "loss": self.losses.total,
            "class_loss": self.losses.class_term,
            "patch_loss": self.losses.patch_term,
            **class_health(self.targets.class_probs, self.last.class_logits / self.student_temp,
                           self.plan.class_weight, self.last.class_term),
            **patch_health(self.last.patch_stats, self.plan, self.last.patch_term),
            "effective_rank": effective_rank(self.targets.class_tokens),
            "feature_spread": feature_spread(self.targets.class_tokens),
            "matched_share_global": self.plan.matched_share[0],
            "matched_share_local": self.plan.matched_share[1],
            "grad_norm": self.grad_norm,
            **dict(zip(("center_norm", "patch_center_norm"), self.centers, strict=False)),
        }
        means = all_reduce_mean(torch.stack([value.detach().float() for value in found.values()]))
        return dict(zip(found, means.tolist(), strict=True)) | self.values._asdict()


class StudentPass(torch.nn.Module):
    """The student's forward pass as one module, so that a wrapper around it can share out its gradients."""

    def __init__(self, network: Network, config: LossConfig) -> None:
        super().__init__()
        self.network, self.config = network, config

    def forward(self, batch: Batch, targets: Targets, plan: MatchPlan, patch_weight: float) -> Losses:
        """See `student_losses`."""
        return student_losses(self.network, batch, targets, plan, patch_weight, self.config)


class TeacherPass(torch.nn.Module):
    """The teacher's forward pass as one module, inside which sharded weights are whole."""

    def __init__(self, network: Network, config: LossConfig) -> None:
        super().__init__()
        self.network, self.config = network, config

    def forward(self, centers: Centers, globals_: Tensor, plan: MatchPlan, values: StepValues) -> Targets:
        """See `teacher_targets`."""
        return teacher_targets(self.network, centers, globals_, plan, values, self.config)


class Engine:
    """Student, teacher, centers and optimizer of one run, and the update that moves them."""

    def __init__(self, recipe: Recipe, seed: int, steps_per_epoch: int, device: torch.device,
                 start: VitBackbone | None = None) -> None:
        self.recipe, self.device, self.steps_per_epoch = recipe, device, steps_per_epoch
        student, self.num_drop_path = build_student(recipe, seed, start)
        self.student = student.to(device).train()
        self.teacher = make_teacher(self.student)
        self.centers = Centers(recipe).to(device)
        self.student_pass, self.teacher_pass = self._passes()
        self.optimizer = make_optimizer(self.student, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision_of(recipe, device) is torch.float16)
        self.steps_done = 0

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.recipe.optim.epochs * self.steps_per_epoch

    def _passes(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        """Student and teacher as what is called: compiled, and wrapped for several processes where there are some."""
        student, teacher = StudentPass(self.student, self.recipe.loss), TeacherPass(self.teacher, self.recipe.loss)
        if self.recipe.run.compile:
            for network in (self.student, self.teacher):
                compile_blocks(network)
        if not self.recipe.run.shard:
            return data_parallel(student, self.device), teacher
        return shard(student, student.network.blocks), shard(teacher, teacher.network.blocks)

    def train_step(self, batch: ViewBatch) -> StepReport:
        """One update on this process's share of a batch of views, which lie on the CPU."""
        return self.update(self.prepare(batch))

    def prepare(self, batch: ViewBatch) -> list[MicroBatch]:
        """Plan the batch, part by part, on the CPU, and send it to the device; waits for nothing.

        A GPU is meanwhile busy with the update before: see `patchssl.pretrain.pairs`.
        """
        parts = []
        for views in batch.split(self.recipe.optim.accumulate):
            plan = plan_batch(views, self.recipe)
            parts.append(MicroBatch(views.to(self.device, non_blocking=True), plan.to(self.device)))
        return parts

    def update(self, parts: Sequence[MicroBatch]) -> StepReport:
        """One update on a prepared batch; all of it happens on the device, none of it waits for the device."""
        recipe, values = self.recipe, values_at(self.steps_done, self.recipe, self.steps_per_epoch)
        set_step_values(self.optimizer, values)
        self.optimizer.zero_grad(set_to_none=True)
        plans = sync_num_pairs([part.plan for part in parts])
        said, found = [], []
        for number, (part, plan) in enumerate(zip(parts, plans, strict=True), start=1):
            batch = training_batch(part.views, recipe, self.device)
            with self._autocast():
                targets = self.teacher_pass(self.centers, batch.globals_, plan, values)
            with gradients_shared(self.student_pass, when=number == len(parts)):
                with self._autocast():
                    losses = self.student_pass(batch, targets, plan, values.patch_weight)
                self.scaler.scale(losses.total / len(parts)).backward()
            said.append(targets)
            found.append(detach(losses))
        self.centers.update(self.teacher, [part.class_mean for part in said], [part.patch_mean for part in said])
        reshard(self.teacher_pass)
        grad_norm = self._move(values)
        update_teacher(self.teacher, self.student, values.teacher_momentum)
        self.steps_done += 1
        return StepReport(mean_losses(found), found[-1], said[-1], plans[-1], grad_norm, recipe.loss.student_temp,
                          self.centers.norms(), values)

    def _move(self, values: StepValues) -> Tensor:
        """Let the optimizer use the gradients; returns their global norm before clipping."""
        if values.last_layer_frozen:
            for prototypes in (self.student.head.last_layer, self.student.head.patch_layer):
                drop_gradients(prototypes)
        if values.backbone_frozen:
            drop_gradients(self.student.backbone)
        self.scaler.unscale_(self.optimizer)
        grad_norm = clip_per_parameter(self.student.parameters(), self.recipe.optim.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return grad_norm

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on."""
        networks = {"student": self.student, "teacher": self.teacher}
        return {**{name: network_to_file(whole_state(network)) for name, network in networks.items()},
                "centers": self.centers.state_dict(),
                "optimizer": whole_optimizer_state(self.student, self.optimizer),
                "scaler": self.scaler.state_dict(), "steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was saved."""
        load_whole_state(self.student, network_from_file(state["student"]))
        load_whole_state(self.teacher, network_from_file(state["teacher"]))
        self.centers.load_state_dict(state["centers"])
        # a copy: torch takes its tensors as they are, and those of a file would keep that on the disk, deleted or not
        load_whole_optimizer_state(self.student, self.optimizer, copy.deepcopy(state["optimizer"]))
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.steps_done = state["steps_done"]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = precision_of(self.recipe, self.device)
        return contextlib.nullcontext() if dtype is torch.float32 else torch.autocast(self.device.type, dtype)


def precision_of(recipe: Recipe, device: torch.device) -> torch.dtype:
    """The type that matrix products are computed in."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
             "auto": torch.bfloat16 if device.type == "cuda" else torch.float32}
    return names[recipe.optim.precision]


def color_views(batch: ViewBatch, recipe: Recipe, device: torch.device) -> tuple[Tensor, Tensor]:
    """Colored, normalized global (B, G, 3, S, S) and local (B, L, 3, s, s) views of a batch, on `device`.

    The draws stay on the CPU, where they are read to plan what the device does.
    """
    views = [batch.global_views, batch.local_views]
    flat = [some.to(device, non_blocking=True).flatten(0, 1) for some in views]
    draws = [batch.global_colors.flatten(), batch.local_colors.flatten()]
    size = recipe.model.patch_size
    if recipe.patch_color == "layered":
        patches = [batch.global_patches.flatten(), batch.local_patches.flatten()]
        colored = layer_colors(flat, draws, patches, size, IMAGENET_MEAN, IMAGENET_STD)
    else:
        colored = [normalize(apply_colors(some, drawn, size), IMAGENET_MEAN, IMAGENET_STD) if len(some) else some
                   for some, drawn in zip(flat, draws, strict=True)]
    globals_, locals_ = (some.unflatten(0, of.shape[:2]) for some, of in zip(colored, views, strict=True))
    return globals_, locals_


def training_batch(views: ViewBatch, recipe: Recipe, device: torch.device) -> Batch:
    """Colored views and draws of a batch whose views lie on `device`."""
    globals_, locals_ = color_views(views, recipe, device)
    return Batch(globals_, locals_, views.drop_path.to(device), views.masks if recipe.masked else None)


def drop_gradients(module: torch.nn.Module) -> None:
    """Keep the optimizer, its weight decay included, from moving `module` in this update."""
    for parameter in module.parameters():
        parameter.grad = None


def detach(losses: Losses) -> Losses:
    """The same numbers without the graph behind them."""
    plain: dict[str, Any] = {name: value.detach() for name, value in losses._asdict().items()
                             if isinstance(value, Tensor)}
    return losses._replace(**plain)


def mean_losses(parts: Sequence[Losses]) -> Losses:
    """Terms as means over `parts` of equal size, all else as in the last one."""
    means: dict[str, Any] = {name: torch.stack([getattr(part, name) for part in parts]).mean()
                             for name in ("total", "class_term", "patch_term")}
    return parts[-1]._replace(**means)
