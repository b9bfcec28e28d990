"""One update against the same update put together by hand, and what the state of an engine must hold."""

import math

import pytest
import torch
from cases import each
from small_runs import BATCH, STEPS, make_batch, make_recipe
from torch.optim import AdamW

from patchssl.pretrain.centering import Centers
from patchssl.pretrain.distill import student_losses, teacher_targets
from patchssl.pretrain.engine import Engine, color_views, training_batch
from patchssl.pretrain.network import build_student, network_from_file, network_to_file
from patchssl.pretrain.pairs import plan_matches
from patchssl.pretrain.schedules import values_at

CPU = torch.device("cpu")
DINO = {"method": "dino"}


def run(recipe, steps=2, seed=0, engine=None):
    """An engine after `steps` updates, and their reports."""
    engine = engine or Engine(recipe, seed, STEPS, CPU)
    reports = [engine.train_step(make_batch(recipe, engine.steps_done, seed)) for _ in range(steps)]
    return engine, reports


def tensors_of(value, name=""):
    """Every tensor and number of a nested state, by its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors_of(inner, f"{name}/{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from tensors_of(inner, f"{name}/{number}")
    else:
        yield name, value


def same(first, second):
    first, second = dict(tensors_of(first)), dict(tensors_of(second))
    assert first.keys() == second.keys()
    return all(torch.equal(a, second[name]) if isinstance(a, torch.Tensor) else a == second[name]
               for name, a in first.items())


class ByHand:
    """The update of DESIGN section 1, spelled out with torch's own AdamW, step by step."""

    def __init__(self, recipe):
        self.recipe = recipe
        self.student, _ = build_student(recipe, 0)
        self.teacher, _ = build_student(recipe, 0)
        self.student.train()
        self.teacher.eval()
        self.centers, self.steps = Centers(recipe), 0
        matrices = [p for p in self.student.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in self.student.parameters() if p.requires_grad and p.ndim <= 1]
        self.optimizer = AdamW([{"params": matrices}, {"params": others}], lr=1.0, foreach=False, fused=False)

    def step(self, batch):
        recipe, values = self.recipe, values_at(self.steps, self.recipe, STEPS)
        plan = plan_matches(batch.boxes, batch.mirrored, recipe)
        views = training_batch(batch, recipe, CPU)
        targets = teacher_targets(self.teacher, self.centers, views.globals_, plan, values, recipe.loss)
        loss = student_losses(self.student, views, targets, plan, values.patch_weight, recipe.loss).total
        self.centers.update(self.teacher, [targets.class_mean], [targets.patch_mean])
        self.optimizer.zero_grad()
        loss.backward()
        for name, p in self.student.named_parameters():
            if p.grad is not None:
                norm = p.grad.norm()
                if norm > recipe.optim.clip_grad > 0:
                    p.grad *= recipe.optim.clip_grad / norm
                if "last_layer" in name and self.steps < recipe.head.freeze_last_layer_epochs * STEPS:
                    p.grad = None
        for group, decay in zip(self.optimizer.param_groups, (values.weight_decay, 0.0), strict=True):
            group["lr"], group["weight_decay"] = values.lr, decay
        self.optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.copy_(values.teacher_momentum * slow + (1 - values.teacher_momentum) * fast)
        self.steps += 1
        return loss.detach()


@pytest.mark.parametrize("parts", [
    {"optim": {"clip_grad": 0.05}, "head": {"freeze_last_layer_epochs": 0.4}},
    {"optim": {"clip_grad": 0, "teacher_momentum": 0.5}, "head": {"norm_last_layer": False}},
    {"loss": {"weighting": "paper", "rule": "paper", "center_per_position": True}},
    {"loss": {"weighting": "lambda-sum", "class_share": 0.8}, "optim": {"clip_grad": 0.75}},
    DINO | {"loss": {"centering": "sinkhorn"}},
], ids=["clipped and frozen", "free last layer", "paper", "lambda-sum", "dino"])
def test_three_updates_equal_the_ones_by_hand(parts):
    recipe = make_recipe(**parts)
    engine, hand = Engine(recipe, 0, STEPS, CPU), ByHand(recipe)
    for step in range(3):
        batch = make_batch(recipe, step)
        report = engine.train_step(batch)
        torch.testing.assert_close(report.losses.total, hand.step(batch), rtol=1e-4, atol=1e-5)
    for ours, theirs in ((engine.student, hand.student), (engine.teacher, hand.teacher)):
        expected = theirs.state_dict()
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@each("centering", ["ema", "sinkhorn"])
def test_pwself_without_its_patch_term_and_color_is_dino_to_the_last_bit(centering):
    """What the studies' control of color, dino-patch-color, stands on."""
    color = {"patchwise": "none"}
    dino, _ = run(make_recipe(method="dino", photometric=color, loss={"centering": centering}), steps=3)
    control, _ = run(make_recipe(photometric=color, loss={"centering": centering, "patch_weight": 0}), steps=3)
    assert same(dino.student.state_dict(), control.student.state_dict())
    assert same(dino.teacher.state_dict(), control.teacher.state_dict())


