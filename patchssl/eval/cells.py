"""The benchmarks that the data at hand has everything for, each as a cell of the suite."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from patchssl.data.images import ImageSet
from patchssl.data.open import NAMED_SETS, open_images, open_pair
from patchssl.eval.copydays import copydays_protocol, dataset_name, require_ranks
from patchssl.eval.faiss import IndexPlan
from patchssl.eval.features import compute_outputs
from patchssl.eval.knn import FewShot, variant
from patchssl.eval.linear.task import linear_protocol
from patchssl.eval.patches import patches_protocol
from patchssl.eval.protocols import Protocol, knn_protocol
from patchssl.eval.records import joined, plain_text
from patchssl.eval.revisited.task import open_revisited, revisited_protocol
from patchssl.eval.search import require_index
from patchssl.models.backbone import Backbone
from patchssl.runtime.errors import DataError, PatchSSLError, UnreadableImage, UsageError
from patchssl.sets.copydays import open_copydays


@dataclass(frozen=True)
class TaskOptions:
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


def find_cells(backbone: Backbone, data: str, tasks: Sequence[str],
               choices: TaskOptions) -> tuple[list[Cell], dict[str, str]]:
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


def _unused(cells: Sequence[Cell], choices: TaskOptions) -> dict[str, str]:
    """Folders that were named and that no cell reads."""
    used = {folder for cell in cells for folder in cell.options.values()}
    folders = {"--distractors": choices.distractors, "--whitening": choices.whitening,
               "--revisited-distractors": choices.revisited_distractors}
    return {f"{name} {folder}": "no benchmark that is found here has a use for it under its default protocol"
            for name, folder in folders.items() if folder is not None and folder not in used}


def _places(data: str, choices: TaskOptions) -> list[str]:
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
                 choices: TaskOptions) -> Iterator[tuple[str, Callable[[], Cell]]]:
    """What `place` has the layout of, and what opens it."""
    if "copydays" in tasks and (Path(place) / "original").is_dir():
        yield f"copydays on {place}", partial(_copydays, backbone, place, choices)
    for path in sorted(Path(place).glob("gnd_*.pkl")) if "revisited" in tasks else ():
        name = path.stem.removeprefix("gnd_")
        yield f"revisited on {path}", partial(_revisited, backbone, place, name, None)
        if (extra := choices.revisited_distractors) is not None:
            yield f"revisited on {path} with {extra}", partial(_revisited, backbone, place, name, extra)


def _copydays(backbone: Backbone, place: str, choices: TaskOptions) -> Cell:
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
                    choices: TaskOptions) -> list[Cell]:
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


def _decode_seconds(images: ImageSet) -> float:
    """Time to decode an image, of three spread over the set; one that cannot be read is named when it matters."""
    began = time.perf_counter()
    for index in (0, len(images) // 2, len(images) - 1):
        with contextlib.suppress(UnreadableImage):
            images.pixels(index)
    return (time.perf_counter() - began) / 3


def _width(backbone: Backbone) -> int:
    """How many numbers the features of an image are."""
    side = backbone.image_size
    with torch.inference_mode():
        return int(compute_outputs(backbone, torch.zeros(1, 3, side, side, device=backbone.device),
                                   ["features"])["features"].shape[1])
