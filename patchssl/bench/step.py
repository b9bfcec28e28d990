"""Time and memory of whole training steps: ours, matched tokens by plain autograd, and every token projected."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchssl.bench.patchterm import MIB, apart, bench_patch_term, peak_so_far
from patchssl.bench.timing import machine
from patchssl.data.images import ArrayImages
from patchssl.pretrain.centering import Centers, teacher_probs
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.crossentropy import MatchStats
from patchssl.pretrain.dataset import ViewBatch, ViewDataset, collate_views
from patchssl.pretrain.distill import Batch, Losses, Targets, student_tokens
from patchssl.pretrain.engine import Engine
from patchssl.pretrain.losses import class_loss, patch_loss
from patchssl.pretrain.network import Network
from patchssl.pretrain.pairs import MatchPlan
from patchssl.pretrain.schedules import StepValues
from patchssl.report.tables.cost import ALL_TOKENS, DINO, CostRecord, Step

ARCHS = {"vit_tiny": "vit_tiny_patch16_224", "vit_small": "vit_small_patch16_224"}
PROTOTYPES = (10_000, 65_536)
WAYS = ("ours", "plain autograd", "all tokens", "dino", "ibot")
COST_WAYS = {"ours": ("pwself", "16 matches a pair"), "plain autograd": ("pwself", "plain autograd"),
             "all tokens": ALL_TOKENS, "dino": DINO, "ibot": ("ibot", "")}  # as cost records name them
VIEWS = "2 x 224 + 8 x 96 px"
PAIRS = 18  # of 2 global and 8 local views


def bench_step(archs: Sequence[str] = ("vit_tiny", "vit_small"), prototypes: Sequence[int] = PROTOTYPES,
               images: int = 2, repeats: int = 3, device: str = "cpu",
               progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Seconds and MiB of one update of `images` images (2 x 224 + 8 x 96 px, patches of 16), each way in a process.

    "ours" is PW-Self with 16 matches a pair; "plain autograd" compares the same tokens with whole matrices; "all
    tokens" does as the authors' code: every token of every view projected by student and teacher, every match of their
    rule compared, a center per position; "dino" and "ibot" are those methods by the same engine. On a CPU: processor
    seconds of one thread, growth of the resident memory.
    "floor" is what parameters, gradients, optimizer and teacher take in any of them. "patch term" are the head's
    prototypes and the loss alone, see `bench_patch_term`.
    """
    jobs = [(arch, count, way) for arch in archs for count in prototypes for way in WAYS]
    steps: dict[str, Any] = {}
    total = len(jobs) + len(prototypes)
    for number, (arch, count, way) in enumerate(jobs):
        if progress:
            progress(number, total)
        cell = steps.setdefault(f"{arch}, {count:,} prototypes", {"arch": ARCHS.get(arch, arch), "prototypes": count})
        cell[way] = apart(measure_step, way, ARCHS.get(arch, arch), count, images, repeats, device)
    for cell in steps.values():
        others = [way for way in WAYS if way != "ours"]
        cell["ours in shares of"] = {way: {what: cell["ours"][what] / cell[way][what]
                                           for what in ("seconds", "peak MiB")} for way in others}
    terms = {}
    for number, count in enumerate(prototypes):
        if progress:
            progress(len(jobs) + number, total)
        terms[f"{count:,} prototypes"] = bench_patch_term(count, repeats=repeats, device=device)
    if progress:
        progress(total, total)
    return {"what": f"one update of {images} images, one thread, each way in a process of its own", "images": images,
            "steps": steps,
            "patch term": terms, "aims": {"vit_small: seconds, of all tokens": 0.75,
                                          "vit_tiny: seconds, of all tokens": 0.6,
                                          "patch term: seconds, of plain autograd": 0.6,
                                          "patch term: MiB, of plain autograd": 0.125},
            "repeats": repeats,
            "machine": machine() | ({} if device == "cpu" else {"device": torch.cuda.get_device_name(device)})}


