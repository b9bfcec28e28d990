"""Teacher targets and student losses against a network that is asked one view and one token at a time."""

import pytest
import torch
from cases import each
from torch.utils._pytree import tree_leaves

from patchssl.models.backbone import VitBackbone
from patchssl.models.networks import NetworkSpec, build_vit
from patchssl.pretrain.centering import Centers, teacher_probs
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.distill import Batch, student_losses, teacher_targets
from patchssl.pretrain.droppath import set_drop_path_draws, use_sampled_drop_path
from patchssl.pretrain.head import ProjectionHead
from patchssl.pretrain.losses import pair_losses, pwself_loss
from patchssl.pretrain.network import Network, masked_tokens
from patchssl.pretrain.pairs import plan_masked, plan_matches
from patchssl.pretrain.schedules import StepValues
from patchssl.pretrain.teacher import make_teacher
from patchssl.views.geometry import View
from patchssl.views.matching import match_patches

PATCH, SIZE, LOCAL, K = 8, 24, 16, 7
SPEC = NetworkSpec(arch="vit_tiny_patch16_224", image_size=SIZE, patch_size=PATCH, embed_dim=12, depth=2,
                   num_heads=3)
VALUES = StepValues(lr=0.1, weight_decay=0.0, teacher_momentum=0.9, teacher_temp=0.05,
                    patch_teacher_temp=0.05, patch_weight=0.7, last_layer_frozen=False, backbone_frozen=False)


def make_recipe(num_global=2, num_local=1, method="pwself", shared=True, **loss):
    return Recipe.model_validate({
        "method": method, "model": {"patch_size": PATCH}, "loss": loss,
        "photometric": {"patch_share": 1 if method == "pwself" else 0},
        "views": {"num_global": num_global, "num_local": num_local, "global_size": SIZE, "local_size": LOCAL},
        "head": {"num_prototypes": K, "hidden": 16, "bottleneck": 6, "shared": shared},
    })


def make_network(recipe, drop_path=0.0, masked=False):
    backbone = VitBackbone(build_vit(SPEC, seed=0))
    use_sampled_drop_path(backbone.module, drop_path)
    network = Network(backbone, ProjectionHead(12, recipe.head), masked=masked)
    for i, p in enumerate(network.parameters()):
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.4, generator=torch.Generator().manual_seed(i))
    return network.train()


def views_of(num_images, num_global, num_local, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(num_images, num_global, 3, SIZE, SIZE, generator=rng),
            torch.randn(num_images, num_local, 3, LOCAL, LOCAL, generator=rng))


def plan_for(recipe, num_images, shift=14.0):
    """Crops of 24 px side by side, `shift` px apart, so that part of the tokens has no match."""
    count = recipe.views.num_views
    boxes = [[[0.0, shift * v, 24.0, 24.0] for v in range(count)]] * num_images
    mirrored = torch.zeros(num_images, count, dtype=torch.bool)
    return plan_matches(torch.tensor(boxes, dtype=torch.float64), mirrored, recipe)


def logits_of_view(head, tokens):
    """(1 + N, K) of the tokens of one view; patches have prototypes of their own in a head with two sets of them."""
    both = head.mlp(tokens) / head.mlp(tokens).norm(dim=-1, keepdim=True)
    own = head.last_layer if head.last_layer2 is None else head.last_layer2
    return torch.cat([head.last_layer(both[:1]), own(both[1:])])


def all_logits(network, globals_):
    """(B, G, 1 + N, K): every token of every view projected, one view at a time."""
    with torch.no_grad():
        return torch.stack([logits_of_view(network.head, network.backbone.tokens(view[None])[0])
                            for view in globals_.flatten(0, 1)]).unflatten(0, globals_.shape[:2])


def tokens_of_the_plan(logits, plan):
    """Rows of the plan's teacher tokens in (B, G, 1 + N, K)."""
    return logits[:, :, 1:].flatten(0, 2)[plan.teacher_tokens]


