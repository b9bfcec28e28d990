"""Files that are whole at every moment: written beside their place and moved there at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patchssl.errors import DataError


@contextmanager
def whole_file(path: Path, what: str) -> Iterator[Path]:
    """A path to write to, which becomes `path`, in folders made for it, when all went well.

    After an error or Ctrl-C an earlier file stays as it was. DataError, that calls the file `what`, where the disk
    does not take it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"the {what} could not be written to {path}: {error.strerror or error}") from error
