"""The planned, batched losses against plain loops over images, pairs and patches, gradients included."""

import random

import pytest
import torch
from cases import each

from patchssl.pretrain.config import Recipe
from patchssl.pretrain.losses import class_loss, patch_loss
from patchssl.pretrain.pairs import plan_matches
from patchssl.views.geometry import View
from patchssl.views.matching import match_patches

PATCH, GLOBAL, LOCAL, K, TEMP = 8, 32, 16, 5, 0.1
LAYOUTS = [(2, 4), (1, 3), (2, 0), (3, 1)]


def make_recipe(num_global, num_local, weighting="balanced", rule="center", **more):
    return Recipe.model_validate({
        "model": {"patch_size": PATCH}, "loss": {"weighting": weighting, "rule": rule},
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

    def __init__(self, views, num_global, seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.student = [[torch.randn(1 + (v.size // PATCH) ** 2, K, generator=rng).requires_grad_()
                         for v in image] for image in views]
        self.teacher = [[torch.randn(1 + (v.size // PATCH) ** 2, K, generator=rng).mul(3).softmax(-1)
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
        found = torch.autograd.grad(loss, every, allow_unused=True)
        return torch.cat([(torch.zeros_like(x) if g is None else g).flatten()
                          for x, g in zip(every, found, strict=True)])


def cross_entropy(teacher, student):
    """H(teacher, student) of one pair of tokens."""
    return -sum(p * q for p, q in zip(teacher, torch.log_softmax(student / TEMP, 0), strict=True))


def pairs_of(tokens, views, num_global, rule):
    """Of each (image, teacher view, other view): the class token's loss and its matches' losses."""
    for i, image in enumerate(views):
        for t in range(num_global):
            for s in range(len(image)):
                if s != t:
                    teacher, student = tokens.teacher[i][t], tokens.student[i][s]
                    ids = zip(*match_patches(image[t], image[s], PATCH, rule), strict=True)
                    yield (cross_entropy(teacher[0], student[0]),
                           [cross_entropy(teacher[1 + a], student[1 + b]) for a, b in ids])


def mean(values):
    return sum(values) / len(values)


def planned(tokens, views, recipe):
    """Class and patch term by the code under test."""
    plan = plan_matches(*tensors(views), recipe)
    class_term = class_loss(tokens.student_class(), tokens.teacher_class(), plan.class_weight, TEMP)
    patch_term = patch_loss(tokens.student_patches(recipe.views.num_global)[plan.student_tokens],
                            tokens.teacher_patches()[plan.teacher_tokens], plan, TEMP)
    return class_term, patch_term


@each("rule", ["center", "paper"])
@each("layout", LAYOUTS)
def test_balanced_terms_equal_the_loops(layout, rule):
    recipe = make_recipe(*layout, rule=rule)
    views = random_views(recipe, num_images=4)
    tokens = Tokens(views, layout[0])
    pairs = list(pairs_of(tokens, views, layout[0], rule))
    assert len(pairs) == 4 * layout[0] * (sum(layout) - 1)
    with_matches = [matches for _, matches in pairs if matches]
    assert len({len(matches) for matches in with_matches}) > 1  # or means could be told apart from nothing
    slow = [mean([c for c, _ in pairs]), mean([mean(matches) for matches in with_matches])]
    for ours, theirs in zip(planned(tokens, views, recipe), slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(tokens.gradients(ours), tokens.gradients(theirs), rtol=1e-4, atol=1e-7)


@each("rule", ["center", "paper"])
@each("layout", LAYOUTS)
def test_paper_weighting_equals_the_loops(layout, rule):
    recipe = make_recipe(*layout, rule=rule, weighting="paper")
    views = random_views(recipe, num_images=8, seed=1)
    tokens = Tokens(views, layout[0])
    pairs = list(pairs_of(tokens, views, layout[0], rule))
    assert min(len(matches) for _, matches in pairs) == 0 < max(len(matches) for _, matches in pairs)
    slow = mean([mean([class_token, *matches]) for class_token, matches in pairs])
    ours = sum(planned(tokens, views, recipe))
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


@pytest.mark.parametrize("weighting", ["balanced", "paper"])
def test_a_batch_whose_views_share_nothing(weighting):
    recipe = make_recipe(2, 1, weighting)
    views = [[View(0, 20 * k, 10, 10, False, size) for k, size in enumerate((GLOBAL, GLOBAL, LOCAL))]] * 3
    tokens = Tokens(views, 2)
    class_term, patch_term = planned(tokens, views, recipe)
    assert patch_term == 0
    assert patch_term.requires_grad
    assert torch.equal(tokens.gradients(patch_term), torch.zeros_like(tokens.gradients(class_term)))
    slow = mean([c for c, _ in pairs_of(tokens, views, 2, "center")])
    torch.testing.assert_close(class_term, slow, rtol=1e-5, atol=1e-6)  # at full weight


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
