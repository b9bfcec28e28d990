"""Where this package keeps what it computed once, and how much of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from patchssl.errors import UsageError

_USUAL_GIB = 20.0


def default_folder() -> Path:
    """PATCHSSL_CACHE, or patchssl in the user's cache folder."""
    if named := os.environ.get("PATCHSSL_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchssl"


def default_limit() -> int:
    """How many bytes of features are kept: PATCHSSL_CACHE_GIB, or 20 GiB; UsageError for what is no such number."""
    asked = os.environ.get("PATCHSSL_CACHE_GIB")
    try:
        gib = float(asked) if asked else _USUAL_GIB
        limit = round(gib * 2**30)
    except (ValueError, OverflowError):
        limit = -1
    if limit < 0:
        raise UsageError(f"PATCHSSL_CACHE_GIB is '{asked}': give the GiB of features to keep, such as 100 or 0.5")
    return limit


def index_folder() -> Path:
    """Where indexes of large archives lie."""
    return default_folder() / "archives"


def index_bytes() -> int:
    """How large the kept indexes are together."""
    folder = index_folder()
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0


def clear_indexes() -> None:
    """Remove the kept indexes; they are made again when needed."""
    shutil.rmtree(index_folder(), ignore_errors=True)
