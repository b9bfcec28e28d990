"""The planned, batched losses against the plain form, gradients included, and that against loops over prototypes."""

import math
import random

import pytest
import torch

from patchssl.pretrain.config import Recipe
from patchssl.pretrain.crossentropy import matched_cross_entropy
from patchssl.pretrain.losses import class_loss, pair_losses, patch_loss, pwself_loss
from patchssl.pretrain.pairs import plan_matches
from patchssl.views.geometry import View
from patchssl.views.matching import match_patches

PATCH, GLOBAL, LOCAL, K, TEMP = 8, 32, 16, 5, 0.1
LAYOUTS = [(2, 4), (1, 3), (2, 0), (3, 1)]


def make_recipe(num_global, num_local, weighting="balanced", rule="center", temp=TEMP, loss=None, **more):
    return Recipe.model_validate({
        "model": {"patch_size": PATCH},
        "loss": {"weighting": weighting, "rule": rule, "student_temp": temp} | (loss or {}),
        "views": {"num_global": num_global, "num_local": num_local, "global_size": GLOBAL,
                  "local_size": LOCAL},
        **more,
    })


def random_views(recipe, num_images, seed=0, extent=48):
    """Per image a list of views, globals first; crops so free that many pairs share nothing."""
    rng, found = random.Random(seed), []
    for _ in range(num_images):
        sizes = [GLOBAL] * recipe.views.num_global + [LOCAL] * recipe.views.num_local
        shapes = [(rng.randint(4, extent), rng.randint(4, extent)) for _ in sizes]
        found.append([View(rng.randint(0, extent - h), rng.randint(0, extent - w), h, w, rng.random() < 0.5, s)
                      for (h, w), s in zip(shapes, sizes, strict=True)])
    return found


def tensors(views):
    boxes = [[[v.top, v.left, v.height, v.width] for v in image] for image in views]
    mirrored = [[v.mirrored for v in image] for image in views]
    return torch.tensor(boxes, dtype=torch.float64), torch.tensor(mirrored)


