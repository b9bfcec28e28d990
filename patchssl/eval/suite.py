"""All benchmarks at once: what can be run with the data that is there, what is done already, one table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from patchssl.data.open import open_pair
from patchssl.data.unreadable import listing_unreadable
from patchssl.eval.cells import Cell, TaskOptions, find_cells
from patchssl.eval.features import extract_outputs, look_at
from patchssl.eval.pooling import compute_outputs
from patchssl.eval.records import Result, ScoredNetwork, network_of, read_results
from patchssl.eval.tasks import ComputeOptions, find_task
from patchssl.models.backbone import Backbone
from patchssl.models.identity import identify
from patchssl.models.pixels import RawPixels
from patchssl.runtime.errors import DataError, PatchSSLError
from patchssl.runtime.progress import CountersOnly

_TIMED_BATCH = 8  # images


@dataclass(frozen=True)
class SuitePlan:
    """What `eval all` would do: cells still to run, cells that have a record, and what cannot be run."""

    run: tuple[Cell, ...]
    done: tuple[Cell, ...]
    network: ScoredNetwork
    left_out: Mapping[str, str] = field(default_factory=dict)  # what -> why
    seconds_per_image: float = 0.0

    @property
    def passes(self) -> list[Cell]:
        """The largest cell of each pass over images; cells of one dataset and one transform share a pass."""
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
        lines += [f"skipped: {what}: {why}" for what, why in self.left_out.items()]
        estimate = timedelta(seconds=round(self.seconds))
        return "\n".join([*lines, f"{self.images:,} images to compute features of, about {estimate}, training of "
                                   "linear probes not counted"])


def _plain(cell: Cell) -> dict[str, Any]:
    return {"task": cell.task, "data": cell.data, "dataset": cell.dataset, "set": cell.set_name,
            "protocol": cell.protocol.name, "protocol_fingerprint": cell.protocol.fingerprint, "images": cell.images,
            "options": {name: str(value) for name, value in cell.options.items()}}


def plan_suite(backbone: Backbone, data: str, tasks: Sequence[str], results: Path | None, compute: ComputeOptions, *,
               choices: TaskOptions | None = None, overwrite: bool = False) -> SuitePlan:
    """What can be run for `backbone` with what lies at `data`: a set, or a folder of sets.

    A cell with a record of these weights, this protocol and these images, distractors and whitening images included,
    is done, unless `overwrite`. UsageError for an unknown task, for an index that cannot search a set and for
    `choices` without use, DataError where nothing at all can be run.
    """
    for task in tasks:
        find_task(task)
    choices = choices or TaskOptions()
    choices.require_use(tasks)
    cells, left_out = find_cells(backbone, data, tasks, choices)
    if not cells:
        reasons = "; ".join(f"{what}: {why}" for what, why in left_out.items())
        raise DataError(f"{data} holds nothing that {', '.join(tasks)} can be run on ({reasons}); it takes folders "
                        "with train/ and val/, Copydays' blocks, or gnd_NAME.pkl beside jpg/, each alone or side by "
                        "side")
    network = network_of(backbone)
    known = {} if overwrite or results is None else _finished(results, network)
    done = tuple(cell for cell in cells if (key := cell.key()) in known and cell.fingerprint() in known[key])
    run = tuple(cell for cell in cells if cell not in done)
    pace = _seconds_per_image(backbone, compute.where(backbone)) if run else 0.0
    return SuitePlan(run, done, network, left_out, pace)


def run_suite(backbone: Backbone, plan: SuitePlan, compute: ComputeOptions, *,
              keep: Callable[[Result], Any] = lambda result: None,
              stop_at_errors: bool = False) -> tuple[list[Result], dict[str, str]]:
    """Run what `plan` says and hand every record to `keep` as soon as it is there.

    A cell that fails does not stop the others, unless `stop_at_errors`: its reason is in the second value.
    """
    results, failed = [], {}
    looked_at: set[str] = set()  # data whose train and val files were looked at: once is enough
    for number, cell in enumerate(plan.run, 1):
        compute.say(f"{number} of {len(plan.run)}: {cell.label()}")
        try:
            if share_pass(backbone, cell, plan.run[number:], compute, looked_at=cell.data in looked_at):
                looked_at.add(cell.data)
            result = run_cell(backbone, cell, compute, looked_at=cell.data in looked_at)
        except PatchSSLError as error:
            if stop_at_errors:
                raise
            failed[cell.label()] = str(error)
            continue
        if find_task(cell.task).classifies:
            looked_at.add(cell.data)
        try:
            keep(result)
            results.append(result)
        except DataError as error:  # a full disk: the others are computed and said all the same
            if stop_at_errors:
                raise
            failed[cell.label()] = str(error)
    return results, failed


def share_pass(backbone: Backbone, cell: Cell, later: Sequence[Cell], compute: ComputeOptions, *,
               looked_at: bool = False) -> bool:
    """Put into the cache by one pass what `cell` and later cells with its images and transform need.

    False: without a cache, or where nobody shares, there is nothing to do. `looked_at`: all files were before.
    """
    settings = cell.protocol.transform().settings
    alike = [other for other in (cell, *later) if find_task(other.task).classifies and other.data == cell.data
             and other.protocol.transform().settings == settings]
    outputs = sorted({output for other in alike for output in other.protocol.settings.get("outputs", ["features"])})
    alone = not find_task(cell.task).classifies or len(alike) < 2
    if compute.cache is None or alone or isinstance(backbone, RawPixels) or identify(backbone).unknown:
        return False
    pair = open_pair(cell.data)
    if not looked_at:
        look_at(backbone, pair, cell.protocol, outputs, compute)
    with listing_unreadable(pair, compute.workers):
        for images in pair:
            progress = compute.counter(f"{images.split} features")
            extract_outputs(backbone, images, cell.protocol, outputs, progress=progress, **compute.passes(backbone))
    return True


def run_cell(backbone: Backbone, cell: Cell, compute: ComputeOptions, *, looked_at: bool = False) -> Result:
    """The record of one benchmark; `looked_at`: the train and val files of its data were, and all can be read."""
    task = find_task(cell.task)
    more: dict[str, Any] = {**cell.options} if cell.set_name is None else {**cell.options, "set_name": cell.set_name}
    if task.classifies:
        more["looked_at"] = looked_at
    if compute.progress is not None:  # what is there was said by the plan
        compute = replace(compute, progress=CountersOnly(compute.progress))
    return task.score(backbone, cell.data, cell.asked, compute, **more)


def _finished(results: Path, network: ScoredNetwork) -> dict[tuple[str, str, str], set[str]]:
    """The datasets, by fingerprint, that every benchmark has records of."""
    records, _ = read_results(results) if results.is_dir() else ([], [])
    found: dict[tuple[str, str, str], set[str]] = {}
    for record in records if not network.unknown else ():  # else the record may be of another one
        if record.network.matches(network):
            key = (record.dataset, record.protocol_fingerprint, record.task)
            found.setdefault(key, set()).add(record.dataset_fingerprint)
    return found


def _seconds_per_image(backbone: Backbone, device: torch.device) -> float:
    """Time of a forward pass, per image, from two small batches."""
    side = backbone.image_size
    images = torch.zeros(_TIMED_BATCH, 3, side, side, device=device)
    with torch.inference_mode():
        compute_outputs(backbone, images, ["features"])
        began = time.perf_counter()
        compute_outputs(backbone, images, ["features"])["features"].sum().item()
    return (time.perf_counter() - began) / _TIMED_BATCH
