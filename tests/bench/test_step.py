"""What the bench of a step times: the three ways make the same kind of update, and two of them the same one."""

import json

import pytest
import torch
from small_runs import make_recipe

from patchssl.bench import step as module
from patchssl.bench.step import bench_step, make_candidate, noise_batch
from patchssl.report.tables.cost import WAYS

CPU = torch.device("cpu")
PAPER = {"rule": "paper", "weighting": "paper", "center_per_position": True}


def losses(way, loss):
    recipe = make_recipe(loss=loss, views={"num_local": 8}, optim={"batch_size": 3})
    engine = make_candidate(way, recipe, CPU)
    batch = noise_batch(recipe, engine.num_drop_path)
    reports = [engine.train_step(batch) for _ in range(3)]
    return [float(report.losses.total) for report in reports], engine.centers.patch_tokens.value


@pytest.mark.parametrize(("way", "loss"), [("plain autograd", {"matches_per_pair": 2}), ("all tokens", PAPER)])
def test_the_peers_learn_the_same_as_ours(way, loss):
    (ours, our_centers), (theirs, their_centers) = losses("ours", loss), losses(way, loss)
    assert ours == pytest.approx(theirs, rel=1e-4)
    torch.testing.assert_close(our_centers, their_centers, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("way", ["dino", "ibot"])
def test_the_baselines_are_those_methods_with_whole_view_color(way):
    recipe = module.step_recipe(way, "vit_tiny_patch16_224", 8, 2)
    assert (recipe.method, recipe.photometric.patch_share, recipe.loss.matches_per_pair) == (way, 0, 0)


@pytest.mark.slow
def test_a_small_bench_fits_into_json(monkeypatch):
    monkeypatch.setattr(module, "bench_patch_term", lambda *given, **more: {})
    found = json.loads(json.dumps(bench_step(["vit_tiny"], [64], images=1, repeats=1)))
    cell = found["steps"]["vit_tiny, 64 prototypes"]
    assert cell["ours"]["parameters"] == cell["all tokens"]["parameters"]
    assert 0 < cell["ours"]["matches"] < cell["all tokens"]["matches"]
    assert cell["ours"]["floor MiB"] < cell["ours"]["peak MiB"]
    (cost,) = module.cost_records(found)
    assert [(step.method, step.seconds) for step in cost.steps] == [
        (method, cell[way]["seconds of each"]) for way, (method, _) in module.COST_WAYS.items()]
    assert (cost.arch, cost.num_prototypes, cost.images, cost.clock) == ("vit_tiny_patch16_224", 64, 1, "processor")
    assert set(module.COST_WAYS.values()) == set(WAYS)
    assert cell["ours in shares of"]["all tokens"]["seconds"] == pytest.approx(
        cell["ours"]["seconds"] / cell["all tokens"]["seconds"])
