import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st

from patchssl.runtime.errors import UsageError
from patchssl.views.geometry import Crops, View
from patchssl.views.matching import RULES, match_crops, match_patches

PATCH_SIZES = [8, 16, 32]


def pairs(teacher: View, student: View, patch_size: int, rule: str) -> list[tuple[int, int]]:
    """(teacher, student) ids as found by the code under test, in its order."""
    teacher_ids, student_ids = match_patches(teacher, student, patch_size, rule)
    assert teacher_ids.dtype == student_ids.dtype == torch.int64
    return list(zip(teacher_ids.tolist(), student_ids.tolist(), strict=True))


def slow_center(teacher: View, student: View, patch_size: int) -> list[tuple[int, int]]:
    """The rule in exact fractions: which teacher patch's rectangle holds the center of each student patch."""
    n, m = teacher.size // patch_size, student.size // patch_size
    tops = [teacher.top + Fraction(teacher.height * k, n) for k in range(n + 1)]
    lefts = [teacher.left + Fraction(teacher.width * k, n) for k in range(n + 1)]
    found = []
    for row in range(m):
        y = student.top + Fraction(student.height * (2 * row + 1), 2 * m)
        for column in range(m):
            place = m - 1 - column if student.mirrored else column
            x = student.left + Fraction(student.width * (2 * place + 1), 2 * m)
            for i in (i for i in range(n) if tops[i] <= y < tops[i + 1]):
                for j in (j for j in range(n) if lefts[j] <= x < lefts[j + 1]):
                    found.append((i * n + (n - 1 - j if teacher.mirrored else j), row * m + column))
    return found


def slow_paper(teacher: View, student: View, patch_size: int) -> list[tuple[int, int]]:
    """The rule one side of one view at a time, in Python's floats, lists and numpy's linspace."""
    def cells(view: View, low: float, high: float, start: float, length: float, mirrored: bool) -> list[int]:
        n = view.size // patch_size
        first = round(n * ((low - start) / length))
        last = min(first + round(n * ((high - low) / length)), n)
        return [n - 1 - c if mirrored else c for c in range(first, last)]

    def thinned(ids: list[int], count: int) -> list[int]:
        return [ids[math.floor(x)] for x in np.linspace(0, len(ids) - 1, count)]

    def matched(start: str, length: str, mirror: bool) -> list[tuple[int, int]]:
        spans = [(getattr(v, start), getattr(v, length)) for v in (teacher, student)]
        low, high = max(s for s, _ in spans), min(s + size for s, size in spans)
        if low >= high:
            return []
        sides = [cells(v, low, high, *span, mirror and v.mirrored)
                 for v, span in zip((teacher, student), spans, strict=True)]
        count = min(map(len, sides))
        return list(zip(*(thinned(ids, count) for ids in sides), strict=True))

    n, m = teacher.size // patch_size, student.size // patch_size
    columns = matched("left", "width", True)
    return [(i * n + j, k * m + c) for i, k in matched("top", "height", False) for j, c in columns]


def random_view(rng: random.Random, height: int, width: int, size: int) -> View:
    h, w = rng.randint(1, height), rng.randint(1, width)
    return View(rng.randint(0, height - h), rng.randint(0, width - w), h, w, rng.random() < 0.5, size)


@st.composite
def views(draw, sizes=(32, 64, 96, 224), extent=40):
    """A whole-pixel crop; a small extent makes centers on borders and exact halves common."""
    height, width = draw(st.integers(1, extent)), draw(st.integers(1, extent))
    top, left = draw(st.integers(0, extent - height)), draw(st.integers(0, extent - width))
    return View(top, left, height, width, draw(st.booleans()), draw(st.sampled_from(sizes)))


@settings(max_examples=80, deadline=None)
@given(teacher=views(), student=views(), patch_size=st.sampled_from([16, 32]))
def test_center_equals_exact_fractions(teacher, student, patch_size):
    assert pairs(teacher, student, patch_size, "center") == slow_center(teacher, student, patch_size)


@each("patch_size", PATCH_SIZES)
def test_center_equals_exact_fractions_on_photographs(patch_size):
    rng = random.Random(patch_size)
    for _ in range(3):
        teacher, student = random_view(rng, 375, 500, 224), random_view(rng, 375, 500, 96)
        assert pairs(teacher, student, patch_size, "center") == slow_center(teacher, student, patch_size)


