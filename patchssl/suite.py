"""All benchmarks at once: what can be run with the data that is there, what is done already, one table."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from patchssl.backbone import Backbone
from patchssl.console import LOOK, Console
from patchssl.data import NAMED_SETS, ImageSet, open_images, open_pair
from patchssl.errors import DataError, PatchSSLError, UnreadableImage, UsageError, one_of
from patchssl.eval.cache import FeatureCache
from patchssl.eval.copydays import copydays_protocol, dataset_name, evaluate_copydays, require_ranks
from patchssl.eval.copydays_set import open_copydays
from patchssl.eval.faiss_index import IndexPlan
from patchssl.eval.features import RawPixels, compute_outputs, extract_outputs
from patchssl.eval.fewshot import FewShot
from patchssl.eval.knn import evaluate_knn, variant
from patchssl.eval.linear import evaluate_linear, linear_protocol
from patchssl.eval.patches import evaluate_patches, patches_protocol
from patchssl.eval.protocols import Protocol, knn_protocol
from patchssl.eval.record import joined
from patchssl.eval.results import Result, plain_text, read_results
from patchssl.eval.retrieval import evaluate_revisited, open_revisited, revisited_protocol
from patchssl.eval.search import require_index
from patchssl.unreadable import listing_unreadable, require_readable

TASKS = ("knn", "linear", "copydays", "revisited")  # by default
ON_REQUEST = ("patches",)  # any images would do for it, so it would run on sets made for another task
_CLASSIFYING = ("knn", "linear")  # on train and val images
_TIMED_BATCH = 8  # images


@dataclass(frozen=True)
class Options:
    """How features are computed; nothing of it moves a number beyond rounding."""

    device: torch.device
    batch_size: int = 64
    workers: int = 2
    cache: FeatureCache | None = None


@dataclass(frozen=True)
class Choices:
    """What benchmarks are run with instead of their defaults: part of the plan, as it moves the numbers."""

    distractors: Path | None = None  # of Copydays; default: those beside its blocks
    whitening: Path | None = None  # the same
    revisited_distractors: Path | None = None  # records of their own, beside those without
    search: IndexPlan = field(default_factory=IndexPlan)  # of k-NN; an index is another protocol

    def require_use(self, tasks: Sequence[str]) -> None:
        """UsageError for a choice that none of `tasks` has a use for, DataError for a folder that is not there."""
        folders = {"--distractors": ("copydays", self.distractors), "--whitening": ("copydays", self.whitening),
                   "--revisited-distractors": ("revisited", self.revisited_distractors)}
        given = {name: task for name, (task, folder) in folders.items() if folder is not None}
        given |= {} if self.search == IndexPlan() else {"--index, --search-params and --gpus": "knn"}
        for name, task in given.items():
            if task not in tasks:
                raise UsageError(f"{name}: for {task}, which is not among the tasks {', '.join(tasks)}; leave it out, "
                                 f"or add --task {task}")
        for name, (_, folder) in folders.items():
            if folder is not None and not folder.is_dir():
                raise DataError(f"{name} {folder}: there is no such folder")


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
    fingerprint: Callable[[], str] = field(compare=False, repr=False)  # of all its images, as records hold it
    set_name: str | None = None  # of a revisited set
    options: Mapping[str, Any] = field(default_factory=dict)  # of its evaluation

    def label(self) -> str:
        """In words: knn on textures (native)."""
        return f"{self.task} on {self.dataset} ({self.protocol.name})"

    def key(self) -> tuple[str, str, str]:
        """What tells its record from others of the same weights: data set, protocol's fingerprint, task."""
        return plain_text(self.dataset), self.protocol.fingerprint, self.protocol.task


@dataclass(frozen=True)
class SuitePlan:
    """What `eval all` would do: cells still to run, cells that have a record, and what cannot be run."""

    run: tuple[Cell, ...]
    done: tuple[Cell, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)  # what -> why
    seconds_per_image: float = 0.0

    @property
    def passes(self) -> list[Cell]:
        """The largest cell of each pass over images; cells of one data set and one transform share a pass."""
        return list({(cell.data, cell.set_name, json.dumps(dict(cell.protocol.transform().settings), sort_keys=True)):
                     cell for cell in sorted(self.run, key=lambda cell: cell.images)}.values())

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
            "protocol": cell.protocol.name, "protocol_fingerprint": cell.protocol.fingerprint, "images": cell.images,
            "options": {name: str(value) for name, value in cell.options.items()}}