def patch_probs(targets):
    """(T, K): given, or made from what the teacher's tokens are."""
    said = targets.patches
    if isinstance(said, torch.Tensor):
        return said
    center = said.center if said.position is None else said.center[said.position]
    return ((said.bottleneck @ said.prototypes.T - center) / said.temp).softmax(-1)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_ema_centers_are_means_of_all_teacher_tokens_and_move_after_use(shared):
    recipe = make_recipe(shared=shared)
    teacher, centers, plan = make_teacher(make_network(recipe)), Centers(recipe), plan_for(recipe, 3)
    assert 0 < len(plan.teacher_tokens) < 3 * 2 * 9
    class_center, patch_center = torch.zeros(K), torch.zeros(K)
    for step in range(3):
        globals_, _ = views_of(3, 2, 1, seed=step)
        targets = teacher_targets(teacher, centers, globals_, plan, VALUES, recipe.loss)
        logits = all_logits(teacher, globals_)
        close(targets.class_probs, ((logits[:, :, 0] - class_center) / 0.05).softmax(-1))
        close(patch_probs(targets), ((tokens_of_the_plan(logits, plan) - patch_center) / 0.05).softmax(-1))
        centers.update(teacher, [targets.class_mean], [targets.patch_mean])
        class_center = 0.9 * class_center + 0.1 * logits[:, :, 0].mean((0, 1))
        patch_center = 0.9 * patch_center + 0.1 * logits[:, :, 1:].mean((0, 1, 2))
        close(centers.class_token.value[0], class_center)
        close(centers.patch_tokens.value[0], patch_center)
    assert (patch_center - class_center).abs().max() > 0.01  # or one could stand for the other


def test_centers_per_position():
    recipe = make_recipe(center_per_position=True)
    teacher, centers, plan = make_teacher(make_network(recipe)), Centers(recipe), plan_for(recipe, 3)
    center = torch.zeros(9, K)
    for step in range(2):
        globals_, _ = views_of(3, 2, 1, seed=step)
        targets = teacher_targets(teacher, centers, globals_, plan, VALUES, recipe.loss)
        logits = all_logits(teacher, globals_)
        centered = torch.cat([logits[:, :, :1], logits[:, :, 1:] - center], dim=2)
        close(patch_probs(targets), (tokens_of_the_plan(centered, plan) / 0.05).softmax(-1))
        centers.update(teacher, [targets.class_mean], [targets.patch_mean])
        center = 0.9 * center + 0.1 * logits[:, :, 1:].mean((0, 1))
        close(centers.patch_tokens.value, center)
    assert center.std(0).max() > 0.01


def test_a_batch_without_matches_still_moves_both_centers():
    recipe = make_recipe()
    teacher, centers = make_teacher(make_network(recipe)), Centers(recipe)
    plan = plan_for(recipe, 2, shift=30.0)
    globals_, _ = views_of(2, 2, 1)
    targets = teacher_targets(teacher, centers, globals_, plan, VALUES, recipe.loss)
    centers.update(teacher, [targets.class_mean], [targets.patch_mean])
    assert patch_probs(targets).shape == (0, K)
    close(centers.patch_tokens.value[0], 0.1 * all_logits(teacher, globals_)[:, :, 1:].mean((0, 1, 2)))


def slow_sinkhorn(logits, temperature=0.05):
    q = (logits.double() / temperature).exp()
    for _ in range(3):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return (q * q.shape[0]).float()


def test_sinkhorn_balances_class_tokens_and_matched_patches_apart_and_keeps_no_center():
    recipe = make_recipe(centering="sinkhorn")
    teacher, centers, plan = make_teacher(make_network(recipe)), Centers(recipe), plan_for(recipe, 3)
    globals_, _ = views_of(3, 2, 1)
    targets = teacher_targets(teacher, centers, globals_, plan, VALUES, recipe.loss)
    logits = all_logits(teacher, globals_)
    close(targets.class_probs.flatten(0, 1), slow_sinkhorn(logits[:, :, 0].flatten(0, 1)))
    close(patch_probs(targets), slow_sinkhorn(tokens_of_the_plan(logits, plan)))
    centers.update(teacher, [targets.class_mean], [targets.patch_mean])
    assert not any(value.any() for value in centers.state_dict().values())


