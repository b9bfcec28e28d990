"""Logistic regression on frozen features: scikit-learn's, its regularization chosen on images held out of train."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchssl.eval.linear.scores import ProbeOutcome, Scaling, best_of, hold_out, join_outputs
from patchssl.runtime.progress import Progress


def logreg_probe(train: Mapping[str, Tensor], labels: Tensor, test: Mapping[str, Tensor], classes: tuple[str, ...],
                 settings: Mapping[str, Any], *, seed: int = 0, progress: Progress | None = None) -> ProbeOutcome:
    """The regression whose C is best on images held out of `train`, fitted on all of `train`, and its logits of `test`.

    `train` and `test` map the protocol's outputs to features (N, D) and (Q, D); `labels` (N,) are ids into `classes`.
    Labels of the test images are no argument. `progress` counts fits, the last one on all of `train`.
    """
    features = join_outputs(train)
    fit, held = hold_out(labels, settings["held_out"], seed, classes)
    strengths, accuracy, loss = settings["inverse_regularizations"], [], []
    for done, strength in enumerate(strengths, start=1):
        logits, _ = _fit(features, labels, fit, features[held], strength, settings, len(classes))
        accuracy.append(float((logits.argmax(dim=1) == labels[held]).double().mean()))
        loss.append(float(F.cross_entropy(logits, labels[held])))
        if progress is not None:
            progress(done, len(strengths) + 1)
    chosen = best_of(torch.tensor(accuracy), torch.tensor(loss))
    logits, iterations = _fit(features, labels, torch.arange(len(labels)), join_outputs(test), strengths[chosen],
                              settings, len(classes))
    if progress is not None:
        progress(len(strengths) + 1, len(strengths) + 1)
    return ProbeOutcome(logits.float(), {
        "chosen": {"inverse_regularization": strengths[chosen]},
        "iterations": iterations, "converged": iterations < settings["max_iterations"],
        "scikit-learn": metadata.version("scikit-learn"),
        "selection": {"by": settings["selection"], "num_probes": len(strengths), "num_held_out": len(held),
                      "accuracy": accuracy[chosen], "loss": loss[chosen],
                      "accuracy_of_each": [{"inverse_regularization": strength, "accuracy": share}
                                           for strength, share in zip(strengths, accuracy, strict=True)]}})


def _fit(features: Tensor, labels: Tensor, indices: Tensor, asked: Tensor, strength: float,
         settings: Mapping[str, Any], num_classes: int) -> tuple[Tensor, int]:
    """Logits (Q, C) float64 of the features `asked`, -inf for classes without images, and how many iterations."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    scaling = Scaling.fit(features, indices)
    model = LogisticRegression(C=strength, solver=settings["solver"], tol=settings["tolerance"],
                               max_iter=settings["max_iterations"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the record says whether it converged
        model.fit(scaling(features[indices]).double().numpy(), labels[indices].numpy())
    found = model.decision_function(scaling(asked).double().numpy())
    if found.ndim == 1:  # of two classes, scikit-learn gives the second's logit alone
        found = np.stack([np.zeros_like(found), found], axis=1)
    logits = torch.full((len(asked), num_classes), -math.inf, dtype=torch.float64)
    logits[:, torch.from_numpy(model.classes_)] = torch.from_numpy(found)
    return logits, int(model.n_iter_.max())
