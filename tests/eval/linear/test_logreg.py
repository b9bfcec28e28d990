import math

import numpy as np
import pytest
import torch
from cases import each
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.preprocessing import StandardScaler

from patchssl.eval.linear.logreg import logreg_probe
from patchssl.eval.linear.scores import hold_out

SETTINGS = {"held_out": 0.25, "solver": "lbfgs", "tolerance": 1e-4, "max_iterations": 1000,
            "inverse_regularizations": [1e-4, 1e-2, 1.0, 100.0], "selection": "held-out accuracy"}


def clusters(count, num_classes, seed=0, d=9, spread=1.5):
    rng, shared = np.random.default_rng(seed), np.random.default_rng(99)
    centers, scales = shared.normal(size=(num_classes, d)), 10.0 ** shared.integers(-2, 3, d)
    labels = rng.integers(0, num_classes, count)
    features = (centers[labels] + spread * rng.normal(size=(count, d))) * scales - 4
    return {"class:1": torch.from_numpy(features.astype(np.float32))}, torch.from_numpy(labels)


def by_hand(train, labels, test, strength):
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(C=strength, max_iter=1000).fit(scaler.transform(train), labels)
    return model, scaler.transform(test)


@each("num_classes", [2, 3, 6])
def test_it_equals_scikit_learn_called_by_hand(num_classes):
    train, labels = clusters(160, num_classes)
    test, _ = clusters(50, num_classes, seed=1)
    outcome = logreg_probe(train, labels, test, tuple("abcdef"[:num_classes]), SETTINGS, seed=2)
    x, asked = (part["class:1"].numpy().astype(np.float64) for part in (train, test))
    y = labels.numpy()
    fit, held = (part.numpy() for part in hold_out(labels, 0.25, 2, tuple("abcdef"[:num_classes])))
    shares = []
    for strength in SETTINGS["inverse_regularizations"]:
        model, held_features = by_hand(x[fit], y[fit], x[held], strength)
        shares.append(accuracy_score(y[held], model.predict(held_features)))
    told = outcome.detail["selection"]
    assert [cell["accuracy"] for cell in told["accuracy_of_each"]] == pytest.approx(shares)
    assert len(set(shares)) > 1
    chosen = outcome.detail["chosen"]["inverse_regularization"]
    assert shares[SETTINGS["inverse_regularizations"].index(chosen)] == max(shares) == told["accuracy"]
    model, asked_features = by_hand(x, y, asked, chosen)
    np.testing.assert_allclose(outcome.logits.softmax(dim=1), model.predict_proba(asked_features), atol=2e-3)
    assert (outcome.logits.argmax(dim=1).numpy() == model.predict(asked_features)).mean() > 0.97
    assert outcome.detail["converged"]


def test_a_class_without_training_images_gets_no_logit():
    train, labels = clusters(80, 3)
    outcome = logreg_probe(train, labels * 2, train, tuple("abcde"), SETTINGS)
    assert (outcome.logits[:, [1, 3]] == -math.inf).all()
    assert outcome.logits[:, [0, 2, 4]].isfinite().all()
    assert (outcome.logits.argmax(dim=1) == labels * 2).double().mean() > 0.5


def test_a_fit_that_ran_out_of_iterations_is_said():
    train, labels = clusters(80, 3)
    detail = logreg_probe(train, labels, train, tuple("abc"), {**SETTINGS, "max_iterations": 2}).detail
    assert (detail["converged"], detail["iterations"]) == (False, 2)


def test_progress_counts_fits():
    train, labels = clusters(80, 3)
    calls = []
    logreg_probe(train, labels, train, tuple("abc"), SETTINGS, progress=lambda *call: calls.append(call))
    assert calls == [(done, 5) for done in range(1, 6)]
