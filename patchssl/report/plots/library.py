"""matplotlib, whatever a notebook or a user's settings ask of it.

Figures are drawn by Agg and need no backend, yet matplotlib is not imported where MPLBACKEND names one that is not
there, as a notebook's `module://matplotlib_inline.backend_inline` in a shell that inherits it, and not where a
matplotlibrc is no text. Such settings are passed over; others stay for the figures that a user draws beside ours.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any


def _import_matplotlib() -> None:
    before = set(sys.modules)
    try:
        import matplotlib
    except ValueError:  # UnicodeDecodeError is one
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "matplotlib":  # half of it: the second try begins anew
                del sys.modules[name]
        kept = {name: os.environ.pop(name, None) for name in ("MPLBACKEND", "MATPLOTLIBRC")}
        os.environ["MATPLOTLIBRC"] = os.devnull
        try:
            import matplotlib  # noqa: F401
        finally:
            del os.environ["MATPLOTLIBRC"]
            os.environ.update({name: value for name, value in kept.items() if value is not None})


_import_matplotlib()


def figure_style(style: Mapping[str, Any]) -> AbstractContextManager[None]:
    """matplotlib's own defaults and `style` inside, nothing of a user's matplotlibrc."""
    from matplotlib import style as styles

    return styles.context(["default", dict(style)])
