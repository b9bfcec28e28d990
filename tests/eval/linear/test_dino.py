import copy
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from patchssl.data.images import ArrayImages
from patchssl.data.open import open_pair
from patchssl.eval.features import extract_outputs
from patchssl.eval.linear import dino as linear_dino
from patchssl.eval.linear.dino import RandomCrops, dino_batches, dino_probe, join_dino
from patchssl.eval.linear.task import linear_protocol
from patchssl.eval.pooling import compute_outputs
from patchssl.models.load import load_backbone
from patchssl.runtime.errors import CheckpointError, DataError, NotFiniteError, UsageError

recorder = runpy.run_path(str(Path(__file__).parents[2] / "record_linear.py"))
OFFICIAL = np.load(recorder["OUTPUTS"])
SMALL = {"train_crop": 16, "crop": 16, "resize": 16}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The network and the sets of the recorded logits."""
    folder = tmp_path_factory.mktemp("recorded")
    train, val = open_pair(recorder["write_images"](folder / "set"))
    return load_backbone(str(recorder["write_network"](folder / "network.pth"))), train, val


@pytest.fixture(scope="module")
def small():
    """A network for 16 px and 22 images of 20 x 30 px in three classes whose colors tell them apart."""
    rng = np.random.default_rng(0)
    labels = np.arange(22) % 3
    pixels = rng.integers(0, 130, (22, 20, 30, 3)) + 90 * np.eye(3, dtype=np.int64)[labels][:, None, None]
    images = ArrayImages(name="made", split="train", source="made", array=pixels.astype(np.uint8), ids=np.arange(22),
                         classes=("a", "b", "c"), labels=labels)
    network = "random:vit_tiny_patch16_224?img_size=16&patch_size=8&embed_dim=24&num_heads=3&depth=2"
    return load_backbone(network), images


def run(small, **options):
    """`dino_probe` on the images of `small`, tested on the same; settings, fields of Training and arguments by name."""
    backbone, images = small
    own = {name: options.pop(name) for name in list(options) if name in linear_protocol("dino", backbone).settings}
    fields = {name: options.pop(name) for name in ("batch_size", "workers", "seed") if name in options}
    training = recorder["training_of"](backbone, images, ["class:2"], **{**SMALL, **own})._replace(**fields)
    test = extract_outputs(backbone, images, linear_protocol("native", backbone), ["class:2"])
    return dino_probe(training, test, training.labels, **options)


@pytest.mark.parametrize("case", recorder["CASES"])
def test_every_epochs_logits_equal_those_of_dinos_own_script(recorded, case, tmp_path, monkeypatch):
    backbone, train, val = recorded
    outputs = recorder["CASES"][case][0]
    training = recorder["training_of"](backbone, train, outputs)
    test = extract_outputs(backbone, val, linear_protocol("dino", backbone), outputs)
    layers = []
    monkeypatch.setattr(linear_dino, "save_checkpoint", lambda _, state: layers.append(copy.deepcopy(state["linear"])))
    outcome = dino_probe(training, test, torch.as_tensor(val.labels), folder=tmp_path)
    seen = join_dino(test, training.settings)
    ours = [torch.nn.functional.linear(seen, layer["weight"], layer["bias"]) for layer in layers]
    assert len(ours) == len(OFFICIAL[case]) == 3
    for found, expected in zip(ours, OFFICIAL[case], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(OFFICIAL[case][-1] - OFFICIAL[case][0]).max() > 0.5  # training moved them
    accuracies = 100 * np.array(outcome.detail["top1_by_epoch"])
    np.testing.assert_allclose(accuracies, OFFICIAL[f"{case}/acc1"])
    best = int(np.argmax(OFFICIAL[f"{case}/acc1"]))
    assert outcome.detail["selection"]["best_epoch"] == best + 1
    np.testing.assert_allclose(outcome.logits, OFFICIAL[case][best], atol=1e-4)


def test_two_outputs_are_interleaved_as_dinos_published_weights_expect(recorded):
    backbone, train, _ = recorded
    plan = linear_protocol("dino", backbone)
    batch = plan.transform()(train.pixels(0))[None].float()
    tokens = backbone.tokens(batch)
    outputs = ("class:1", "mean_patch")
    joined = join_dino(compute_outputs(backbone, batch, outputs), {"outputs": outputs})
    classes, means = tokens[0, 0].tolist(), tokens[0, 1:].mean(dim=0).tolist()
    written_out = [value for pair in zip(classes, means, strict=True) for value in pair]  # class0, mean0, class1, ...
    np.testing.assert_allclose(joined.tolist(), [written_out], rtol=1e-6, atol=1e-7)


def test_crops_are_those_of_torchvisions_transforms_for_their_seed(small):
    _, images = small
    settings = linear_protocol("dino", small[0]).settings
    reference = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()])
    crops = RandomCrops(images, settings, seed=5)
    for key in [(0, 3), (7, 3), (0, 4)]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([5, *key]).generate_state(1, np.uint64)[0]))
            expected = np.array(reference(Image.fromarray(images.pixels(key[1]))))
        assert np.array_equal(crops[key].permute(1, 2, 0), expected)


def test_a_crop_depends_on_seed_epoch_and_index_and_leaves_the_global_generator_alone(small):
    _, images = small
    same = images.subset([0, 0])
    crops = {}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for seed in (0, 1):
        made = RandomCrops(same, linear_protocol("dino", small[0]).settings, seed)
        crops |= {(seed, epoch, index): made[epoch, index] for epoch in (0, 1) for index in (0, 1)}
        assert torch.equal(made[1, 1], crops[seed, 1, 1])
    assert torch.equal(torch.rand(3), expected)
    assert len({crop.numpy().tobytes() for crop in crops.values()}) == 8


def test_the_order_of_an_epoch_is_that_of_torchs_distributed_sampler(small):
    backbone, images = small
    training = recorder["training_of"](backbone, images, ["class:2"], **SMALL)
    sampler = torch.utils.data.DistributedSampler(images, num_replicas=1, rank=0)
    expected = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        order = list(sampler)
        expected += [order[:8], order[8:16], order[16:]]
    assert [batch.indices for batch in dino_batches(training, range(2))] == expected


@pytest.mark.parametrize(("batch_size", "workers"), [(3, 0), (3, 2), (64, 1)])
def test_workers_change_nothing_and_the_size_of_forward_passes_hardly_anything(small, batch_size, workers):
    expected = run(small, batch_size=3)
    found = run(small, batch_size=batch_size, workers=workers)
    tolerance = 0 if batch_size == 3 else 1e-4
    torch.testing.assert_close(found.logits, expected.logits, atol=tolerance, rtol=0)
    assert not torch.equal(run(small, seed=1).logits, expected.logits)


def test_the_learning_rate_follows_the_batch_and_falls_to_zero_as_a_cosine_by_epoch(small, monkeypatch):
    rates = []

    def noted(self, *_, step=torch.optim.SGD.step):
        rates.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    run(small, epochs=4, batch=11, learning_rate=0.1)
    by_hand = [0.1 * 11 / 256 * share for share in (1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2)]
    np.testing.assert_allclose(rates, np.repeat(by_hand, 2), rtol=1e-6)


def test_colors_are_learned_and_the_first_of_the_best_epochs_is_reported(small):
    outcome = run(small, epochs=60, learning_rate=1.0)
    top1, labels = outcome.detail["top1_by_epoch"], torch.as_tensor(small[1].labels)
    assert len(top1) == 60
    assert max(top1) == 1
    assert outcome.detail["selection"] == {"by": "best test epoch", "best_epoch": top1.index(1.0) + 1, "epochs": 60}
    assert (outcome.logits.argmax(dim=1) == labels).all()


def test_a_killed_training_goes_on_to_the_very_same_numbers(small, tmp_path, monkeypatch):
    expected = run(small, epochs=5)

    class KilledError(Exception):
        pass

    steps = []

    def killed(self, *_, step=torch.optim.SGD.step):
        steps.append(None)
        if len(steps) == 8:  # three a epoch: in the middle of the third
            raise KilledError
        step(self)

    with monkeypatch.context() as patched, pytest.raises(KilledError):
        patched.setattr(torch.optim.SGD, "step", killed)
        run(small, epochs=5, folder=tmp_path, facts={"seed": 0})
    calls = []
    found = run(small, epochs=5, folder=tmp_path, facts={"seed": 0}, progress=lambda *call: calls.append(call))
    assert torch.equal(found.logits, expected.logits)
    assert found.detail == expected.detail
    assert calls == [(done, 110) for done in (44, *(22 * epoch + seen for epoch in (2, 3, 4) for seen in (8, 16, 22)))]


KILLED = """
import os, runpy, sys
from patchssl.eval.linear import dino as linear_dino
test = runpy.run_path(sys.argv[1])
save = linear_dino.save_checkpoint
def save_twice_then_die(folder, state):
    save(folder, state)
    if len(state["top1_by_epoch"]) == 2:
        os.kill(os.getpid(), 9)
