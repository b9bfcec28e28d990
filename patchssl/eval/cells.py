"""The benchmarks that the data at hand has everything for, each as a cell of the suite."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from patchssl.data.images import ImageSet
from patchssl.data.open import NAMED_SETS, open_pair
from patchssl.eval.faiss import IndexPlan
from patchssl.eval.naming import shown_name
from patchssl.eval.protocols import Protocol
from patchssl.eval.tasks import all_tasks
from patchssl.models.backbone import Backbone
from patchssl.runtime.errors import DataError, PatchSSLError, UnreadableImage, UsageError


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
    """One benchmark that can be run: a task on a dataset under a protocol."""

    task: str
    data: str  # a named set or a folder
    dataset: str  # what the record calls it
    protocol: Protocol
    images: int
    weights: str  # sha256
    decode_seconds: float  # per image, of a few of them
    fingerprint: Callable[[], str] = field(compare=False, repr=False)  # of all its images, as records hold it
    asked: str | None = None  # the protocol to ask for; None: the default
    set_name: str | None = None  # of a revisited set
    options: Mapping[str, Any] = field(default_factory=dict)  # of its evaluation

    def label(self) -> str:
        """In words: knn on textures (native)."""
        return f"{self.task} on {self.dataset} ({self.protocol.name})"

    def key(self) -> tuple[str, str, str]:
        """What tells its record from others of the same weights: dataset, protocol's fingerprint, task."""
        return shown_name(self.dataset), self.protocol.fingerprint, self.protocol.task


class DataPlace:
    """A set, or a folder that may be one; what is opened once serves every task."""

    def __init__(self, data: str) -> None:
        self.data = data

    @cached_property
    def labeled_pair(self) -> tuple[ImageSet, ImageSet]:
        """Its train and val images; DataError where they, or labels, are missing."""
        train, val = open_pair(self.data)
        train.require_labels()
        return train, val

    @cached_property
    def decode_seconds(self) -> float:
        """Time to decode a training image."""
        return decode_seconds(self.labeled_pair[0])


def find_cells(backbone: Backbone, data: str, tasks: Sequence[str],
               choices: TaskOptions) -> tuple[list[Cell], dict[str, str]]:
    """The benchmarks that `data` has everything for, and why others were skipped."""
    wanted = [task for name, task in all_tasks().items() if name in tasks]
    own = [task for task in wanted if task.own_layout]
    others = sorted((task for task in wanted if not task.own_layout), key=lambda task: task.by_default)
    cells: list[Cell] = []
    skipped: dict[str, str] = {}
    for place in map(DataPlace, _places(data, choices)):
        found, rest = ([pair for task in some for pair in task.find(backbone, place, choices)]
                       for some in (own, others))
        missing: dict[str, str] = {}
        cells += _made(found, skipped) + _made(rest, missing)
        if not found:  # a Copydays set is no classification set, and that is no news
            skipped |= _together(missing, place.data)
    return cells, skipped | _unused(cells, choices)


def _made(found: Sequence[tuple[str, Callable[[], Cell]]], missing: dict[str, str]) -> list[Cell]:
    """The cells that everything is there for; why others are not goes into `missing`."""
    cells = []
    for what, make in found:
        try:
            cells.append(make())
        except PatchSSLError as error:
            missing[what] = str(error)
    return cells


def _together(missing: Mapping[str, str], data: str) -> dict[str, str]:
    """What is missing for one reason in one sentence: knn and linear on DATA."""
    by_reason: dict[str, list[str]] = {}
    for what, why in missing.items():
        by_reason.setdefault(why, []).append(what.removesuffix(f" on {data}"))
    return {f"{' and '.join(names)} on {data}": why for why, names in by_reason.items()}


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


def decode_seconds(images: ImageSet) -> float:
    """Time to decode an image, of three spread over the set; one that cannot be read is named when it matters."""
    began = time.perf_counter()
    for index in (0, len(images) // 2, len(images) - 1):
        with contextlib.suppress(UnreadableImage):
            images.pixels(index)
    return (time.perf_counter() - began) / 3
