"""Features computed once: a folder of arrays, each under a hash of everything its numbers depend on.

An entry is an array and a small JSON file beside it that says what it is and what its bytes hash to; a damaged
entry is computed again. The longest unused entries go when the folder would grow past its limit. A pass over an image
set stores an entry per output and block of images, so that a killed one resumes there; it never removes blocks of its
own, so that of a set that does not fit the first blocks stay and help the next time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchssl.runtime.files import default_folder, default_limit, read_regular, replacing

_KEY_DIGITS = 40
_LARGEST_FACTS = 2**24  # bytes
_ABANDONED = 3600.0  # seconds after which a file that was begun has no writer any more: one takes well below a minute
_LOOKS = 16  # looks at the whole folder while a limit's worth of bytes is stored: other processes store there, too

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
        self._total: int | None = None  # bytes in the folder, as far as this process knows
        self._added = 0  # bytes of them since the last look
        self._oldest: deque[tuple[float, Path, int]] = deque()  # when last used, and bytes

    def holds(self, facts: Mapping[str, Any]) -> bool:
        """Whether something is stored under `facts`; it may turn out to be damaged."""
        return all(file.is_file() for file in self._files(facts))

    def load(self, facts: Mapping[str, Any]) -> Tensor | None:
        """The array stored under `facts`, None where there is none or it is damaged."""
        array_file, facts_file = self._files(facts)
        try:
            stored = json.loads(read_regular(facts_file, _LARGEST_FACTS))
            content = read_regular(array_file)
            if hashlib.blake2b(content).hexdigest() != stored["blake2b"]:
                raise ValueError("its bytes have changed")
            array = np.frombuffer(content, dtype="<f4").reshape(stored["shape"])
            os.utime(array_file)
            return torch.from_numpy(array.copy())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            log.warning("%s is damaged (%s) and is computed again", array_file, error)
            return None

    def store(self, facts: Mapping[str, Any], features: Tensor, keep: Collection[Path] = ()) -> bool:
        """Keep float32 `features` under `facts`, in the place of entries that are longest unused and not in `keep`.

        False where there is no room for it, or, a warning says so, where it cannot be written.
        """
        array_file, facts_file = self._files(facts)
        if self.holds(facts) and self.load(facts) is not None:
            return True  # another process was faster: array and facts of one of the two belong together
        content = features.contiguous().numpy().astype("<f4", copy=False).tobytes()
        described = {"facts": dict(facts), "shape": list(features.shape),
                     "blake2b": hashlib.blake2b(content).hexdigest()}
        try:
            array_file.parent.mkdir(parents=True, exist_ok=True)
            if not self._make_room(len(content), {array_file, *keep}):
                return False
            _write(array_file, content)
            _write(facts_file, json.dumps(described, sort_keys=True).encode())
        except OSError as error:
            log.warning("features are not cached in %s: %s", self.folder, error)
            return False
        self._total = (self._total or 0) + len(content)
        self._added += len(content)
        return True

    def entries(self) -> list[Entry]:
        """Everything stored, longest unused first."""
        found = []
        for facts_file in self.folder.glob("*.json") if self.folder.is_dir() else ():
            array_file = facts_file.with_suffix(".f32")
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                status = array_file.stat()
                facts = json.loads(read_regular(facts_file, _LARGEST_FACTS))["facts"]
                found.append(Entry(array_file, status.st_size, status.st_mtime, facts))
        return sorted(found, key=lambda entry: entry.used)

    def begun_bytes(self) -> int:
        """Bytes of files that are being written, or that a process was killed over: those go after an hour."""
        found = 0
        for path in self.folder.glob(".*.partial") if self.folder.is_dir() else ():
            with contextlib.suppress(OSError):
                found += path.stat().st_size
        return found

    def clear(self) -> int:
        """Remove everything; returns how many bytes that were."""
        size = sum(entry.size for entry in self.entries()) + self.begun_bytes()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._total = None
        return size

    def path(self, facts: Mapping[str, Any]) -> Path:
        """The file of the array that is stored under `facts`."""
        return self._files(facts)[0]

    def _make_room(self, size: int, keep: Collection[Path]) -> bool:
        """Remove entries until `size` more bytes fit; False where all that is left is to be kept."""
        if self._total is None or self._added > self.limit / _LOOKS:
            self._look()
        looked = False
        while (self._total or 0) + size > self.limit:
            if not self._oldest:
                if looked:
                    return False
                self._look()
                looked = True
                continue
            used, path, stored = self._oldest.popleft()
            with contextlib.suppress(FileNotFoundError):
                if path in keep or path.stat().st_mtime > used:  # used since: not among the oldest any more
                    continue
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)
            self._total = (self._total or 0) - stored
        return True

    def _look(self) -> None:
        """See what is in the folder, whoever stored it, and remove what was begun and abandoned."""
        found, begun = [], 0
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                if entry.name.endswith(".f32"):
                    found.append((status.st_mtime, Path(entry.path), status.st_size))
                elif entry.name.endswith(".partial"):
                    begun += status.st_size
                    if time.time() - status.st_mtime > _ABANDONED:
                        Path(entry.path).unlink(missing_ok=True)
                        begun -= status.st_size
        self._oldest = deque(sorted(found))
        self._total, self._added = begun + sum(size for _, _, size in found), 0

    def _files(self, facts: Mapping[str, Any]) -> tuple[Path, Path]:
        text = json.dumps(dict(facts), sort_keys=True, separators=(",", ":"), allow_nan=False)
        key = hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]
        return self.folder / f"{key}.f32", self.folder / f"{key}.json"


class CachedBlocks:
    """The blocks `parts` of one pass in `cache`, whose outputs depend on `facts`; without either, there are none."""

    def __init__(self, cache: FeatureCache | None, facts: Mapping[str, Any] | None, outputs: Sequence[str],
                 parts: Sequence[range]) -> None:
        self._cache = cache if facts is not None else None
        self._facts, self._outputs, self._parts = facts or {}, outputs, parts
        self._own = frozenset(self._cache.path(self._about(output, part)) for part in parts for output in outputs
                              ) if self._cache is not None else frozenset()
        self._full = self._said = False

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
        """Keep a block whose numbers are all finite, while there is room for this pass."""
        if self._cache is None or self._full:
            return
        self._say(self._cache, block)
        for output, tensor in block.items():
            if torch.isfinite(tensor).all():
                self._full |= not self._cache.store(self._about(output, part), tensor, keep=self._own)

    def _say(self, cache: FeatureCache, block: Block) -> None:
        """At the first block: what the pass needs, if the cache keeps less."""
        if self._said:
            return
        self._said = True
        need = 4 * sum(tensor.shape[1] for tensor in block.values()) * sum(map(len, self._parts))
        if need > cache.limit:
            log.warning("the features of this pass take %.3g GiB and the cache keeps at most %.3g: the last %.0f %% of "
                        "them will be computed again next time; PATCHSSL_CACHE_GIB=%d keeps all of them",
                        need / 2**30, cache.limit / 2**30, 100 * (1 - cache.limit / need),
                        math.ceil(1.1 * need / 2**30))

    def _about(self, output: str, part: range) -> dict[str, Any]:
        return {**self._facts, "output": output, "block": [part.start, part.stop]}


def _write(path: Path, content: bytes) -> None:
    """All of `content` or nothing."""
    with replacing(path) as partial:
        partial.write_bytes(content)
