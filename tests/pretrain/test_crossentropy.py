"""The cross-entropy in pieces against the plain formula with whole matrices, gradients included."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import each
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from patchssl.pretrain import centering
from patchssl.pretrain.crossentropy import GroupedMatches, TeacherTokens, group_matches, matched_cross_entropy

TEMP, TEACHER_TEMP, IMAGES = 0.1, 0.04, 5
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


class Case(NamedTuple):
    """Random tokens of some images: student rows in any order, up to three teachers each, teachers shared."""

    bottleneck: Tensor
    prototypes: Tensor
    teacher: TeacherTokens | Tensor
    student: Tensor  # (M,) rows
    teacher_rows: Tensor
    weight: Tensor
    student_image: Tensor
    teacher_image: Tensor

    @property
    def groups(self) -> GroupedMatches:
        return group_matches(self.student, self.student_image, self.teacher_image)

    def ours(self, rows=None):
        return matched_cross_entropy(self.bottleneck, self.prototypes, self.teacher, self.groups, self.teacher_rows,
                                     self.weight, TEMP, rows=rows)

    def gradients(self, loss):
        return torch.autograd.grad(loss, (self.bottleneck, self.prototypes), retain_graph=True)


def make_case(kind="one center", dtype=torch.float32, num_student=23, num_prototypes=31, dim=6, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=dtype)

    num_teacher = 4 * IMAGES
    teacher_image = torch.arange(num_teacher) // 4
    student_image = torch.randint(IMAGES - 1, (num_student,), generator=rng)  # nothing in the last image is matched
    student, teacher_rows = [], []
    for row, image in enumerate(student_image.tolist()):
        for teacher in torch.randperm(4, generator=rng)[: 1 + row % 3].tolist():
            student.append(row)
            teacher_rows.append(4 * image + teacher)
    mixed = torch.randperm(len(student), generator=rng)
    positions = 1 if kind == "one center" else 3
    tokens = TeacherTokens(F.normalize(normal(num_teacher, dim), dim=-1), normal(num_prototypes, dim),
                           0.1 * normal(positions, num_prototypes), TEACHER_TEMP,
                           torch.randint(3, (num_teacher,), generator=rng) if positions > 1 else None)
    given = normal(num_teacher, num_prototypes).mul(3).softmax(-1)
    return Case(F.normalize(normal(num_student, dim), dim=-1).requires_grad_(),
                normal(num_prototypes, dim).requires_grad_(), given if kind == "given" else tokens,
                torch.tensor(student)[mixed], torch.tensor(teacher_rows)[mixed],
                torch.rand(len(student), generator=rng, dtype=dtype), student_image, teacher_image)


KINDS = ["one center", "per position", "given"]


def teacher_probs(case):
    if isinstance(case.teacher, Tensor):
        return case.teacher
    center = case.teacher.center
    center = center if case.teacher.position is None else center[case.teacher.position]
    return centering.teacher_probs(F.linear(case.teacher.bottleneck, case.teacher.prototypes), center, TEACHER_TEMP)


def plain(case):
    """-sum_m weight_m sum_k p_k log q_k, with a row for every match."""
    log_probs = F.log_softmax(F.linear(case.bottleneck, case.prototypes) / TEMP, dim=-1)
    each = -(teacher_probs(case)[case.teacher_rows] * log_probs[case.student]).sum(-1)
    return (case.weight * each).sum()


def assert_near(ours, theirs, tolerance):
    """Within `tolerance` of the largest number, each of them."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@each("rows", [None, 1, 3, 7])
@each("dtype", TOLERANCE)
@each("kind", KINDS)
def test_value_and_gradients_equal_the_plain_formula(kind, dtype, rows):
    for seed in range(3):
        case = make_case(kind, dtype, seed=seed)
        ours, theirs = case.ours(rows)[0], plain(case)
        assert ours.dtype == dtype
        assert_near(ours, theirs, TOLERANCE[dtype])
        for found, expected in zip(case.gradients(-2.5 * ours), case.gradients(-2.5 * theirs), strict=True):
            assert_near(found, expected, TOLERANCE[dtype])


def test_many_prototypes_lose_no_precision():
    case = make_case(num_student=40, num_prototypes=20_000, dim=64)
    tokens, prototypes, center, *rest = case.teacher
    exact = case._replace(bottleneck=case.bottleneck.detach().double().requires_grad_(),
                          prototypes=case.prototypes.detach().double().requires_grad_(),
                          teacher=TeacherTokens(tokens.double(), prototypes.double(), center.double(), *rest))
    ours, theirs = case.ours()[0], plain(exact)
    assert_near(ours, theirs, 1e-5)
    for found, expected in zip(case.gradients(ours), exact.gradients(theirs), strict=True):
        assert_near(found, expected, 1e-5)


