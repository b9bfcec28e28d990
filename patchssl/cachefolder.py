"""Where this package keeps what it computed once."""

from __future__ import annotations

import os
from pathlib import Path


def default_folder() -> Path:
    """PATCHSSL_CACHE, or patchssl in the user's cache folder."""
    if named := os.environ.get("PATCHSSL_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchssl"
