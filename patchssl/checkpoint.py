"""Checkpoints: written so that a kill loses nothing, read so that nothing in them runs.

A run folder keeps two: `checkpoint.pth` and the one before it, `checkpoint-previous.pth`.
A checkpoint is a plain dictionary with "format": "patchssl"; see `patchssl.pretrain.run` for its keys.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from patchssl.errors import CheckpointError
from patchssl.weights import read_torch

NEWEST = "checkpoint.pth"
PREVIOUS = "checkpoint-previous.pth"
FORMAT, VERSION = "patchssl", 1

log = logging.getLogger(__name__)


def save_checkpoint(folder: Path, checkpoint: dict[str, Any]) -> Path:
    """Write `checkpoint` as the newest of `folder`, keeping the one before it.

    Temporary file, flush, rename: at every moment one whole checkpoint is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    newest, partial = folder / NEWEST, folder / f"{NEWEST}.partial"
    try:
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **checkpoint}, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{newest} could not be written ({error}); the checkpoint before it is intact, "
                              "free some space and resume the run") from error
    if newest.exists():
        newest.replace(folder / PREVIOUS)
    partial.replace(newest)
    return newest


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint file `path`, or the newest whole one of the run folder `path`.

    Nothing is executed (`weights_only`). A damaged newest checkpoint is named in a warning and the one before
    it is used. Raises CheckpointError when none can be read.
    """
    if path.is_file():
        return _read(path)
    candidates = [path / name for name in (NEWEST, PREVIOUS) if (path / name).exists()]
    if not candidates:
        raise CheckpointError(f"{path} holds no {NEWEST}: not a run folder, or a run that has not saved yet; a file of "
                              "weights in it is named itself")
    for candidate in candidates[:-1]:
        try:
            return _read(candidate)
        except CheckpointError as error:
            log.warning("%s; using %s", error, PREVIOUS)
    return _read(candidates[-1])


def require_format(content: Any, path: Path) -> None:
    """CheckpointError unless `content` of the file `path` is a checkpoint that this version can read."""
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of patchssl")
    version = content.get("version")
    if not isinstance(version, int):
        raise CheckpointError(f"{path} does not say which version of patchssl's format it has")
    if version > VERSION:
        raise CheckpointError(f"{path} was written by a newer patchssl (format {version}, this one reads up to "
                              f"{VERSION}); update patchssl")


def _read(path: Path) -> dict[str, Any]:
    content = read_torch(path)
    require_format(content, path)
    return dict(content)