def test_gradients_are_those_of_finite_differences():
    case = make_case(dtype=torch.float64, num_student=6, num_prototypes=5, dim=3)
    assert torch.autograd.gradcheck(lambda b, p: case._replace(bottleneck=b, prototypes=p).ours(rows=2)[0],
                                    (case.bottleneck, case.prototypes))


def test_by_hand():
    """One match, two prototypes, logits (1, 0) / 0.1 against probabilities (1/4, 3/4)."""
    groups = group_matches(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]))
    loss, stats = matched_cross_entropy(torch.tensor([[1.0, 0.0]]), torch.eye(2), torch.tensor([[0.25, 0.75]]), groups,
                                        torch.tensor([0]), torch.tensor([2.0]), student_temp=0.1)
    assert float(loss) == pytest.approx(2 * 7.5000454, rel=1e-6)  # 10 * 3/4 + ln(1 + e^-10)
    assert float(stats.teacher_entropy) == pytest.approx(0.5623351, rel=1e-6)
    assert float(stats.matched_entropy) == pytest.approx(2 * 0.5623351, rel=1e-6)
    assert float(stats.marginal_entropy) == pytest.approx(0.5623351, rel=1e-6)


@each("kind", KINDS)
def test_entropies_of_the_teacher(kind):
    case = make_case(kind, torch.float64)
    probs = teacher_probs(case)
    entropies = torch.special.entr(probs).sum(-1)
    stats = case.ours(rows=3)[1]
    torch.testing.assert_close(stats.teacher_entropy, entropies.mean())
    torch.testing.assert_close(stats.matched_entropy, (case.weight * entropies[case.teacher_rows]).sum())
    torch.testing.assert_close(stats.marginal_entropy, torch.special.entr(probs.mean(0)).sum())
    assert not any(value.requires_grad for value in stats)


def test_loss_less_matched_entropy_is_zero_where_both_say_the_same():
    """Kullback-Leibler divergence of a network from itself."""
    case = make_case(dtype=torch.float64)
    tokens = F.normalize(torch.randn(20, 6, dtype=torch.float64), dim=-1)
    same = TeacherTokens(tokens, case.prototypes.detach(), torch.zeros(1, 31, dtype=torch.float64), TEMP)
    rows = torch.arange(20)
    groups = group_matches(rows, case.teacher_image, case.teacher_image)
    weight = torch.rand(20, dtype=torch.float64)
    loss, stats = matched_cross_entropy(tokens, case.prototypes, same, groups, rows, weight, TEMP)
    assert float(loss.detach() - stats.matched_entropy) == pytest.approx(0, abs=1e-12)
    assert loss > 0


def test_no_match_gives_a_zero_with_gradients():
    none = torch.zeros(0, dtype=torch.int64)
    bottleneck, prototypes = torch.zeros(0, 6, requires_grad=True), torch.randn(31, 6, requires_grad=True)
    teacher = TeacherTokens(torch.zeros(0, 6), torch.randn(31, 6), torch.zeros(1, 31), TEACHER_TEMP)
    for source in (teacher, torch.zeros(0, 31)):
        loss, stats = matched_cross_entropy(bottleneck, prototypes, source, group_matches(none, none, none), none,
                                            torch.zeros(0), TEMP)
        gradients = torch.autograd.grad(loss, (bottleneck, prototypes))
        assert loss == 0
        assert torch.equal(gradients[1], torch.zeros(31, 6))
        assert gradients[0].shape == (0, 6)
        assert [float(value) for value in stats] == [0, 0, 0]


def test_teacher_tokens_that_nobody_matches_count_in_its_entropy_only():
    teacher_image = torch.tensor([0, 0])
    probs = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    none = torch.zeros(0, dtype=torch.int64)
    loss, stats = matched_cross_entropy(torch.zeros(0, 2), torch.eye(2), probs,
                                        group_matches(none, none, teacher_image), none, torch.zeros(0), TEMP)
    assert loss == 0
    assert float(stats.teacher_entropy) == pytest.approx(0.6931472 / 2, rel=1e-6)
    assert stats.matched_entropy == 0


def test_matches_without_weight_change_nothing():
    case = make_case()
    silent = case._replace(weight=torch.where(case.student % 2 == 0, 0.0, case.weight))
    ours = silent.ours(rows=3)[0]
    assert_near(ours, plain(silent), 1e-5)
    gradient = case.gradients(ours)[0]
    assert torch.equal(gradient[::2], torch.zeros_like(gradient[::2]))
    assert gradient[1::2].abs().min(dim=0).values.max() > 0


