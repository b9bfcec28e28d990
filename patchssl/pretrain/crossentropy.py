"""Cross-entropy of matched tokens over many prototypes without a (tokens x prototypes) matrix.

A few hundred tokens are projected at a time, and while their logits are at hand the gradient is formed, so that
nothing is kept but its products: what cut cross-entropy (arXiv 2411.09009) does for labels, here for probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from patchssl.pretrain.centering import centered


class TeacherTokens(NamedTuple):
    """What the teacher's probabilities softmax((logits - center) / temp) are made from; takes no gradient."""

    bottleneck: Tensor  # (T, d) unit vectors
    prototypes: Tensor  # (K, d)
    center: Tensor  # (1, K), or (P, K): one for each position
    temp: float
    position: Tensor | None = None  # (T,) int64: of each token its row in a center (P, K)


class GroupedMatches(NamedTuple):
    """Matches grouped by image, with offsets: where each student token's stand. What they weigh and say comes later."""

    order: Tensor  # (S,) int64: student rows, image by image
    matches: Tensor  # (S, R) int64: the matches of each of these; its first one again where it has fewer than R
    filled: Tensor  # (S, R) bool: False for what is there again
    student_ends: tuple[int, ...]  # of each image: one past its last place in `order`
    teacher_ends: tuple[int, ...]  # of each image: one past its last teacher row

    def to(self, device: torch.device) -> GroupedMatches:
        """The groups on `device`, copied without waiting."""
        pinned = device.type == "cuda"
        order, matches, filled = ((tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)
                                  for tensor in self[:3])
        return GroupedMatches(order, matches, filled, *self[3:])


class MatchStats(NamedTuple):
    """What the teacher said, in nats, without gradient."""

    teacher_entropy: Tensor  # () mean over teacher tokens
    matched_entropy: Tensor  # () weighted sum over matches: the loss less this is the Kullback-Leibler divergence
    marginal_entropy: Tensor  # () of the mean probabilities of all teacher tokens


def group_matches(student: Tensor, student_image: Tensor, teacher_image: Tensor) -> GroupedMatches:
    """Sort M matches by student token and image: on the CPU, where counting keeps nobody waiting.

    `student` (M,) int64 is the student row of each match, `student_image` (S,) and `teacher_image` (T,) the image,
    from 0, that a row comes from. Raises ValueError where a student row has no match or teacher rows do not come
    image by image.
    """
    counts = torch.bincount(student, minlength=len(student_image))
    if (counts == 0).any():
        raise ValueError(f"{int((counts == 0).sum())} of {len(counts)} student rows have no match: leave them out")
    if (teacher_image.diff() < 0).any():
        raise ValueError("teacher rows must come image by image")
    order = student_image.argsort(stable=True)
    counts = counts[order]
    by_place = order.argsort()[student].argsort(stable=True)
    slots = torch.arange(int(counts.max()) if len(counts) else 1)
    filled = slots < counts[:, None]
    first = (counts.cumsum(0) - counts)[:, None]
    num_images = 1 + max((int(image.max()) for image in (student_image, teacher_image) if len(image)), default=-1)
    student_ends, teacher_ends = (tuple(torch.bincount(image, minlength=num_images).cumsum(0).tolist())
                                  for image in (student_image, teacher_image))
    return GroupedMatches(order, by_place[first + slots * filled], filled, student_ends, teacher_ends)


