"""Module names that lead elsewhere: doors of the public interface, and names of 0.1 that are kept for one release."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

DOORS = {
    "patchssl.errors": "patchssl.runtime.errors",
    "patchssl.geometry": "patchssl.views.geometry",
    "patchssl.matching": "patchssl.views.matching",
}
MOVED = {  # what README, documentation and scripts of 0.1 import
    "patchssl.backbone": "patchssl.models.backbone",
    "patchssl.drawing": "patchssl.report.figures.draw",
    "patchssl.loading": "patchssl.models.load",
    "patchssl.report.compare": "patchssl.report.tables.compare",
    "patchssl.tabling": "patchssl.report.tables.make",
}


class MovedModules(MetaPathFinder, Loader):
    """Finds a module by its other name: both names are one module object."""

    def find_spec(self, name: str, path: Sequence[str] | None = None,
                  target: ModuleType | None = None) -> ModuleSpec | None:
        """A spec for the names above, None for all others."""
        return ModuleSpec(name, self) if name in DOORS or name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module that is meant into the place of `module`, which importlib hands out then."""
        name = module.__name__
        if name in MOVED:
            warn_moved(name, MOVED[name])
        sys.modules[name] = importlib.import_module({**DOORS, **MOVED}[name])


def warn_moved(old: str, new: str) -> None:
    """FutureWarning, which Python shows to everybody, at the line that asked: `old` is called `new` now."""
    warnings.warn(f"{old} is now {new}; the old name goes with the next release", FutureWarning, stacklevel=3)
