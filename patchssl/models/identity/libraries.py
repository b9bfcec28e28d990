"""Which code is a library's, and which of a library's networks somebody has changed by hand."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
import types
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# large and released with care: the version says all; of others what is installed is looked at
_KNOWN = frozenset({"patchssl", "torch", "torchvision", "timm", "transformers", "numpy", "scipy", "PIL"})
_MOST_FILES = 3000  # of a package that are read


def is_library(found: Any) -> bool:
    """Whether a class or module comes from the standard library, an installed package or this one."""
    name = found.__module__ if isinstance(found, type) else found.__name__
    top = str(name).partition(".")[0]
    files = (getattr(sys.modules.get(place), "__file__", None) for place in (str(name), top))
    file = next(filter(None, files), None)
    return top == "patchssl" or (is_library_file(file) if file else top in sys.stdlib_module_names)


@cache
def is_library_file(name: str) -> bool:
    """Whether code of the file `name` belongs to the standard library, an installed package or this one."""
    if name.startswith("<frozen "):
        return True
    parts = Path(name).parts
    if {"site-packages", "dist-packages"} & {*parts}:
        return True
    own = Path(__file__).resolve().parents[2]
    homes = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("platstdlib")), own]
    return any(Path(name).is_relative_to(home) or Path(name).is_relative_to(home.resolve()) for home in homes)


@cache
def installed_code(package: str) -> str:
    """sha256 of the source files of an installed `package`; "" of one known by its version, or too large to read."""
    module = sys.modules.get(package)
    roots = [Path(root) for root in getattr(module, "__path__", ())]
    files = [(root, file) for root in roots for file in sorted(root.rglob("*.py"))]
    if not roots and getattr(module, "__file__", None):
        files = [(Path(module.__file__).parent, Path(module.__file__))]  # type: ignore[union-attr, arg-type]
    if package in _KNOWN or package in sys.stdlib_module_names or len(files) > _MOST_FILES:
        return ""
    digest = hashlib.sha256()
    for root, file in files:
        digest.update(f"{file.relative_to(root)}\0".encode("utf-8", "surrogateescape"))
        digest.update(file.read_bytes())
    return digest.hexdigest()


def patched_methods(cls: type) -> list[Any]:
    """Functions of one's own that were put into a library's class."""
    return [value for base in cls.__mro__ if is_library(base) for _, value in sorted(vars(base).items())
            if _is_ones_own(value)]


def is_changed(module: nn.Module) -> bool:
    """Whether one's own code was put into a part of a network of a library, or hooked to it."""
    own = vars(module)
    return bool(patched_methods(type(module)) or any(map(_is_ones_own, own.values())) or any(map(own.get, HOOKS)))


def _is_ones_own(value: Any) -> bool:
    """A function that is neither a library's nor made by one from text, as dataclasses make theirs."""
    function = getattr(value, "__func__", value)
    name = function.__code__.co_filename if isinstance(function, types.FunctionType) else "<string>"
    return not is_library_file(name) and not name.startswith("<string>")