def test_sinkhorn_without_matches():
    recipe = make_recipe(centering="sinkhorn")
    targets = teacher_targets(make_teacher(make_network(recipe)), Centers(recipe), views_of(2, 2, 1)[0],
                              plan_for(recipe, 2, shift=30.0), VALUES, recipe.loss)
    assert patch_probs(targets).shape == (0, K)


@pytest.mark.parametrize("centering", ["ema", "sinkhorn"])
def test_targets_are_probabilities_without_gradient_and_the_teacher_stays(centering):
    recipe = make_recipe(centering=centering)
    teacher = make_network(recipe)  # with gradients, to see that none is asked for
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    targets = teacher_targets(teacher.eval(), Centers(recipe), views_of(3, 2, 1)[0], plan_for(recipe, 3),
                              VALUES, recipe.loss)
    assert not any(x.requires_grad for x in tree_leaves(targets) if isinstance(x, torch.Tensor))
    close(targets.class_probs.sum(-1), torch.ones(3, 2))
    close(patch_probs(targets).sum(-1), torch.ones(len(patch_probs(targets))))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_targets_keep_the_class_tokens_for_health():
    recipe = make_recipe()
    teacher, (globals_, _) = make_teacher(make_network(recipe)), views_of(3, 2, 1)
    targets = teacher_targets(teacher, Centers(recipe), globals_, plan_for(recipe, 3), VALUES, recipe.loss)
    one_by_one = [teacher.backbone.tokens(view[None])[0, 0] for image in globals_ for view in image]
    close(targets.class_tokens, torch.stack(one_by_one))


def test_dino_over_three_updates_equals_its_paper():
    """Algorithm 1 of arXiv 2104.14294 with multi-crop, spelled out; the student is the teacher's twin."""
    recipe = make_recipe(num_local=2, method="dino")
    student = make_network(recipe)
    teacher, centers, plan = make_teacher(make_network(recipe)), Centers(recipe), plan_for(recipe, 4)
    center = torch.zeros(K)
    for step in range(3):
        globals_, locals_ = views_of(4, 2, 2, seed=step)
        targets = teacher_targets(teacher, centers, globals_, plan, VALUES, recipe.loss)
        draws = torch.zeros(4, 4, 4)
        losses = student_losses(student, Batch(globals_, locals_, draws), targets, plan, 0.0, recipe.loss)
        views = [*globals_.unbind(1), *locals_.unbind(1)]
        s = [student.head(student.backbone.tokens(v)[:, 0]) for v in views]
        t = [student.head(student.backbone.tokens(v)[:, 0]).detach() for v in views[:2]]
        terms = [-(((t[i] - center) / 0.05).softmax(1) * (s[j] / 0.1).softmax(1).log()).sum(1).mean()
                 for i in range(2) for j in range(4) if i != j]
        close(losses.total, sum(terms) / 6)
        centers.update(teacher, [targets.class_mean], [targets.patch_mean])
        center = 0.9 * center + 0.1 * torch.cat(t).mean(0)
        close(centers.class_token.value[0], center)
    assert centers.patch_tokens is None


def slow_terms(student, globals_, locals_, draws, targets, plan, recipe):
    """Class and patch term by one forward pass a view, from the plan's weights."""
    g = globals_.shape[1]
    per_view, flat = [], []
    for i in range(len(globals_)):
        row = []
        for v, view in enumerate([*globals_[i], *locals_[i]]):
            set_drop_path_draws(student.backbone, draws[i, v][None])
            logits = logits_of_view(student.head, student.backbone.tokens(view[None])[0])
            row.append((logits / recipe.loss.student_temp).log_softmax(-1))
        per_view.append(row)
    class_term = sum(-plan.class_weight[i, t, v] * (targets.class_probs[i, t] * per_view[i][v][0]).sum()
                     for i in range(len(globals_)) for t in range(g) for v in range(len(per_view[i])))
    for chosen in (slice(g), slice(g, None)):
        flat += [row[v][1:] for row in per_view for v in range(len(row))[chosen]]
    patches = torch.cat(flat)[plan.student_tokens]
    weight = plan.weight / plan.num_pairs
    patch_term = -(weight * (patch_probs(targets)[plan.teacher] * patches[plan.student]).sum(-1)).sum()
    return class_term, patch_term, torch.stack([torch.stack([v[0] for v in row]) for row in per_view])


