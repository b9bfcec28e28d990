"""A digest of Python code and of all that it reaches: functions, closures, globals, objects with their state.

Functions count by what they are compiled to, which is what runs: a file may have changed since it was imported.
Code of the standard library and of well-known packages counts by its name, of other installed packages by all of their
files. What cannot be looked into, such as
a random generator's state, a compiled module or a function that runs text as code, is listed in words.
"""

from __future__ import annotations

import copyreg
import dis
import hashlib
import random
import sys
import types
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patchssl.models.identity.libraries import (
    HOOKS,
    installed_code,
    is_library,
    is_library_file,
    patched_methods,
)

_SCALARS = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis))
# methods that make a network, not its numbers, and what Python keeps of a class
_MAKERS = frozenset({"__init__", "__new__", "__init_subclass__", "__class_getitem__"})
_OF_CLASS = frozenset({"__module__", "__dict__", "__weakref__", "__doc__", "__annotations__", "__qualname__",
                       "__slots__", "__abstractmethods__", "_abc_impl", "__dataclass_fields__", "__dataclass_params__",
                       "__match_args__", "__parameters__", "__orig_bases__"})
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)
_INNER = ("fget", "func", "__func__")  # where a property, or a method of a kind, has its function
_OF_MODULE = frozenset(vars(nn.Module()))  # hooks, parts, tensors: looked at one by one
_OF_BACKBONE = frozenset({"origin", "notes", "image_size"})  # what it is called, not what it computes
# where a network of transformers was loaded from
_PLACES = frozenset({"_name_or_path", "name_or_path", "_commit_hash", "transformers_version"})
_OUTSIDE = frozenset({"eval", "exec", "globals", "locals", "__import__", "import_module", "environ", "getenv", "open",
                      "read_text", "read_bytes", "urandom",
                      # readers of files, and what draws from generators that all share
                      "load", "load_file", "safe_open", "fromfile", "loadtxt", "genfromtxt", "memmap", "imread",
                      "read_image", "read_file", "read_csv", "read_json", "read_parquet", "urlopen", "from_pretrained",
                      "load_state_dict_from_url", "listdir", "scandir", "glob", "rand", "randn", "randint", "randperm",
                      "bernoulli", "multinomial", "rand_like", "randn_like", "time", "perf_counter", "now"})
_RANDOM = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_MOST, _ENOUGH = 200_000, 10  # values; reasons, after which nothing more is looked at