def cost_records(bench: dict[str, Any]) -> list[CostRecord]:
    """What `bench_step` found, as records that tables are made of: one per network and number of prototypes."""
    found = []
    for cell in bench["steps"].values():
        steps = [Step(method=method, way=named, seconds=cell[way]["seconds of each"], peak_mib=cell[way]["peak MiB"],
                      floor_mib=cell[way]["floor MiB"]) for way, (method, named) in COST_WAYS.items()]
        found.append(CostRecord(arch=cell["arch"], num_prototypes=cell["prototypes"], images=bench["images"],
                                views=VIEWS,
                                device=bench["machine"].get("device", bench["machine"]["processor"]), threads=1,
                                clock="wall" if "device" in bench["machine"] else "processor",
                                memory="device" if "device" in bench["machine"] else "resident", steps=steps,
                                versions=bench["machine"]["versions"]))
    return found


def measure_step(way: str, arch: str, num_prototypes: int, images: int, repeats: int, device: str) -> dict[str, Any]:
    """Seconds of every update after the first one, peak memory beyond the libraries' own, and its floor."""
    torch.set_num_threads(1)
    place = torch.device(device)
    recipe = step_recipe(way, arch, num_prototypes, images)
    before = peak_so_far(place)
    engine = make_candidate(way, recipe, place)
    batch = noise_batch(recipe, engine.num_drop_path)
    trained = sum(p.numel() for p in engine.student.parameters())
    floor = 4 * sum(p.numel() * (5 if p.requires_grad else 2) for p in engine.student.parameters()) / MIB
    times = [_seconds(engine, batch, place) for _ in range(1 + repeats)][1:]
    return {"seconds": float(np.median(times)), "seconds of each": times, "peak MiB": peak_so_far(place) - before,
            "floor MiB": floor, "parameters": trained, "matches": float(len(engine.prepare(batch)[0].plan.weight))}


def step_recipe(way: str, arch: str, num_prototypes: int, images: int) -> Recipe:
    """The recipe of one candidate."""
    paper = {"rule": "paper", "weighting": "paper", "center_per_position": True}
    losses = {"ours": {"matches_per_pair": 16}, "plain autograd": {"matches_per_pair": 16}, "all tokens": paper}
    baseline = way not in losses
    return Recipe.model_validate({
        "model": {"arch": arch}, "head": {"num_prototypes": num_prototypes, "freeze_last_layer_epochs": 0},
        "method": way if baseline else "pwself", "photometric": {"patch_share": 0.0 if baseline else 1.0},
        "loss": losses.get(way, {}),
        "optim": {"batch_size": images, "warmup_epochs": 0}})


def noise_batch(recipe: Recipe, num_drop_path: int) -> ViewBatch:
    """Views of random pixels, 500 x 375."""
    count = recipe.optim.batch_size
    pixels = np.random.default_rng(0).integers(0, 256, (1, 375, 500, 3), dtype=np.uint8)
    images = ArrayImages(array=pixels, ids=np.zeros(count, np.int64), name="noise", split="all", source="noise")
    views = ViewDataset(images, recipe, seed=0, num_drop_path=num_drop_path)
    return collate_views([views[0, index] for index in range(count)])


def make_candidate(way: str, recipe: Recipe, device: torch.device) -> Engine:
    """An engine whose forward passes are those of `way`."""
    engine = Engine(recipe, 0, 1000, device)
    if way == "plain autograd":
        engine.student_pass = PlainStudent(engine.student, recipe)
    elif way == "all tokens":
        engine.student_pass = AllTokensStudent(engine.student, recipe)
        engine.teacher_pass = AllTokensTeacher(engine.teacher)
    return engine


