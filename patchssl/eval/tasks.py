"""Benchmarks as data: one `Task` each in one registry, read by suite, commands, tables, studies, page and doctor.

A new benchmark is one module, with a function that finds what it can be run on and one that scores, and one `Task`.
Nothing heavy is imported here: tables and `--help` read the registry too, functions are imported when they are called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from patchssl.runtime.errors import UsageError, unknown_choice
from patchssl.runtime.progress import Progress, Reporter

if TYPE_CHECKING:
    import torch

    from patchssl.eval.cache import FeatureCache
    from patchssl.eval.cells import Cell, DataPlace, TaskOptions
    from patchssl.eval.records import Result
    from patchssl.models.backbone import Backbone


@dataclass(frozen=True)
class ComputeOptions:
    """What scoring may use, and whom it tells how far it is; nothing of it moves a number beyond rounding."""

    device: str | torch.device | None = None  # None: where the network is
    batch_size: int | None = None  # images of a forward pass; None: as many as the task takes by itself
    workers: int = 0  # processes that decode images
    cache: FeatureCache | None = None
    progress: Reporter | None = None

    def where(self, backbone: Backbone) -> torch.device:
        """The device that `backbone` is to run on."""
        import torch

        return backbone.device if self.device is None else torch.device(self.device)

    def counter(self, what: str) -> Progress | None:
        """What counts `what`, None where nobody watches."""
        return None if self.progress is None else self.progress.counter(what)

    def say(self, sentence: str) -> None:
        """Tell the user, if there is one."""
        if self.progress is not None:
            self.progress.say(sentence)

    def passes(self, backbone: Backbone, batch_size: int = 64) -> dict[str, Any]:
        """The options of a pass over images, as `extract_outputs` takes them; `batch_size` where none is asked for."""
        size = batch_size if self.batch_size is None else self.batch_size
        return {"batch_size": size, "workers": self.workers, "device": self.where(backbone), "cache": self.cache}


ANYWHERE = ComputeOptions()


@dataclass(frozen=True, kw_only=True)
class Task:
    """One benchmark: what it is called, what it shows, what it needs, and how it runs.

    `find(backbone, place, options)` gives, for a folder or set, a label and a function that makes the `Cell`, for
    everything that the task could be run on there; the function raises PatchSSLError where something is missing.
    `score(backbone, data, protocol, compute, **options)` gives the record; `options` are those of the cell and its
    `set_name`, and `looked_at` of a task that `classifies`: whether the files of its data were looked at before.
    """

    name: str
    titles: Mapping[str, str]  # of its tables, by what its records call the task
    protocols: tuple[str, ...]
    headlines: tuple[str, ...]  # metrics that tables show, in this order
    words: Mapping[str, str]  # metrics that a sentence names, in this order, and how
    measures: Mapping[str, str] = field(default_factory=dict)  # metrics that studies compare, and their titles
    needs: str  # in words: the data
    find: Callable[[Backbone, DataPlace, TaskOptions], Iterable[tuple[str, Callable[[], Cell]]]]
    score: Callable[..., Result]
    by_default: bool = True  # False: any images would do for it, so it would run on sets made for another task
    own_layout: bool = False  # sets of it have a layout of their own, and serve no other task
    classifies: bool = False  # needs features of train and val images, which such tasks compute in one pass


def later(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of `module`, imported when it is called."""
    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call


