import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import each
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from patchssl.eval.linear import cached as linear_cached
from patchssl.eval.linear.cached import Data, GridProbe, cached_probe, grid, input_columns, length, train_grid
from patchssl.eval.linear.scores import epoch_order, hold_out, join_outputs
from patchssl.runtime.errors import NotFiniteError, UsageError

SETTINGS = {"inputs": ["class:1", "class:3", "class:1 + mean_patch", "class:3 + mean_patch"], "epochs": 4, "batch": 32,
            "least_updates": 0, "ridge": 1e-3, "momentum": 0.9, "learning_rates": [0.3, 3.0],
            "weight_decays": [0.0, 0.01], "held_out": 0.2, "selection": "held-out accuracy"}
NAMES = tuple("abcde")
D = 6


def outputs_of(count, seed=0, spread=1.0, columns=None):
    """Outputs class:3 and mean_patch and labels of five overlapping classes; `columns` hold all the signal."""
    rng, shared = np.random.default_rng(seed), np.random.default_rng(99)
    centers, scales = shared.normal(size=(5, 4 * D)), 10.0 ** shared.integers(-2, 3, 4 * D)
    labels = rng.integers(0, 5, count)
    features = spread * rng.normal(size=(count, 4 * D))
    signal = slice(None) if columns is None else columns
    features[:, signal] += centers[labels][:, signal]
    features = torch.from_numpy((features * scales + 7).astype(np.float32))
    return {"class:3": features[:, : 3 * D], "mean_patch": features[:, 3 * D :]}, torch.from_numpy(labels)


def data_of(outputs, labels):
    widths = {output: features.shape[1] for output, features in outputs.items()}
    return Data(join_outputs(outputs), labels, input_columns(widths), len(NAMES))


