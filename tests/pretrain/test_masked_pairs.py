"""The plan of masked patches against loops over images, views and patches."""

import pytest
import torch
import torch.nn.functional as F
from small_runs import make_recipe

from patchssl.pretrain.crossentropy import matched_cross_entropy
from patchssl.pretrain.losses import patch_loss
from patchssl.pretrain.pairs import plan_masked

IMAGES, GLOBALS, POSITIONS, PROTOTYPES = 4, 2, 9, 5


def make_masks():
    masks = torch.rand(IMAGES, GLOBALS, POSITIONS, generator=torch.Generator().manual_seed(0)) < 0.4
    masks[0, 1], masks[2], masks[1, 0] = False, False, True  # a view and an image without, a view all masked
    return masks


def make_logits(seed):
    return 2 * torch.randn(IMAGES * GLOBALS * POSITIONS, PROTOTYPES, generator=torch.Generator().manual_seed(seed))


def slow_patch_term(student, teacher, masks, temp):
    """Mean over images and views of the mean over masked patches, 0 for views without any."""
    total = 0.0
    for b in range(IMAGES):
        for g in range(GLOBALS):
            terms = []
            for n in range(POSITIONS):
                token = (b * GLOBALS + g) * POSITIONS + n
                if masks[b, g, n]:
                    terms.append(F.cross_entropy(student[token] / temp, teacher[token]).item())
            total += sum(terms) / max(1, len(terms))
    return total / (IMAGES * GLOBALS)


def test_the_patch_term_is_a_mean_of_means():
    masks, student, teacher = make_masks(), make_logits(1), make_logits(2).softmax(-1)
    plan = plan_masked(masks, make_recipe(method="ibot", photometric={"patch_share": 0}))
    rows, targets = student[plan.student_tokens], teacher[plan.teacher_tokens]
    expected = pytest.approx(slow_patch_term(student, teacher, masks, 0.1), rel=1e-5)
    assert patch_loss(rows, targets, plan, 0.1).item() == expected
    value, _ = matched_cross_entropy(rows, torch.eye(PROTOTYPES), targets, plan.groups, plan.teacher, plan.weight, 0.1)
    assert (value / plan.num_pairs).item() == expected


def test_class_tokens_are_compared_between_all_different_views():
    plan = plan_masked(make_masks(), make_recipe(method="ibot", photometric={"patch_share": 0}))
    weight = torch.tensor([[0.0, 1, 1, 1], [1, 0, 1, 1]]) / (IMAGES * 6)
    torch.testing.assert_close(plan.class_weight, weight.expand(IMAGES, 2, 4))


def test_the_share_of_student_patches_that_are_compared():
    masks = make_masks()
    plan = plan_masked(masks, make_recipe(method="ibot", photometric={"patch_share": 0}))
    assert plan.matched_share.tolist() == [pytest.approx(masks.sum().item() / masks.numel()), 0]


def test_a_batch_without_masks_has_a_patch_term_of_zero():
    masks = torch.zeros(2, 2, 9, dtype=torch.bool)
    plan = plan_masked(masks, make_recipe(method="ibot", photometric={"patch_share": 0}))
    student, prototypes = torch.ones(0, 3, requires_grad=True), torch.eye(3, requires_grad=True)
    value, _ = matched_cross_entropy(student, prototypes, torch.ones(0, 3), plan.groups, plan.teacher, plan.weight, 0.1)
    value.backward()
    assert value.item() == 0 and not prototypes.grad.any()
