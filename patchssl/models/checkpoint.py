"""Checkpoints: written so that a kill loses nothing, read so that nothing in them runs.

A run folder keeps two: `checkpoint.pth` and the one before it, `checkpoint-previous.pth`. They carry checksums of all
their parts (torch writes them, `patchssl.models.weights` compares them), so that one wrong bit is noticed.
A checkpoint is a plain dictionary with "format": "patchssl"; see `patchssl.pretrain.run.loop` for its keys.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from patchssl.models.weights import read_torch
from patchssl.runtime.errors import CheckpointError
from patchssl.runtime.text import resume_command

NEWEST = "checkpoint.pth"
PREVIOUS = "checkpoint-previous.pth"
DAMAGED = "checkpoint.pth.damaged"
FORMAT, VERSION = "patchssl", 1

log = logging.getLogger(__name__)


def save_checkpoint(folder: Path, checkpoint: dict[str, Any]) -> Path:
    """Write `checkpoint` as the newest of `folder`, keeping the one before it.

    Temporary file, flush, rename: at every moment one whole checkpoint is there, if there was one (who resumes from
    a folder whose newest is damaged calls `recover_checkpoint` first). CheckpointError on a full disk.
    """
    newest, partial = folder / NEWEST, folder / f"{NEWEST}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **checkpoint}, file)
            file.flush()
            os.fsync(file.fileno())
        if newest.exists():
            newest.replace(folder / PREVIOUS)
        partial.replace(newest)
        _flush_names(folder)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        before = "the checkpoint before it is intact, " if newest.exists() else "no checkpoint was there before it, "
        raise CheckpointError(f"{newest} could not be written ({_reason(error)}); {before}"
                              f"free some space, then resume with: {resume_command(folder)}") from error
    return newest


def _flush_names(folder: Path) -> None:
    """Have the renames on the disk too, before anything counts on them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """What the system said: torch's writer puts its own words over it."""
    while isinstance(error, RuntimeError) and error.__context__ is not None:
        error = error.__context__
    return error.strerror or str(error) if isinstance(error, OSError) else str(error).splitlines()[0]


# what the checkpoint of a run holds, and of which kind
_NEEDED: Mapping[str, Any] = {"student": Mapping, "teacher": Mapping, "network": Mapping, "origin": Mapping}
_KNOWN: Mapping[str, Any] = {**_NEEDED, "recipe": str, "seconds": (int, float), "steps_done": int, "centers": Mapping,
                             "optimizer": Mapping, "scaler": Mapping, "unreadable": Mapping}


def load_checkpoint(path: Path, *, of_run: bool = True) -> dict[str, Any]:
    """The checkpoint file `path`, or the newest whole one of the run folder `path`.

    Nothing is executed (`weights_only`). A newest checkpoint that is damaged, or lacks what one of a run has (unless
    `of_run` is false), is named in a warning and the one before it is used. CheckpointError when none can be read.
    """
    return _read(path, of_run) if path.is_file() else _newest_whole(path, of_run)[1]


def recover_checkpoint(folder: Path) -> dict[str, Any]:
    """As `load_checkpoint` of a run folder, for who resumes it and writes there.

    A damaged newest checkpoint is renamed, or the next save would put it in the place of the whole one before it.
    """
    used, checkpoint = _newest_whole(folder, of_run=True)
    if used.name != NEWEST and (folder / NEWEST).exists():
        (folder / NEWEST).replace(folder / DAMAGED)
    return checkpoint


def _newest_whole(folder: Path, of_run: bool) -> tuple[Path, dict[str, Any]]:
    candidates = [folder / name for name in (NEWEST, PREVIOUS) if (folder / name).exists()]
    if not candidates:
        raise CheckpointError(f"{folder} holds no {NEWEST}: not a run folder, or a run that has not saved yet; a file "
                              "of weights in it is named itself")
    for candidate in candidates[:-1]:
        try:
            return candidate, _read(candidate, of_run)
        except CheckpointError as error:
            log.warning("%s; using %s", error, PREVIOUS)
    return candidates[-1], _read(candidates[-1], of_run)


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


def _read(path: Path, of_run: bool) -> dict[str, Any]:
    content = read_torch(path)
    require_format(content, path)
    if of_run:
        if lacking := [name for name in _NEEDED if name not in content]:
            raise CheckpointError(f"{path} lacks what a checkpoint of patchssl says about itself: {', '.join(lacking)}")
        if wrong := [name for name, kind in _KNOWN.items() if name in content and not isinstance(content[name], kind)]:
            raise CheckpointError(f"{path} lacks what a checkpoint of patchssl says about itself: of another kind is "
                                  f"{', '.join(wrong)}")
    return dict(content)
