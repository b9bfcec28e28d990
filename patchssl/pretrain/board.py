"""TensorBoard's copy of the log rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from patchssl.errors import UsageError


class TensorBoardWriter:
    """Event files in `folder`, one scalar for every number of a row.

    A resumed run takes back what was written after update `steps_done`; where nothing was written so far, as when
    a run is resumed with run.tensorboard=true, `rows` are those to begin with.
    """

    def __init__(self, folder: Path, steps_done: int, rows: Iterable[dict[str, Any]]) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        is_new = not folder.is_dir()
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
