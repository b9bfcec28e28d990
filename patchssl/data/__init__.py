"""Image sets: what --data names becomes images by index."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = ("open_images", "open_pair")  # resolved on first use: whoever needs a submodule alone imports no more


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module("patchssl.data.open"), name)
    raise AttributeError(f"module 'patchssl.data' has no attribute '{name}'")
