"""Three updates in a row give what the official losses of DINO, iBOT and PW-Self's authors gave, centers included."""


import numpy as np
import pytest
import record_losses as official
import torch
from record_losses import BOXES, GLOBALS, IMAGES, LOCALS, LOSSES, MIRRORED, PATCH, PROTOTYPES, SEPARATE, SIDE, UPDATES
from torch import nn

from patchssl.pretrain.centering import EmaCenter, teacher_probs
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.crossentropy import TeacherTokens, matched_cross_entropy
from patchssl.pretrain.losses import class_loss, patch_loss
from patchssl.pretrain.pairs import class_only, even_class_weight, plan_masked, plan_matches

LOGITS = nn.Identity()  # prototypes for logits: the centers' mean is that of logits


def logits(name, update, *shape):
    return torch.from_numpy(official.logits(name, update, *shape))


def class_term(student, teacher, plan, center, update):
    probs = teacher_probs(teacher, center.value, official.TEMPS[update])
    return class_loss(student, probs, plan.class_weight, official.STUDENT_TEMP)


def patch_terms(student, teacher, plan, center, temp):
    """The patch term (in its plain form, in the form of the step) of logits of all tokens, (S, K) and (B, G, N, K)."""
    student, positions = student[plan.student_tokens], teacher.shape[2]
    matched = teacher.flatten(0, 2)[plan.teacher_tokens]
    position = plan.teacher_tokens % positions if len(center.value) > 1 else None
    probs = teacher_probs(matched, center.value if position is None else center.value[position], temp)
    axes = torch.eye(student.shape[1])  # prototypes of which a bottleneck is the logits
    says = TeacherTokens(matched, axes, center.value, temp, position)
    value, _ = matched_cross_entropy(student, axes, says, plan.groups, plan.teacher, plan.weight, official.STUDENT_TEMP)
    return patch_loss(student, probs, plan, official.STUDENT_TEMP), value / plan.num_pairs


def agree(name, update, **found):
    with np.load(LOSSES) as record:
        for what, value in found.items():
            expected = torch.from_numpy(record[f"{name}/{update}/{what}"])
            assert (value - expected).abs().max() <= 1e-5 * expected.abs().max(), (name, update, what)
            assert value.shape == expected.shape and expected.abs().max() > 1e-3


def test_dino():
    center = EmaCenter(PROTOTYPES, 0.9)
    plan = class_only(even_class_weight(IMAGES, GLOBALS, GLOBALS + LOCALS))
    for update in range(UPDATES):
        student = logits("student", update, IMAGES, GLOBALS + LOCALS, PROTOTYPES)
        teacher = logits("teacher", update, IMAGES, GLOBALS, PROTOTYPES)
        loss = class_term(student, teacher, plan, center, update)
        center.update(LOGITS, teacher.mean((0, 1))[None])
        agree("dino", update, loss=loss, center=center.value)


@pytest.mark.parametrize(("name", "prototypes"), [("ibot", PROTOTYPES), ("ibot_separate", SEPARATE)])
def test_ibot(name, prototypes):
    recipe = Recipe.model_validate({"method": "ibot", "photometric": {"patch_share": 0},
                                    "views": {"num_global": GLOBALS, "num_local": LOCALS}})
    centers = EmaCenter(PROTOTYPES, 0.9), EmaCenter(prototypes, 0.9)
    for update in range(UPDATES):
        student = logits("student", update, IMAGES, GLOBALS + LOCALS, PROTOTYPES)
        teacher = logits("teacher", update, IMAGES, GLOBALS, PROTOTYPES)
        seen, said = (logits(f"{who} patches", update, IMAGES, GLOBALS, SIDE**2, prototypes)
                      for who in ("student", "teacher"))
        plan = plan_masked(torch.from_numpy(official.masks(update)).flatten(2), recipe)
        of_class = class_term(student, teacher, plan, centers[0], update)
        of_patches = patch_terms(seen.flatten(0, 2), said, plan, centers[1], official.PATCH_TEMPS[update])
        centers[0].update(LOGITS, teacher.mean((0, 1))[None])
        centers[1].update(LOGITS, said.mean((0, 1, 2))[None])
        for term in of_patches:
            agree(name, update, cls=of_class, patch=official.PATCH_WEIGHT * term,
                  loss=of_class + official.PATCH_WEIGHT * term, center=centers[0].value,
                  patch_center=centers[1].value)


def pwself_plan(weighting="paper", own=False):
    """The authors' matches, of one geometry for all images or of each image's `own`."""
    share = {"class_share": official.CLASS_SHARES[weighting]} if weighting in official.CLASS_SHARES else {}
    recipe = Recipe.model_validate({
        "model": {"patch_size": PATCH}, "views": {"num_global": GLOBALS, "num_local": LOCALS},
        "loss": {"weighting": weighting, "rule": "paper", "center_per_position": True} | share})
    boxes = [official.own_boxes(image) if own else BOXES for image in range(IMAGES)]
    return plan_matches(torch.tensor(boxes, dtype=torch.float64), torch.tensor(MIRRORED).expand(IMAGES, -1), recipe)


@pytest.mark.parametrize(("name", "plan", "times"), [
    ("pwself", pwself_plan(), 1), ("pwself lambda", pwself_plan("lambda", own=True), 1),
    ("pwself lambda-sum", pwself_plan("lambda-sum"), IMAGES),  # theirs is the sum over images
], ids=["paper", "lambda", "lambda-sum"])
def test_pwself_as_the_authors_weigh_match_and_center_it(name, plan, times):
    of_globals, of_locals = official.pwself_sizes()
    centers = EmaCenter(PROTOTYPES, 0.9), EmaCenter(PROTOTYPES, 0.9, of_globals - 1)
    for update in range(UPDATES):
        views = (logits("student globals", update, IMAGES, GLOBALS, of_globals, PROTOTYPES),
                 logits("student locals", update, IMAGES, LOCALS, of_locals, PROTOTYPES))
        teacher = logits("teacher", update, IMAGES, GLOBALS, of_globals, PROTOTYPES)
        of_class = class_term(torch.cat([v[:, :, 0] for v in views], 1), teacher[:, :, 0], plan, centers[0], update)
        patches = torch.cat([v[:, :, 1:].flatten(0, 2) for v in views])
        terms = patch_terms(patches, teacher[:, :, 1:], plan, centers[1], official.TEMPS[update])
        centers[0].update(LOGITS, teacher[:, :, 0].mean((0, 1))[None])
        centers[1].update(LOGITS, teacher[:, :, 1:].mean((0, 1)))
        for term in terms:
            agree(name, update, loss=times * (of_class + term), center=centers[0].value,
                  patch_center=centers[1].value)


def test_the_recorded_geometry_has_pairs_with_and_without_overlap():
    weight = pwself_plan().class_weight[0] * GLOBALS * (GLOBALS + LOCALS - 1) * IMAGES  # 1 / (1 + matches)
    different = weight[weight > 0]
    assert (different == 1).any() and (different < 0.05).any() and len(different) == 8
    own = pwself_plan(own=True).class_weight  # an image that got another's matches would weigh otherwise
    assert all((row == 0).sum() == GLOBALS for row in own)
    assert not any(torch.equal(own[a], own[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
