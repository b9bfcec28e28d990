"""The exported folder: written beside its place, checked, and only then renamed to it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from patchssl.eval.records import Result, network_of, read_results
from patchssl.export.card import CARD_FILE, model_card
from patchssl.export.dino import DINO, DINO_FILE
from patchssl.export.onnx import ONNX, ONNX_FILE, ONNX_WEIGHTS
from patchssl.export.source import ExportSource, Format, Written, open_source
from patchssl.export.timm import TIMM, network_config
from patchssl.models.hub import upload_folder
from patchssl.models.pretrained import FOLDER_CONFIG, FOLDER_WEIGHTS, read_config
from patchssl.runtime.console import Console
from patchssl.runtime.errors import CheckpointError, UsageError, unknown_choice
from patchssl.runtime.files import is_utf8
from patchssl.runtime.lock import locked
from patchssl.runtime.progress import Progress, Steps

FORMATS: Mapping[str, Format] = {"timm": TIMM, "dino": DINO, "onnx": ONNX}
_FILES = {CARD_FILE, FOLDER_CONFIG, FOLDER_WEIGHTS, DINO_FILE, ONNX_FILE, ONNX_WEIGHTS}


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was exported, how far each format is from the network itself, and what was skipped and why."""

    model: str
    name: str
    arch: str
    weights_sha256: str
    folder: Path
    files: Mapping[str, int]  # name -> bytes
    differences: Mapping[str, float]  # format -> largest difference as a share of the largest feature
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    def as_text(self) -> str:
        """Lines for a reader."""
        width = max(map(len, self.files))
        found = ", ".join(f"{name} {off:.1g}" for name, off in self.differences.items())
        return "\n".join([f"{self.name} ({self.arch}) exported to {self.folder}",
                          *(f"  {name:{width}}  {size:>13,} bytes" for name, size in self.files.items()),
                          f"largest difference from the network, as a share of the largest feature: {found}",
                          *(f"skipped: {sentence}" for sentence in self.left_out), *self.notes])

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"model": self.model, "name": self.name, "arch": self.arch, "weights_sha256": self.weights_sha256,
                "folder": str(self.folder), "files": dict(self.files), "differences": dict(self.differences),
                "left_out": list(self.left_out), "notes": list(self.notes)}


