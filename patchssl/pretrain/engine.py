"""One update: views to color to losses to weights. Knows no file, no process group and no progress bar."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchssl.backbone import IMAGENET_MEAN, IMAGENET_STD, VitBackbone
from patchssl.networks import NetworkSpec, build_vit
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.drop_path import use_sampled_drop_path
from patchssl.pretrain.head import ProjectionHead
from patchssl.pretrain.health import effective_rank, entropy, feature_spread, marginal_entropy
from patchssl.pretrain.loss import MatchPlan, plan_matches
from patchssl.pretrain.methods import Centers, Losses, Network, Targets, student_losses, teacher_targets
from patchssl.pretrain.optim import clip_per_parameter, make_optimizer, set_step_values
from patchssl.pretrain.photometric import apply_colors, normalize
from patchssl.pretrain.schedules import StepValues, values_at
from patchssl.pretrain.start import take_weights
from patchssl.pretrain.teacher import make_teacher, update_teacher
from patchssl.pretrain.views import ViewBatch


@dataclass(frozen=True)
class StepReport:
    """What one update found out; tensors stay on the device so that nobody waits for them."""

    losses: Losses
    targets: Targets
    plan: MatchPlan
    grad_norm: Tensor
    values: StepValues

    def row(self) -> dict[str, float]:
        """The log row: plain numbers; this waits for the device."""
        probs, class_tokens = self.targets.class_probs, self.targets.class_tokens
        teacher_entropy = entropy(probs)
        found = {
            "loss": self.losses.total,
            "class_loss": self.losses.class_term,
            "patch_loss": self.losses.patch_term,
            "teacher_entropy": teacher_entropy,
            "marginal_entropy": marginal_entropy(probs),
            "class_kl": self.losses.class_term / self.plan.class_weight.sum() - teacher_entropy,
            "patch_entropy": entropy(self.targets.patch_probs) if len(self.targets.patch_probs) else torch.zeros(()),
            "effective_rank": effective_rank(class_tokens),
            "feature_spread": feature_spread(class_tokens),
            "matched_share_global": self.plan.matched_share[0],
            "matched_share_local": self.plan.matched_share[1],
            "grad_norm": self.grad_norm,
        }
        return {name: float(value) for name, value in found.items()} | self.values._asdict()


class Engine:
    """Student, teacher, centers and optimizer of one run, and the update that moves them."""

    def __init__(self, recipe: Recipe, seed: int, steps_per_epoch: int, device: torch.device,
                 start: VitBackbone | None = None) -> None:
        self.recipe, self.device, self.steps_per_epoch = recipe, device, steps_per_epoch
        student, self.num_drop_path = build_student(recipe, seed, start)
        self.student = student.to(device).train()
        self.teacher = make_teacher(self.student)
        self.centers = Centers(recipe).to(device)
        self.optimizer = make_optimizer(self.student, device)
        self.steps_done = 0

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.recipe.optim.epochs * self.steps_per_epoch

    def train_step(self, batch: ViewBatch) -> StepReport:
        """One update on one batch of views, which lie on the CPU."""
        values = values_at(self.steps_done, self.recipe, self.steps_per_epoch)
        plan = plan_matches(batch.boxes, batch.mirrored, self.recipe).to(self.device)
        globals_, locals_ = color_views(batch, self.recipe, self.device)
        drop_path = batch.drop_path.to(self.device, non_blocking=True)
        set_step_values(self.optimizer, values)
        with self._autocast():
            targets = teacher_targets(self.teacher, self.centers, globals_, plan, values, self.recipe.loss)
            losses = student_losses(self.student, globals_, locals_, drop_path, targets, plan,
                                    values.patch_weight, self.recipe.loss)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        if values.last_layer_frozen:
            drop_gradients(self.student.head.last_layer)
        if values.backbone_frozen:
            drop_gradients(self.student.backbone)
        grad_norm = clip_per_parameter(self.student.parameters(), self.recipe.optim.clip_grad)
        self.optimizer.step()
        update_teacher(self.teacher, self.student, values.teacher_momentum)
        self.steps_done += 1
        return StepReport(detach(losses), targets, plan, grad_norm, values)

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on."""
        return {"student": network_to_file(self.student.state_dict()),
                "teacher": network_to_file(self.teacher.state_dict()),
                "centers": self.centers.state_dict(), "optimizer": self.optimizer.state_dict(),
                "steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was saved."""
        self.student.load_state_dict(network_from_file(state["student"]))
        self.teacher.load_state_dict(network_from_file(state["teacher"]))
        self.centers.load_state_dict(state["centers"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_done = state["steps_done"]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        precision = self.recipe.optim.precision
        if precision == "bf16" or (precision == "auto" and self.device.type == "cuda"):
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()


def network_spec(recipe: Recipe) -> NetworkSpec:
    """The backbone that `recipe` asks for; its training size is that of the global views."""
    model = recipe.model
    return NetworkSpec(arch=model.arch, image_size=recipe.views.global_size, patch_size=model.patch_size,
                       embed_dim=model.embed_dim, depth=model.depth, num_heads=model.num_heads)


def build_student(recipe: Recipe, seed: int, start: VitBackbone | None = None) -> tuple[Network, int]:
    """A student before its first update and how many places of drop path it has.

    `seed` fixes its weights; with `start` those of the head only.
    """
    spec = network_spec(recipe)
    backbone = VitBackbone(build_vit(spec, seed=seed), arch=spec.label())
    if start is not None:
        take_weights(backbone, start)
    num_drop_path = use_sampled_drop_path(backbone.module, recipe.model.drop_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        head = ProjectionHead(backbone.embed_dim, recipe.head)
    return Network(backbone, head), num_drop_path


def color_views(batch: ViewBatch, recipe: Recipe, device: torch.device) -> tuple[Tensor, Tensor]:
    """Colored, normalized global (B, G, 3, S, S) and local (B, L, 3, s, s) views of a batch, on `device`.

    The draws stay on the CPU, where `apply_colors` reads them.
    """
    colored = []
    for views, draws in ((batch.global_views, batch.global_colors), (batch.local_views, batch.local_colors)):
        flat = views.to(device, non_blocking=True).flatten(0, 1)
        if len(flat):
            flat = apply_colors(flat, draws.flatten(), recipe.model.patch_size)
            flat = normalize(flat, IMAGENET_MEAN, IMAGENET_STD)
        colored.append(flat.unflatten(0, views.shape[:2]))
    return colored[0], colored[1]


def drop_gradients(module: torch.nn.Module) -> None:
    """Keep the optimizer, its weight decay included, from moving `module` in this update."""
    for parameter in module.parameters():
        parameter.grad = None


def detach(losses: Losses) -> Losses:
    """The same numbers without the graph behind them."""
    return Losses(*(tensor.detach() for tensor in losses))


def network_to_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State of a `Network` under a checkpoint's names: timm's names after `backbone.`, and `head.*`."""
    return {name.replace("backbone.module.", "backbone.", 1): value for name, value in state.items()}


def network_from_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `network_to_file`."""
    return {name.replace("backbone.", "backbone.module.", 1) if name.startswith("backbone.") else name: value
            for name, value in state.items()}