def plan_suite(backbone: Backbone, data: str, tasks: Sequence[str], results: Path | None, options: Options, *,
               choices: Choices | None = None, overwrite: bool = False) -> SuitePlan:
    """What can be run for `backbone` with what lies at `data`: a set, or a folder of sets.

    A cell with a record of these weights, this protocol and these images, distractors and whitening images included,
    is done, unless `overwrite`. UsageError for an unknown task, for an index that cannot search a set and for
    `choices` without use, DataError where nothing at all can be run.
    """
    for task in tasks:
        if task not in TASKS + ON_REQUEST:
            raise UsageError(one_of("task", task, TASKS + ON_REQUEST))
    choices = choices or Choices()
    choices.require_use(tasks)
    cells, left_out = find_cells(backbone, data, tasks, choices)
    if not cells:
        reasons = "; ".join(f"{what}: {why}" for what, why in left_out.items())
        raise DataError(f"{data} holds nothing that {', '.join(tasks)} can be run on ({reasons}); it takes folders "
                        "with train/ and val/, Copydays' blocks, or gnd_NAME.pkl beside jpg/, each alone or side by "
                        "side")
    known = {} if overwrite or results is None else _finished(results, backbone.weights_sha256)
    done = tuple(cell for cell in cells if (key := cell.key()) in known and cell.fingerprint() in known[key])
    run = tuple(cell for cell in cells if cell not in done)
    pace = _seconds_per_image(backbone, options.device) if run else 0.0
    return SuitePlan(run, done, left_out, pace)


def run_suite(backbone: Backbone, plan: SuitePlan, options: Options, *, console: Console | None = None,
              keep: Callable[[Result], Any] = lambda result: None,
              stop_at_errors: bool = False) -> tuple[list[Result], dict[str, str]]:
    """Run what `plan` says and hand every record to `keep` as soon as it is there.

    A cell that fails does not stop the others, unless `stop_at_errors`: its reason is in the second value.
    """
    results, failed = [], {}
    looked_at: set[str] = set()  # data whose train and val files were looked at: once is enough
    for number, cell in enumerate(plan.run, 1):
        if console is not None:
            console.say(f"{number} of {len(plan.run)}: {cell.label()}")
        try:
            if share_pass(backbone, cell, plan.run[number:], options, console, looked_at=cell.data in looked_at):
                looked_at.add(cell.data)
            result = run_cell(backbone, cell, options, console, looked_at=cell.data in looked_at)
        except PatchSSLError as error:
            if stop_at_errors:
                raise
            failed[cell.label()] = str(error)
            continue
        if cell.task in _CLASSIFYING:
            looked_at.add(cell.data)
        keep(result)
        results.append(result)
    return results, failed


def share_pass(backbone: Backbone, cell: Cell, later: Sequence[Cell], options: Options,
               console: Console | None, *, looked_at: bool = False) -> bool:
    """Put into the cache by one pass what `cell` and later cells with its images and transform need.

    False: without a cache, or where nobody shares, there is nothing to do. `looked_at`: all files were before.
    """
    settings = cell.protocol.transform().settings
    alike = [other for other in (cell, *later) if other.task in _CLASSIFYING and other.data == cell.data
             and other.protocol.transform().settings == settings]
    outputs = sorted({output for other in alike for output in other.protocol.settings.get("outputs", ["features"])})
    if options.cache is None or cell.task not in _CLASSIFYING or len(alike) < 2 or isinstance(backbone, RawPixels):
        return False
    pair = open_pair(cell.data)
    if not looked_at:
        require_readable(pair, options.workers, console.counter(LOOK) if console else None)
    with listing_unreadable(pair, options.workers):
        for images in pair:
            progress = console.counter(f"{images.split} features") if console else None
            extract_outputs(backbone, images, cell.protocol, outputs, batch_size=options.batch_size,
                            workers=options.workers, device=options.device, progress=progress, cache=options.cache)
    return True