class Watch(TorchDispatchMode):
    """Notes the largest tensor that any operation gives back, and how many rows meet how many prototypes."""

    def __init__(self, num_prototypes):
        super().__init__()
        self.num_prototypes, self.largest, self.projected = num_prototypes, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(found) if isinstance(x, Tensor))])
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
            left, right = args[-2:]
            self.projected += len(left) if right.shape[1] == self.num_prototypes else 0
        return found


@pytest.mark.parametrize("kind", ["one center", "per position"])
def test_each_token_is_projected_once_and_no_large_matrix_made(kind):
    case = make_case(kind, num_student=60, num_prototypes=500, dim=6)
    with Watch(500) as pieces:
        case.ours(rows=10)[0].backward()
    assert pieces.projected == 60 + 4 * IMAGES
    assert pieces.largest <= 500 * 12
    with Watch(500) as whole:
        plain(case).backward()
    assert whole.largest >= 60 * 500


def test_no_gradient_is_formed_for_those_who_want_none():
    case = make_case(num_prototypes=500)
    with_gradients = case.ours(rows=5)[0]
    with torch.no_grad():
        value = case.ours(rows=5)[0]
    assert not value.requires_grad
    assert torch.equal(value, with_gradients)
    frozen = case._replace(prototypes=case.prototypes.detach())
    loss = frozen.ours(rows=5)[0]
    found, = torch.autograd.grad(loss, frozen.bottleneck)
    assert torch.equal(found, case.gradients(with_gradients)[0])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_stays_within_its_rounding(low):
    case = make_case(num_student=200, num_prototypes=300, dim=32)
    case = case._replace(weight=1e-6 * case.weight)  # gradients that float16 could not tell from zero
    exact = plain(case)
    with torch.autocast("cpu", low):
        ours = case.ours(rows=64)[0]
    assert ours.dtype == torch.float32
    assert ours != exact  # it did compute in low precision
    assert_near(ours, exact, torch.finfo(low).eps)
    for found, expected in zip(case.gradients(ours), case.gradients(exact), strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 4 * torch.finfo(low).eps * expected.norm()


def test_low_precision_tokens_get_gradients_of_their_own_type():
    case = make_case()
    low = case._replace(bottleneck=case.bottleneck.detach().bfloat16().requires_grad_())
    ours = low.ours()[0]
    found = low.gradients(ours)[0]
    assert ours.dtype == torch.float32
    assert found.dtype == torch.bfloat16
    exact = case._replace(bottleneck=low.bottleneck.detach().float().requires_grad_())
    assert_near(found.float(), exact.gradients(plain(exact))[0], 0.01)


@each("kind", KINDS)
def test_nothing_waits_for_a_value(kind):
    """On a device whose tensors have no content, whoever asks for one fails."""
    case, there = make_case(kind), torch.device("meta")

    def move(value):
        return value.detach().to(there) if isinstance(value, Tensor) else value

    teacher = move(case.teacher) if kind == "given" else TeacherTokens(*map(move, case.teacher))
    bottleneck, prototypes = move(case.bottleneck).requires_grad_(), move(case.prototypes).requires_grad_()
    loss, stats = matched_cross_entropy(bottleneck, prototypes, teacher, case.groups.to(there), move(case.teacher_rows),
                                        move(case.weight), TEMP, rows=7)
    loss.backward()
    assert bottleneck.grad.shape == case.bottleneck.shape
    assert stats.teacher_entropy.device == there


def test_the_groups_by_hand():
    """Four student tokens of images 1, 0, 1, 0; token 2 has two matches."""
    groups = group_matches(torch.tensor([2, 0, 1, 2, 3]), torch.tensor([1, 0, 1, 0]), torch.tensor([0, 0, 1]))
    assert groups.order.tolist() == [1, 3, 0, 2]
    assert groups.matches.tolist() == [[2, 2], [4, 4], [1, 1], [0, 3]]
    assert groups.filled.tolist() == [[True, False]] * 3 + [[True, True]]
    assert groups.student_ends == (2, 4)
    assert groups.teacher_ends == (2, 3)


def test_what_cannot_be_grouped_is_refused():
    with pytest.raises(ValueError, match="1 of 2 student rows have no match"):
        group_matches(torch.tensor([0]), torch.tensor([0, 0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="image by image"):
        group_matches(torch.tensor([0]), torch.tensor([0]), torch.tensor([1, 0]))


def test_groups_of_other_tokens_are_refused():
    case = make_case()
    with pytest.raises(ValueError, match="22 student and 20 teacher tokens, but groups of 23 and 20"):
        matched_cross_entropy(case.bottleneck[1:], case.prototypes, case.teacher, case.groups, case.teacher_rows,
                              case.weight, TEMP)
