"""Schedules against numpy's arithmetic and values worked out by hand."""

import numpy as np
import pytest
from cases import each

from patchssl.pretrain.config import Recipe
from patchssl.pretrain.recipe import load_recipe, recipe_names
from patchssl.pretrain.schedules import cosine, linear, unfinished, values_at, warmup_cosine


def test_warmup_cosine_is_numpys_line_then_half_a_cosine():
    steps, warmup, peak, end = 50, 10, 0.3, 0.01
    i = np.arange(steps - warmup)
    rest = end + (peak - end) * (1 + np.cos(np.pi * i / len(i))) / 2
    expected = np.concatenate([np.linspace(0, peak, warmup), rest])
    found = [warmup_cosine(s, steps=steps, warmup=warmup, peak=peak, end=end) for s in range(steps)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_cosine_is_half_way_in_the_middle_and_never_quite_at_its_end():
    assert cosine(50, steps=100, start=0.996, end=1.0) == pytest.approx(0.998)
    assert cosine(99, steps=100, start=0.996, end=1.0) < 1.0


@pytest.mark.parametrize("step", [-1, 100])
def test_a_step_outside_the_schedule_is_refused(step):
    with pytest.raises(ValueError, match="outside a schedule of 100"):
        cosine(step, steps=100, start=0, end=1)


@each("steps", [2, 3, 7])
def test_linear_is_linspace(steps):
    np.testing.assert_allclose([linear(i, steps=steps, start=0.04, end=0.07) for i in range(steps)],
                               np.linspace(0.04, 0.07, steps))


def recipe(**parts):
    return Recipe.model_validate({"method": "pwself", **parts})


def test_learning_rate_scales_with_the_batch():
    r = recipe(optim={"epochs": 10, "warmup_epochs": 0, "batch_size": 512, "lr": 1e-3})
    assert values_at(0, r, steps_per_epoch=5).lr == pytest.approx(2e-3)


def test_teacher_temperature_rises_by_epoch():
    r = recipe(optim={"epochs": 10, "warmup_epochs": 0},
               loss={"teacher_temp_start": 0.04, "teacher_temp": 0.07, "teacher_temp_warmup_epochs": 4})
    by_epoch = [values_at(4 * epoch + 2, r, steps_per_epoch=4).teacher_temp for epoch in range(6)]
    assert by_epoch == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])


def test_patch_weight_rises_and_the_last_layer_thaws():
    r = recipe(optim={"epochs": 10, "warmup_epochs": 0}, head={"freeze_last_layer_epochs": 1.5},
               loss={"patch_weight": 0.8, "patch_warmup_epochs": 2})
    values = [values_at(step, r, steps_per_epoch=4) for step in range(12)]
    assert [v.patch_weight for v in values[:9]] == pytest.approx([0.1 * i for i in range(9)])
    assert values[11].patch_weight == pytest.approx(0.8)
    assert [v.last_layer_frozen for v in values] == [True] * 6 + [False] * 6


def test_dino_has_no_patch_weight():
    r = Recipe.model_validate({"method": "dino", "photometric": {"patch_share": 0}})
    assert values_at(0, r, steps_per_epoch=4).patch_weight == 0


# schedules that a run is too short for: what is said, against the values of every update

PER_EPOCH = 20
IBOT = {"method": "ibot"}
INIT = {"init": "timm:vit_small_patch16_224.dino"}
TEMPERATURES = {"teacher_temp_start": 0.04, "teacher_temp": 0.07}


def values_of(made):
    return [values_at(step, made, PER_EPOCH) for step in range(made.optim.epochs * PER_EPOCH)]


def lengths(made):
    """The keys that are called too long."""
    return [sentence.partition(" = ")[0] for sentence in unfinished(made)]


def short(epochs, **parts):
    """A recipe without any warm-up but the ones named."""
    optim = {"epochs": epochs, "warmup_epochs": 0, **parts.pop("optim", {})}
    head = {"freeze_last_layer_epochs": 0, **parts.pop("head", {})}
    return recipe(optim=optim, head=head, **parts)


@each(("epochs", "warmup", "said"), [(5, 10, True), (5, 5, True), (5, 4.9, False), (5, 0.5, False), (1, 1, True)])
def test_a_learning_rate_that_never_falls_is_said(epochs, warmup, said):
    made = short(epochs, optim={"warmup_epochs": warmup})
    rates = [value.lr for value in values_of(made)]
    assert (rates == sorted(rates)) == said
    assert lengths(made) == ["optim.warmup_epochs"] * said