def test_center_on_a_patch_border_belongs_to_the_patch_that_begins_there():
    # student centers at 2, 6, 10, 14; the teacher's patches of 2 px begin there, its crop ends at 14
    teacher, student = View(0, 0, 14, 14, False, 112), View(0, 0, 16, 16, False, 64)
    assert pairs(teacher, student, 16, "center") == [
        (7 * i + j, 4 * k + m) for k, i in enumerate([1, 3, 5]) for m, j in enumerate([1, 3, 5])]


@settings(max_examples=150, deadline=None)
@given(teacher=views(), student=views(), patch_size=st.sampled_from(PATCH_SIZES))
def test_paper_equals_a_slow_reading_of_its_words(teacher, student, patch_size):
    assert pairs(teacher, student, patch_size, "paper") == slow_paper(teacher, student, patch_size)


def test_paper_equals_a_slow_reading_of_its_words_on_photographs():
    rng = random.Random(0)
    for _ in range(100):
        patch_size = rng.choice(PATCH_SIZES)
        teacher, student = (random_view(rng, 375, 500, rng.choice([224, 96])) for _ in range(2))
        assert pairs(teacher, student, patch_size, "paper") == slow_paper(teacher, student, patch_size)


def test_paper_by_hand():
    # columns: overlap [4, 8): the teacher's patches 2, 3 of 4 and the student's 0, 1 of 2
    # rows: overlap [0, 8): the teacher's 0..3 thinned to floor(linspace(0, 3, 2)) = 0, 3, the student's 0, 1
    teacher, student = View(0, 0, 8, 8, False, 64), View(0, 4, 8, 8, False, 64)
    assert pairs(teacher, student, 16, "paper") == [
        (2, 0), (3, 1), (6, 4), (7, 5), (10, 8), (11, 9), (14, 12), (15, 13)]
    student = View(0, 4, 8, 4, False, 32)
    assert pairs(teacher, student, 16, "paper") == [(2, 0), (3, 1), (14, 2), (15, 3)]


def test_paper_orders_matches_by_the_source_also_in_a_mirrored_student():
    teacher, student = View(0, 0, 8, 8, False, 64), View(0, 4, 8, 4, True, 32)
    assert pairs(teacher, student, 16, "paper") == [(2, 1), (3, 0), (14, 3), (15, 2)]
    teacher = View(0, 0, 8, 8, True, 64)
    assert pairs(teacher, student, 16, "paper") == [(1, 1), (0, 0), (13, 3), (12, 2)]


@pytest.mark.parametrize("mirrored", [False, True])
def test_paper_cuts_a_run_that_two_halves_push_beyond_the_grid(mirrored):
    # 3 patches over 6 px, overlap [3, 6): starts at round(1.5) = 2 and is round(1.5) = 2 long: patches 2, (3)
    teacher, student = View(0, 0, 6, 6, mirrored, 48), View(0, 3, 6, 3, False, 48)
    last = 0 if mirrored else 2
    assert pairs(teacher, student, 16, "paper") == [(last, 0), (3 + last, 3), (6 + last, 6)]


@each("rule", RULES)
@each("patch_size", PATCH_SIZES)
@each("mirrored", [(False, False), (True, True), (False, True), (True, False)])
def test_identical_crops_match_themselves_or_their_mirror(rule, patch_size, mirrored):
    rng = random.Random(str(mirrored))
    n = 224 // patch_size
    grid = np.arange(n * n).reshape(n, n)
    expected = grid if mirrored[0] == mirrored[1] else grid[:, ::-1]
    for _ in range(20):
        view = random_view(rng, 375, 500, 224)
        box = (view.top, view.left, view.height, view.width)
        found = match_crops(*(Crops.of([View(*box, m, 224)]) for m in mirrored), patch_size, rule)
        assert np.array_equal(found.view(n, n).numpy(), expected)


@each("rule", RULES)
@each("offset", [(0, 50), (50, 0), (0, -50), (-50, 0), (0, 80), (80, 80)])
def test_views_without_overlap_have_no_match(rule, offset):
    teacher = View(100, 100, 50, 50, True, 64)
    student = View(100 + offset[0], 100 + offset[1], 50, 50, False, 32)
    teacher_ids, student_ids = match_patches(teacher, student, 8, rule)
    assert teacher_ids.shape == student_ids.shape == (0,)


