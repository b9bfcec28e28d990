"""`patchssl study`: from the words of the command line to runs, a plan, and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchssl.data.open import open_pair
from patchssl.runtime.console import Console
from patchssl.runtime.errors import DataError
from patchssl.study.config import LEAST_ORIGINALS, load_study
from patchssl.study.folder import StudyFolder, StudyRun, runs_of, study_folder
from patchssl.study.plan import StudyPlan, plan_study
from patchssl.study.run import StudyProgress, do_runs
from patchssl.study.summary import StudySummary, summarize
from patchssl.study.tables import study_text, write_study


@dataclass(frozen=True)
class StudyRequest:
    """What the command line asks for."""

    folder: StudyFolder
    runs: Sequence[StudyRun]
    device: str | None


@dataclass(frozen=True)
class Answer:
    """What a call of the command did."""

    progress: StudyProgress
    summary: StudySummary
    files: Sequence[Path]

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return {**self.summary.as_dict(), "failed": self.progress.failed, "busy": self.progress.busy,
                "files": [str(path) for path in self.files]}

    def text(self) -> str:
        """For people: the tables, what failed, and what other processes are still at."""
        lines = [study_text(self.summary).rstrip("\n"), ""]
        lines += [f"failed: {name}: {why}" for name, why in self.progress.failed.items()]
        if self.progress.busy:
            lines.append(f"other processes are at {', '.join(self.progress.busy)}; the last one to end writes whole "
                         "tables")
        return "\n".join([*lines, "Written:", *(f"  {path}" for path in self.files)])


def ask(source: str, out: Path | None, data: str | None, *, only: Sequence[str], seeds: Sequence[int],
        ablations: bool, device: str | None, planning: bool) -> StudyRequest:
    """The runs of the study `source`, and where they go; everything that would spoil them is refused here."""
    study = load_study(source)
    folder = study_folder(study, out, data, planning=planning)
    runs = runs_of(study, only, seeds, ablations=ablations)
    for run in runs:
        folder.outcome(run)
        if run.trained:
            folder.begun(run)
    return StudyRequest(folder, runs, device)


def plan(asked: StudyRequest, console: Console) -> tuple[StudyPlan, str]:
    """What the study would cost, and the tables it would fill."""
    found = plan_study(asked.folder, asked.runs, device=asked.device, progress=console.counter("planning"))
    return found, study_text(summarize(asked.folder, asked.runs))


def _require_enough(folder: StudyFolder) -> None:
    """DataError, before the first run and not after it, for images without labels, or too few to make copies of."""
    pair = open_pair(folder.data)
    for images in pair:
        images.require_labels()
    if "copydays" in folder.study.evaluations and (count := len(pair[1])) < LEAST_ORIGINALS:
        raise DataError(f"{folder.data} has {count} images to score on, and copy detection needs {LEAST_ORIGINALS} "
                        f"originals; leave copydays out of the evaluations of study {folder.study.name}")


def run(asked: StudyRequest, console: Console) -> Answer:
    """Plan, run what is missing, tabulate what is there."""
    _require_enough(asked.folder)
    before = plan_study(asked.folder, asked.runs, device=asked.device, progress=console.counter("planning"))
    console.say(before.text())

    def left(waiting: Sequence[StudyRun], processes: int) -> str:
        now = plan_study(asked.folder, waiting, device=asked.device, known=before.costs)
        return now.left(processes)

    progress = do_runs(asked.folder, asked.runs, left, device=asked.device, console=console)
    summary = summarize(asked.folder, asked.runs)
    return Answer(progress, summary, write_study(summary))
