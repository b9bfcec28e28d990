"""What a study would cost: runs, updates and time, planned by a few updates of each variant, or measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from patchssl.data.images import ArrayImages
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.run.estimate import plan_run
from patchssl.pretrain.schedules import unfinished
from patchssl.runtime.console import clock
from patchssl.runtime.device import default_device
from patchssl.study.config import StandIn
from patchssl.study.folder import RunOutcome, StudyFolder, StudyRun, runs_of

_DIFFERENT = 8  # images of noise that stand for all others


@dataclass(frozen=True)
class RunCost:
    """Of one run of a variant, in seconds; `score` is None where no run has been scored yet."""

    images: int  # seen, all epochs
    updates: int
    train: float
    score: float | None
    measured: int  # runs that these are means of; 0: planned on a few updates

    @property
    def seconds(self) -> float:
        """All that is known of it."""
        return self.train + (self.score or 0.0)


@dataclass(frozen=True)
class StudyPlan:
    """Which runs are done and which are not, and what they cost."""

    name: str
    data: str
    runs: tuple[StudyRun, ...]
    done: frozenset[str]  # names of runs
    failed: Mapping[str, str]  # name -> why
    costs: Mapping[str, RunCost]  # by variant
    stand_in: StandIn | None = None

    @property
    def missing(self) -> list[StudyRun]:
        """Runs that are still to be run."""
        return [run for run in self.runs if run.name not in self.done and run.name not in self.failed]

    @property
    def warnings(self) -> dict[str, list[str]]:
        """Sentences on schedules that their runs are too short for, and the variants they are said of."""
        said: dict[str, list[str]] = {}
        for variant, recipe in {run.variant: run.recipe for run in self.runs if run.trained}.items():
            for sentence in unfinished(recipe):
                said.setdefault(sentence, []).append(variant)
        return said

    @property
    def seconds(self) -> float:
        """Left for one process."""
        return sum(self.costs[run.variant].seconds for run in self.missing)

    @property
    def scoring_counted(self) -> bool:
        """Is the time of every benchmark known?"""
        return all(self.costs[run.variant].score is not None for run in self.missing)

    def left(self, processes: int = 1) -> str:
        """In words: about 1:52:30 left for 2 processes."""
        shared = "one process" if processes == 1 else f"{processes} processes"
        scoring = "" if self.scoring_counted else ", scoring not counted"
        return f"about {clock(self.seconds / processes)} left for {shared}{scoring}"

    def as_dict(self) -> dict[str, Any]:
        """For machines; seconds are those of one process."""
        variants = {name: {**asdict(cost), "seconds": cost.seconds} for name, cost in self.costs.items()}
        return {"study": self.name, "data": self.data, "cells": [run.name for run in self.runs],
                "missing": [run.name for run in self.missing], "done": sorted(self.done),
                "failed": dict(self.failed), "variants": variants, "estimated_seconds": self.seconds,
                "scoring_counted": self.scoring_counted, "warnings": self.warnings}

    def text(self) -> str:
        """For people."""
        width = max(len(name) for name in self.costs)
        assumed = "" if self.stand_in is None else (f"{self.stand_in.images:,} images of {self.stand_in.width} x "
                                                    f"{self.stand_in.height} pixels, assumed and timed on noise")
        lines = [f"study {self.name} on {self.data or assumed}: {len(self.runs)} runs, {len(self.done)} done, "
                 f"{len(self.failed)} failed, {len(self.missing)} to run"]
        for name, cost in self.costs.items():
            seeds = [str(run.seed) for run in self.missing if run.variant == name]
            score = "" if cost.score is None else f" + {clock(cost.score)} scoring"
            how = f"measured on {cost.measured}" if cost.measured else "planned"
            lines.append(f"  {name:<{width}}  {cost.updates:>7,} updates, {cost.images:>11,} images, "
                         f"{clock(cost.train)} training{score} a run ({how}); "
                         + (f"seeds {', '.join(seeds)} to run" if seeds else "all done"))
        lines += [f"failed: {name}: {why}" for name, why in self.failed.items()]
        lines += [f"warning: {', '.join(names)}: {sentence}" for sentence, names in self.warnings.items()]
        if self.missing:
            lines.append(f"{self.left()}; {self.left(2)}")
        return "\n".join(lines)


def plan_study(folder: StudyFolder, runs: Sequence[StudyRun], *, device: str | None,
               known: Mapping[str, RunCost] | None = None,
               progress: Callable[[int, int], None] | None = None) -> StudyPlan:
    """What is left of `runs` and what it costs: as measured in runs that are done, else on a few updates.

    `known` are costs that were planned already.
    """
    whole = runs_of(folder.study, ablations=True)  # other runs' benchmarks take as long
    everything = {run.name: found for run in whole if (found := folder.outcome(run)) is not None}
    outcomes = {run.name: everything[run.name] for run in runs if run.name in everything}
    failed = {name: found.failed for name, found in outcomes.items() if found.failed}
    done = frozenset(run.name for run in runs if folder.finished(run) and run.name not in failed)
    variants = list(dict.fromkeys(run.variant for run in runs))
    ended = [found for found in everything.values() if not found.failed]
    scoring = fmean(found.score_seconds for found in ended) if ended else None
    costs: dict[str, RunCost] = {}
    for number, variant in enumerate(variants, 1):
        run = next(run for run in runs if run.variant == variant)
        if own := [found for found in ended if found.variant == variant]:
            costs[variant] = _measured(own)
        elif known and variant in known:
            costs[variant] = replace(known[variant], score=scoring)
        elif run.trained:
            costs[variant] = _planned(folder, run, device, scoring)
        else:
            costs[variant] = RunCost(0, 0, 0.0, scoring, 0)
        if progress:
            progress(number, len(variants))
    return StudyPlan(folder.study.name, folder.data, tuple(runs), done, failed, costs,
                     folder.study.stand_in)


def _measured(own: Sequence[RunOutcome]) -> RunCost:
    return RunCost(own[0].images, own[0].updates, fmean(found.train_seconds for found in own),
                   fmean(found.score_seconds for found in own), len(own))


def _planned(folder: StudyFolder, run: StudyRun, device: str | None, scoring: float | None) -> RunCost:
    """The cost of a variant without a finished run; without images, on noise in their place."""
    chosen, stand_in = str(default_device(device)), folder.study.stand_in
    noise = None if folder.data or stand_in is None else _noise(stand_in, run.recipe)
    plan = plan_run(run.recipe, folder.data, run.seed, chosen, images=noise)
    images = plan.total_steps * run.recipe.optim.batch_size
    return RunCost(images, plan.total_steps, plan.estimated_seconds, scoring, 0)


def _noise(stand_in: StandIn, recipe: Recipe) -> ArrayImages:
    count = min(stand_in.images, recipe.max_images or stand_in.images)
    pixels = np.random.default_rng(0).integers(0, 256, (_DIFFERENT, stand_in.height, stand_in.width, 3), dtype=np.uint8)
    return ArrayImages(array=pixels, ids=np.arange(count) % _DIFFERENT, name="noise", split="train", source="noise")