@pytest.mark.parametrize("rule", RULES)
def test_one_patch_grids(rule):
    whole = View(0, 0, 30, 30, True, 32)
    inner = pairs(whole, View(10, 10, 10, 10, False, 32), 32, rule)
    assert inner == ([(0, 0)] if rule == "center" else [])  # a third of the teacher's patch rounds to none
    assert pairs(whole, whole, 32, rule) == [(0, 0)]
    assert pairs(whole, View(40, 0, 30, 30, False, 32), 32, rule) == []


def test_one_patch_student_matches_where_its_center_is():
    teacher, student = View(0, 0, 40, 40, False, 64), View(20, 0, 20, 18, True, 16)
    assert pairs(teacher, student, 16, "center") == [(12, 0)]  # center (30, 9): row 3, column 0


@settings(max_examples=60, deadline=None)
@given(teacher=views(), student=views(), rule=st.sampled_from(RULES), patch_size=st.sampled_from(PATCH_SIZES))
def test_mirroring_a_view_mirrors_its_columns(teacher, student, rule, patch_size):
    def mirrored(view: View) -> View:
        return View(view.top, view.left, view.height, view.width, not view.mirrored, view.size)

    def turned(ids: int, view: View) -> int:
        n = view.size // patch_size
        return ids // n * n + n - 1 - ids % n

    before = pairs(teacher, student, patch_size, rule)
    other_teacher = pairs(mirrored(teacher), student, patch_size, rule)
    other_student = pairs(teacher, mirrored(student), patch_size, rule)
    assert other_teacher == [(turned(t, teacher), s) for t, s in before]
    assert sorted(other_student) == sorted((t, turned(s, student)) for t, s in before)


@settings(max_examples=60, deadline=None)
@given(teacher=views(), student=views(), rule=st.sampled_from(RULES), patch_size=st.sampled_from(PATCH_SIZES))
def test_no_student_patch_is_matched_twice(teacher, student, rule, patch_size):
    students = [s for _, s in pairs(teacher, student, patch_size, rule)]
    assert len(set(students)) == len(students)
    if rule == "center":
        assert students == sorted(students)


@each("rule", RULES)
@each("patch_size", PATCH_SIZES)
def test_a_batch_equals_its_single_pairs(rule, patch_size):
    rng = random.Random(7)
    teachers = [[random_view(rng, 60, 80, 224) for _ in range(2)] for _ in range(5)]
    students = [[random_view(rng, 60, 80, 96) for _ in range(3)] for _ in range(5)]

    def batch(rows: list[list[View]]) -> Crops:
        flat = Crops.of([view for row in rows for view in row])
        shape = (len(rows), len(rows[0]))
        return Crops(flat.boxes.view(*shape, 4), flat.mirrored.view(shape), flat.size)

    t, s = batch(teachers), batch(students)
    found = match_crops(Crops(t.boxes[:, :, None], t.mirrored[:, :, None], t.size),
                        Crops(s.boxes[:, None], s.mirrored[:, None], s.size), patch_size, rule)
    assert found.shape == (5, 2, 3, (96 // patch_size) ** 2) and found.dtype == torch.int64
    for image in range(5):
        for i, teacher in enumerate(teachers[image]):
            for j, student in enumerate(students[image]):
                ids = found[image, i, j]
                single = pairs(teacher, student, patch_size, rule)
                assert sorted(single, key=lambda pair: pair[1]) == [
                    (int(ids[k]), k) for k in range(len(ids)) if ids[k] >= 0]


@pytest.mark.parametrize("rule", RULES)
def test_crops_broadcast_and_may_be_empty(rule):
    one = Crops.of([View(0, 0, 40, 40, False, 32)])
    many = Crops(one.boxes.expand(4, 4), one.mirrored.expand(4), 32)
    assert torch.equal(match_crops(one, many, 16, rule), torch.arange(4).expand(4, 4))
    none = Crops(torch.zeros(3, 0, 4, dtype=torch.float64), torch.zeros(3, 0, dtype=torch.bool), 32)
    assert match_crops(none, none, 16, rule).shape == (3, 0, 4)


def test_an_unknown_rule_is_refused_with_the_nearest_one():
    view = View(0, 0, 10, 10, False, 32)
    with pytest.raises(UsageError, match="did you mean 'center'"):
        match_patches(view, view, 16, "centre")


@pytest.mark.parametrize("rule", RULES)
def test_views_that_are_no_whole_number_of_patches_are_refused(rule):
    view = View(0, 0, 10, 10, False, 33)
    with pytest.raises(ValueError, match="whole number of patches"):
        match_patches(view, view, 16, rule)
