"""Schedules against numpy's arithmetic and values worked out by hand."""

import numpy as np
import pytest
from cases import each

from patchssl.pretrain.config import Recipe
from patchssl.pretrain.schedules import cosine, linear, values_at, warmup_cosine


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
