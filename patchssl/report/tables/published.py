"""Numbers that others printed, read from `published.csv` with their sources. None is measured here."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from patchssl.eval.records import Result

# datasets of the PW-Self paper whose numbers we could not get hold of
PAPER_DATASETS = ("cifar10", "imagenet100", "imagenet1k", "copydays", "roxford5k", "rparis6k")
# task and metric of our records -> benchmark (behind the dataset's name) and metric as `published.csv` has them
_METRICS = {("knn", "top1@20"): ("{}-knn", "top1"), ("linear", "top1"): ("{}-linear", "top1"),
            ("copydays", "strong/map"): ("{}-strong", "mAP"),
            **{(task, f"{level}/map"): ("{}-" + level[0].upper(), "mAP")
               for task in ("roxford5k", "rparis6k") for level in ("easy", "medium", "hard")}}
_OTHER_PROTOCOL = ("TRANSFER", "THIRD PARTY", "USER REPORT", "DINOv2 authors")  # how the notes of such rows begin


@dataclass(frozen=True)
class Published:
    """One printed number, a fraction in [0, 1], and where it stands."""

    method: str
    arch: str
    pretraining: str
    benchmark: str
    metric: str
    value: float
    protocol: str  # in words
    source: str

    @property
    def protocol_name(self) -> str | None:
        """Our name of the protocol the number was printed under: `dino`, `ibot`, or None where it is neither's."""
        if self.protocol.startswith(_OTHER_PROTOCOL) or "probe ablation" in self.protocol:
            return None
        return "ibot" if self.method == "iBOT" and self.benchmark.startswith(("roxford5k", "rparis6k")) else "dino"


def published(task: str, dataset: str, metric: str,
              methods: tuple[str, ...] = ("DINO", "iBOT")) -> list[Published]:
    """Printed numbers of Vision Transformers trained by `methods` for `metric` of `task`, in file order.

    Empty where nothing is printed for that dataset; names of datasets are compared without case and
    punctuation.
    """
    benchmark, printed = _METRICS.get((task, metric), ("", ""))
    sought = benchmark.format(plain_name(dataset)), printed
    return [row for row in read_published() if (row.benchmark, row.metric) == sought
            and row.method in methods and row.arch.startswith("ViT")]


def only_named_so(record: Result, name: str | None = None) -> bool:
    """Are the record's images, which are called `name` (None: as it says), not as many as the set of that name has?

    False for a name without published numbers. A record that does not say how many they are counts as one.
    """
    official = _official().get(plain_name(name or record.dataset))
    return official is not None and not any(
        all(record.detail.get(name) == value for name, value in counts.items()) for counts in official)


@cache
def _official() -> Mapping[str, tuple[Mapping[str, int], ...]]:
    """What the detail of a record on the set itself says, one of these: how many images, or that all were there."""
    from patchssl.sets.imagenet import (  # brings numpy, which the list of models does without
        IMAGENET,
        IMAGENET100_TRAIN,
    )

    return {
        "cifar10": ({"num_train": 50_000, "num_test": 10_000},),
        "imagenet1k": ({"num_train": IMAGENET["train"], "num_test": IMAGENET["val"]},),
        "imagenet100": tuple({"num_train": count, "num_test": 5_000} for count in IMAGENET100_TRAIN.values()),
        # the DINO authors' 10,000 distractors and 20,000 images to whiten by are drawn anew by others, as many
        "copydays": ({"official": True, "num_distractors": 10_000, "num_whitening": 20_000},),
        "roxford5k": ({"official": True, "num_distractors": 0},),
        "rparis6k": ({"official": True, "num_distractors": 0},),
    }


@cache
def read_published() -> tuple[Published, ...]:
    """All rows of the `published.csv` that comes with the package."""
    text = (resources.files("patchssl.report.tables") / "published.csv").read_text("utf-8")
    return tuple(_published(row) for row in csv.DictReader(text.splitlines()))


def plain_name(dataset: str) -> str:
    """A dataset's name as `published.csv` spells it.

    >>> plain_name("CIFAR-10")
    'cifar10'
    """
    return "".join(letter for letter in dataset.lower() if letter.isalnum())


def _published(row: dict[str, str]) -> Published:
    arch = f"{row['arch']}/{row['patch_size']}" if row["patch_size"] else row["arch"]
    epochs = f"{row['pretrain_epochs']} epochs" if row["pretrain_epochs"] else "epochs not stated"
    source = ", ".join(row[key] for key in ("source_title", "source_locator", "source_ref") if row[key])
    return Published(row["method"], arch, f"{row['pretrain_data']}, {epochs}", row["benchmark"],
                     row["metric"], float(row["value"]) / 100, row["protocol_notes"], source)