def export_model(uri: str, to: str | Path, *, formats: Sequence[str] = (), license: str | None = None,
                 results: Path | None = None, overwrite: bool = False, progress: Progress | None = None,
                 ) -> ExportReport:
    """Write the backbone that `uri` names to the folder `to`, with a model card, and check every file.

    `formats` are timm, dino and onnx; empty is each that is possible, the report says which is not and why.
    `results` is a folder of records: those of these weights go into the card. `to` must not exist or be empty;
    `overwrite` replaces an earlier export. UsageError for a format that was asked for and is not possible,
    CheckpointError for weights that cannot be read, or a file that does not give the same features. Nothing is left
    half written.
    """
    folder = Path(to).expanduser().resolve()
    _require_free(folder, overwrite)
    for name in formats:
        if name not in FORMATS:
            raise UsageError(unknown_choice("format", name, FORMATS))
    source = open_source(uri)
    chosen, left_out = _possible(source, formats)
    steps = Steps(progress, len(chosen) + 2)
    steps.one()
    with _beside(folder, overwrite) as partial:
        config = network_config(source)
        (partial / FOLDER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        written: dict[str, Written] = {}
        for name in chosen:
            with _explained(name):
                written[name] = FORMATS[name].write(source, partial)
            steps.one()
        records, problems = _records(source, results)
        card = model_card(source, config["num_features"], written, license, records)
        (partial / CARD_FILE).write_text(card, encoding="utf-8")
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        _move(partial, folder)
    steps.one()
    notes = [*(f"when loading: {note}" for note in source.backbone.notes),
             *(note for result in written.values() for note in result.notes), *problems]
    return ExportReport(model=uri, name=source.backbone.name, arch=source.backbone.arch,
                        weights_sha256=source.backbone.weights_sha256, folder=folder, files=files,
                        differences={name: result.difference for name, result in written.items()},
                        left_out=tuple(left_out), notes=tuple(notes))


def push_model(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload the export in `folder` to `repo` (ORG/NAME) on the Hugging Face hub and return its address.

    UsageError for a folder that `export_model` did not write.
    """
    folder = Path(folder)
    if not is_export(folder):
        raise UsageError(f"{folder} is no export of patchssl, whose {FOLDER_CONFIG} has a part 'patchssl'; make one "
                         "with 'patchssl export'")
    return upload_folder(folder, repo, private=private, message="Upload a backbone exported by patchssl")


def is_export(folder: Path) -> bool:
    """Did `export_model` write `folder`?"""
    try:
        return isinstance(read_config(folder / FOLDER_CONFIG).get("patchssl"), dict)
    except CheckpointError:
        return False


def _possible(source: ExportSource, asked: Sequence[str]) -> tuple[list[str], list[str]]:
    """The formats to write, in the order of `FORMATS`, and a sentence for each that is not possible.

    UsageError where one of those `asked` (empty: all) is not, or none is.
    """
    chosen, left_out = [], []
    for name in (name for name in FORMATS if not asked or name in asked):
        if (reason := FORMATS[name].obstacle(source)) is None:
            chosen.append(name)
        elif asked:
            raise UsageError(f"{source.uri} cannot be exported as {name}: {reason}")
        else:
            left_out.append(f"{name}: {reason}")
    if not chosen:
        raise UsageError(f"{source.uri} cannot be exported: {'; '.join(left_out)}")
    return chosen, left_out


def _records(source: ExportSource, results: Path | None) -> tuple[list[Result], list[str]]:
    """The records in `results` of the source's weights, and sentences on what could not be used."""
    if results is None or not results.exists():
        return [], []
    found, problems = read_results(results)
    network = network_of(source.backbone)
    own = [record for record in found if record.network.matches(network)]
    if not own:
        problems = [*problems, f"none of the {len(found)} records in {results} is of these weights"]
    return own, problems


def _require_free(folder: Path, overwrite: bool) -> None:
    """UsageError unless `folder` can be written without losing anything but an earlier export."""
    if not is_utf8(folder):
        raise UsageError(f"{folder} is no text in UTF-8, and timm, safetensors and ONNX Runtime open no file in such a "
                         "folder; choose another --out")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder that does not exist yet")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if not names:
        return
    if not is_export(folder):
        raise UsageError(f"{folder} is not empty and no earlier export; name another folder")
    if not overwrite:
        raise UsageError(f"{folder} holds an earlier export; name another folder, or replace it with --overwrite")
    if strange := sorted(names - _FILES):
        raise UsageError(f"{folder} holds, beside an earlier export, {', '.join(strange[:5])}, which would be lost; "
                         "move that away first")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Failures of the libraries that write files, a full disk among them, as a CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"the format {name} could not be written: {reason}; nothing was exported") from error


@contextmanager
def _beside(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `folder`, which is gone afterwards unless it was renamed; FolderInUse as of `locked`."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    with locked(folder.parent, "wait for it to end, or choose another --out", file=f".{folder.name}.lock"):
        _require_free(folder, overwrite)  # another process may have written it since
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed and had the same number
        partial.mkdir(parents=True)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _move(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`; an earlier export there comes back if that fails."""
    old = partial.with_suffix(".old")
    try:
        if folder.exists():
            folder.replace(old)
        partial.replace(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def export_and_push(model: str, to: Path, formats: tuple[str, ...], *, license_name: str | None, results: Path,
                    overwrite: bool, push: str | None, private: bool, console: Console) -> ExportReport:
    """Export `model` to the folder `to` and, where `push` names a repository of the hub, upload the folder."""
    report = export_model(model, to, formats=formats, license=license_name, results=results, overwrite=overwrite,
                          progress=console.counter("export"))
    if push is not None:
        console.say(f"uploading {to} to {push}")
        console.say(f"uploaded to {push_model(to, push, private=private)}")
    return report
