"""Protocols are data: every setting that moves a number, under a name and with a fingerprint.

`resolve` turns a task and a name into the concrete record. Settings that depend on the size a network was
trained at are numbers by then, so two fingerprints are equal exactly when the numbers can be compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from patchssl.eval.transforms import ImageTransform, native_resize
from patchssl.runtime.errors import UsageError, unknown_choice


@dataclass(frozen=True)
class Protocol:
    """How a task is run: `settings` are plain JSON values and never change; `version` counts revisions."""

    task: str
    name: str
    version: int
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        # through JSON: nothing else than plain values, and no part shared with the caller
        plain = self.plain_settings()
        frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}
        object.__setattr__(self, "settings", MappingProxyType(frozen))

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __reduce__(self) -> tuple[type[Protocol], tuple[Any, ...]]:
        return Protocol, (self.task, self.name, self.version, dict(self.settings))

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the sha256 of task, name, version and settings as canonical JSON."""
        settings = dict(self.settings)
        record = {"task": self.task, "name": self.name, "version": self.version, "settings": settings}
        return hashlib.sha256(_canonical(record).encode()).hexdigest()[:16]

    def plain_settings(self) -> dict[str, Any]:
        """A copy of the settings as a record holds them: lists, not tuples."""
        return dict(json.loads(_canonical(dict(self.settings))))

    def transform(self) -> ImageTransform:
        """The step from an image's pixels to what the network's normalization gets."""
        plain = self.plain_settings()
        keys = ("resize", "crop", "square", "interpolation")
        return ImageTransform({key: plain[key] for key in keys if key in plain})


def _canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def resolve(task: str, name: str | None, image_size: int) -> Protocol:
    """The protocol `name` of `task` for a network trained at `image_size` pixels.

    None is the default: `native` for networks whose training size is not 224, `dino` otherwise.
    Raises UsageError for an unknown task or name.
    """
    makers: dict[str, dict[str, Callable[[int], dict[str, Any]]]] = {
        "knn": {"dino": _knn_dino, "native": _knn_native},
    }
    if task not in makers:
        raise UsageError(unknown_choice("task", task, makers))
    return choose_protocol(task, name, image_size, makers[task])


def choose_protocol(task: str, name: str | None, image_size: int,
                    makers: Mapping[str, Callable[[int], dict[str, Any]]], usual: str = "dino") -> Protocol:
    """The protocol `name` of `task`, whose settings `makers[name](image_size)` gives.

    None is the default: `native` for networks whose training size is not 224, `usual` otherwise. Raises UsageError
    for an unknown name.
    """
    chosen = name or (usual if image_size == 224 else "native")
    if chosen not in makers:
        raise UsageError(unknown_choice(f"{task} protocol", chosen, makers))
    return Protocol(task, chosen, 1, makers[chosen](image_size))


def knn_protocol(name: str | None, image_size: int) -> Protocol:
    """The k-NN protocol `dino` or `native` (None: the default) for a training size of `image_size` pixels."""
    return resolve("knn", name, image_size)


def _knn_dino(image_size: int) -> dict[str, Any]:
    """k-NN as facebookresearch/dino's eval_knn.py runs it."""
    return _knn(resize=256, crop=224)


def _knn_native(image_size: int) -> dict[str, Any]:
    """The same vote at the size the network was trained at."""
    return _knn(resize=native_resize(image_size), crop=image_size)


def _knn(resize: int, crop: int) -> dict[str, Any]:
    return {
        "resize": resize,
        "crop": crop,
        "interpolation": "bicubic",
        "feature": "final class token",
        "normalization": "l2",
        "similarity": "cosine",
        "vote": "exp(similarity / temperature)",
        "temperature": 0.07,
        "ks": [10, 20, 100, 200],
        "headline_k": 20,
    }
