"""Pretraining: views, patch-wise color, matching losses, the engine.

`patchssl.pretrain(recipe, ...)` runs one: the package itself can be called, see `patchssl.pretrain.run.start.pretrain`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """The contract has one name for the package and for what it does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Path:
        from patchssl.pretrain.run.start import pretrain

        return pretrain(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
