"""Which patch tokens of a batch are compared, and what each comparison weighs: a `MatchPlan`.

`plan_batch` makes it: `plan_matches` for PW-Self, from the geometry of the views (and, for DINO, without any match),
`plan_masked` for iBOT, from its masks. Views are ordered globals first; a pair is (teacher view t, student view s) with
t != s. The weights are the means and sums in `patchssl.pretrain.losses.pwself_loss`, spelled out match by match.

The plan is made on the CPU, for a whole batch at once, while an accelerator still computes the update before. How many
tokens match depends on the draws: made on the device, the host would have to wait for these counts in every update
before it knew a single shape.

With `views.shared_in_batch` all images of a batch have the same matches: those of one are found, and written down for
all (`_repeat`). Masks, and so iBOT's plans, are each image's own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchssl.pretrain.config import LossConfig, Recipe
from patchssl.pretrain.crossentropy import GroupedMatches, group_matches
from patchssl.pretrain.dataset import ViewBatch
from patchssl.views.geometry import Crops, patches_per_side
from patchssl.views.matching import match_crops


def plan_batch(views: ViewBatch, recipe: Recipe) -> MatchPlan:
    """What the tokens of a batch are compared with, from geometry, masks and draws, on the CPU."""
    if recipe.method == "ibot":
        return plan_masked(views.masks, recipe)
    if not recipe.views.shared_in_batch:
        return plan_matches(views.boxes, views.mirrored, recipe, views.match_draws)
    return plan_matches(views.boxes[:1], views.mirrored[:1], recipe, views.match_draws[:1], copies=len(views.boxes))


class MatchPlan(NamedTuple):
    """Which tokens of a batch are projected, which are compared, and what each comparison weighs.

    Student tokens are numbered over (B, G, N_global) and then (B, L, N_local), teacher tokens over (B, G, N_global).
    A match's weight in the loss is `weight / num_pairs`.
    """

    student_tokens: Tensor  # (S,) int64, ascending: every student token with a match, once
    teacher_tokens: Tensor  # (T,) int64, ascending: every teacher token with a match, once
    student: Tensor  # (M,) int64: of each match, its row in student_tokens
    teacher: Tensor  # (M,) int64: and its row in teacher_tokens; for rule similarity, the first row of its view
    weight: Tensor  # (M,) float32
    num_pairs: Tensor  # () float32: how many (image, pair) the patch term is a mean over; 1 where weights say it all
    class_weight: Tensor  # (B, G, V) float32: weight of each (image, teacher view, student view), 0 for t == s
    matched_share: Tensor  # (2,) float32: share of student patches with a match, in global and in local views
    groups: GroupedMatches  # the matches grouped by image, with offsets

    def to(self, device: torch.device) -> MatchPlan:
        """The plan on `device`, copied without waiting."""
        pinned = device.type == "cuda"
        sent: dict[str, Any] = {name: (value.pin_memory() if pinned else value).to(device, non_blocking=True)
                                for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return self._replace(groups=self.groups.to(device), **sent)


def plan_matches(boxes: Tensor, mirrored: Tensor, recipe: Recipe, draws: Tensor | None = None, *,
                 copies: int = 1) -> MatchPlan:
    """Plan the comparisons of a batch from its geometry: `boxes` (B, V, 4) and `mirrored` (B, V), globals first.

    `draws` (B, 2, G, V, N), uniform in [0, 1), order the matches of a pair where `loss.matches_per_pair` takes
    some of them, and choose the teacher's patch under the rule `random`; N is the larger of N_global and N_local.
    With `copies` one image is given, B = 1, and the plan is that of a batch of so many like it.
    """
    num_images, num_views = mirrored.shape
    num_global = recipe.views.num_global
    class_weight = even_class_weight(num_images * copies, num_global, num_views)
    if recipe.method != "pwself":
        return class_only(class_weight)
    class_weight = class_weight[:num_images]  # weighs as an image of the whole batch
    kinds = [_match_views(boxes, mirrored, recipe, draws, local)
             for local in (False, True)[: 1 + (num_views > num_global)]]
    student, teacher, pair, scale = (torch.cat(parts) for parts in zip(*(kind[:4] for kind in kinds), strict=True))
    counts = torch.zeros(class_weight.numel()).index_add_(0, pair, scale)  # matches M of each (image, t, s)
    class_weight, weight, pairs = _weigh(class_weight, counts, pair, scale, recipe.loss)
    share = torch.tensor([kind.share for kind in kinds] + [0.0] * (2 - len(kinds)))
    if recipe.loss.rule == "similarity":  # any teacher token may turn out to be the nearest
        teacher_tokens = torch.arange(num_images * num_global * _patches(recipe.views.global_size, recipe))
    else:
        teacher_tokens, teacher = teacher.unique(return_inverse=True)
    student_tokens, student = student.unique(return_inverse=True)
    groups = _group(student, student_tokens, teacher_tokens, num_images, recipe)
    plan = MatchPlan(student_tokens, teacher_tokens, student, teacher, weight, pairs, class_weight, share, groups)
    return plan if copies == 1 else _repeat(plan, copies, recipe)


def _repeat(plan: MatchPlan, copies: int, recipe: Recipe) -> MatchPlan:
    """The plan of a batch of `copies` images like the one of `plan`, whose class weights are those of the batch.

    Tokens, rows and matches are listed as `plan_matches` lists them: those of all images' global views first.
    """
    groups, views = plan.groups, recipe.views
    of_globals = views.num_global * _patches(views.global_size, recipe)
    tokens = of_globals + (views.num_local * _patches(views.local_size, recipe) if views.num_local else 0)
    students, teachers, matches = len(plan.student_tokens), len(plan.teacher_tokens), len(plan.student)
    first_rows = int((plan.student_tokens < of_globals).sum())  # those of global views
    first_matches = int((plan.student < first_rows).sum())
    every = _renumber(plan.student_tokens, of_globals, tokens, copies)
    student = _renumber(plan.student, first_rows, students, copies)
    teacher = _renumber(plan.teacher, teachers, teachers, copies)
    order = _renumber(groups.order, first_rows, students, copies)
    of_rows = _renumber(groups.matches, first_matches, matches, copies)
    return MatchPlan(
        _firsts_first(every, first_rows), _renumber(plan.teacher_tokens, of_globals, of_globals, copies).flatten(),
        _firsts_first(student, first_matches), _firsts_first(teacher, first_matches),
        _firsts_first(plan.weight.expand(copies, -1), first_matches),
        plan.num_pairs * (copies if recipe.loss.weighting == "balanced" else 1),
        plan.class_weight.repeat(copies, 1, 1), plan.matched_share,
        GroupedMatches(order.flatten(), of_rows.flatten(0, 1), groups.filled.repeat(copies, 1),
                       *(tuple(end * (copy + 1) for copy in range(copies) for end in ends)
                         for ends in (groups.student_ends, groups.teacher_ends))))


def _firsts_first(values: Tensor, first: int) -> Tensor:
    """The `first` values (images, values) of every image, then the others of every image."""
    return torch.cat([values[:, :first].flatten(), values[:, first:].flatten()])


def _renumber(numbers: Tensor, first: int, total: int, copies: int) -> Tensor:
    """Numbers (copies, ...) in a batch of what each image numbers from 0 to `total` - 1.

    The batch counts the `first` of every image before the others.
    """
    image = torch.arange(copies).view(-1, *[1] * numbers.dim())
    return numbers + torch.where(numbers < first, image * first, (copies - 1) * first + image * (total - first))


def _weigh(even: Tensor, counts: Tensor, pair: Tensor, scale: Tensor, loss: LossConfig) -> tuple[Tensor, ...]:
    """`MatchPlan.class_weight`, `weight` and `num_pairs` under a weighting.

    `even` (B, G, V) weighs pairs, `counts` (B * G * V,) are all their matches; `pair` and `scale` (M,) are of those
    compared. Those drawn of a pair weigh as much together as all of it: each stands for `scale` matches.
    """
    if loss.weighting == "balanced":  # a pair is the mean over its matches, where it has any
        return even, scale / counts[pair], (counts > 0).sum().float()
    if loss.weighting == "paper":  # a pair is the mean over its class token and M matches
        even = even / (1 + counts.view_as(even))
        return even, even.flatten()[pair] * scale, torch.ones(())
    of_matches = (1 - loss.class_share) * even.flatten()[pair] * scale
    if loss.weighting == "lambda":  # their mean; under lambda-sum their sum
        of_matches = of_matches / counts[pair]
    return loss.class_share * even, of_matches, torch.ones(())


def plan_masked(masks: Tensor, recipe: Recipe) -> MatchPlan:
    """Plan the comparisons of a batch from its `masks` (B, G, N) of global views, on the CPU.

    The patch term is the mean over images and global views of a view's mean over masked patches; a view without any
    counts as 0, as in bytedance/ibot's main_ibot.py. Class tokens are compared between all different views.
    """
    num_images, num_global, positions = masks.shape
    tokens = masks.flatten().nonzero()[:, 0]
    rows = torch.arange(len(tokens))
    counts = masks.sum(-1)  # (B, G)
    weight = (1 / (counts.clamp(min=1) * counts.numel())).flatten()[tokens // positions]
    image = tokens // (num_global * positions)
    share = torch.stack([masks.float().mean(), torch.zeros(())])
    return MatchPlan(tokens, tokens, rows, rows, weight, torch.ones(()),
                     even_class_weight(num_images, num_global, recipe.views.num_views), share,
                     group_matches(rows, image, image))


def even_class_weight(num_images: int, num_global: int, num_views: int) -> Tensor:
    """(B, G, V): every pair of different views weighs the same, all of them 1."""
    weight = torch.ones(num_images, num_global, num_views)
    weight[:, torch.arange(num_global), torch.arange(num_global)] = 0
    return weight / (num_images * num_global * (num_views - 1))


def class_only(class_weight: Tensor) -> MatchPlan:
    """A plan without any match."""
    none, empty = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    return MatchPlan(none, none, none, none, empty, torch.ones(()), class_weight, torch.zeros(2),
                     group_matches(none, none, none))


def _group(student: Tensor, student_tokens: Tensor, teacher_tokens: Tensor, num_images: int,
           recipe: Recipe) -> GroupedMatches:
    """The matches by image and student token; tokens are numbered as `MatchPlan` says."""
    views = recipe.views
    of_globals = views.num_global * _patches(views.global_size, recipe)
    of_locals = views.num_local * _patches(views.local_size, recipe) if views.num_local else 1
    first_local = num_images * of_globals
    student_image = torch.where(student_tokens < first_local, student_tokens // of_globals,
                                (student_tokens - first_local) // of_locals)
    return group_matches(student, student_image, teacher_tokens // of_globals)


class _Matches(NamedTuple):
    """M matches of all global, or of all local, student views."""

    student: Tensor  # (M,) token number
    teacher: Tensor  # (M,) token number
    pair: Tensor  # (M,) flat number of (image, t, s)
    scale: Tensor  # (M,) float32: matches of the pair that this one stands for
    share: float  # of the student patches that have a match


def _match_views(boxes: Tensor, mirrored: Tensor, recipe: Recipe, draws: Tensor | None, local: bool) -> _Matches:
    """Matches between all global views and the global or local student views of every image."""
    num_images, num_views = mirrored.shape
    num_global = recipe.views.num_global
    ids = _teacher_ids(boxes, mirrored, recipe, draws, local)
    found = ids >= 0
    pairs = num_images * (num_global * ids.shape[2] - (0 if local else num_global))
    share = found.sum().item() / max(1, pairs * ids.shape[3])
    counts = found.sum(-1)
    if limit := recipe.loss.matches_per_pair:
        found = _some(found, _of_views(draws, ids.shape, num_global, local, which=0), limit)
    image, t, s, patch_id = found.nonzero(as_tuple=True)
    kept = found.sum(-1)
    per_teacher = _patches(recipe.views.global_size, recipe)
    teacher = (image * num_global + t) * per_teacher + ids[image, t, s, patch_id]
    student = (image * ids.shape[2] + s) * ids.shape[3] + patch_id
    student += num_images * num_global * per_teacher if local else 0
    pair = (image * num_global + t) * num_views + s + (num_global if local else 0)
    scale = (counts / kept.clamp(min=1))[image, t, s]
    return _Matches(student, teacher, pair, scale, share)


def _teacher_ids(boxes: Tensor, mirrored: Tensor, recipe: Recipe, draws: Tensor | None, local: bool) -> Tensor:
    """Teacher patch (B, G, S, N) of each student patch, -1 where none; similarity knows none yet and says 0."""
    views, patch, rule = recipe.views, recipe.model.patch_size, recipe.loss.rule
    num_global = views.num_global
    chosen = slice(num_global, None) if local else slice(num_global)
    size = views.local_size if local else views.global_size
    shape = (len(mirrored), num_global, mirrored[0, chosen].numel(), _patches(size, recipe))
    if rule == "similarity":
        ids = torch.zeros(shape, dtype=torch.int64)
    else:
        teacher_crops = Crops(boxes[:, :num_global, None], mirrored[:, :num_global, None], views.global_size)
        student_crops = Crops(boxes[:, None, chosen], mirrored[:, None, chosen], size)
        ids = match_crops(teacher_crops, student_crops, patch, "center" if rule == "random" else rule)
        if rule == "random":  # as many matches as by geometry, each with some patch of the teacher's view
            last = _patches(views.global_size, recipe) - 1
            some = (_of_views(draws, ids.shape, num_global, local, which=1) * (last + 1)).long().clamp(max=last)
            ids = torch.where(ids >= 0, some, ids)
    if not local:
        ids[:, torch.arange(num_global), torch.arange(num_global)] = -1
    return ids


def _of_views(draws: Tensor | None, shape: torch.Size, num_global: int, local: bool, which: int) -> Tensor:
    """The (B, G, S, N) draws of the global or local student views."""
    if draws is None or not draws.numel():
        raise ValueError("loss.matches_per_pair and the rule random need draws")
    return draws[:, which, :, num_global if local else 0:, : shape[3]][:, :, : shape[2]]


def _some(found: Tensor, draws: Tensor, limit: int) -> Tensor:
    """Of the true places (B, G, S, N) of each pair the `limit` with the smallest draws, all where they are fewer."""
    if limit >= found.shape[-1]:
        return found
    order = torch.where(found, draws, 2.0)
    smallest = order.topk(limit, dim=-1, largest=False).indices
    return found & torch.zeros_like(found).scatter_(-1, smallest, True)


def _patches(size: int, recipe: Recipe) -> int:
    return patches_per_side(size, recipe.model.patch_size) ** 2