@each("layout", [(2, 3), (1, 2), (2, 0)])
@each("weighting", ["balanced", "paper", "lambda", "lambda-sum"])
def test_student_losses_equal_one_view_at_a_time(layout, weighting):
    recipe = make_recipe(*layout, weighting=weighting)
    student = make_network(recipe, drop_path=0.5)
    teacher, plan = make_teacher(student), plan_for(recipe, 3, shift=7.0)
    globals_, locals_ = views_of(3, *layout)
    draws = torch.rand(3, sum(layout), 4, generator=torch.Generator().manual_seed(5))
    targets = teacher_targets(teacher, Centers(recipe), globals_, plan, VALUES, recipe.loss)
    losses = student_losses(student, Batch(globals_, locals_, draws), targets, plan, 0.7, recipe.loss)
    class_term, patch_term, log_probs = slow_terms(student, globals_, locals_, draws, targets, plan, recipe)
    assert patch_term > 0
    close(losses.class_term, class_term)
    close(losses.patch_term, patch_term)
    close(losses.total, class_term + 0.7 * patch_term)
    close((losses.class_logits / 0.1).log_softmax(-1), log_probs)
    weights = [p for p in student.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(x, weights) for x in (losses.total, class_term + 0.7 * patch_term))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("weighting", ["balanced", "paper", "lambda", "lambda-sum"])