class PlainStudent(nn.Module):
    """Matched tokens only, but logits, probabilities and targets of all of them at once."""

    def __init__(self, network: Network, recipe: Recipe) -> None:
        super().__init__()
        self.network, self.temp = network, recipe.loss.student_temp

    def forward(self, batch: Batch, targets: Targets, plan: MatchPlan, patch_weight: float) -> Losses:
        class_tokens, patch_tokens = _student_tokens(self.network, batch)
        said = targets.patches
        assert not isinstance(said, Tensor)
        with torch.no_grad():
            probs = teacher_probs(F.linear(said.bottleneck, said.prototypes), said.center, said.temp)
        logits = self.network.head(patch_tokens.index_select(0, plan.student_tokens))
        class_logits = self.network.head(class_tokens)
        terms = (class_loss(class_logits, targets.class_probs, plan.class_weight, self.temp),
                 patch_loss(logits, probs, plan, self.temp))
        return Losses(terms[0] + patch_weight * terms[1], *terms, class_logits, _no_stats(probs))


class AllTokensStudent(nn.Module):
    """Every token projected; the loss pair by pair, as in the authors' `DINOLoss.forward`."""

    def __init__(self, network: Network, recipe: Recipe) -> None:
        super().__init__()
        self.network, self.temp = network, recipe.loss.student_temp

    def forward(self, batch: Batch, targets: Targets, plan: MatchPlan, patch_weight: float) -> Losses:
        class_tokens, patch_tokens = _student_tokens(self.network, batch)
        logits = self.network.head(torch.cat([class_tokens.flatten(0, 1), patch_tokens])) / self.temp
        class_logits = logits[: class_tokens.shape[0] * class_tokens.shape[1]].unflatten(0, class_tokens.shape[:2])
        patch_logits = logits[len(logits) - len(patch_tokens):]
        probs = targets.patches
        assert isinstance(probs, Tensor)
        patch_term = logits.new_zeros(())
        for rows in torch.arange(len(plan.student), device=logits.device).chunk(PAIRS):
            student = patch_logits.index_select(0, plan.student_tokens[plan.student[rows]]).log_softmax(-1)
            teacher = probs.index_select(0, plan.teacher_tokens[plan.teacher[rows]])
            patch_term = patch_term - (plan.weight[rows, None] * teacher * student).sum()
        class_term = class_loss(class_logits * self.temp, targets.class_probs, plan.class_weight, self.temp)
        return Losses(class_term + patch_weight * patch_term, class_term, patch_term, class_logits, _no_stats(probs))


class AllTokensTeacher(nn.Module):
    """Probabilities of every token of the global views."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, centers: Centers, globals_: Tensor, plan: MatchPlan, values: StepValues) -> Targets:
        shape = globals_.shape[:2]
        tokens = self.network.backbone.tokens(globals_.flatten(0, 1))
        bottleneck = self.network.head.bottleneck(tokens)
        assert centers.patch_tokens is not None
        center = torch.cat([centers.class_token.value, centers.patch_tokens.value])
        probs = teacher_probs(self.network.head.last_layer(bottleneck), center, values.teacher_temp)
        return Targets(probs[:, 0].unflatten(0, shape), probs[:, 1:].flatten(0, 1), tokens[:, 0],
                       tokens[:, 1:].unflatten(0, shape), bottleneck[:, 0].mean(0, keepdim=True),
                       bottleneck[:, 1:].mean(0))


def _student_tokens(student: Network, batch: Batch) -> tuple[Tensor, Tensor]:
    """Class tokens (B, V, D), and all patch tokens as `MatchPlan` numbers them."""
    tokens = student_tokens(student, batch)
    return (torch.cat([x[..., 0, :] for x in tokens], dim=1), torch.cat([x[..., 1:, :].flatten(0, 2) for x in tokens]))


def _no_stats(like: Tensor) -> MatchStats:
    return MatchStats(*like.new_zeros(3).unbind())


def _seconds(engine: Engine, batch: ViewBatch, device: torch.device) -> float:
    clock: Callable[[], float] = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    engine.train_step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began