linear_dino.save_checkpoint = save_twice_then_die
test["run"](test["small"].__wrapped__(), folder=test["Path"](sys.argv[2]), facts={})
"""


@pytest.mark.slow
def test_sigkill_between_epochs_leaves_a_checkpoint_to_go_on_from(small, tmp_path):
    end = subprocess.run([sys.executable, "-c", KILLED, __file__, str(tmp_path)], env=dict(os.environ), timeout=200,
                         capture_output=True, text=True, check=False)
    assert end.returncode == -9, end.stderr
    calls = []
    found = run(small, folder=tmp_path, facts={}, progress=lambda *call: calls.append(call))
    assert calls[0] == (44, 66)
    assert torch.equal(found.logits, run(small).logits)


def test_a_finished_training_is_not_done_again(small, tmp_path):
    first = run(small, folder=tmp_path, facts={"seed": 0})
    calls = []
    again = run(small, folder=tmp_path, facts={"seed": 0}, progress=lambda *call: calls.append(call))
    assert calls == [(66, 66)]
    assert torch.equal(first.logits, again.logits)
    assert first.detail == again.detail


def test_another_probes_checkpoint_is_refused_by_what_differs(small, tmp_path):
    run(small, folder=tmp_path, facts={"seed": 0, "weights": "a"})
    with pytest.raises(UsageError, match=r"another probe: there {'weights': 'a'}, asked for was {'weights': 'b'}"):
        run(small, folder=tmp_path, facts={"seed": 0, "weights": "b"})


def test_a_folder_with_a_pretraining_run_is_refused_and_left_alone(small, tmp_path, tiny_run):
    before = {path.name: path.read_bytes() for path in tiny_run.iterdir() if path.is_file()}
    with pytest.raises(UsageError, match="not of a linear probe"):
        run(small, folder=tiny_run)
    assert {path.name: path.read_bytes() for path in tiny_run.iterdir() if path.is_file()} == before


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_one_that_does_not_fit_is_named(small, tmp_path):
    expected = run(small, folder=tmp_path)
    (tmp_path / "checkpoint.pth").write_bytes((tmp_path / "checkpoint.pth").read_bytes()[:1000])
    assert torch.equal(run(small, folder=tmp_path).logits, expected.logits)
    with pytest.raises(CheckpointError, match="does not fit"):
        run((small[0], small[1].subset(range(22)).with_classes(tuple("abcd"))), folder=tmp_path)


def write_set(folder, bad):
    rng = np.random.default_rng(0)
    for label, name in enumerate("abc"):
        for number in range(5):
            path = folder / "train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 200, (20, 24, 3), dtype=np.uint8) + np.uint8(20 * label)).save(path)
            if (name, number) in bad:
                path.write_bytes(b"no image")
    (folder / "val").symlink_to(folder / "train")
    return open_pair(folder)[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_all_unreadable_images_are_listed_after_one_epoch_and_no_number_is_given(small, tmp_path, workers):
    images = write_set(tmp_path, {("a", 3), ("c", 0), ("c", 4)})
    training = recorder["training_of"](small[0], images, ["class:2"], **SMALL)._replace(workers=workers, batch_size=4)
    with pytest.raises(DataError) as caught:
        dino_probe(training, {"class:2": torch.zeros(2, 48)}, torch.tensor([0, 1]), folder=tmp_path / "out")
    assert "3 of 15 images cannot be read" in str(caught.value)
    assert all(name in str(caught.value) for name in ("a/3.png", "c/0.png", "c/4.png"))
    assert not (tmp_path / "out").exists()


def test_a_training_that_diverges_ends_with_its_own_error(small):
    with pytest.raises(NotFiniteError, match="not finite after epoch 1"):
        run(small, learning_rate=1e40)


def test_the_network_is_frozen_in_evaluation_mode_and_handed_back_as_it_was(small):
    backbone, images = copy.deepcopy(small[0]), small[1]
    before = copy.deepcopy(backbone.state_dict())
    modes = []
    backbone.train()
    first = backbone.module.blocks[0]
    first.register_forward_hook(lambda block, *_: modes.append((block.training, torch.is_grad_enabled())))
    run((backbone, images), epochs=1)
    assert set(modes) == {(False, False)}
    assert backbone.training
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
