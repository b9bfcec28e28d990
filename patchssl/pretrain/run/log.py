"""What a run writes down beside its checkpoints: log.jsonl, a row every few seconds, and TensorBoard's copy of it.

Both forget the rows after the checkpoint that a run is resumed from, which the run writes again. A row that a kill cut
short is no row. `report.logs` reads the same file for people, whoever wrote it, and says what of it is damaged.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from patchssl.runtime.errors import PatchSSLError, UsageError
from patchssl.runtime.files import replacing, write_through
from patchssl.runtime.text import resume_command

LOG, EVENTS = "log.jsonl", "tensorboard"


class MetricLog:
    """The rows of the run in `folder`, those after update `steps_done` dropped: a resumed run writes them again.

    `last` is the last row that was kept, None without one.
    """

    def __init__(self, folder: Path, steps_done: int, *, tensorboard: bool) -> None:
        self.path = folder / LOG
        kept = _lines_until(self.path, steps_done)
        if steps_done == 0:
            shutil.rmtree(folder / EVENTS, ignore_errors=True)
        self._rewrite(kept)
        self.last: dict[str, Any] | None = json.loads(kept[-1]) if kept else None
        self.board = TensorBoardWriter(folder / EVENTS, steps_done, map(json.loads, kept)) if tensorboard else None

    def append(self, row: dict[str, Any]) -> None:
        """Write `row` after the others; PatchSSLError on a full disk."""
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            if self.board:
                self.board.add(row)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def complete_last(self, key: str, value: float) -> dict[str, Any]:
        """Add to the last row that was kept what it lacks; before the first `append`."""
        assert self.last is not None
        self.last |= {key: value}
        self._rewrite([*self.path.read_text("utf-8").splitlines()[:-1], json.dumps(self.last)])
        if self.board:
            self.board.add({"step": self.last["step"], key: value})
        return self.last

    def close(self) -> None:
        """Nothing more will be written."""
        if self.board:
            self.board.close()

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
            if name != "step":
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
