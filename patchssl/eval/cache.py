"""Features computed once: a folder of arrays, each under a hash of everything its numbers depend on.

An entry is an array and a small JSON file beside it that says what it is and what its bytes hash to; a damaged
entry is computed again. The oldest unused entries go when the folder grows past its limit. A pass over an image set
stores an entry per output and block of images, so that a killed one resumes there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchssl.runtime.files import default_folder, default_limit, replacing

_KEY_DIGITS = 40

Block = dict[str, Tensor]  # output -> (images of the block, D)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One array in the cache, and the facts it was stored under."""

    path: Path
    size: int  # bytes
    used: float  # seconds since 1970
    facts: Mapping[str, Any]


class FeatureCache:
    """Arrays below `folder`, at most `limit` bytes of them (default: see `default_limit`).

    The folder is made when something is stored.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder = (folder or default_folder()) / "features"
        self.limit = default_limit() if limit is None else limit

    def holds(self, facts: Mapping[str, Any]) -> bool:
        """Whether something is stored under `facts`; it may turn out to be damaged."""
        return all(file.is_file() for file in self._files(facts))

    def load(self, facts: Mapping[str, Any]) -> Tensor | None:
        """The array stored under `facts`, None where there is none or it is damaged."""
        array_file, facts_file = self._files(facts)
        try:
            stored = json.loads(facts_file.read_text("utf-8"))
            content = array_file.read_bytes()
            if hashlib.blake2b(content).hexdigest() != stored["blake2b"]:
                raise ValueError("its bytes have changed")
            array = np.frombuffer(content, dtype="<f4").reshape(stored["shape"])
            os.utime(array_file)
            return torch.from_numpy(array.copy())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%s) and is computed again", array_file, error)
            return None

    def store(self, facts: Mapping[str, Any], features: Tensor) -> None:
        """Keep float32 `features` under `facts`; where that is not possible, a warning says so and all goes on."""
        array_file, facts_file = self._files(facts)
        content = features.contiguous().numpy().astype("<f4", copy=False).tobytes()
        described = {"facts": dict(facts), "shape": list(features.shape),
                     "blake2b": hashlib.blake2b(content).hexdigest()}
        try:
            array_file.parent.mkdir(parents=True, exist_ok=True)
            _write(array_file, content)
            _write(facts_file, json.dumps(described, sort_keys=True).encode())
            self._prune(keep=array_file)
        except OSError as error:
            log.warning("features are not cached in %s: %s", self.folder, error)

    def entries(self) -> list[Entry]:
        """Everything stored, longest unused first."""
        found = []
        for facts_file in self.folder.glob("*.json") if self.folder.is_dir() else ():
            array_file = facts_file.with_suffix(".f32")
            with contextlib.suppress(OSError, ValueError, KeyError):
                status = array_file.stat()
                facts = json.loads(facts_file.read_text("utf-8"))["facts"]
                found.append(Entry(array_file, status.st_size, status.st_mtime, facts))
        return sorted(found, key=lambda entry: entry.used)

    def clear(self) -> int:
        """Remove everything; returns how many bytes that were."""
        size = sum(entry.size for entry in self.entries())
        shutil.rmtree(self.folder, ignore_errors=True)
        return size

    def _prune(self, keep: Path) -> None:
        statuses = {path: path.stat() for path in self.folder.glob("*.f32")}
        excess = sum(status.st_size for status in statuses.values()) - self.limit
        for path in sorted(statuses, key=lambda path: statuses[path].st_mtime):
            if excess <= 0:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                path.with_suffix(".json").unlink(missing_ok=True)
                excess -= statuses[path].st_size

    def _files(self, facts: Mapping[str, Any]) -> tuple[Path, Path]:
        text = json.dumps(dict(facts), sort_keys=True, separators=(",", ":"), allow_nan=False)
        key = hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]
        return self.folder / f"{key}.f32", self.folder / f"{key}.json"


class CachedBlocks:
    """The blocks of one pass in `cache`, whose outputs depend on `facts`; without either, there are none."""

    def __init__(self, cache: FeatureCache | None, facts: Mapping[str, Any] | None, outputs: Sequence[str]) -> None:
        self._cache = cache if facts is not None else None
        self._facts, self._outputs = facts or {}, outputs

    def holds(self, part: range) -> bool:
        """Whether the block of the images in `part` is there, perhaps damaged."""
        cache = self._cache
        return cache is not None and all(cache.holds(self._about(output, part)) for output in self._outputs)

    def load(self, part: range) -> Block | None:
        """The block of the images in `part`, None unless every output of it is there."""
        if self._cache is None:
            return None
        stored = {output: self._cache.load(self._about(output, part)) for output in self._outputs}
        found = {output: tensor for output, tensor in stored.items() if tensor is not None}
        return found if len(found) == len(stored) else None

    def store(self, part: range, block: Block) -> None:
        """Keep a block whose numbers are all finite."""
        if self._cache is None:
            return
        for output, tensor in block.items():
            if torch.isfinite(tensor).all():
                self._cache.store(self._about(output, part), tensor)

    def _about(self, output: str, part: range) -> dict[str, Any]:
        return {**self._facts, "output": output, "block": [part.start, part.stop]}


def _write(path: Path, content: bytes) -> None:
    """All of `content` or nothing."""
    with replacing(path) as partial:
        partial.write_bytes(content)