@each(("epochs", "warmup", "said"), [(4, 8, True), (4, 4.1, True), (4, 4, False), (4, 1, False), (4, 0, False)])
def test_a_patch_weight_may_arrive_with_the_end_of_the_run_but_not_later(epochs, warmup, said):
    made = short(epochs, loss={"patch_weight": 0.5, "patch_warmup_epochs": warmup})
    arrives = 0.5 * min(1, epochs / warmup) if warmup else 0.5  # one update after the last
    assert (arrives < 0.5) == said
    assert values_of(made)[-1].patch_weight == pytest.approx(arrives, abs=0.5 / PER_EPOCH)
    assert lengths(made) == ["loss.patch_warmup_epochs"] * said


@each(("epochs", "warmup", "said"), [(6, 12, True), (6, 6, True), (6, 5.5, True), (6, 5, False), (1, 0.1, True),
                                     (1, 0, False)])
def test_a_temperature_that_changes_to_the_last_epoch_is_said(epochs, warmup, said):
    made = short(epochs, loss={**TEMPERATURES, "teacher_temp_warmup_epochs": warmup})
    settled = sum(value.teacher_temp == 0.07 for value in values_of(made)) / PER_EPOCH
    assert (settled <= 1 and (epochs > 1 or not settled)) == said
    assert lengths(made) == ["loss.teacher_temp_warmup_epochs"] * said


def test_the_temperature_at_the_end_is_said():
    made = short(10, loss={**TEMPERATURES, "teacher_temp_warmup_epochs": 30})
    end = 0.04 + 0.03 * 9 / 29
    assert f"{end:.3g} (loss.teacher_temp = 0.07)" in next(unfinished(made))


def test_a_warm_up_of_a_temperature_that_stays_is_not_looked_at():
    assert lengths(short(2, loss={"teacher_temp_warmup_epochs": 9})) == []


@each(("start", "said"), [(0, False), (3, True), (2, False)])
def test_the_temperature_of_patch_tokens_waits_for_the_masks(start, said):
    made = short(6, **IBOT, loss={**TEMPERATURES, "teacher_temp_warmup_epochs": 3}, masks={"start_epoch": start})
    settled = sum(value.patch_teacher_temp == pytest.approx(0.07) for value in values_of(made)) / PER_EPOCH
    assert (settled <= 1) == said
    assert lengths(made) == ["loss.teacher_temp_warmup_epochs"] * said


@each(("epochs", "frozen", "said"), [(3, 3, True), (3, 7, True), (3, 2.9, False), (3, 0, False)])
def test_a_last_layer_that_never_learns_is_said(epochs, frozen, said):
    made = short(epochs, head={"freeze_last_layer_epochs": frozen})
    assert all(value.last_layer_frozen for value in values_of(made)) == said
    assert lengths(made) == ["head.freeze_last_layer_epochs"] * said


@each(("start", "frozen", "said"), [(INIT, 3, True), (INIT, 2, False), ({}, 3, False)])
def test_a_backbone_that_never_learns_is_said_where_there_is_one_to_begin_with(start, frozen, said):
    made = short(3, **start, optim={"freeze_backbone_epochs": frozen})
    assert all(value.backbone_frozen for value in values_of(made)) == said
    assert lengths(made) == ["optim.freeze_backbone_epochs"] * said


@each(("method", "start", "said"), [("ibot", 3, True), ("ibot", 2, False), ("pwself", 3, False)])
def test_masks_that_never_come_are_said_where_there_would_be_some(method, start, said):
    assert lengths(short(3, method=method, masks={"start_epoch": start})) == ["masks.start_epoch"] * said


def test_dino_has_no_patch_weight_to_warm_up():
    assert lengths(short(2, method="dino", loss={"patch_warmup_epochs": 9})) == []


def test_a_sentence_names_both_numbers_both_keys_and_a_way_out():
    sentence, = unfinished(load_recipe("imagenet100", ["optim.epochs=5"]))
    assert sentence == ("optim.warmup_epochs = 10 is too long for optim.epochs = 5: the learning rate only rises, and "
                        "never falls; ask for more epochs, or for optim.warmup_epochs=0.5")


@each("name", recipe_names())
def test_shipped_recipes_end_their_warm_ups_and_the_advice_for_short_runs_helps(name):
    assert list(unfinished(load_recipe(name))) == []
    advice = [sentence.rpartition(" ")[2] for sentence in unfinished(load_recipe(name, ["optim.epochs=1"]))]
    assert advice or name == "fashion-mnist"  # whose longest is a third of an epoch
    assert list(unfinished(load_recipe(name, ["optim.epochs=1", *advice]))) == []
