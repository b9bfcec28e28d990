"""Result records: one model on one task and data set, with everything needed to trust and repeat the number.

A record is a small JSON file, `<root>/<model>-<sha8>/<task>-<dataset>@<protocol>.json` (sha8: the first 8 hex
digits of the sha256 of the weights), never half written. Reading a folder survives whatever else lies there.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

import patchssl
from patchssl.errors import DataError

SCHEMA = 1
_FORMAT = "patchssl result"
_LARGEST_BYTES = 64 * 2**20
_LONGEST_NAME = 60  # characters, so that a file name stays below 255 bytes

Word = Annotated[str, Field(min_length=1)]
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class Result:
    """One cell of the comparison tables, with its provenance; ValueError names a wrong field."""

    model: Word
    method: Word  # pwself, dino, ibot, random, pixels, supervised, other
    arch: str
    weights_sha256: Hex
    pretrain_data: str | None = None
    pretrain_epochs: Amount | None = None
    task: Word  # knn, linear, copydays, roxford5k, rparis6k, patches
    dataset: Word
    dataset_fingerprint: Hex
    protocol: Word
    protocol_version: int
    protocol_settings: dict[str, Any]
    protocol_fingerprint: Hex
    metrics: Annotated[dict[str, Fraction], Field(min_length=1)]
    detail: dict[str, Any] = Field(default_factory=dict)  # per query or per class, by task
    seed: int | None = None  # of the pretraining
    versions: dict[str, str | None]
    device: str
    duration: Amount  # seconds

    def path(self, root: Path) -> Path:
        """Where the record lies below `root`: one file per model, task, data set and protocol."""
        folder = f"{safe_name(self.model)}-{self.weights_sha256[:8]}"
        parts = (safe_name(part) for part in (self.task, self.dataset, self.protocol))
        return Path(root) / folder / "{}-{}@{}.json".format(*parts)

    def write(self, root: Path) -> Path:
        """Save below `root`, replacing an earlier run of the same cell; at every moment the file is whole."""
        path = self.path(root)
        text = json.dumps(self.as_dict(), indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("w", encoding="utf-8") as file:
                    file.write(text + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"the result could not be written to {path}: {error.strerror or error}") from error
        return path

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the record's format and schema version."""
        return {"format": _FORMAT, "schema": SCHEMA, **asdict(self)}


def read_results(root: Path) -> tuple[list[Result], list[str]]:
    """All records below `root`, in the order of their paths, and a sentence for every JSON file left out."""
    found, problems = read_result_files(root)
    return list(found.values()), problems


def read_result_files(root: Path) -> tuple[dict[Path, Result], list[str]]:
    """As `read_results`, by the files that the records are in."""
    results, problems = {}, []
    for path in _json_files(Path(root)):
        try:
            results[path] = read_result(path)
        except DataError as error:
            problems.append(str(error))
    return results, problems


def read_result(path: Path) -> Result:
    """The record in the file `path`; DataError says what is wrong with one that cannot be used."""
    try:
        if not path.is_file():  # a pipe named .json would never end
            raise DataError(f"{path} is not a regular file")
        if path.stat().st_size > _LARGEST_BYTES:
            raise DataError(f"{path} is larger than {_LARGEST_BYTES // 2**20} MiB: not a result record")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged or not JSON ({error}); run that evaluation again") from error
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        raise DataError(f"{path} is JSON but not a result record of patchssl")
    if (schema := content.pop("schema", None)) != SCHEMA:
        raise DataError(
            f"{path} has the record schema {schema!r}, this patchssl reads schema {SCHEMA}; run that "
            "evaluation again, or read it with the version that wrote it"
        )
    try:
        return Result(**content)
    except ValidationError as error:
        raise DataError(f"{path} is not a valid result record: {_first_fault(error)}") from None
    except TypeError as error:  # a key that cannot be an argument's name
        raise DataError(f"{path} is not a valid result record: {error}") from None


def safe_name(name: str) -> str:
    """`name` as one component of a path: no separators, not hidden, not '..', no longer than 60 characters.

    >>> safe_name("../runs/my net"), safe_name("timm:vit_small_patch16_224.dino")
    ('runs_my_net', 'timm_vit_small_patch16_224.dino')
    """
    plain = re.sub(r"[^\w.+-]+", "_", name)
    plain = re.sub(r"\.{2,}", ".", plain).strip("._-") or "unnamed"
    if len(plain) <= _LONGEST_NAME:
        return plain
    digest = hashlib.sha256(plain_text(name).encode()).hexdigest()
    return f"{plain[: _LONGEST_NAME - 9]}-{digest[:8]}"


def plain_text(name: str) -> str:
    """`name` as text that JSON can hold: bytes of a file name that are no UTF-8 become escapes.

    >>> plain_text("caf\\udce9")
    'caf\\\\udce9'
    """
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def library_versions() -> dict[str, str | None]:
    """Versions of what moves a number; None for what is not installed. Imports none of it."""
    versions: dict[str, str | None] = {"patchssl": patchssl.__version__, "python": platform.python_version()}
    for name in ("torch", "torchvision", "timm", "numpy", "pillow"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def pack_bits(bits: np.ndarray) -> str:
    """Booleans (N,) as hex digits, four per digit: the first is the highest bit of the first digit.

    >>> pack_bits(np.array([True, False, False, True, True]))
    '98'
    """
    return np.packbits(np.asarray(bits, dtype=bool)).tobytes().hex()


def unpack_bits(text: str, count: int) -> np.ndarray:
    """The `count` booleans that `pack_bits` wrote; ValueError when the text is not theirs.

    >>> unpack_bits("98", 5).tolist()
    [True, False, False, True, True]
    """
    packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    if len(packed) != -(-count // 8):
        raise ValueError(f"{len(text)} hex digits do not hold {count} bits")
    return np.unpackbits(packed, count=count).astype(bool)


def _json_files(root: Path) -> Iterator[Path]:
    """Every *.json below `root`, sorted; links to folders are not followed."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        yield from (Path(folder) / name for name in sorted(files) if name.endswith(".json"))


def _first_fault(error: ValidationError) -> str:
    """The first wrong field by its dotted name, and how many more there are."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    name = ".".join(str(part) for part in faults[0]["loc"])
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{name}: {faults[0]['msg']}{more}"