def test_the_last_layer_thaws_after_its_epochs():
    recipe = make_recipe(head={"freeze_last_layer_epochs": 0.4})  # 2 of 5 updates
    engine, seen = Engine(recipe, 0, STEPS, CPU), []
    for step in range(4):
        before = engine.student.head.last_layer.weight_v.clone()
        engine.train_step(make_batch(recipe, step))
        seen.append(torch.equal(before, engine.student.head.last_layer.weight_v))
    assert seen == [True, True, False, False]


@pytest.mark.parametrize("parts", [
    {"views": {"num_global": 1, "num_local": 3}},
    {"views": {"num_global": 2, "num_local": 0}},
    {"views": {"num_global": 2, "num_local": 0, "local_size": 17}},  # a size that nobody asks for
    {"views": {"num_global": 3, "num_local": 1}},
    {"loss": {"weighting": "paper"}}, {"loss": {"centering": "sinkhorn"}}, {"loss": {"rule": "paper"}},
    {"loss": {"weighting": "paper", "rule": "paper", "center_per_position": True}},
    {"loss": {"patch_warmup_epochs": 2, "patch_weight": 0.5}},
    {"loss": {"weighting": "lambda"}}, {"loss": {"weighting": "lambda", "class_share": 0}},
    {"loss": {"weighting": "lambda-sum", "class_share": 0.8}}, {"loss": {"weighting": "lambda-sum", "class_share": 1}},
    {"photometric": {"patch_share": 0.5}}, {"photometric": {"patchwise": "replace", "patch_share": 0.5}},
    {"model": {"drop_path": 0.3}},
    {"masks": {"matched": True, "probability": 1, "ratio": [0.5, 0.5]}},
    {"model": {"patch_size": 24, "drop_path": 0.0}, "views": {"global_size": 24, "local_size": 24}},
    DINO, DINO | {"loss": {"centering": "sinkhorn"}}, DINO | {"views": {"num_global": 1, "num_local": 2}},
], ids=str)
def test_every_setting_makes_finite_updates_of_all_weights(parts):
    recipe = make_recipe(**parts)
    before = Engine(recipe, 0, STEPS, CPU).student.state_dict()
    engine, reports = run(recipe, steps=2)
    assert all(math.isfinite(value) for report in reports for value in report.row().values())
    still = {name for name, value in engine.student.state_dict().items() if torch.equal(value, before[name])}
    assert {name for name in still if not name.endswith(("weight_g", "bias"))} == set()
    assert engine.steps_done == 2


def test_bf16_updates_stay_near_float32_and_weights_stay_float32():
    full, (report,) = run(make_recipe(optim={"precision": "fp32"}), steps=1)
    half, (rough,) = run(make_recipe(optim={"precision": "bf16"}), steps=1)
    assert rough.losses.total.dtype == torch.float32
    assert rough.targets.class_probs.dtype == torch.float32
    assert float(rough.losses.total) == pytest.approx(float(report.losses.total), rel=0.02)
    assert float(rough.losses.total) != float(report.losses.total)
    assert {p.dtype for p in half.student.parameters()} == {torch.float32}
    assert {value.dtype for value in half.centers.state_dict().values()} == {torch.float32}
    assert math.isfinite(float(run(make_recipe(optim={"precision": "bf16"}), 1, engine=half)[1][0].losses.total))
    assert full.device == CPU


def test_a_seed_fixes_every_weight_and_the_global_generator_is_left_alone():
    torch.manual_seed(1)
    first, _ = run(make_recipe())
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second, _ = run(make_recipe())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(first.state_dict(), second.state_dict())
    other, _ = run(make_recipe(), seed=1)
    assert not same(first.state_dict(), other.state_dict())


def test_teacher_starts_as_the_student_without_gradients_or_drop_path():
    engine = Engine(make_recipe(model={"drop_path": 0.5}), 0, STEPS, CPU)
    assert same(engine.student.state_dict(), engine.teacher.state_dict())
    assert not any(p.requires_grad for p in engine.teacher.parameters())
    assert engine.student.training
    assert not engine.teacher.training
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(engine.teacher.backbone.tokens(images), engine.teacher.backbone.tokens(images))


@pytest.mark.parametrize("parts", [{}, {"loss": {"center_per_position": True}}, DINO], ids=["pwself", "paper", "dino"])
def test_an_engine_goes_on_from_its_state_as_if_nothing_had_happened(parts, tmp_path):
    recipe = make_recipe(**parts)
    straight, _ = run(recipe, steps=4)
    half, _ = run(recipe, steps=2)
    torch.save(half.state_dict(), tmp_path / "state.pth")
    again = Engine(recipe, 99, STEPS, CPU)  # another start, to see that nothing of it is left
    again.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    assert again.steps_done == 2
    run(recipe, steps=2, engine=again)
    assert same(straight.state_dict(), again.state_dict())


