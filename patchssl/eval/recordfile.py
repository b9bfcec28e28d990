"""Record files: JSON that is never half written, and read with distrust."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from patchssl.runtime.errors import DataError
from patchssl.runtime.files import write_text
from patchssl.runtime.yamltext import load_json

_PLAIN_LIST = re.compile(r"\[\n\s+([^\[\]{}\"]*?)\n\s*\]")  # no string in it; a line break is never inside of one
_LARGEST_BYTES = 64 * 2**20
_LONGEST_VALUE = 40  # characters of a wrong value that a sentence shows
_RecordT = TypeVar("_RecordT")


def write_record(content: Mapping[str, Any], path: Path) -> Path:
    """Save `content` at `path`, replacing what is there; at every moment the file is whole. DataError: it cannot be.

    Indented, but a list of numbers stands on one line: there may be thousands of them.
    """
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    write_text(path, _PLAIN_LIST.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n", "result")
    return path


def read_record(path: Path, make: Callable[..., _RecordT], kind: str, schema: int) -> _RecordT:
    """The record of `kind` in the file `path`, made by `make` of its fields; DataError says what is wrong with it."""
    content = _read_json(path, kind)
    if content.pop("format", None) != f"patchssl {kind}":
        raise DataError(f"{path} is JSON but not a {kind} record of patchssl")
    if (found := content.pop("schema", None)) != schema:
        raise DataError(f"{path} has the record schema {repr(found)[:_LONGEST_VALUE]}, this patchssl reads schema "
                        f"{schema}; make it again, or read it with the version that wrote it")
    try:
        return make(**content)
    except ValidationError as error:
        raise DataError(f"{path} is not a valid {kind} record: {_first_fault(error)}") from None
    except TypeError as error:  # a key that cannot be an argument's name
        raise DataError(f"{path} is not a valid {kind} record: {error}") from None


def files_below(root: Path, ending: str) -> Iterator[Path]:
    """Every file below `root` whose name has the `ending`, sorted; links to folders are not followed.

    Of a study's folder, which has cells/ beside records/, those of its records.
    """
    for folder, folders, files in os.walk(root):
        if {"cells", "records"} <= {*folders}:
            folders[:] = ["records"]
            continue
        folders.sort()
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(ending))


def _read_json(path: Path, kind: str) -> dict[str, Any]:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe named .json would never end
            raise DataError(f"{path} is not a regular file")
        if found.st_size > _LARGEST_BYTES:
            raise DataError(f"{path} is larger than {_LARGEST_BYTES // 2**20} MiB: not a {kind} record")
        content = load_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:  # a link to nowhere
        raise DataError(f"{path} is not a regular file") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged or not JSON ({error}); make it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is JSON but not a {kind} record of patchssl")
    return content


def _first_fault(error: ValidationError) -> str:
    """The first wrong field by its dotted name, and how many more there are."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    name = ".".join(str(part) for part in faults[0]["loc"])
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{name}: {faults[0]['msg']}{more}"
