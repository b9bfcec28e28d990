"""Checkpoints: written so that a kill loses nothing, read so that nothing in them runs.

A run folder keeps two: `checkpoint.pth` and the one before it, `checkpoint-previous.pth`.
A checkpoint is a plain dictionary with "format": "patchssl"; see `patchssl.pretrain.run` for its keys.
"""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchssl.errors import CheckpointError

NEWEST = "checkpoint.pth"
PREVIOUS = "checkpoint-previous.pth"
FORMAT, VERSION = "patchssl", 1
PREFIX = "backbone."

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
        raise CheckpointError(f"{path} holds no {NEWEST}: not a run folder, or a run that has not saved yet")
    for candidate in candidates[:-1]:
        try:
            return _read(candidate)
        except CheckpointError as error:
            log.warning("%s; using %s", error, PREVIOUS)
    return _read(candidates[-1])


def network_state(checkpoint: dict[str, Any], network: str, path: Path) -> dict[str, Tensor]:
    """Backbone weights of `network` ("teacher" or "student") in a checkpoint, without the head."""
    if network not in ("teacher", "student") or network not in checkpoint:
        there = sorted({"teacher", "student"} & set(checkpoint))
        raise CheckpointError(f"{path} has no '{network}', only {there}; choose one as {path}#NAME")
    state = {k.removeprefix(PREFIX): v for k, v in checkpoint[network].items() if k.startswith(PREFIX)}
    if not state:
        raise CheckpointError(f"'{network}' in {path} holds no '{PREFIX}*' weights: not a patchssl checkpoint?")
    return state


def _read(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        first = str(error).splitlines()[0] if str(error) else "unknown"
        raise CheckpointError(f"{path} asks to run code or is no checkpoint, and was refused: {first}") from None
    except Exception as error:  # which one depends on the byte that is wrong: a name, a length, a checksum, ...
        raise CheckpointError(f"{path} is damaged or not a checkpoint of patchssl: {error}") from None
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: its part {damaged} has a wrong checksum")
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of patchssl")
    if checkpoint.get("version", 0) > VERSION:
        raise CheckpointError(f"{path} was written by a newer patchssl (format {checkpoint['version']}, this one "
                              f"reads up to {VERSION}); update patchssl")
    return checkpoint