def run_cell(backbone: Backbone, cell: Cell, options: Options, console: Console | None = None, *,
             looked_at: bool = False) -> Result:
    """The record of one benchmark; `looked_at`: the train and val files of its data were, and all can be read."""
    shown = {"progress": console.counter(cell.task), "check_progress": console.counter(LOOK)} if console else {}
    how: dict[str, Any] = {"device": options.device, "workers": options.workers, "cache": options.cache, **shown}
    name = cell.protocol.name
    if cell.task == "copydays":
        return evaluate_copydays(backbone, cell.data, name, batch_size=options.batch_size, **cell.options, **how)
    if cell.task == "revisited":
        return evaluate_revisited(backbone, cell.data, cell.set_name or "", name, **cell.options, **how)
    if cell.task == "patches":
        return evaluate_patches(backbone, open_images(cell.data, "val"), name, batch_size=options.batch_size,
                                device=options.device, workers=options.workers, looked_at=looked_at, **shown)
    train, val = open_pair(cell.data)
    if cell.task == "knn":  # a variant's name is not that of the protocol it varies
        return evaluate_knn(backbone, train, val, None, batch_size=options.batch_size, looked_at=looked_at,
                            **cell.options, **how)
    return evaluate_linear(backbone, train, val, name, batch_size=options.batch_size, looked_at=looked_at, **how)


def find_cells(backbone: Backbone, data: str, tasks: Sequence[str],
               choices: Choices) -> tuple[list[Cell], dict[str, str]]:
    """The benchmarks that `data` has everything for, and why others were left out."""
    cells: list[Cell] = []
    left_out: dict[str, str] = {}
    wanted = [task for task in ("knn", "linear") if task in tasks]
    for place in _places(data, choices):
        own_layout = list(_own_layouts(backbone, place, tasks, choices))
        for what, make in own_layout:
            try:
                cells.append(make())
            except PatchSSLError as error:
                left_out[what] = str(error)
        if "patches" in tasks:
            try:
                cells.append(_patches(backbone, place))
            except PatchSSLError as error:
                if not own_layout:
                    left_out[f"patches on {place}"] = str(error)
        if not wanted:
            continue
        try:
            train, val = open_pair(place)
            train.require_labels()
        except PatchSSLError as error:
            if not own_layout:  # a Copydays set is no classification set, and that is no news
                left_out[f"{' and '.join(wanted)} on {place}"] = str(error)
        else:
            cells += _classification(backbone, place, (train, val), wanted, choices)
    return cells, left_out | _unused(cells, choices)


def _unused(cells: Sequence[Cell], choices: Choices) -> dict[str, str]:
    """Folders that were named and that no cell reads."""
    used = {folder for cell in cells for folder in cell.options.values()}
    folders = {"--distractors": choices.distractors, "--whitening": choices.whitening,
               "--revisited-distractors": choices.revisited_distractors}
    return {f"{name} {folder}": "no benchmark that is found here has a use for it under its default protocol"
            for name, folder in folders.items() if folder is not None and folder not in used}


def _places(data: str, choices: Choices) -> list[str]:
    """`data` itself if it is a set, else the folders in it that may be sets; not those that `choices` name."""
    root = Path(data).expanduser()
    if data in NAMED_SETS or not root.is_dir():
        return [data]
    named = {folder.resolve() for folder in (choices.distractors, choices.whitening, choices.revisited_distractors)
             if folder is not None}
    inside = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
                    and entry.resolve() not in named)
    nested = [folder for entry in inside if entry.name == "datasets" for folder in sorted(entry.iterdir())
              if folder.is_dir()]
    own = {entry.name for entry in inside} & {"train", "original", "jpg", "raw", "FashionMNIST", "cifar-10-batches-py"}
    return [data] if own or not inside else [str(entry) for entry in (*inside, *nested) if entry.name != "datasets"]


def _own_layouts(backbone: Backbone, place: str, tasks: Sequence[str],
                 choices: Choices) -> Iterator[tuple[str, Callable[[], Cell]]]:
    """What `place` has the layout of, and what opens it."""
    if "copydays" in tasks and (Path(place) / "original").is_dir():
        yield f"copydays on {place}", partial(_copydays, backbone, place, choices)
    for path in sorted(Path(place).glob("gnd_*.pkl")) if "revisited" in tasks else ():
        name = path.stem.removeprefix("gnd_")
        yield f"revisited on {path}", partial(_revisited, backbone, place, name, None)
        if (extra := choices.revisited_distractors) is not None:
            yield f"revisited on {path} with {extra}", partial(_revisited, backbone, place, name, extra)


