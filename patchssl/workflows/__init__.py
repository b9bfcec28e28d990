"""What joins pretraining and evaluation: in-training k-NN, quickstart, Slurm."""

from __future__ import annotations

import importlib
from typing import Any

from patchssl.runtime.moved import warn_moved


def __getattr__(name: str) -> Any:
    if name == "score_knn":  # where 0.1 had it
        warn_moved("patchssl.workflows.score_knn", "patchssl.eval.score.score_knn")
        return importlib.import_module("patchssl.eval.score").score_knn
    raise AttributeError(f"module 'patchssl.workflows' has no attribute '{name}'")