def matched_cross_entropy(bottleneck: Tensor, prototypes: Tensor, teacher: TeacherTokens | Tensor,
                          groups: GroupedMatches,
                          teacher_rows: Tensor, weight: Tensor, student_temp: float, *,
                          rows: int | None = None) -> tuple[Tensor, MatchStats]:
    """Sum over matches of weight * H(teacher token, student token), and what the teacher said.

    `bottleneck` (S, d) and `prototypes` (K, d) are the student's and take gradients, which are formed together with
    the value; `teacher` may also be probabilities (T, K). Of each of the M matches of `groups`, `teacher_rows` (M,)
    int64 is the teacher token, from the same image, and `weight` (M,) is not negative. At most `rows` student
    tokens are projected at once, teacher tokens as many as one image has. Under autocast products have its
    precision, sums are float32. No match at all gives a zero that still has a gradient. Raises ValueError for a
    groups of other tokens.
    """
    num_teacher = len(teacher if isinstance(teacher, Tensor) else teacher.bottleneck)
    if (len(bottleneck), num_teacher) != (len(groups.order), (0, *groups.teacher_ends)[-1]):
        raise ValueError(f"{len(bottleneck)} student and {num_teacher} teacher tokens, but groups of "
                         f"{len(groups.order)} and {(0, *groups.teacher_ends)[-1]}")
    device, exact = bottleneck.device, torch.promote_types(bottleneck.dtype, torch.float32)
    precision = _autocast_dtype(device) or exact
    weights = weight.to(exact)[groups.matches] * groups.filled
    total = weights.sum(1)
    shares = weights / total.clamp(min=torch.finfo(exact).tiny)[:, None]
    most, block = _sizes(len(prototypes), device)
    task = _MatchedTokens(teacher, groups, teacher_rows[groups.matches], total, shares, student_temp, precision,
                          rows or most,
                          block)
    loss, entropies, mean = _CrossEntropy.apply(bottleneck, prototypes, task, torch.is_grad_enabled())
    return loss, MatchStats(entropies.sum() / max(1, len(entropies)), (weight * entropies[teacher_rows]).sum(),
                            torch.special.entr(mean).sum())


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The precision of products that a surrounding autocast asks for."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def _sizes(num_prototypes: int, device: torch.device) -> tuple[int, int]:
    """Tokens of a product and of an elementwise pass.

    On a CPU a pass is over what its cache holds; on an accelerator every call costs a launch.
    """
    rows, numbers = (256, 2**19) if device.type == "cpu" else (1024, 2**24)
    return rows, max(1, numbers // num_prototypes)


class _MatchedTokens(NamedTuple):
    """All that the loss depends on and that takes no gradient; student tokens in the order of the groups."""

    teacher: TeacherTokens | Tensor
    groups: GroupedMatches
    matched: Tensor  # (S, R) teacher rows
    total: Tensor  # (S,) weight of each student token
    shares: Tensor  # (S, R) what part of it each match has
    student_temp: float
    precision: torch.dtype  # of products
    rows: int
    block: int

    def runs(self) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Student places and teacher rows of one image, or of several that have no more than `rows` of either."""
        starts = ends = (0, 0)
        for stops in zip(self.groups.student_ends, self.groups.teacher_ends, strict=True):
            if max(stops[0] - starts[0], stops[1] - starts[1]) > self.rows and ends != starts:
                yield (starts[0], ends[0]), (starts[1], ends[1])
                starts = ends
            ends = stops
        if ends != starts:
            yield (starts[0], ends[0]), (starts[1], ends[1])


class _CrossEntropy(torch.autograd.Function):
    """Value and gradients at once; the way back only scales them."""

    @staticmethod
    def forward(ctx: Any, bottleneck: Tensor, prototypes: Tensor, task: _MatchedTokens,
                with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        wanted = [with_grad and needed for needed in ctx.needs_input_grad[:2]]
        teacher, student = _Teacher(task, len(prototypes)), _Student(task, bottleneck, prototypes, wanted)
        for (first, last), (begin, end) in task.runs():
            probs = teacher.probs(begin, end)
            for i, j in _pieces(first, last, task.rows):
                student.compare(i, j, probs, begin)
        ctx.save_for_backward(*student.gradients())
        mean = teacher.sum / max(1, len(teacher.entropies))
        ctx.mark_non_differentiable(teacher.entropies, mean)
        return (student.losses * task.total).sum(), teacher.entropies, mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if grad is None else grad * upstream for grad in ctx.saved_tensors), None, None)


class _Teacher:
    """Probabilities of some teacher tokens at a time, always in the same place, and what is counted on the way."""

    def __init__(self, task: _MatchedTokens, num_prototypes: int) -> None:
        self.task = task
        self.entropies = task.total.new_zeros((0, *task.groups.teacher_ends)[-1])
        self.sum = task.total.new_zeros(num_prototypes)
        if isinstance(task.teacher, TeacherTokens):
            self.tokens = task.teacher.bottleneck.to(self.sum.dtype) / task.teacher.temp
            self.prototypes = task.teacher.prototypes.to(task.precision)
            longest = max((end - begin for _, (begin, end) in task.runs()), default=0)
            self.space = self.sum.new_empty(longest, num_prototypes)

    def probs(self, begin: int, end: int) -> Tensor:
        """Those of rows `begin` to `end`, good until the next call."""
        teacher = self.task.teacher
        if isinstance(teacher, Tensor):
            found = teacher[begin:end].to(self.sum.dtype)
            for i, j in _pieces(begin, end, self.task.block):
                rows = found[i - begin : j - begin]
                self.entropies[i:j] = torch.special.entr(rows).sum(-1)
                self.sum += rows.sum(0)
            return found
        return self._project(teacher, begin, end)

    def _project(self, teacher: TeacherTokens, begin: int, end: int) -> Tensor:
        found = _product_(self.space[: end - begin], self.tokens[begin:end], self.prototypes.T, self.task.precision)
        for i, j in _pieces(begin, end, self.task.block):
            rows = found[i - begin : j - begin]
            center = teacher.center if teacher.position is None else teacher.center[teacher.position[i:j]]
            probs = centered(rows, center, teacher.temp, divided=True).softmax(dim=-1)
            self.entropies[i:j] = _log_sum_exp(rows, probs) - torch.linalg.vecdot(probs, rows)
            self.sum += rows.copy_(probs).sum(0)
        return found


class _Student:
    """Losses of student tokens, and the gradients that they leave behind; tokens in the order of the groups."""

    def __init__(self, task: _MatchedTokens, bottleneck: Tensor, prototypes: Tensor, wanted: Sequence[bool]) -> None:
        self.task, self.wanted = task, any(wanted)
        self.tokens = bottleneck.to(task.total.dtype).index_select(0, task.groups.order) / task.student_temp
        # half precision has no room for gradients that are yet to be scaled
        self.precision = self.tokens.dtype if task.precision == torch.float16 else task.precision
        self.forth, self.back = prototypes.to(task.precision), prototypes.to(self.precision)
        self.losses = torch.zeros_like(task.total)
        pieces = (piece for places, _ in task.runs() for piece in _pieces(*places, task.rows))
        self.space = self.tokens.new_empty(max((last - first for first, last in pieces), default=0), len(prototypes))
        self.grad_tokens = torch.zeros_like(self.tokens) if wanted[0] else None
        self.grad_prototypes = torch.zeros_like(prototypes, dtype=self.tokens.dtype) if wanted[1] else None

    def compare(self, first: int, last: int, probs: Tensor, begin: int) -> None:
        """Take in tokens `first` to `last`, whose matches are among `probs`, the teacher's rows from `begin` on."""
        task, tokens = self.task, self.tokens[first:last]
        slope = _product_(self.space[: last - first], tokens, self.forth.T, task.precision)
        for i, j in _pieces(first, last, task.block):
            rows = slope[i - first : j - first]  # logits, then the gradient of the logits
            target = F.embedding_bag(task.matched[i:j] - begin, probs, mode="sum", per_sample_weights=task.shares[i:j])
            own = rows.softmax(dim=-1)
            self.losses[i:j] = _log_sum_exp(rows, own) - torch.linalg.vecdot(target, rows)
            if self.wanted:
                torch.sub(own, target, out=rows)
        if self.grad_tokens is not None:
            _product_(self.grad_tokens[first:last], slope, self.back, self.precision)
        if self.grad_prototypes is not None:
            weighted = tokens * task.total[first:last, None]
            _product_(self.grad_prototypes, slope.T, weighted, self.precision, add=True)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of the bottleneck (S, d), in its own order, and of the prototypes (K, d)."""
        if self.grad_tokens is None:
            return None, self.grad_prototypes
        scaled = self.grad_tokens * (self.task.total / self.task.student_temp)[:, None]
        return torch.empty_like(scaled).index_copy_(0, self.task.groups.order, scaled), self.grad_prototypes


def _log_sum_exp(logits: Tensor, probs: Tensor) -> Tensor:
    """Of each row of `logits`, whose softmax is `probs`: log(p) = logit - this, and the highest p is surely not 0."""
    return logits.amax(-1) - probs.amax(-1).log()


def _product_(out: Tensor, left: Tensor, right: Tensor, precision: torch.dtype, *, add: bool = False) -> Tensor:
    """`left` @ `right`, multiplied in `precision`, in the place of `out` or added to it."""
    if precision == out.dtype:
        return out.addmm_(left, right.to(precision), beta=int(add))
    product = left.to(precision) @ right.to(precision)
    return out.add_(product) if add else out.copy_(product)


def _pieces(first: int, last: int, most: int) -> Iterator[tuple[int, int]]:
    """From `first` to `last` in equal steps of at most `most`."""
    count = -(-(last - first) // most)
    bounds = [first + (last - first) * k // count for k in range(count + 1)] if count else []
    return pairwise(bounds)