class Tokens:
    """Random student logits and teacher probabilities for every token of every view, class token first."""

    def __init__(self, views, num_global, seed=0, prototypes=K):
        rng = torch.Generator().manual_seed(seed)
        self.student = [[torch.randn(1 + (v.size // PATCH) ** 2, prototypes, generator=rng).requires_grad_()
                         for v in image] for image in views]
        self.teacher = [[torch.randn(1 + (v.size // PATCH) ** 2, prototypes, generator=rng).mul(3).softmax(-1)
                         for v in image[:num_global]] for image in views]

    def student_class(self):
        return torch.stack([torch.stack([x[0] for x in image]) for image in self.student])

    def teacher_class(self):
        return torch.stack([torch.stack([x[0] for x in image]) for image in self.teacher])

    def student_patches(self, num_global):
        """All patch tokens in MatchPlan's order: of global views, image by image, and then of local ones."""
        return torch.cat([x[1:] for part in (slice(num_global), slice(num_global, None))
                          for image in self.student for x in image[part]])

    def teacher_patches(self):
        return torch.cat([x[1:] for image in self.teacher for x in image])

    def gradients(self, loss):
        every = [x for image in self.student for x in image]
        found = torch.autograd.grad(loss, every, allow_unused=True, retain_graph=True)
        return torch.cat([(torch.zeros_like(x) if g is None else g).flatten()
                          for x, g in zip(every, found, strict=True)])


def pairs_of(tokens, views, num_global, rule, temp=TEMP):
    """Plain losses of each (image, teacher view, other view)."""
    return [pair_losses(student, tokens.teacher[i][t], *match_patches(image[t], image[s], PATCH, rule), temp)
            for i, image in enumerate(views) for t in range(num_global)
            for s, student in enumerate(tokens.student[i]) if s != t]


def mean(values):
    return sum(values) / len(values)


def planned(tokens, views, recipe, form="whole"):
    """Class and patch term by the code under test; the patch term in the `form` of whole matrices or of training."""
    plan, temp = plan_matches(*tensors(views), recipe), recipe.loss.student_temp
    class_term = class_loss(tokens.student_class(), tokens.teacher_class(), plan.class_weight, temp)
    student = tokens.student_patches(recipe.views.num_global)[plan.student_tokens]
    teacher = tokens.teacher_patches()[plan.teacher_tokens]
    if form == "whole":
        return class_term, patch_loss(student, teacher, plan, temp)
    axes = torch.eye(student.shape[1])  # prototypes of which a bottleneck is the logits
    total, _ = matched_cross_entropy(student, axes, teacher, plan.groups, plan.teacher, plan.weight, temp, rows=50)
    return class_term, total / plan.num_pairs.clamp(min=1e-6)


@pytest.mark.parametrize("num_matches", [0, 1, 7])
def test_the_plain_losses_of_a_pair_are_sums_over_prototypes(num_matches):
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(9, K, generator=rng), torch.randn(5, K, generator=rng).softmax(-1)
    teacher_ids, student_ids = (torch.randint(4, (num_matches,), generator=rng) for _ in range(2))
    found = pair_losses(student, teacher, teacher_ids, student_ids, TEMP)

    def cross_entropy(p, s):
        total = sum(math.exp(x / TEMP) for x in s)
        return -sum(a * math.log(math.exp(x / TEMP) / total) for a, x in zip(p, s, strict=True))

    p, s = teacher.tolist(), student.tolist()
    ids = zip(teacher_ids.tolist(), student_ids.tolist(), strict=True)
    assert float(found[0]) == pytest.approx(cross_entropy(p[0], s[0]), rel=1e-5)
    assert found[1].tolist() == pytest.approx([cross_entropy(p[1 + a], s[1 + b]) for a, b in ids], rel=1e-5)


def test_the_plain_weightings_by_hand():
    """Three pairs: class tokens 1, 2 and 6, with matches 3 and 5, none, and 0."""
    pairs = [(torch.tensor(1.0), torch.tensor([3.0, 5.0])), (torch.tensor(2.0), torch.zeros(0)),
             (torch.tensor(6.0), torch.tensor([0.0]))]
    assert float(pwself_loss(pairs, "balanced", patch_weight=0.5)) == 3 + 0.5 * (4 + 0) / 2
    assert float(pwself_loss(pairs, "paper")) == pytest.approx((9 / 3 + 2 + 6 / 2) / 3)
    assert float(pwself_loss(pairs[1:2], "balanced")) == float(pwself_loss(pairs[1:2], "paper")) == 2
    assert float(pwself_loss(pairs, "lambda", class_share=0.75)) == pytest.approx((0.75 * 9 + 0.25 * (4 + 0)) / 3)
    assert float(pwself_loss(pairs, "lambda-sum", class_share=0.75)) == pytest.approx((0.75 * 9 + 0.25 * (8 + 0)) / 3)
    assert float(pwself_loss(pairs[1:2], "lambda")) == float(pwself_loss(pairs[1:2], "lambda-sum"))
    assert float(pwself_loss(pairs[1:2], "lambda")) == pytest.approx(0.9 * 2)  # nothing makes up for missing matches


FORMS = pytest.mark.parametrize("form", ["whole", "training"])
SIZES = pytest.mark.parametrize(("prototypes", "temp"), [(5, 0.1), (40, 0.3)])


@FORMS
@SIZES
@pytest.mark.parametrize("rule", ["center", "paper"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_balanced_terms_equal_the_plain_form(layout, rule, prototypes, temp, form):
    recipe = make_recipe(*layout, rule=rule, temp=temp)
    views = random_views(recipe, num_images=4)
    tokens = Tokens(views, layout[0], prototypes=prototypes)
    pairs = pairs_of(tokens, views, layout[0], rule, temp)
    assert len(pairs) == 4 * layout[0] * (sum(layout) - 1)
    counts = {len(matches) for _, matches in pairs}
    assert 0 in counts and len(counts) > 2  # or means could be told apart from nothing
    class_term, patch_term = planned(tokens, views, recipe, form)
    for weight in (0.0, 1.0, 0.3):
        ours, slow = class_term + weight * patch_term, pwself_loss(pairs, "balanced", weight)
        torch.testing.assert_close(ours, slow, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(tokens.gradients(ours), tokens.gradients(slow), rtol=1e-4, atol=1e-7)


@FORMS
@SIZES
@pytest.mark.parametrize("rule", ["center", "paper"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_paper_weighting_equals_the_plain_form(layout, rule, prototypes, temp, form):
    recipe = make_recipe(*layout, rule=rule, weighting="paper", temp=temp)
    views = random_views(recipe, num_images=8, seed=1)
    tokens = Tokens(views, layout[0], prototypes=prototypes)
    pairs = pairs_of(tokens, views, layout[0], rule, temp)
    assert min(len(matches) for _, matches in pairs) == 0 < max(len(matches) for _, matches in pairs)
    ours, slow = sum(planned(tokens, views, recipe, form)), pwself_loss(pairs, "paper")
    torch.testing.assert_close(ours, slow, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tokens.gradients(ours), tokens.gradients(slow), rtol=1e-4, atol=1e-7)


@FORMS
@SIZES
@pytest.mark.parametrize("weighting", ["lambda", "lambda-sum"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weightings_with_a_class_share_equal_the_plain_form(layout, weighting, prototypes, temp, form):
    for share in (0.0, 0.8, 1.0):
        recipe = make_recipe(*layout, weighting=weighting, temp=temp, loss={"class_share": share})
        views = random_views(recipe, num_images=8, seed=1)
        tokens = Tokens(views, layout[0], prototypes=prototypes)
        pairs = pairs_of(tokens, views, layout[0], "center", temp)
        counts = {len(matches) for _, matches in pairs}
        assert 0 in counts and len(counts) > 2
        ours = sum(planned(tokens, views, recipe, form))
        slow = pwself_loss(pairs, weighting, class_share=share)
        torch.testing.assert_close(ours, slow, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(tokens.gradients(ours), tokens.gradients(slow), rtol=1e-4, atol=1e-7)


def test_two_views_by_hand():
    """The same crop twice, one mirrored: each patch meets its own mirror image."""
    recipe = make_recipe(2, 0)
    views = [[View(0, 0, 10, 10, False, GLOBAL), View(0, 0, 10, 10, True, GLOBAL)]]
    plan = plan_matches(*tensors(views), recipe)
    mirrored = [4 * (i // 4) + 3 - i % 4 for i in range(16)]
    teacher, student = plan.teacher_tokens[plan.teacher].tolist(), plan.student_tokens[plan.student].tolist()
    there, back = [(i, 16 + mirrored[i]) for i in range(16)], [(16 + mirrored[i], i) for i in range(16)]
    assert sorted(zip(teacher, student, strict=True)) == sorted(there + back)
    assert (plan.weight / plan.num_pairs).tolist() == pytest.approx([1 / 32] * 32)
    assert plan.class_weight.tolist() == [[[0, 0.5], [0.5, 0]]]
    assert plan.matched_share.tolist() == [1, 0]
    for weighting, of_match in (("lambda", 0.25 / 2 / 16), ("lambda-sum", 0.25 / 2)):  # 2 pairs with 16 matches each
        plan = plan_matches(*tensors(views), make_recipe(2, 0, weighting, loss={"class_share": 0.75}))
        assert (plan.weight / plan.num_pairs).tolist() == pytest.approx([of_match] * 32)
        assert plan.class_weight.tolist() == [[[0, 0.375], [0.375, 0]]]


@pytest.mark.parametrize("weighting", ["balanced", "paper", "lambda", "lambda-sum"])
def test_a_batch_whose_views_share_nothing(weighting):
    recipe = make_recipe(2, 1, weighting)
    views = [[View(0, 20 * k, 10, 10, False, size) for k, size in enumerate((GLOBAL, GLOBAL, LOCAL))]] * 3
    tokens = Tokens(views, 2)
    class_term, patch_term = planned(tokens, views, recipe)
    assert patch_term == 0
    assert patch_term.requires_grad
    assert torch.equal(tokens.gradients(patch_term), torch.zeros_like(tokens.gradients(class_term)))
    slow = mean([c for c, _ in pairs_of(tokens, views, 2, "center")])
    full = 1 if weighting in ("balanced", "paper") else 0.9
    torch.testing.assert_close(class_term, full * slow, rtol=1e-5, atol=1e-6)


def test_only_tokens_with_a_match_are_projected_each_once():
    recipe = make_recipe(2, 4)
    views = random_views(recipe, num_images=3, seed=2)
    plan = plan_matches(*tensors(views), recipe)
    student, teacher = set(), set()
    for i, image in enumerate(views):
        for t in range(2):
            for s in range(6):
                if s != t:
                    first = (i * 2 + s) * 16 if s < 2 else 3 * 2 * 16 + (i * 4 + s - 2) * 4
                    teacher_ids, student_ids = match_patches(image[t], image[s], PATCH)
                    student |= {first + k for k in student_ids.tolist()}
                    teacher |= {(i * 2 + t) * 16 + k for k in teacher_ids.tolist()}
    assert plan.student_tokens.tolist() == sorted(student)
    assert plan.teacher_tokens.tolist() == sorted(teacher)


def test_shares_of_matched_patches_are_counted_over_all_pairs():
    recipe = make_recipe(2, 3)
    views = random_views(recipe, num_images=5, seed=3)
    counts = {True: [], False: []}  # by whether the student's view is local
    for image in views:
        for t in range(2):
            for s in range(5):
                if s != t:
                    share = len(match_patches(image[t], image[s], PATCH)[0]) / (image[s].size // PATCH) ** 2
                    counts[s >= 2].append(share)
    found = plan_matches(*tensors(views), recipe).matched_share
    assert found.tolist() == pytest.approx([mean(counts[False]), mean(counts[True])])


def test_many_matches_are_summed_in_pieces_without_a_seam():
    """More matches than one piece holds, against one big matrix."""
    recipe = make_recipe(2, 2)
    sizes = (GLOBAL, GLOBAL, LOCAL, LOCAL)
    views = [[View(0, 0, 8, 8, bool(k % 2), size) for k, size in enumerate(sizes)]] * 150
    plan = plan_matches(*tensors(views), recipe)
    assert len(plan.student) > 4096
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(len(plan.student_tokens), K, generator=rng)
    probs = torch.randn(len(plan.teacher_tokens), K, generator=rng).softmax(-1)
    each = -(probs[plan.teacher] * torch.log_softmax(logits[plan.student] / TEMP, -1)).sum(-1)
    torch.testing.assert_close(patch_loss(logits, probs, plan, TEMP), (plan.weight * each).sum() / plan.num_pairs)


def test_dino_has_no_patch_term():
    recipe = make_recipe(2, 4, method="dino", photometric={"patch_share": 0})
    views = random_views(recipe, num_images=3)
    plan = plan_matches(*tensors(views), recipe)
    assert [len(x) for x in plan[:5]] == [0] * 5
    tokens = Tokens(views, 2)
    class_term, patch_term = planned(tokens, views, recipe)
    slow = mean([c for c, _ in pairs_of(tokens, views, 2, "center")])
    torch.testing.assert_close(class_term, slow, rtol=1e-5, atol=1e-6)
    assert patch_term == 0


def test_bfloat16_logits_are_compared_in_float32():
    logits = torch.tensor([[[20.0, 0.0], [0.0, 3.0]]], dtype=torch.bfloat16)
    probs = torch.tensor([[[1.0, 0.0]]])
    loss = class_loss(logits, probs, torch.tensor([[[0.0, 1.0]]]), student_temp=1.0)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(3.0485873, rel=1e-6)  # ln(1 + e^3)
