"""Patch-wise self-supervised pretraining of Vision Transformers, and the benchmarks that judge them."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from patchssl.runtime.moved import MovedModules

__version__ = "0.1.0"

# names of the public interface and where they live; resolved on first use, so that `import patchssl` stays light
_PUBLIC = {"load_backbone": "patchssl.models.load", "Backbone": "patchssl.models.backbone",
           "evaluate": "patchssl.eval.score"}
_PACKAGES = ("pretrain", "eval", "geometry", "matching", "errors", "data", "report")

__all__ = ["Backbone", "__version__", "evaluate", "load_backbone", "pretrain"]

if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
    sys.meta_path.append(MovedModules())


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"patchssl.{name}")
    raise AttributeError(f"module 'patchssl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, *_PACKAGES])
