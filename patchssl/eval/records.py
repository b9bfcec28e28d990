"""Result records: one model on one task and dataset, with everything needed to trust and repeat the number.

A record is a small JSON file, `<root>/<model>-<sha8>/<task>-<dataset>@<protocol>.json`, never half written. sha8 are
the first 8 hex digits of the sha256 of the weights, or of all that tells the network where its code is one's own. What
only shares its names with a record that lies there, another network, other images or other settings, is written beside
it under digits of its own. `make_record` makes one from a backbone, a protocol and numbers. Reading a folder survives
whatever else lies there.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

import patchssl
from patchssl.data.fingerprints import VERSION
from patchssl.eval.naming import shown_name
from patchssl.eval.recordfile import files_below, read_record, write_record
from patchssl.runtime.errors import DataError

if TYPE_CHECKING:
    from patchssl.data.images import ImageSet
    from patchssl.eval.protocols import Protocol
    from patchssl.models.backbone import Backbone

SCHEMA = 1
KIND = "result"
OTHER_KINDS = (".cost.json",)  # how the names of other records end
_LONGEST_NAME = 60  # characters, so that a file name stays below 255 bytes

Word = Annotated[str, Field(min_length=1)]
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ScoredNetwork(NamedTuple):
    """What a record says of the network it is of."""

    weights: str  # sha256
    arch: str
    sha256: str | None  # of weights, settings and code; None: the record is older than that
    own_code: bool = False
    unknown: tuple[str, ...] = ()  # what of its code could not be looked into: nothing was taken from the cache

    def matches(self, other: ScoredNetwork) -> bool:
        """Whether both are one network, as far as it is known."""
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        return (self.weights, self.arch) == (other.weights, other.arch) and not (self.own_code or other.own_code)

    @property
    def key(self) -> str:
        """Hex digits by which it is called: of the weights, where they are the network of a loader."""
        return self.sha256 if self.own_code and self.sha256 else self.weights

    def as_detail(self) -> dict[str, Any]:
        """For a record's detail, which versions that do not know it read all the same."""
        about: dict[str, Any] = {"sha256": self.sha256}
        about |= {"own_code": True} if self.own_code else {}
        return about | ({"unknown": [plain_text(words) for words in self.unknown]} if self.unknown else {})


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
    variant: Word | None = None  # of a method, as a study names it: its records share a row of the tables
    versions: dict[str, str | None]
    device: str
    duration: Amount  # seconds

    @property
    def network(self) -> ScoredNetwork:
        """The network it is of."""
        said = self.detail.get("network")
        found = said if isinstance(said, dict) and re.fullmatch("[0-9a-f]{64}", str(said.get("sha256"))) else {}
        return ScoredNetwork(self.weights_sha256, self.arch, found.get("sha256"), bool(found.get("own_code")))

    def path(self, root: Path) -> Path:
        """Where the record lies below `root` by its names: one file per model, task, dataset and protocol."""
        folder = f"{safe_name(self.model)}-{self.network.key[:8]}"
        parts = (safe_name(part) for part in (self.task, self.dataset, self.protocol))
        return Path(root) / folder / "{}-{}@{}.json".format(*parts)

    def write(self, root: Path) -> Path:
        """Save below `root`, replacing an earlier run of the same cell; at every moment the file is whole."""
        return write_record(self.as_dict(), self._free_path(root))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the record's format and schema version."""
        return {"format": f"patchssl {KIND}", "schema": SCHEMA, **asdict(self)}

    def _free_path(self, root: Path) -> Path:
        """`path`, with digits added to what only has the names of another record that lies there."""
        path = self.path(root)
        digits = self.network.sha256 or joined([self.weights_sha256, self.arch])
        own = path.parent.with_name(f"{path.parent.name}-{digits[:8]}")
        others = read_result_files(path.parent)[0].values() if path.parent.is_dir() else ()
        if own.is_dir() or not all(self.network.matches(other.network) for other in others):
            path = own / path.name
        digits = joined([self.dataset_fingerprint, self.protocol_fingerprint])
        beside = path.with_name(f"{path.stem}-{digits[:8]}.json")
        return beside if beside.exists() or not self._may_replace(path) else path

    def _may_replace(self, path: Path) -> bool:
        """Whether `path` is free, or holds an earlier run of this cell.

        One that knew images by other signs is kept: nobody can tell any more whether they were the same.
        """
        try:
            other = read_result(path)
        except DataError:
            return True  # nothing, or nothing that can be used
        older = other.protocol_version != self.protocol_version
        return other.dataset_fingerprint == self.dataset_fingerprint and (
            older or other.protocol_fingerprint == self.protocol_fingerprint)


def read_results(root: Path) -> tuple[list[Result], list[str]]:
    """All records below `root`, in the order of their paths, and a sentence for every JSON file skipped.

    Records of another kind (`*.cost.json`) are passed over.
    """
    found, problems = read_result_files(root)
    return list(found.values()), problems


def read_result_files(root: Path) -> tuple[dict[Path, Result], list[str]]:
    """As `read_results`, by the files that the records are in."""
    results, problems = {}, []
    for path in files_below(Path(root), ".json"):
        if path.name.endswith(OTHER_KINDS):
            continue
        try:
            results[path] = read_result(path)
        except DataError as error:
            problems.append(str(error))
    return results, problems


def read_result(path: Path) -> Result:
    """The record in the file `path`; DataError says what is wrong with one that cannot be used."""
    return read_record(path, Result, KIND, SCHEMA)


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


def make_record(backbone: Backbone, plan: Protocol, *, dataset: str, fingerprints: Iterable[str],
                metrics: Mapping[str, float], detail: Mapping[str, Any], device: str, duration: float,
                task: str | None = None) -> Result:
    """The record of `backbone` under the protocol `plan`; `task` (default: the protocol's) names the cell.

    `fingerprints` are those of the image sets that the numbers depend on, in a fixed order; `metrics` fractions,
    `detail` plain JSON values, `device` from `describe_device`, `duration` in seconds.
    """
    from patchssl.eval.search import faiss_version  # brings torch, which readers of records need not have

    network = network_of(backbone)
    return Result(
        model=shown_name(backbone.name), method=backbone.method, arch=shown_name(backbone.arch),
        weights_sha256=network.weights, pretrain_data=backbone.pretrain_data and shown_name(backbone.pretrain_data),
        pretrain_epochs=backbone.pretrain_epochs, seed=backbone.seed,
        task=task or plan.task, dataset=shown_name(dataset), dataset_fingerprint=joined(fingerprints),
        protocol=plan.name, protocol_version=plan.version, protocol_settings=plan.plain_settings(),
        protocol_fingerprint=plan.fingerprint, metrics=dict(metrics), detail={**detail, "network": network.as_detail()},
        versions={**library_versions(), "faiss": faiss_version()}, device=device, duration=duration,
    )


def network_of(backbone: Backbone) -> ScoredNetwork:
    """What records of `backbone` say of it."""
    from patchssl.models.identity import identify

    weights = backbone.weights_sha256
    found = identify(backbone, weights)
    return ScoredNetwork(weights, backbone.arch, found.sha256, found.own_code, found.unknown)
def covered(**sets: ImageSet | None) -> dict[str, Any]:
    """What a record says of its images: which content the fingerprint of each set covers, and by which formula."""
    return {"version": VERSION, **{name: images.known.content for name, images in sets.items() if images is not None}}


def joined(fingerprints: Iterable[str]) -> str:
    """One fingerprint of several, in their order."""
    return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()