@pytest.mark.parametrize(("layout", "shift"), [((2, 2), 7.0), ((1, 3), 10.0), ((3, 0), 13.0)])
def test_a_forward_pass_is_the_plain_formulas(layout, shift, weighting, per_position):
    """Matching, centering and loss pair by pair, from the logits of one view at a time."""
    recipe = make_recipe(*layout, weighting=weighting, center_per_position=per_position)
    student, plan = make_network(recipe), plan_for(recipe, 3, shift)
    teacher, centers = make_teacher(student), Centers(recipe)
    globals_, locals_ = views_of(3, *layout)
    for step in range(2):  # the second with centers that have moved
        targets = teacher_targets(teacher, centers, globals_, plan, VALUES, recipe.loss)
        if not step:
            centers.update(teacher, [10 * targets.class_mean], [10 * targets.patch_mean])
    draws, patch_weight = torch.zeros(3, sum(layout), 4), 0.7 if weighting == "balanced" else 1.0
    ours = student_losses(student, Batch(globals_, locals_, draws), targets, plan, patch_weight, recipe.loss).total
    center = torch.cat([centers.class_token.value, centers.patch_tokens.value.expand(9, K)])
    assert center.abs().max() > 0.01
    probs = teacher_probs(all_logits(teacher, globals_), center, 0.05)
    views = [View(0, shift * v, 24, 24, False, SIZE if v < layout[0] else LOCAL) for v in range(sum(layout))]
    pairs = []
    for i in range(3):
        for s, view in enumerate([*globals_[i], *locals_[i]]):
            logits = logits_of_view(student.head, student.backbone.tokens(view[None])[0])
            pairs += [pair_losses(logits, probs[i, t], *match_patches(views[t], views[s], PATCH), 0.1)
                      for t in range(layout[0]) if t != s]
    assert len({len(matches) for _, matches in pairs}) > 1
    slow = pwself_loss(pairs, weighting, patch_weight)
    close(ours, slow)
    weights = [p for p in student.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(slow, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_teacher_token_that_nobody_matches_changes_no_loss():
    recipe = make_recipe(centering="sinkhorn")
    plan = plan_for(recipe, 2)
    unmatched = sorted(set(range(2 * 2 * 9)) - set(plan.teacher_tokens.tolist()))
    teacher = make_teacher(make_network(recipe))
    globals_, _ = views_of(2, 2, 1)
    tokens = teacher.backbone.tokens(globals_.flatten(0, 1))
    first = teacher_targets(teacher, Centers(recipe), globals_, plan, VALUES, recipe.loss)
    tokens[:, 1:].flatten(0, 1)[unmatched] = 99.0
    teacher.backbone.tokens = lambda images: tokens
    second = teacher_targets(teacher, Centers(recipe), globals_, plan, VALUES, recipe.loss)
    assert unmatched
    assert torch.equal(patch_probs(first), patch_probs(second))


@pytest.mark.parametrize("shared", [True, False])
def test_ibot_hides_patches_of_global_views_from_the_student_alone(shared):
    """Class and patch term by one forward pass a view: masked globals, whole locals, targets of whole globals."""
    recipe = make_recipe(num_local=1, method="ibot", shared=shared)
    student = make_network(recipe, masked=True)
    teacher = make_teacher(student)
    globals_, locals_ = views_of(2, 2, 1)
    masks = torch.rand(2, 2, 9, generator=torch.Generator().manual_seed(3)) < 0.4
    masks[1, 0] = False
    plan = plan_masked(masks, recipe)
    targets = teacher_targets(teacher, Centers(recipe), globals_, plan, VALUES, recipe.loss)
    losses = student_losses(student, Batch(globals_, locals_, torch.zeros(2, 3, 4), masks), targets, plan, 0.7,
                            recipe.loss)
    said = (all_logits(teacher, globals_) / 0.05).softmax(-1)
    class_terms, patch_terms = [], []
    for i in range(2):
        seen = [masked_tokens(student.backbone, globals_[i, v][None], student.mask_token[0], masks[i, v][None])[0]
                for v in range(2)] + [student.backbone.tokens(locals_[i, 0][None])[0]]
        answers = [(logits_of_view(student.head, tokens) / 0.1).log_softmax(-1) for tokens in seen]
        class_terms += [-(said[i, t, 0] * answers[v][0]).sum() for t in range(2) for v in range(3) if t != v]
        for v in range(2):
            each = -(said[i, v, 1:] * answers[v][1:]).sum(-1)
            patch_terms.append(each[masks[i, v]].sum() / max(1, int(masks[i, v].sum())))
    close(losses.class_term, torch.stack(class_terms).mean())
    close(losses.patch_term, torch.stack(patch_terms).mean())
    gradient = torch.autograd.grad(losses.total, student.mask_token)[0]
    assert gradient.shape == (1, 12) and gradient.abs().max() > 0


def test_a_masked_patch_is_compared_with_its_match_in_the_other_view():
    """PW-Self through masks: what each view's student says where the plan matches it, hidden patches included."""
    recipe = make_recipe(num_local=1)
    student = make_network(recipe, masked=True)
    teacher = make_teacher(student)
    globals_, locals_ = views_of(2, 2, 1)
    masks = torch.rand(2, 2, 9, generator=torch.Generator().manual_seed(3)) < 0.6
    plan = plan_for(recipe, 2)
    hidden = masks.flatten()[plan.student_tokens[plan.student_tokens < masks.numel()]]
    assert hidden.any() and not hidden.all()
    targets = teacher_targets(teacher, Centers(recipe), globals_, plan, VALUES, recipe.loss)
    losses = student_losses(student, Batch(globals_, locals_, torch.zeros(2, 3, 4), masks), targets, plan, 0.7,
                            recipe.loss)
    said = (all_logits(teacher, globals_) / 0.05).softmax(-1)[:, :, 1:].flatten(0, 2)
    seen = [masked_tokens(student.backbone, view[None], student.mask_token[0], mask[None])[0]
            for view, mask in zip(globals_.flatten(0, 1), masks.flatten(0, 1), strict=True)]
    seen += [student.backbone.tokens(view[None])[0] for view in locals_.flatten(0, 1)]
    answers = torch.cat([(logits_of_view(student.head, tokens) / 0.1).log_softmax(-1)[1:] for tokens in seen])
    total = torch.zeros(())
    for row, target, weight in zip(plan.student, plan.teacher, plan.weight, strict=True):
        total -= weight * (said[plan.teacher_tokens[target]] * answers[plan.student_tokens[row]]).sum()
    close(losses.patch_term, total / plan.num_pairs)