class CodeWalk:
    """Collects the digest of values `add`ed in turn; `state` are tensors that are known already, by name."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.unknown: dict[str, None] = {}
        self.libraries: dict[str, str | None] = {}
        self._digest = hashlib.sha256()
        self._state = {id(tensor): name for name, tensor in state.items()}
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no id is given away twice
        self._count = 0
        self._modules: set[tuple[int, frozenset[str]]] = set()  # by the names that were asked of them
        self._making = False  # in a method that makes networks: what it reads has become their state
        self._names: frozenset[str] = frozenset()  # attributes that the function being looked at may ask of a module

    def hexdigest(self) -> str:
        """sha256 of all that was added."""
        return self._digest.hexdigest()

    def add(self, value: Any, where: str) -> None:
        """Look into `value`, which is found at the place `where` (in words)."""
        try:
            self._add(value, where)
        except RecursionError:
            self._give_up(where, "nested too deep")
        except Exception as error:  # an object's own code, which even asking for its class may run
            self._give_up(where, f"raising {type(error).__name__} when it is looked at")

    def _add(self, value: Any, where: str) -> None:
        self._count += 1
        if self._count > _MOST:
            self._give_up("the network", f"made of more than {_MOST:,} values")
        if len(self.unknown) >= _ENOUGH or self._count > _MOST:
            return
        if type(value) in _SCALARS:
            self._text(type(value).__name__, repr(value))
        elif type(value) in (list, tuple):
            self._text(type(value).__name__, len(value))
            for number, inner in enumerate(value):
                self._add(inner, f"{where}[{number}]")
        elif type(value) in (set, frozenset):
            self._set(value, where)
        elif type(value) in (dict, types.MappingProxyType):
            self._dict(value, where)
        elif isinstance(value, types.CodeType):
            self._code(value)
        elif isinstance(value, types.ModuleType):
            self._module(value, where)
        elif id(value) in self._seen:
            self._text("again", self._seen[id(value)])
        else:
            self._seen[id(value)] = len(self._seen)
            self._alive.append(value)
            self._thing(value, where)

    def _thing(self, value: Any, where: str) -> None:
        """What is compared by what it is, not by its text."""
        if isinstance(value, Tensor):
            self._tensor(value, where)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self._text("array", value.dtype.str, value.shape)
            self._digest.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, types.FunctionType):
            self._function(value, where)
        elif isinstance(value, types.MethodType):
            self._text("method")
            self._add(value.__func__, where)
            self._add(value.__self__, f"the object of {where}")
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, property | staticmethod | classmethod | cached_property):
            self._text(type(value).__name__)
            self._add(next(getattr(value, name) for name in _INNER if hasattr(value, name)), where)
        elif isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType):
            self._builtin(value, where)
        elif isinstance(value, nn.Module):
            self._network(value, where)
        else:
            self._object(value, where)

    def _tensor(self, tensor: Tensor, where: str) -> None:
        if (name := self._state.get(id(tensor))) is not None:
            return self._text("weights", name)
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            return self._give_up(where, "a tensor without plain numbers")
        self._text("tensor", tensor.dtype, tuple(tensor.shape))
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        self._digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)

    def _network(self, module: nn.Module, where: str) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            return self._give_up(where, "compiled TorchScript")
        if isinstance(inner := vars(module).get("_modules", {}).get("_orig_mod"), nn.Module):  # torch.compile's
            return self._add(inner, where)
        self._add(type(module), where)
        for method in patched_methods(type(module)):
            self._add(method, f"a method of {where}")
        own = vars(module)
        for kind in ("_parameters", "_buffers", "_modules", *HOOKS):
            self._dict(dict(own[kind]) if kind not in HOOKS else dict(enumerate(own[kind].values())), where)
        skipped = _OF_MODULE | _PLACES | (_OF_BACKBONE if "origin" in own else frozenset())
        self._dict({name: value for name, value in own.items() if name not in skipped}, where)

    def _function(self, function: types.FunctionType, where: str) -> None:
        code = function.__code__
        named = f"{where} ({function.__qualname__})" if function.__qualname__ not in where else where
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        before = self._names
        if library := is_library_file(code.co_filename):  # its closure may hold one's own code: a decorator's does
            self._library(function.__globals__.get("__name__"), code.co_name)  # `__module__` may be what it wraps
        else:
            self._names = frozenset(name for part in _codes(code) for name in part.co_names)
            self._code(code)
            self._note(code, named)
            self._add([function.__defaults__, function.__kwdefaults__], f"a default of {named}")
        for name, cell in sorted(cells.items()):
            try:
                self._add(cell.cell_contents, f"'{name}' of {named}")
            except ValueError:  # not set yet
                self._text("empty", name)
        if not library:
            self._dict(vars(function), f"an attribute of {named}")
            self._reached(function, named)
        self._names = before

    def _reached(self, function: types.FunctionType, where: str) -> None:
        """What the function asks of its module and of modules that it imports."""
        codes = _codes(function.__code__)
        asked = {name for code in codes for name in _steps(code, "LOAD_GLOBAL", "LOAD_NAME")}
        for name in sorted(asked & function.__globals__.keys()):
            self._text("global", name)
            self._add(function.__globals__[name], f"'{name}'")
        package = str(function.__globals__.get("__package__") or "")
        for name in sorted({name for code in codes for name in _steps(code, "IMPORT_NAME")}):
            found = sys.modules.get(name) or sys.modules.get(f"{package}.{name}")
            if found is not None:
                self._add(found, f"'{name}'")
            elif name.partition(".")[0] not in sys.stdlib_module_names:
                self._give_up(where, f"importing {name or 'something'} as it runs")

    def _note(self, code: types.CodeType, where: str) -> None:
        """Say what a function's code does that this walk cannot follow."""
        inner, outer = _codes(code), {*code.co_freevars}
        outside = sorted(_OUTSIDE & {name for part in inner for name in part.co_names})
        if outside and not self._making:
            self._give_up(where, f"using {', '.join(outside)}")
        changed = {name for part in inner for name in _steps(part, "STORE_GLOBAL")}
        changed |= {name for part in inner for name in _steps(part, "STORE_DEREF")} & outer
        for name in sorted(changed):
            self._give_up(where, f"changing '{name}', which later calls see")

    def _code(self, code: types.CodeType) -> None:
        self._text("code", *sys.version_info[:2], code.co_flags, code.co_argcount, code.co_posonlyargcount,
                   code.co_kwonlyargcount, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        self._digest.update(code.co_code + getattr(code, "co_exceptiontable", b""))
        for constant in code.co_consts:
            self._add(constant, code.co_name)

    def _class(self, cls: type) -> None:
        if is_library(cls):
            return self._library(cls.__module__, cls.__qualname__)
        self._text("class", cls.__qualname__)
        for base in cls.__mro__[1:]:
            self._add(base, base.__qualname__)
        for name, value in sorted(vars(cls).items()):
            if name not in _OF_CLASS and not isinstance(value, _SLOTS):
                self._text("of class", name)
                before, self._making = self._making, name in _MAKERS
                self._add(value, f"{cls.__qualname__}.{name}")
                self._making = before

    def _module(self, module: types.ModuleType, where: str) -> None:
        if is_library(module):
            return self._library(module.__name__, "")
        if (known := (id(module), self._names)) in self._modules:
            return self._text("again", module.__name__)
        self._modules.add(known)
        if not str(getattr(module, "__file__", None) or "").endswith(".py") and not hasattr(module, "__path__"):
            return self._give_up(where, "a module without a source file")
        every = bool(self._names & {"getattr", "vars"})
        for name, value in sorted(vars(module).items()):
            if name in self._names or (every and not name.startswith("__")):
                self._text("of module", name)
                self._add(value, f"{module.__name__}.{name}")

    def _builtin(self, function: Any, where: str) -> None:
        owner = getattr(function, "__self__", getattr(function, "__objclass__", None))
        if owner is None or isinstance(owner, type | types.ModuleType):
            home = getattr(function, "__module__", None) or getattr(owner, "__name__", "builtins")
            if isinstance(owner, types.ModuleType) and not is_library(owner):
                return self._give_up(where, "compiled code")
            return self._library(str(home), function.__qualname__)
        self._text("builtin", function.__name__)
        self._add(owner, where)

    def _object(self, value: Any, where: str) -> None:
        """By what pickle would keep of it; an object that has no such form cannot be told from others."""
        if isinstance(value, _RANDOM):
            return self._give_up(where, "a generator of random numbers")
        try:
            known = copyreg.dispatch_table.get(type(value))
            form = known(value) if known else value.__reduce_ex__(4)
        except RecursionError:
            raise
        except Exception:  # the object's own code
            return self._give_up(where, f"an object of {type(value).__module__}.{type(value).__qualname__}")
        if isinstance(form, str):  # a name stands for it: where it wraps a function, only that tells what it does
            self._library(type(value).__module__, form)
            return self._add(getattr(value, "__wrapped__", None), where)
        make, arguments, state, *items = (*form, None)[:5]
        if type(state) is dict:
            state = {name: inner for name, inner in state.items() if name not in _PLACES}
        self._text("object")
        self._add([make, arguments, state, *(None if part is None else list(part) for part in items)], where)

    def _dict(self, found: Mapping[Any, Any], where: str) -> None:
        self._text("dict", len(found))
        texts = all(type(key) is str for key in found)
        for key in sorted(found) if texts else found:
            self._add(key, where)
            self._add(found[key], f"{where}.{key.lstrip('_')}" if texts else where)

    def _set(self, found: Iterable[Any], where: str) -> None:
        if all(map(_is_plain, found)):
            return self._text("set", *sorted(map(repr, found)))
        self._give_up(where, "a set of objects")

    def _library(self, module: str | None, name: str) -> None:
        top = str(module or "builtins").partition(".")[0]
        if top not in sys.stdlib_module_names:
            version = getattr(sys.modules.get(top), "__version__", None)
            self.libraries[top] = None if version is None else str(version)
        self._text("library", module, name, installed_code(top))

    def _give_up(self, where: str, why: str) -> None:
        self.unknown.setdefault(f"{where} is {why}" if why.startswith(("a ", "an ")) else f"{where}: {why}")
        self._text("unknown", why)

    def _text(self, *parts: Any) -> None:
        self._digest.update("\0".join([*map(str, parts), "\n"]).encode("utf-8", "backslashreplace"))


def _is_plain(value: Any) -> bool:
    return type(value) in _SCALARS or (type(value) is tuple and all(map(_is_plain, value)))


def _codes(code: types.CodeType) -> list[types.CodeType]:
    """`code` and all that is defined inside of it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return [code, *(found for part in inner for found in _codes(part))]


def _steps(code: types.CodeType, *kinds: str) -> list[str]:
    """The names that instructions of these `kinds` are about."""
    return [str(step.argval) for step in dis.get_instructions(code) if step.opname in kinds]
