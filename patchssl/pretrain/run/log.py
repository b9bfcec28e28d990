"""What a run writes down beside its checkpoints: log.jsonl, a row every few seconds, and TensorBoard's copy of it.

Both forget the rows after the checkpoint that a run is resumed from, which the run writes again. A row that a kill cut
short is no row. `report.logs` reads the same file for people, whoever wrote it, and says what of it is damaged.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from patchssl.runtime.errors import PatchSSLError, UsageError
from patchssl.runtime.files import replacing, write_through
from patchssl.runtime.text import resume_command

LOG, EVENTS, UNREADABLE = "log.jsonl", "tensorboard", "unreadable.jsonl"

log = logging.getLogger(__name__)


class MetricLog:
    """The rows of the run in `folder`, those after update `steps_done` dropped: a resumed run writes them again.

    `last` is the newest row, None without one. Rows that a full disk does not take wait for the next that it takes: a
    log does not end a run. Nor does TensorBoard, which is given up when it fails.
    """

    def __init__(self, folder: Path, steps_done: int, *, tensorboard: bool) -> None:
        self.path = folder / LOG
        kept = _lines_until(self.path, steps_done)
        if steps_done == 0:
            shutil.rmtree(folder / EVENTS, ignore_errors=True)
        self._rewrite(kept)
        self.last: dict[str, Any] | None = json.loads(kept[-1]) if kept else None
        self.board: TensorBoardWriter | None = None
        if tensorboard:
            require_tensorboard()
            self._on_board(lambda: setattr(self, "board", TensorBoardWriter(folder / EVENTS, steps_done,
                                                                            map(json.loads, kept))))
        self._waiting: list[str] = []
        if not steps_done:
            (folder / UNREADABLE).unlink(missing_ok=True)

    def append(self, row: dict[str, Any]) -> None:
        """Write `row` after the others."""
        self.last = row
        self._waiting.append(json.dumps(row))
        self._write_waiting()
        if board := self.board:
            self._on_board(lambda: board.add(row))

    def complete_last(self, values: dict[str, Any]) -> dict[str, Any]:
        """Add to the newest row what it lacks; of words TensorBoard is not told."""
        assert self.last is not None
        self.last |= values
        if self._waiting:
            self._waiting[-1] = json.dumps(self.last)
            self._write_waiting()
        else:
            try:
                self._rewrite([*self.path.read_text("utf-8").splitlines()[:-1], json.dumps(self.last)])
            except (OSError, PatchSSLError) as error:
                log.warning("%s lacks %s of update %s: %s", self.path, ", ".join(values), self.last["step"], error)
        if board := self.board:
            step = self.last["step"]
            self._on_board(lambda: board.add({"step": step, **values}))
        return self.last

    def list_unreadable(self, step: int, found: Mapping[str, str]) -> None:
        """Add images `found` unreadable by update `step`, name -> reason, to their list."""
        path = self.path.with_name(UNREADABLE)
        lines = [json.dumps({"step": step, "name": name, "reason": reason}) for name, reason in found.items()]
        try:
            _append(path, lines)
        except OSError as error:
            log.warning("%s could not be written: %s", path, error.strerror or error)

    def close(self) -> None:
        """Nothing more will be written."""
        self._write_waiting()
        if self._waiting:
            log.warning("%s lacks its last %s rows: the disk did not take them", self.path, len(self._waiting))
        if board := self.board:
            self._on_board(board.close)

    def _write_waiting(self) -> None:
        try:
            _append(self.path, self._waiting)
            self._waiting = []
        except OSError as error:
            if len(self._waiting) == 1:  # said when it begins
                log.warning("%s could not be written (%s): its rows wait until it can be", self.path,
                            error.strerror or error)

    def _on_board(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            self.board = None
            log.warning("TensorBoard's files lack what comes from now on, %s has it (%s)", self.path,
                        " ".join(str(error).split()) or type(error).__name__)

    def _rewrite(self, lines: list[str]) -> None:
        text = "".join(f"{line}\n" for line in lines)
        if not text:
            self.path.unlink(missing_ok=True)
        elif self.path.read_bytes() != text.encode():
            write_whole(self.path, text)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of the log `path`, also of a run under way or killed; [] where there is none."""
    return [json.loads(line) for line in _lines_until(path, math.inf)]


def _lines_until(path: Path, steps_done: float) -> list[str]:
    """The whole rows of the log `path` up to update `steps_done`."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= steps_done:
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # the line that a kill cut short
            continue
    return kept


def write_whole(path: Path, text: str) -> None:
    """Write or replace `path` so that a kill leaves the old text or the new one; PatchSSLError on a full disk."""
    try:
        with replacing(path) as partial:
            write_through(partial, text)
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> PatchSSLError:
    """The error that says so, and how to resume."""
    return PatchSSLError(f"{path} could not be written ({error.strerror}); what was saved before is intact: free some "
                         f"space, then resume with: {resume_command(path.parent)}")


def _append(path: Path, lines: Iterable[str]) -> None:
    """Add `lines` to the file at `path`, or none of them."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))
    except OSError:
        with suppress(OSError):
            os.truncate(path, size)
        raise


class TensorBoardWriter:
    """Event files in `folder`, one scalar for every number of a row.

    A resumed run takes back what was written after update `steps_done`; where nothing was written so far, as when
    a run is resumed with run.tensorboard=true, `rows` are those to begin with.
    """

    def __init__(self, folder: Path, steps_done: int, rows: Iterable[dict[str, Any]]) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        is_new = not folder.is_dir()
        # files are read in the order of their names, which begin with the second they were begun in
        while not is_new and any(folder.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.05)
        self._writer = SummaryWriter(str(folder), purge_step=None if is_new else steps_done + 1)
        for row in rows if is_new else ():
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Write `row` through to the disk, so that a checkpoint never knows of rows that a kill has lost."""
        for name, value in row.items():
            if name != "step" and not isinstance(value, str):
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Nothing more will be written."""
        self._writer.close()


def require_tensorboard() -> None:
    """UsageError where the library is missing."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise UsageError("run.tensorboard = true needs the library tensorboard: pip install 'patchssl[tensorboard]', "
                         "or leave it out; log.jsonl has the same numbers") from None
