"""All benchmarks at once: what can be run with the data that is there, what is done already, one table."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from patchssl.backbone import Backbone
from patchssl.console import Console
from patchssl.data import NAMED_SETS, ImageSet, open_images, open_pair
from patchssl.errors import DataError, PatchSSLError, UnreadableImage, UsageError, one_of
from patchssl.eval.cache import FeatureCache
from patchssl.eval.copydays import copydays_protocol, dataset_name, evaluate_copydays
from patchssl.eval.copydays_set import open_copydays
from patchssl.eval.features import Progress, RawPixels, compute_outputs, extract_outputs
from patchssl.eval.ground_truth import find_ground_truth, read_ground_truth, require_images
from patchssl.eval.knn import evaluate_knn
from patchssl.eval.linear import evaluate_linear, linear_protocol
from patchssl.eval.protocols import Protocol, knn_protocol
from patchssl.eval.results import Result, read_results
from patchssl.eval.retrieval import evaluate_revisited, revisited_protocol

TASKS = ("knn", "linear", "copydays", "revisited")
_TIMED_BATCH = 8  # images


@dataclass(frozen=True)
class Options:
    """How features are computed; nothing of it moves a number beyond rounding."""

    device: torch.device
    batch_size: int = 64
    workers: int = 2
    cache: FeatureCache | None = None


@dataclass(frozen=True)
class Cell:
    """One benchmark that can be run: a task on a data set under a protocol."""

    task: str
    data: str  # a named set or a folder
    dataset: str  # what the record calls it
    protocol: Protocol
    images: int
    weights: str  # sha256
    decode_seconds: float  # per image, of a few of them
    set_name: str | None = None  # of a revisited set

    def label(self) -> str:
        """In words: knn on textures (native)."""
        return f"{self.task} on {self.dataset} ({self.protocol.name})"


@dataclass(frozen=True)
class SuitePlan:
    """What `eval all` would do: cells still to run, cells that have a record, and what cannot be run."""

    run: tuple[Cell, ...]
    done: tuple[Cell, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)  # what -> why
    seconds_per_image: float = 0.0

    @property
    def passes(self) -> list[Cell]:
        """One cell for each pass over images; cells of one data set and one transform share a pass."""
        return list({(cell.data, cell.set_name, json.dumps(dict(cell.protocol.transform().settings), sort_keys=True)):
                     cell for cell in self.run}.values())

    @property
    def images(self) -> int:
        """Images whose features are computed."""
        return sum(cell.images for cell in self.passes)

    @property
    def seconds(self) -> float:
        """Estimated time of the feature passes; probes that are trained come on top."""
        return sum(cell.images * (self.seconds_per_image + cell.decode_seconds) for cell in self.passes)

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        cells = {name: [_plain(cell) for cell in cells] for name, cells in (("run", self.run), ("done", self.done))}
        return {**cells, "left_out": dict(self.left_out), "images": self.images, "estimated_seconds": self.seconds}

    def text(self) -> str:
        """For people."""
        lines = [f"to run: {cell.label()}, {cell.images:,} images" for cell in self.run]
        lines += [f"done:   {cell.label()}" for cell in self.done]
        lines += [f"left out: {what}: {why}" for what, why in self.left_out.items()]
        estimate = timedelta(seconds=round(self.seconds))
        return "\n".join([*lines, f"{self.images:,} images to compute features of, about {estimate}, training of "
                                   "linear probes not counted"])


def _plain(cell: Cell) -> dict[str, Any]:
    return {"task": cell.task, "data": cell.data, "dataset": cell.dataset, "set": cell.set_name,
            "protocol": cell.protocol.name, "protocol_fingerprint": cell.protocol.fingerprint, "images": cell.images}


def plan_suite(backbone: Backbone, data: str, tasks: Sequence[str], results: Path | None, options: Options, *,
               overwrite: bool = False) -> SuitePlan:
    """What can be run for `backbone` with what lies at `data`: a set, or a folder of sets.

    A cell with a record of these weights, this protocol and this data set is done, unless `overwrite`. UsageError for
    an unknown task, DataError where nothing at all can be run.
    """
    for task in tasks:
        if task not in TASKS:
            raise UsageError(one_of("task", task, TASKS))
    cells, left_out = find_cells(backbone, data, tasks)
    if not cells:
        reasons = "; ".join(f"{what}: {why}" for what, why in left_out.items())
        raise DataError(f"{data} holds nothing that {', '.join(tasks)} can be run on ({reasons}); it takes folders "
                        "with train/ and val/, Copydays' blocks, or gnd_NAME.pkl beside jpg/, each alone or side by "
                        "side")
    known = set() if overwrite or results is None else _finished(results, backbone.weights_sha256)
    done = tuple(cell for cell in cells if _key(cell) in known)
    run = tuple(cell for cell in cells if _key(cell) not in known)
    pace = _seconds_per_image(backbone, options.device) if run else 0.0
    return SuitePlan(run, done, left_out, pace)


def run_suite(backbone: Backbone, plan: SuitePlan, options: Options, *, console: Console | None = None,
              keep: Callable[[Result], Any] = lambda result: None,
              stop_at_errors: bool = False) -> tuple[list[Result], dict[str, str]]:
    """Run what `plan` says and hand every record to `keep` as soon as it is there.

    A cell that fails does not stop the others, unless `stop_at_errors`: its reason is in the second value.
    """
    results, failed = [], {}
    for number, cell in enumerate(plan.run, 1):
        if console is not None:
            console.say(f"{number} of {len(plan.run)}: {cell.label()}")
        try:
            share_pass(backbone, cell, plan.run[number:], options, console)
            result = run_cell(backbone, cell, options, console.counter(cell.task) if console else None)
        except PatchSSLError as error:
            if stop_at_errors:
                raise
            failed[cell.label()] = str(error)
            continue
        keep(result)
        results.append(result)
    return results, failed


def share_pass(backbone: Backbone, cell: Cell, later: Sequence[Cell], options: Options,
               console: Console | None) -> None:
    """Put into the cache by one pass what `cell` and later cells with its images and transform need.

    Without a cache, or where nobody shares, there is nothing to do.
    """
    settings = cell.protocol.transform().settings
    alike = [other for other in (cell, *later) if other.task in ("knn", "linear") and other.data == cell.data
             and other.protocol.transform().settings == settings]
    outputs = sorted({output for other in alike for output in other.protocol.settings.get("outputs", ["features"])})
    if options.cache is None or cell.task not in ("knn", "linear") or len(alike) < 2 or isinstance(backbone, RawPixels):
        return
    for images in open_pair(cell.data):
        progress = console.counter(f"{images.split} features") if console else None
        extract_outputs(backbone, images, cell.protocol, outputs, batch_size=options.batch_size,
                        workers=options.workers, device=options.device, progress=progress, cache=options.cache)


def run_cell(backbone: Backbone, cell: Cell, options: Options, progress: Progress | None = None) -> Result:
    """The record of one benchmark."""
    how: dict[str, Any] = {"device": options.device, "workers": options.workers, "cache": options.cache,
                           "progress": progress}
    name = cell.protocol.name
    if cell.task == "copydays":
        return evaluate_copydays(backbone, cell.data, name, batch_size=options.batch_size, **how)
    if cell.task == "revisited":
        return evaluate_revisited(backbone, cell.data, cell.set_name or "", name, **how)
    train, val = open_pair(cell.data)
    evaluate = evaluate_knn if cell.task == "knn" else evaluate_linear
    return evaluate(backbone, train, val, name, batch_size=options.batch_size, **how)


def find_cells(backbone: Backbone, data: str, tasks: Sequence[str]) -> tuple[list[Cell], dict[str, str]]:
    """The benchmarks that `data` has everything for, and why others were left out."""
    cells: list[Cell] = []
    left_out: dict[str, str] = {}
    for place in _places(data):
        for task, find in _FINDERS.items():
            if task in tasks:
                try:
                    cells += find(backbone, place)
                except PatchSSLError as error:
                    left_out[f"{task} on {place}"] = str(error)
        known = any(cell.data == place for cell in cells) or any(what.endswith(f" on {place}") for what in left_out)
        wanted = [task for task in ("knn", "linear") if task in tasks]
        if wanted:
            try:
                cells += _classification(backbone, place, wanted)
            except PatchSSLError as error:
                if not known:  # a Copydays set is no classification set, and that is no news
                    left_out[f"{' and '.join(wanted)} on {place}"] = str(error)
    return cells, left_out


def _places(data: str) -> list[str]:
    """`data` itself if it is a set, else the folders in it that may be sets."""
    root = Path(data).expanduser()
    if data in NAMED_SETS or not root.is_dir():
        return [data]
    inside = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    nested = [folder for entry in inside if entry.name == "datasets" for folder in sorted(entry.iterdir())
              if folder.is_dir()]
    own = {entry.name for entry in inside} & {"train", "original", "jpg", "raw", "FashionMNIST", "cifar-10-batches-py"}
    return [data] if own or not inside else [str(entry) for entry in (*inside, *nested) if entry.name != "datasets"]


def _copydays(backbone: Backbone, place: str) -> list[Cell]:
    if not (Path(place) / "original").is_dir():
        return []
    names = [None, "dino", "dino-nodistractors", "dino-nowhitening", "dino-plain"]
    protocol = copydays_protocol(None, backbone)
    for name in names:  # the default, or what of it the folder has everything for
        protocol = copydays_protocol(name, backbone)
        try:
            found = open_copydays(place, needs_distractors=bool(protocol.settings.get("distractors")),
                                  needs_whitening=bool(protocol.settings.get("whitening")))
        except DataError:
            if name == names[-1]:
                raise
            continue
        count = sum(len(block.images) for block in found.blocks)
        count += sum(len(extra) for extra in (found.distractors, found.whitening) if extra is not None)
        return [Cell("copydays", place, dataset_name(found), protocol, count, backbone.weights_sha256,
                     _decode_seconds(found.originals))]
    return []


def _revisited(backbone: Backbone, place: str) -> list[Cell]:
    cells = []
    for path in sorted(Path(place).glob("gnd_*.pkl")):
        name = path.stem.removeprefix("gnd_")
        found = find_ground_truth(Path(place), name)
        truth = read_ground_truth(found.ground_truth)
        require_images(truth, found.images)
        count = len(truth.imlist) + len(truth.qimlist)
        cells.append(Cell("revisited", place, name, revisited_protocol(None, backbone, name), count,
                          backbone.weights_sha256, _decode_seconds(open_images(found.images)), name))
    return cells


def _classification(backbone: Backbone, place: str, tasks: Iterable[str]) -> list[Cell]:
    train, val = open_pair(place)
    train.require_labels()
    makers: dict[str, Callable[[], Protocol]] = {"knn": lambda: knn_protocol(None, backbone.image_size),
                                                 "linear": lambda: linear_protocol(None, backbone)}
    weights, pace = backbone.weights_sha256, _decode_seconds(train)
    return [Cell(task, place, val.name, makers[task](), len(train) + len(val), weights, pace) for task in tasks]


_FINDERS: Mapping[str, Callable[[Backbone, str], list[Cell]]] = {"copydays": _copydays, "revisited": _revisited}


def _finished(results: Path, weights: str) -> set[tuple[str, str, str]]:
    records, _ = read_results(results) if results.is_dir() else ([], [])
    return {(record.dataset, record.protocol_fingerprint, record.task) for record in records
            if record.weights_sha256 == weights}


def _key(cell: Cell) -> tuple[str, str, str]:
    task = cell.task
    if task == "revisited":
        task = cell.dataset if cell.dataset in ("roxford5k", "rparis6k") else "revisited"
    return cell.dataset, cell.protocol.fingerprint, task


def _decode_seconds(images: ImageSet) -> float:
    """Time to decode an image, of three spread over the set; one that cannot be read is named when it matters."""
    began = time.perf_counter()
    for index in (0, len(images) // 2, len(images) - 1):
        with contextlib.suppress(UnreadableImage):
            images.pixels(index)
    return (time.perf_counter() - began) / 3


def _seconds_per_image(backbone: Backbone, device: torch.device) -> float:
    """Time of a forward pass, per image, from two small batches."""
    side = backbone.image_size
    images = torch.zeros(_TIMED_BATCH, 3, side, side, device=device)
    with torch.inference_mode():
        compute_outputs(backbone, images, ["features"])
        began = time.perf_counter()
        compute_outputs(backbone, images, ["features"])["features"].sum().item()
    return (time.perf_counter() - began) / _TIMED_BATCH