def test_names_in_a_checkpoint_are_timms():
    engine = Engine(make_recipe(), 0, STEPS, CPU)
    state = engine.student.state_dict()
    written = network_to_file(state)
    assert {"backbone.cls_token", "backbone.blocks.1.attn.qkv.weight", "head.last_layer.weight_v"} <= set(written)
    assert same(network_from_file(written), state)


def test_uncolored_views_are_only_normalized():
    recipe = make_recipe(photometric={"patchwise": "none", "jitter": 0, "grayscale": 0, "blur": [0, 0, 0],
                                      "solarize": [0, 0, 0]})
    batch = make_batch(recipe)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for found, views in zip(color_views(batch, recipe, CPU), (batch.global_views, batch.local_views), strict=True):
        expected = (views.double() / 255 - mean[:, None, None]) / std[:, None, None]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_a_report_tells_what_the_step_saw():
    recipe = make_recipe(loss={"patch_weight": 0.5})
    _, (report,) = run(recipe, steps=1)
    row = report.row()
    probs = report.targets.class_probs.double()
    entropy = float(-(probs * probs.log()).sum(-1).mean())
    assert row["loss"] == pytest.approx(row["class_loss"] + 0.5 * row["patch_loss"], rel=1e-5)
    assert row["teacher_entropy"] == pytest.approx(entropy, rel=1e-4)
    assert row["class_kl"] == pytest.approx(row["class_loss"] - entropy, abs=1e-4)
    assert row["class_kl"] > 0  # Gibbs' inequality
    assert 0 < row["patch_entropy"] < math.log(32)
    assert 0 < row["matched_share_local"] <= 1
    assert row["lr"] == pytest.approx(0.05 * BATCH / 256)
    assert (row["patch_weight"], row["last_layer_frozen"]) == (0.5, False)
    assert not report.losses.total.requires_grad


def test_gradient_norm_in_the_report_is_the_one_before_clipping():
    _, (clipped,) = run(make_recipe(optim={"clip_grad": 1e-4}), steps=1)
    _, (free,) = run(make_recipe(optim={"clip_grad": 0}), steps=1)
    assert float(clipped.grad_norm) == pytest.approx(float(free.grad_norm), rel=1e-5)
    assert float(free.grad_norm) > 1e-3


@pytest.mark.slow
def test_compiled_blocks_make_the_same_updates_under_the_same_names(monkeypatch):
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: plain(module, backend="aot_eager"))
    recipes = [make_recipe(model={"drop_path": 0.3}, run={"compile": wanted}) for wanted in (False, True)]
    (eager, eager_reports), (compiled, reports) = (run(recipe, steps=3) for recipe in recipes)
    assert [float(r.losses.total) for r in reports] == pytest.approx(
        [float(r.losses.total) for r in eager_reports], rel=1e-5)
    assert compiled.state_dict()["student"].keys() == eager.state_dict()["student"].keys()


@pytest.mark.slow
def test_fp16_scales_its_loss_and_keeps_the_scale_in_its_state():
    # a head as wide as real ones are: the gradient of a narrow one's short bottleneck overflows
    parts = {"model": {"drop_path": 0.0}, "optim": {"lr": 0.0005}, "head": {"hidden": 2048, "bottleneck": 64}}
    half = {**parts, "optim": {"lr": 0.0005, "precision": "fp16"}}
    engine = Engine(make_recipe(**half), 0, STEPS, CPU)
    engine.scaler.load_state_dict(engine.scaler.state_dict() | {"scale": 64.0})
    (_, exact), (engine, reports) = run(make_recipe(**parts), steps=3), run(make_recipe(**half), 3, engine=engine)
    assert [float(r.losses.total) for r in reports] == pytest.approx(
        [float(r.losses.total) for r in exact], rel=0.02)
    assert [float(r.grad_norm) for r in reports] == pytest.approx([float(r.grad_norm) for r in exact], rel=0.1)
    assert {p.dtype for p in engine.student.parameters()} == {torch.float32}
    engine.scaler.update(new_scale=512.0)
    again = Engine(make_recipe(**half), 0, STEPS, CPU)
    again.load_state_dict(engine.state_dict())
    assert again.scaler.get_scale() == 512


def test_fp16_leaves_an_update_out_whose_gradients_overflow():
    recipe = make_recipe(optim={"precision": "fp16"})
    engine = Engine(recipe, 0, STEPS, CPU)
    engine.train_step(make_batch(recipe))
    before = {name: value.clone() for name, value in engine.student.state_dict().items()}
    engine.scaler.update(new_scale=1e38)
    report = engine.train_step(make_batch(recipe, 1))
    assert not torch.isfinite(report.grad_norm) and torch.isfinite(report.losses.total)
    assert all(torch.equal(value, before[name]) for name, value in engine.student.state_dict().items())
    assert engine.scaler.get_scale() < 1e38
