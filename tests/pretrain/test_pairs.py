"""Which matches are drawn, what they weigh, and the rules that are peers of geometry."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_runs import make_batch, make_recipe

from patchssl.pretrain.distill import nearest_teacher, sync_num_pairs
from patchssl.pretrain.pairs import plan_batch, plan_matches

GLOBAL, LOCAL = 9, 4  # patches of a view of `make_recipe`
VIEWS = 4


def matches_of(plan, num_images=6):
    """By (image, t, s): the set of (teacher patch, student patch), and the sum of their weights."""
    found = {}
    for student, teacher, weight in zip(plan.student_tokens[plan.student].tolist(),
                                        plan.teacher_tokens[plan.teacher].tolist(),
                                        (plan.weight / plan.num_pairs).tolist(), strict=True):
        local = student >= num_images * 2 * GLOBAL
        number = student - num_images * 2 * GLOBAL if local else student
        image, s, patch = number // (2 * (LOCAL if local else GLOBAL)), *divmod(number, LOCAL if local else GLOBAL)
        pair = image, (teacher // GLOBAL) % 2, s % 2 + 2 * local
        assert image == teacher // (2 * GLOBAL)
        pairs, weights = found.setdefault(pair, (set(), []))
        pairs.add((teacher % GLOBAL, patch))
        weights.append(weight)
    return found


def plans(limit, *, weighting="balanced", rule="center", epoch=0):
    recipe = make_recipe(loss={"matches_per_pair": limit, "weighting": weighting, "rule": rule})
    return plan_batch(make_batch(recipe, epoch), recipe)


@pytest.mark.parametrize("weighting", ["balanced", "paper", "lambda", "lambda-sum"])
def test_some_matches_are_a_part_of_all_and_weigh_as_much_together(weighting):
    every, some = (matches_of(plans(limit, weighting=weighting)) for limit in (0, 2))
    assert every.keys() == some.keys()
    cut = 0
    for pair, (all_matches, weights) in every.items():
        chosen, fewer = some[pair]
        assert chosen <= all_matches and len(chosen) == min(2, len(all_matches))
        assert sum(fewer) == pytest.approx(sum(weights), rel=1e-5)
        cut += len(chosen) < len(all_matches)
    assert cut > 10
    assert torch.equal(plans(0, weighting=weighting).class_weight, plans(2, weighting=weighting).class_weight)


def test_a_limit_above_all_matches_changes_nothing():
    every, limited = plans(0), plans(9)
    assert all(torch.equal(a, b) for a, b in zip(every[:-1], limited[:-1], strict=True))


def test_every_match_is_drawn_equally_often():
    """Of one pair whose 9 patches all match, 3 are drawn 600 times."""
    recipe = make_recipe(views={"num_global": 2, "num_local": 0, "global_size": 24}, loss={"matches_per_pair": 3})
    boxes = torch.tensor([[[0.0, 0, 24, 24]] * 2] * 600, dtype=torch.float64)
    draws = torch.rand(600, 2, 2, 2, GLOBAL, generator=torch.Generator().manual_seed(0))
    plan = plan_matches(boxes, torch.zeros(600, 2, dtype=torch.bool), recipe, draws)
    counts = torch.bincount(plan.student_tokens[plan.student] % GLOBAL, minlength=GLOBAL)
    expected = 2 * 600 * 3 / GLOBAL
    assert counts.sum() == 2 * 600 * 3
    assert ((counts - expected).abs() < 4 * math.sqrt(expected * (1 - 3 / GLOBAL))).all()


@pytest.mark.parametrize("weighting", ["balanced", "paper", "lambda", "lambda-sum"])
def test_sampling_is_unbiased(weighting):
    """Over many draws the weighted sum of any quantity of matches has that of all matches as its mean."""
    value = torch.randn(2, GLOBAL, generator=torch.Generator().manual_seed(1))
    recipe = make_recipe(views={"num_global": 2, "num_local": 0, "global_size": 24},
                         loss={"matches_per_pair": 4, "weighting": weighting})
    every = recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"matches_per_pair": 0})})
    boxes = torch.tensor([[[0.0, 0, 24, 24], [0.0, 6, 20, 24]]] * 4000, dtype=torch.float64)
    mirrored = torch.zeros(4000, 2, dtype=torch.bool)
    draws = torch.rand(4000, 2, 2, 2, GLOBAL, generator=torch.Generator().manual_seed(2))

    def total(plan):
        token = plan.student_tokens[plan.student]
        return float((plan.weight / plan.num_pairs * value.flatten()[token % (2 * GLOBAL)]).sum())

    whole = plan_matches(boxes, mirrored, every)
    weight = float(whole.weight.sum() / whole.num_pairs)
    of_all = {"balanced": 1, "lambda": 0.1, "lambda-sum": 0.1 * len(whole.weight) / (2 * 4000)}
    assert weight == pytest.approx(of_all.get(weighting, weight), rel=1e-3)
    assert total(plan_matches(boxes, mirrored, recipe, draws)) == pytest.approx(total(whole), abs=0.02 * weight)


def test_random_has_as_many_matches_as_geometry_and_other_teachers():
    geometry, some = matches_of(plans(0)), matches_of(plans(0, rule="random"))
    assert geometry.keys() == some.keys()
    right = total = 0
    for pair, (matches, _) in geometry.items():
        assert {student for _, student in matches} == {student for _, student in some[pair][0]}
        right, total = right + len(matches & some[pair][0]), total + len(matches)
    assert right / total == pytest.approx(1 / GLOBAL, abs=0.08)


def test_draws_come_from_the_sample_alone():
    recipe = make_recipe(loss={"matches_per_pair": 2, "rule": "random"})
    first, again, later = make_batch(recipe), make_batch(recipe), make_batch(recipe, step=1)
    assert torch.equal(first.match_draws, again.match_draws)
    assert not torch.equal(first.match_draws, later.match_draws)
    assert make_batch(make_recipe()).match_draws.numel() == 0
    with pytest.raises(ValueError, match="need draws"):
        plan_matches(first.boxes, first.mirrored, recipe)


@pytest.mark.parametrize("limit", [0, 2])
def test_similarity_takes_the_nearest_teacher_token_of_the_view(limit):
    recipe = make_recipe(loss={"rule": "similarity", "matches_per_pair": limit})
    plan = plan_batch(make_batch(recipe), recipe)
    rng = torch.Generator().manual_seed(3)
    teacher = torch.randn(6, 2, GLOBAL, 5, generator=rng)
    student = [torch.randn(6, 2, number, 5, generator=rng) for number in (GLOBAL, LOCAL)]
    found = nearest_teacher(plan, teacher, student)
    tokens = torch.cat([x.flatten(0, 2) for x in student])
    for row, start, chosen in zip(plan.student.tolist(), plan.teacher.tolist(), found.teacher.tolist(), strict=True):
        image, t = divmod(start // GLOBAL, 2)
        likeness = [float(F.cosine_similarity(tokens[plan.student_tokens[row]], token, dim=0))
                    for token in teacher[image, t]]
        assert chosen == start + likeness.index(max(likeness))
    per_pair = min(limit, LOCAL) if limit else LOCAL
    assert len(found.teacher) == 6 * (2 * (limit or GLOBAL) + 4 * per_pair)
    assert plan.matched_share.tolist() == [1, 1]


def test_pairs_are_shared_over_parts():
    """Two parts with 3 and 5 pairs: each divides by 4, so that their mean is the sum over 8."""
    plan = plans(0)
    parts = sync_num_pairs([plan._replace(num_pairs=torch.tensor(value)) for value in (3.0, 5.0)])
    assert [float(part.num_pairs) for part in parts] == [4, 4]
