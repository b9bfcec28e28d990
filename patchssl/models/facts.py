"""What `patchssl inspect` says of a file of weights: sound or not, for people and for machines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from patchssl.models.recognize import describe_left_out
from patchssl.models.weights import BARE
from patchssl.runtime.errors import printable


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a network is once it is loaded; sizes in pixels."""

    name: str  # what records call it
    architecture: str
    num_parameters: int
    patch_size: int
    image_size: int
    embed_dim: int | None
    depth: int | None
    num_heads: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    positions: str | None  # how position embeddings get to other sizes; None without any
    pretrain_data: str | None
    pretrain_epochs: float | None
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class NetworkReport:
    """One network of a file. `facts` are None for a network that was not recognized."""

    network: str  # its name in the file, "" for one without
    framework: str | None
    method: str | None
    facts: Facts | None
    notes: tuple[str, ...]  # what was assumed
    heads_assumed: bool
    num_tensors: int  # of the backbone
    left_out: tuple[str, ...]  # the other tensors
    dtypes: tuple[str, ...]
    weights_sha256: str | None  # as in records; None for weights that do not load
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[str, ...]
    trouble: tuple[str, ...]
    loads: bool  # it can be loaded, and its numbers are finite


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect_model` found. `command` evaluates the model; None where it cannot be evaluated."""

    model: str
    file: str
    size_bytes: int
    kind: str
    networks: tuple[NetworkReport, ...]  # the chosen one first
    default: str | None  # the network that is taken where none is named; None: one has to be named
    chosen: str | None  # the one this inspection is about
    steps_done: int | None  # updates, of a run of ours
    normalization: str  # why this mean and standard deviation
    file_trouble: tuple[str, ...]
    command: str | None

    @property
    def main(self) -> NetworkReport:
        """The report on the network that is taken, or on the first one where none is."""
        return self.networks[0]

    @property
    def loads(self) -> bool:
        """Does the model load as it was named, and are its numbers finite?"""
        return self.chosen is not None and self.main.loads

    @property
    def trouble(self) -> tuple[str, ...]:
        """Everything that is wrong, in sentences."""
        several = len(self.networks) > 1
        return (*self.file_trouble, *(f"{report.network}: {sentence}" if several else sentence
                                      for report in self.networks for sentence in report.trouble))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(json.loads(json.dumps({**asdict(self), "trouble": self.trouble, "loads": self.loads})))

    def as_text(self) -> str:
        """Aligned lines, the command that evaluates the model last."""
        rows = [*_file_rows(self), *_network_rows(self), *_weights_rows(self)]
        rows += [("" if number else "trouble", sentence) for number, sentence in enumerate(self.trouble or ["none"])]
        rows.append(("evaluate", self.command or "not possible, see trouble"))
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:{width}}  {printable(value)}" for label, value in rows)


def _file_rows(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "file", found.file
    yield "size", f"{found.size_bytes:,} bytes, {found.kind}"
    yield "framework", found.main.framework or "not recognized"
    if names := [report.network for report in found.networks if report.network != BARE]:
        taken = f"the {found.chosen} is taken" if found.chosen else "none is taken by itself, name one"
        others = " or ".join(f"#{name}" for name in names if name != found.chosen)
        yield "networks", ", ".join(names)
        yield "", taken + (f", {others} names another" if found.chosen and others else "")


def _network_rows(found: Inspection) -> Iterator[tuple[str, str]]:
    report = found.main
    if (facts := report.facts) is None:
        return
    yield "architecture", facts.architecture
    yield "parameters", f"{facts.num_parameters:,}"
    yield "patch size", f"{facts.patch_size} px"
    yield "image size", f"{facts.image_size} px"
    sizes = [("channels", facts.embed_dim), ("blocks", facts.depth), ("heads", facts.num_heads)]
    yield from ((label, str(size)) for label, size in sizes if size is not None)
    yield from (("", note) for note in report.notes)
    yield "mean", _numbers(facts.mean)
    yield "std", _numbers(facts.std)
    yield "", found.normalization
    if facts.positions:
        yield "positions", f"resized to other image sizes in {facts.positions} way"
    epochs = f"{facts.pretrain_epochs:g} epochs" if facts.pretrain_epochs is not None else "epochs not stated"
    steps = f" ({found.steps_done:,} updates)" if found.steps_done is not None else ""
    yield "method", report.method or "not known"
    yield "pretraining", (f"{facts.pretrain_data or 'data not stated'}, {epochs}{steps}"
                          + (f", seed {facts.seed}" if facts.seed is not None else ""))
    yield "in records", facts.name


def _weights_rows(found: Inspection) -> Iterator[tuple[str, str]]:
    report, several = found.main, len(found.networks) > 1
    left_out = describe_left_out(report.left_out)
    counted = f"{report.num_tensors} of the backbone" if report.framework else str(report.num_tensors)
    yield "tensors", counted + (f"; {left_out}" if left_out else "")
    yield "types", ", ".join(report.dtypes)
    for number, each in enumerate(found.networks):
        checksum = each.weights_sha256 or "none, it does not load"
        yield "sha256" if not number else "", f"{checksum} {each.network if several else ''}".rstrip()


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