def alone(features, labels, probe, settings, seed):
    """One probe by torch's own SGD and autograd: (weight, bias) after training."""
    layer = torch.nn.Linear(features.shape[1], len(NAMES))
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    groups = [{"params": [layer.weight], "weight_decay": probe.weight_decay}, {"params": [layer.bias]}]
    optimizer = torch.optim.SGD(groups, lr=probe.learning_rate, momentum=settings["momentum"])
    steps = settings["epochs"] * math.ceil(len(labels) / settings["batch"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: (1 + math.cos(math.pi * done / steps)) / 2)
    for epoch in range(settings["epochs"]):
        for rows in epoch_order(seed, epoch, len(labels)).split(settings["batch"]):
            optimizer.zero_grad()
            F.cross_entropy(layer(features[rows]), labels[rows]).backward()
            optimizer.step()
            scheduler.step()
    return layer


def white(features, rows, ridge=1e-3):
    """Whitened along the principal axes: by another rotation than the code's."""
    scaled = StandardScaler().fit(features[rows]).transform(features)
    values, vectors = np.linalg.eigh(scaled[rows].T @ scaled[rows] / len(rows))
    return torch.from_numpy(scaled @ vectors / np.sqrt((values + ridge) * len(values))).float()


@pytest.mark.parametrize("kept", [2**30, 0])
def test_training_the_grid_in_one_pass_equals_training_every_probe_alone_with_torchs_own_sgd(kept, monkeypatch):
    monkeypatch.setattr(linear_cached, "_KEPT", kept)
    monkeypatch.setattr(linear_cached, "_ROWS", 50)
    outputs, labels = outputs_of(190)
    data, probes, rows = data_of(outputs, labels), grid(SETTINGS), torch.arange(40, 190)
    assert len(probes) == 16
    together = next(train_grid(data, rows, probes, SETTINGS, seed=5).logits(data.features))
    distinct = set()
    for number, probe in enumerate(probes):
        features = white(data.features[:, data.columns[probe.input]].double().numpy(), rows.numpy())
        expected = alone(features[rows], labels[rows], probe, SETTINGS, seed=5)(features)
        torch.testing.assert_close(together[:, number], expected, atol=1e-4, rtol=1e-4)
        distinct.add(round(float(expected.detach().abs().sum()), 3))
    assert len(distinct) == 16


def test_enough_epochs_reach_the_optimum_that_scikit_learn_finds():
    outputs, labels = outputs_of(120)
    data = data_of(outputs, labels)
    settings, decay = {**SETTINGS, "epochs": 400, "batch": 120}, 0.01
    found = next(train_grid(data, torch.arange(120), [GridProbe("class:3 + mean_patch", 1.0, decay)], settings)
                 .logits(data.features))[:, 0].softmax(dim=1)
    # mean loss + decay / 2 |w|^2 here; C * (sum of losses) + 1 / 2 |w|^2 there
    features = white(data.features.double().numpy(), np.arange(120))
    oracle = LogisticRegression(C=1 / (120 * decay), tol=1e-10, max_iter=10_000).fit(features, labels)
    np.testing.assert_allclose(found, oracle.predict_proba(features), atol=1e-3)


def test_a_small_set_gets_more_epochs_until_the_updates_suffice():
    assert length(1000, {"batch": 256, "epochs": 30, "least_updates": 1000}) == (250, 4)
    assert length(100_000, {"batch": 256, "epochs": 30, "least_updates": 1000}) == (30, 391)
    assert length(3, {"batch": 256, "epochs": 2, "least_updates": 0}) == (2, 1)


def test_features_that_never_vary_or_repeat_each_other_do_no_harm():
    outputs, labels = outputs_of(200, spread=0.1)
    plain = cached_probe(outputs, labels, outputs, NAMES, SETTINGS)
    outputs["mean_patch"] = torch.cat([outputs["class:3"][:, :4], torch.full((200, 2), 3.7)], dim=1)
    found = cached_probe(outputs, labels, outputs, NAMES, SETTINGS)
    assert found.logits.isfinite().all()
    assert (found.logits.argmax(dim=1) == plain.logits.argmax(dim=1)).all()
    nothing = {name: torch.ones_like(part) for name, part in outputs.items()}
    assert cached_probe(nothing, labels, nothing, NAMES, SETTINGS).logits.isfinite().all()


def test_a_separable_set_is_learned_exactly():
    outputs, labels = outputs_of(200, spread=0.05)
    test, test_labels = outputs_of(100, seed=1, spread=0.05)
    outcome = cached_probe(outputs, labels, test, NAMES, SETTINGS)
    assert torch.equal(outcome.logits.argmax(dim=1), test_labels)
    assert outcome.detail["selection"]["accuracy"] == 1.0


@pytest.mark.parametrize(("columns", "word"), [(slice(0, D), "class:3"), (slice(3 * D, 4 * D), "mean_patch")])
def test_the_chosen_probe_sees_what_tells_the_classes_apart(columns, word):
    outputs, labels = outputs_of(300, columns=columns)
    outcome = cached_probe(outputs, labels, outputs, NAMES, {**SETTINGS, "epochs": 10})
    assert word in outcome.detail["chosen"]["input"]
    blind = [cell["accuracy"] for cell in outcome.detail["selection"]["accuracy_of_each"] if word not in cell["input"]]
    assert len(blind) == 8
    assert max(blind) < 0.4 < outcome.detail["selection"]["accuracy"]


def test_the_logits_are_those_of_the_chosen_probe_trained_again_on_all_images():
    outputs, labels = outputs_of(150)
    test, _ = outputs_of(30, seed=2)
    outcome = cached_probe(outputs, labels, test, NAMES, SETTINGS, seed=3)
    probe = GridProbe(**outcome.detail["chosen"])
    again = train_grid(data_of(outputs, labels), torch.arange(150), [probe], SETTINGS, seed=3)
    torch.testing.assert_close(outcome.logits, next(again.logits(join_outputs(test)))[:, 0])


def test_the_selection_is_the_accuracy_on_images_that_were_held_out():
    outputs, labels = outputs_of(150, spread=2.0)
    outcome = cached_probe(outputs, labels, outputs, NAMES, SETTINGS, seed=3)
    fit, held = hold_out(labels, 0.2, 3, NAMES)
    data, probe = data_of(outputs, labels), GridProbe(**outcome.detail["chosen"])
    logits = next(train_grid(data, fit, [probe], SETTINGS, seed=3).logits(data.features[held]))[:, 0]
    told = outcome.detail["selection"]
    assert told["accuracy"] == pytest.approx(float((logits.argmax(dim=1) == labels[held]).double().mean()))
    assert told["loss"] == pytest.approx(float(F.cross_entropy(logits, labels[held])), rel=1e-4)
    assert (told["num_held_out"], told["num_probes"]) == (len(held), 16)
    assert told["accuracy"] == max(cell["accuracy"] for cell in told["accuracy_of_each"])


def test_a_probe_that_diverges_is_passed_over_and_when_all_do_no_number_is_given():
    outputs, labels = outputs_of(150)
    explodes = {**SETTINGS, "weight_decays": [0.0, 1e20]}  # as 1 - rate * decay, to the power of the updates
    assert cached_probe(outputs, labels, outputs, NAMES, explodes).detail["chosen"]["weight_decay"] == 0
    with pytest.raises(NotFiniteError, match="diverged"):
        cached_probe(outputs, labels, outputs, NAMES, {**SETTINGS, "weight_decays": [1e20]})


def test_the_blocks_of_scoring_do_not_show(monkeypatch):
    outputs, labels = outputs_of(150)
    whole = cached_probe(outputs, labels, outputs, NAMES, SETTINGS)
    monkeypatch.setattr(linear_cached, "_LOGITS_AT_A_TIME", 16 * 5 * 7)
    blocks = cached_probe(outputs, labels, outputs, NAMES, SETTINGS)
    torch.testing.assert_close(whole.logits, blocks.logits, atol=1e-5, rtol=1e-5)
    assert whole.detail["chosen"] == blocks.detail["chosen"]
    assert whole.detail["selection"]["accuracy_of_each"] == blocks.detail["selection"]["accuracy_of_each"]


def test_progress_rises_by_one_to_the_number_of_updates():
    outputs, labels = outputs_of(150)
    calls = []
    cached_probe(outputs, labels, outputs, NAMES, SETTINGS, progress=lambda *call: calls.append(call))
    fit, _ = hold_out(labels, 0.2, 0, NAMES)
    total = 4 * math.ceil(len(fit) / 32) + 4 * math.ceil(150 / 32)
    assert calls == [(done, total) for done in range(1, total + 1)]


@each(("widths", "expected"), [
    ({"features": 5}, {"features": (0, 5)}),
    ({"class:1": 4, "mean_patch": 4}, {"class:1": (0, 4), "class:1 + mean_patch": (0, 8)}),
    ({"class:3": 6}, {"class:3": (0, 6), "class:2": (2, 6), "class:1": (4, 6)})])
def test_inputs_are_runs_of_columns_that_end_with_the_last_blocks_class_token(widths, expected):
    assert {name: (part.start, part.stop) for name, part in input_columns(widths).items()} == expected


def test_features_too_wide_to_be_whitened_are_refused_not_tried(monkeypatch):
    """A covariance of a hundred thousand columns would end the process."""
    settings = {**SETTINGS, "inputs": ["features"]}
    train = {"features": torch.zeros(4, 9)}
    monkeypatch.setattr(linear_cached, "MOST_WIDE", 8)
    with pytest.raises(UsageError, match=r"9 numbers an image .* 8 at most"):
        cached_probe(train, torch.tensor([0, 0, 1, 1]), train, ("a", "b"), settings)
    monkeypatch.setattr(linear_cached, "MOST_WIDE", 9)
    assert cached_probe(train, torch.tensor([0, 0, 1, 1]), train, ("a", "b"), settings).logits.shape == (4, 2)
