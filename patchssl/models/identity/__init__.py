"""Which network gives some numbers: its tensors, how it is configured, and the code that runs them.

The weights alone do not say it: another pooling, other heads or another `tokens=` function make other numbers of them.
A network of timm that a loader built is told by its weights and a few settings, the same in every version of timm.
One's own is walked through (`codewalk`): what its functions are compiled to, the values they reach,
and all of its state. What cannot be told is listed; numbers of such a network are not to be kept for later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

from torch import nn

from patchssl.models.backbone import Backbone, ConvolutionalBackbone, TransformerBackbone, VitBackbone
from patchssl.models.identity.codewalk import CodeWalk
from patchssl.models.identity.libraries import is_changed, is_library
from patchssl.models.networks import state_sha256
from patchssl.models.pixels import PixelPatches, RawPixels

_LOADED = (VitBackbone, TransformerBackbone, ConvolutionalBackbone, RawPixels, PixelPatches)
# what of a part moves a number, beside its weights; names that torch and timm have kept
_SETTINGS = ("num_heads", "eps", "stride", "dilation", "padding", "groups", "approximate", "negative_slope",
             "pool_type", "num_prefix_tokens", "no_embed_class")
_IDLE = ("Identity", "Drop")  # how classes are called that do nothing in evaluation


class Identity(NamedTuple):
    """What tells a network from others."""

    sha256: str  # over weights, settings and code
    own_code: bool  # whether the weights say less of it than of a network that a loader built
    unknown: tuple[str, ...] = ()  # what of its code and state could not be looked into, in words
    libraries: Mapping[str, str | None] = {}  # version of each whose code it runs; numbers may depend on it


def identify(backbone: Backbone, weights_sha256: str | None = None) -> Identity:
    """The identity of `backbone`, the same in every process; `weights_sha256` spares hashing its weights again."""
    weights = weights_sha256 or backbone.weights_sha256
    about: dict[str, Any] = {"weights": weights, "mean": list(backbone.mean), "std": list(backbone.std),
                             "patch_size": backbone.patch_size}
    if type(backbone) in _LOADED and not _own_parts(backbone):
        about |= {"kind": type(backbone).__name__, "dino_positions": getattr(backbone, "dino_positions", None),
                  "parts": _parts(backbone.module)}
        return Identity(_digest(about), own_code=False, libraries={"timm": version("timm")})
    walk = CodeWalk(backbone.module.state_dict(keep_vars=True))
    walk.add(backbone, "the network")
    return Identity(_digest({**about, "code": walk.hexdigest()}), own_code=True, unknown=tuple(walk.unknown),
                    libraries=dict(sorted(walk.libraries.items())))


def _own_parts(module: nn.Module) -> bool:
    """Whether any part of `module` runs code that is no library's."""
    return any(not is_library(type(part)) or is_changed(part) for part in module.modules())


def _parts(module: nn.Module) -> list[Any]:
    """Of every part that has any, its settings, and tables that no file holds; of the smallest parts their kind."""
    found: list[Any] = []
    for name, part in module.named_modules():
        kind = type(part).__name__ if not any(part.children()) else ""
        settings = {key: _plain(getattr(part, key)) for key in _SETTINGS if hasattr(part, key)}
        if (kind or settings) and not kind.startswith(_IDLE):
            found.append([name, kind, settings])
    state = module.state_dict()
    tables = {name: table for name, table in module.named_buffers() if name not in state}
    return [*found, state_sha256(tables)] if tables else found


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else [str(value)]


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