def _copydays(backbone: Backbone, place: str, choices: Choices) -> Cell:
    """Under the default protocol, or what of it the folder has everything for; DataError where nothing fits."""
    named = {"distractors": choices.distractors, "whitening": choices.whitening}
    protocols = _copydays_protocols(backbone, [kind for kind, folder in named.items() if folder is not None])
    for protocol in protocols:
        needs = {kind: bool(protocol.settings[kind]) for kind in named}
        used = {kind: folder for kind, folder in named.items() if folder is not None and needs[kind]}
        try:
            found = open_copydays(place, needs_distractors=needs["distractors"], needs_whitening=needs["whitening"],
                                  distractors=used.get("distractors"), whitening=used.get("whitening"))
        except DataError:
            if protocol is not protocols[-1]:
                continue
            raise
        break
    require_ranks(found, protocol)
    count = sum(len(block.images) for block in found.blocks)
    count += sum(len(extra) for extra in (found.distractors, found.whitening) if extra is not None)
    return Cell("copydays", place, dataset_name(found), protocol, count, backbone.weights_sha256,
                _decode_seconds(found.originals), lambda: joined([found.fingerprint]), options=used)


def _copydays_protocols(backbone: Backbone, named: Sequence[str]) -> list[Protocol]:
    """The default and, best first, those of DINO that do with fewer images but read all `named` kinds of them."""
    usual = copydays_protocol(None, backbone)
    if usual.name == "native":  # which needs nothing but the blocks
        return [usual]
    fewer = [copydays_protocol(f"dino-{less}", backbone) for less in ("nodistractors", "nowhitening", "plain")]
    return [usual, *(protocol for protocol in fewer if all(protocol.settings[kind] for kind in named))]


def _revisited(backbone: Backbone, place: str, name: str, distractors: Path | None) -> Cell:
    found = open_revisited(Path(place), name, distractors)
    count = len(found.images) + (0 if found.distractors is None else len(found.distractors))
    return Cell("revisited", place, found.name, revisited_protocol(None, backbone, name), count,
                backbone.weights_sha256, _decode_seconds(found.images), lambda: joined(found.fingerprints().values()),
                name, {} if distractors is None else {"distractors": distractors})


def _classification(backbone: Backbone, place: str, pair: tuple[ImageSet, ImageSet], tasks: Iterable[str],
                    choices: Choices) -> list[Cell]:
    train, val = pair
    knn, options = knn_protocol(None, backbone.image_size), {}
    if choices.search != IndexPlan():
        knn, options = variant(knn, FewShot(), choices.search), asdict(choices.search)
        require_index(choices.search, len(train), _width(backbone))
    makers: dict[str, Callable[[], Protocol]] = {"knn": lambda: knn, "linear": lambda: linear_protocol(None, backbone)}
    pace = _decode_seconds(train)
    return [Cell(task, place, val.name, makers[task](), len(train) + len(val), backbone.weights_sha256, pace,
                 lambda: joined([train.fingerprint, val.fingerprint]), options=options if task == "knn" else {})
            for task in tasks]


def _patches(backbone: Backbone, place: str) -> Cell:
    """On the val images of a set that has them, labeled or not."""
    val = open_images(place, "val")
    return Cell("patches", place, val.name, patches_protocol(backbone), len(val), backbone.weights_sha256,
                _decode_seconds(val), lambda: joined([val.fingerprint]))


def _finished(results: Path, weights: str) -> dict[tuple[str, str, str], set[str]]:
    """The data sets, by fingerprint, that every benchmark has records of."""
    records, _ = read_results(results) if results.is_dir() else ([], [])
    found: dict[tuple[str, str, str], set[str]] = {}
    for record in records:
        if record.weights_sha256 == weights:
            key = (record.dataset, record.protocol_fingerprint, record.task)
            found.setdefault(key, set()).add(record.dataset_fingerprint)
    return found


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


def _width(backbone: Backbone) -> int:
    """How many numbers the features of an image are."""
    side = backbone.image_size
    with torch.inference_mode():
        return int(compute_outputs(backbone, torch.zeros(1, 3, side, side, device=backbone.device),
                                   ["features"])["features"].shape[1])