_BUILT_IN = (
    Task(name="knn", titles={"knn": "k-NN on frozen features"}, protocols=("dino", "native"),
         headlines=("top1@20", "top5@20"), words={"top1@20": "20-NN top-1", "top5@20": "top-5"},
         measures={"top1@20": "20-NN top-1"}, needs="labeled train and val images", classifies=True,
         find=later("patchssl.eval.knn.task", "find_knn"), score=later("patchssl.eval.knn.task", "score_knn")),
    Task(name="linear", titles={"linear": "Linear probe"}, protocols=("cached", "native", "dino", "logreg"),
         headlines=("top1", "top5"), words={"top1": "top-1", "top5": "top-5"}, measures={"top1": "linear top-1"},
         needs="labeled train and val images", classifies=True,
         find=later("patchssl.eval.linear.task", "find_linear"),
         score=later("patchssl.eval.linear.task", "score_linear")),
    Task(name="copydays", titles={"copydays": "Copydays copy detection"},
         protocols=("dino", "dino-nodistractors", "dino-nowhitening", "dino-plain", "sscd", "sscd-224", "native"),
         headlines=("strong/map",), words={"strong/map": "strong mAP", "overall/muap": "pooled µAP"},
         measures={"strong/map": "strong copies mAP"}, needs="Copydays' blocks: original/, strong/, jpegqual/, crops/",
         own_layout=True, find=later("patchssl.eval.copydays", "find_copydays"),
         score=later("patchssl.eval.copydays", "evaluate_copydays")),
    Task(name="revisited", titles={"roxford5k": "Revisited Oxford", "rparis6k": "Revisited Paris",
                                   "revisited": "Retrieval on made sets"},
         protocols=("revisitop", "dino", "ibot", "native"), headlines=("medium/map", "hard/map"),
         words={"easy/map": "easy mAP", "medium/map": "medium mAP", "hard/map": "hard mAP"},
         needs="gnd_NAME.pkl beside jpg/", own_layout=True,
         find=later("patchssl.eval.revisited.task", "find_revisited"),
         score=later("patchssl.eval.revisited.task", "evaluate_revisited")),
    Task(name="patches", titles={"patches": "Patch correspondence"}, protocols=("native",),
         headlines=("exact", "within1"),
         words={"exact": "exact matches", "within1": "within one patch", "pixels/exact": "exact by raw pixels",
                "position/exact": "by place alone", "chance/exact": "by chance"},
         measures={"exact": "exact matches", "within1": "within one patch"}, needs="any images, labels not needed",
         by_default=False, find=later("patchssl.eval.patches", "find_patches"),
         score=later("patchssl.eval.patches", "score_patches")),
)
_registry = {task.name: task for task in _BUILT_IN}


def all_tasks() -> dict[str, Task]:
    """Every benchmark by name, in the order of tables."""
    return dict(_registry)


def find_task(name: str) -> Task:
    """The task `name`; UsageError with those there are."""
    if name not in _registry:
        raise UsageError(unknown_choice("task", name, _registry))
    return _registry[name]


def register(task: Task) -> None:
    """Add a benchmark of one's own; UsageError for a name, of it or of its records, that is taken."""
    taken = {*_registry, *table_titles()} & {task.name, *task.titles}
    if taken:
        raise UsageError(f"a task called {min(taken)} is registered already; choose another name")
    if not task.protocols:
        raise UsageError(f"the task {task.name} names no protocol; one is the least")
    _registry[task.name] = task


@contextmanager
def registered(task: Task) -> Iterator[None]:
    """`task` is among the benchmarks inside the block only."""
    register(task)
    try:
        yield
    finally:
        del _registry[task.name]


def default_tasks() -> tuple[str, ...]:
    """Names of what `eval all` runs unless told otherwise."""
    return tuple(name for name, task in _registry.items() if task.by_default)


def table_titles() -> dict[str, str]:
    """The title of each table, by what records call the task."""
    return {record: title for task in _registry.values() for record, title in task.titles.items()}


def table_metrics() -> dict[str, tuple[str, ...]]:
    """The metrics that tables show, by what records call the task, each in this order."""
    return {record: task.headlines for task in _registry.values() for record in task.titles}


def metric_words() -> dict[str, str]:
    """How sentences name a metric, in this order."""
    return {metric: words for task in _registry.values() for metric, words in task.words.items()}


def study_measures() -> dict[tuple[str, str], str]:
    """Titles of what studies compare, by task and metric; sets with a layout of their own come last."""
    ordered = sorted(_registry.values(), key=lambda task: task.own_layout)
    return {(task.name, metric): title for task in ordered for metric, title in task.measures.items()}
