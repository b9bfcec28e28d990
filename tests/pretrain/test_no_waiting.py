"""The update on a device whose tensors have no content, so that whoever waits for a value gets an error."""

import pytest
import torch
from small_runs import BATCH, STEPS, make_batch, make_recipe
from torch.utils._python_dispatch import TorchDispatchMode

import patchssl.pretrain.engine as engine_module
from patchssl.pretrain.engine import Engine

THERE = torch.device("meta")  # stands for a GPU: shapes, types and gradients, no values


class Copies(TorchDispatchMode):
    """Keeps in `waits` the shapes of what is copied to the device without `non_blocking`."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            target = torch.device(kwargs.get("device") or "cpu")
            if target == THERE and not kwargs.get("non_blocking"):
                self.waits.append(tuple(args[0].shape))
        return function(*args, **kwargs)


def test_the_device_notices_who_waits():
    with Copies() as copies:
        there = torch.ones(3).to(THERE, non_blocking=True)
        assert not copies.waits
        torch.ones(3).to(THERE)
        assert copies.waits == [(3,)]
    for wait in (there.sum().item, there.nonzero, (there > 1).any().__bool__, lambda: there[there > 1], there.cpu,
                 there.tolist, there.unique):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()


DINO, IBOT = ({"method": method, "photometric": {"patch_share": 0}} for method in ("dino", "ibot"))
SETTINGS = {
    "pwself": {}, "dino": DINO, "ibot": IBOT, "some views layered": {"photometric": {"patch_share": 0.5}},
    "some views replaced": {"photometric": {"patchwise": "replace", "patch_share": 0.5}},
    "paper": {"loss": {"weighting": "paper", "rule": "paper", "center_per_position": True}},
    "sampled, in two parts": {"loss": {"matches_per_pair": 2}, "optim": {"accumulate": 2}},
    "masked": {"masks": {"matched": True}},
    "similarity": {"loss": {"rule": "similarity"}},
    "random, sinkhorn": {"loss": {"rule": "random", "centering": "sinkhorn"}},
    "frozen, two heads, not clipped": {"head": {"freeze_last_layer_epochs": 1, "shared": False},
                                       "optim": {"clip_grad": 0}},
}


@pytest.mark.parametrize("parts", [
    pytest.param(parts, id=name, marks=() if name in ("pwself", "dino") else pytest.mark.slow)
    for name, parts in SETTINGS.items()])
def test_an_update_waits_for_nothing(parts):
    recipe = make_recipe(**parts)
    engine = Engine(recipe, 0, STEPS, THERE)
    batches = [make_batch(recipe, step) for step in range(2)]
    with Copies() as copies:
        for batch in batches:
            report = engine.train_step(batch)
    assert report.losses.total.device == THERE
    assert report.last.class_logits.shape == (BATCH // recipe.optim.accumulate, 4, 32)
    assert not copies.waits


def test_an_update_that_waits_is_found(monkeypatch):
    plain = engine_module.clip_per_parameter
    monkeypatch.setattr(engine_module, "clip_per_parameter", lambda *given: torch.tensor(plain(*given).item()))
    recipe = make_recipe()
    with pytest.raises(RuntimeError, match="item"):
        Engine(recipe, 0, STEPS, THERE).train_step(make_batch(recipe))
