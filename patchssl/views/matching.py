"""Which patches of two views show the same place, from the geometry of their crops alone.

Both rules treat rows and columns apart, so a whole batch costs a few operations on (..., patches per side).

- `center`: a student patch matches the teacher patch that contains its center in source pixels, if that
  center lies inside the teacher's crop. Exact for crops in whole pixels, where a center falls on a border too
  (it belongs to the patch that begins there): every quotient is taken of two integers below 2^53.
- `paper`: the rule of the authors of PW-Self (arXiv 2310.18651). In each view the patches that the overlap of
  the two crops covers, rounded to whole patches, form a sub-grid; of rows and of columns the longer run is
  thinned to the length of the shorter one, and the k-th of one is matched with the k-th of the other.

Measured on 6,000 random pairs of a global 224 px and a local 96 px view of a 500 x 375 image, patches of
16 px (`patchssl bench matching` repeats it): the matched teacher patch contains the student patch's center in
100 % of `center`'s matches and in 41.8 % of `paper`'s; of the latter 12.3 % are off by more than a whole
patch, center to center.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from patchssl.runtime.errors import UsageError, unknown_choice
from patchssl.views.geometry import Crops, View, patches_per_side


def match_patches(
    teacher: View, student: View, patch_size: int, rule: str = "center"
) -> tuple[Tensor, Tensor]:
    """Matched patches of one pair of views: (teacher ids, student ids), each (M,) int64, row-major from 0.

    `center` lists pairs in ascending student id, `paper` as the authors do: row by row from left to right of
    the source image. Views without overlap give M = 0. Raises UsageError for an unknown rule, ValueError when
    a view is no whole number of patches.
    """
    found = match_crops(Crops.of([teacher]), Crops.of([student]), patch_size, rule)[0]
    ids = torch.arange(len(found))
    if rule == "paper" and student.mirrored:
        side = patches_per_side(student.size, patch_size)
        ids = ids.view(side, side).flip(-1).flatten()
    ids = ids[found[ids] >= 0]
    return found[ids], ids


def match_crops(teacher: Crops, student: Crops, patch_size: int, rule: str = "center") -> Tensor:
    """For each student patch the id of the matching teacher patch or -1: (..., N_student) int64.

    The batch shapes of `teacher` and `student` broadcast: (B, G, 1) against (B, 1, V) gives all pairs of B
    images. Works on the device of the boxes and never waits for it. Errors as in `match_patches`.
    """
    if rule not in _RULES:
        raise UsageError(unknown_choice("matching rule", rule, RULES))
    match_axis = _RULES[rule]
    teacher_rows, teacher_columns = _axes(teacher, patch_size)
    student_rows, student_columns = _axes(student, patch_size)
    n = teacher_rows.num
    row = match_axis(teacher_rows, student_rows).mul_(n).long()
    column = match_axis(teacher_columns, student_columns).long()
    return row.unsqueeze(-1).add(column.unsqueeze(-2)).clamp_(min=-1).flatten(-2)


class _Axis(NamedTuple):
    """Rows or columns of a batch of crops: `num` patches over `length` source pixels from `start`."""

    start: Tensor  # (..., 1) float64
    length: Tensor  # (..., 1) float64
    mirrored: Tensor | None  # (..., 1) bool; None: never
    num: int

    def turn(self, index: Tensor) -> Tensor:
        """Patch index in the view from the one in the unmirrored grid, or back."""
        if self.mirrored is None:
            return index
        return torch.where(self.mirrored, self.num - 1 - index, index)

    def missing(self) -> int:
        """The index that says `no patch`: row * num + column is below 0 whichever of the two is missing."""
        return -self.num * self.num

    def upto(self, last: int) -> Tensor:
        """0, 1, ..., last - 1 as float64, on the device of the crops."""
        return torch.arange(last, dtype=torch.float64, device=self.start.device)


def _axes(crops: Crops, patch_size: int) -> tuple[_Axis, _Axis]:
    top, left, height, width = crops.boxes.unsqueeze(-1).unbind(-2)
    num = patches_per_side(crops.size, patch_size)
    return _Axis(top, height, None, num), _Axis(left, width, crops.mirrored.unsqueeze(-1), num)


def _center_rule(teacher: _Axis, student: _Axis) -> Tensor:
    """Teacher index (..., n_student) float64 of each student row or column, both in the views' order."""
    place = student.turn(student.upto(student.num))
    # center = start + length (place + 1/2) / num; everything times 2 num, so whole pixels stay whole numbers
    before = 2 * student.num * teacher.num * (student.start - teacher.start)
    distance = torch.addcmul(before, teacher.num * student.length, 2 * place + 1)
    index = distance.div_(2 * student.num * teacher.length).floor_()
    outside = index.clamp(0, teacher.num - 1) != index
    return teacher.turn(index).masked_fill_(outside, teacher.missing())


def _paper_rule(teacher: _Axis, student: _Axis) -> Tensor:
    """As `_center_rule`; operations in the authors' order, so that halves round alike."""
    low = torch.maximum(teacher.start, student.start)
    high = torch.minimum(teacher.start + teacher.length, student.start + student.length)
    teacher_first, teacher_count = _covered(teacher, low, high)
    student_first, student_count = _covered(student, low, high)
    shorter = torch.minimum(teacher_count, student_count)
    k = student.upto(min(teacher.num, student.num))
    from_index = student.turn(student_first + _thin(k, student_count, shorter))
    to_index = teacher.turn(teacher_first + _thin(k, teacher_count, shorter))
    # what lies beyond the run goes to a slot that is cut off
    slot = torch.where(k < shorter, from_index, student.num).long()
    found = to_index.new_full((*slot.shape[:-1], student.num + 1), teacher.missing())
    return found.scatter_(-1, slot, to_index)[..., :-1].contiguous()


def _covered(axis: _Axis, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """First patch and number of patches of the unmirrored grid that [low, high) covers, rounded half to even.

    Two halves that both round up would end one patch beyond the grid: the run is cut at its last patch.
    (The authors' slice is cut there too in an unmirrored view, and comes out empty in a mirrored one.)
    """
    first = (axis.num * ((low - axis.start) / axis.length)).round()
    count = (axis.num * ((high - low) / axis.length)).round()
    return first, torch.minimum(count, axis.num - first).clamp(min=0)


def _thin(k: Tensor, longer: Tensor, shorter: Tensor) -> Tensor:
    """The k-th of floor(linspace(0, longer - 1, shorter)), in numpy's order of operations."""
    step = (longer - 1) / (shorter - 1).clamp(min=1)
    last = (k == shorter - 1) & (shorter > 1)  # numpy sets the end instead of computing it
    return torch.where(last, longer - 1, (k * step).floor_())


_RULES: dict[str, Callable[[_Axis, _Axis], Tensor]] = {"center": _center_rule, "paper": _paper_rule}
RULES: tuple[str, ...] = tuple(_RULES)
