"""A study's folder: its runs, what is known of each, and who works on it.

    runs/<variant>-<seed>/          the run folder, as `patchssl pretrain` leaves it
    records/<variant>/              result records, each with its variant
    cells/<variant>-<seed>.json     how a finished run was made, or why it failed
    locks/                          one file for each run; the system drops the lock of a process that ends, or is
                                    killed, so that nobody waits for the dead
    copydays/                       the synthetic set
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from patchssl.data.open import absolute_name
from patchssl.eval.records import Result, read_results
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.recipe import with_patchwise
from patchssl.pretrain.run.log import LOG, read_rows
from patchssl.pretrain.run.resume import FACTS, changes_between, read_run, sentence, weighty_among
from patchssl.runtime.errors import DataError, FolderInUse, UsageError, unknown_choice
from patchssl.runtime.files import write_text
from patchssl.runtime.lock import locked
from patchssl.study.config import UNTRAINED, Study

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyRun:
    """One variant with one seed."""

    variant: str
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """Of its folder, its records and its lock."""
        return f"{self.variant}-{self.seed}"

    @property
    def trained(self) -> bool:
        """Is there anything to pretrain?"""
        return self.variant != UNTRAINED


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended; seconds are those of the process that did it."""

    variant: str
    seed: int
    data: str
    recipe: dict[str, Any]
    evaluations: list[str]
    weights: str = ""  # sha256 of the network that was scored
    train_seconds: float = 0.0
    score_seconds: float = 0.0
    images: int = 0  # seen in pretraining, all epochs
    updates: int = 0
    device: str = ""
    threads: int = 0
    failed: str = ""  # why there is no result

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.train_seconds + self.score_seconds


def runs_of(study: Study, only: Sequence[str] = (), seeds: Sequence[int] = (), *,
            ablations: bool = False) -> list[StudyRun]:
    """The runs asked for, seed after seed, so that what is finished early can be compared in pairs; ablations last.

    UsageError for a variant in `only` or a seed that the study does not have.
    """
    known = {**study.all_variants(), **({UNTRAINED: {}} if study.untrained else {})}
    for name in only:
        if name not in known:
            raise UsageError(unknown_choice("variant", name, known))
    for seed in seeds:
        if seed not in study.seeds:
            raise UsageError(f"seed {seed} is none of study {study.name}: {', '.join(map(str, study.seeds))}")
    chosen = [name for name in known if not only or name in only]
    recipes = {name: study.recipe_of(name) for name in chosen}
    first = [name for name in chosen if name not in study.ablations]
    later = [name for name in chosen if name in study.ablations and (only or ablations)]
    return [StudyRun(name, seed, recipes[name]) for group in (first, later) for seed in study.seeds
            if not seeds or seed in seeds for name in group]


@dataclass(frozen=True)
class StudyFolder:
    """The folder of a study and the images it works on."""

    root: Path
    study: Study
    data: str  # lasting, the part held out of it included; "" where a plan does without

    @property
    def records(self) -> Path:
        return self.root / "records"

    @property
    def copydays(self) -> Path:
        return self.root / "copydays"

    def run_folder(self, run: StudyRun) -> Path:
        """The run folder of `run`."""
        return self.root / "runs" / run.name

    def records_of(self, run: StudyRun) -> Path:
        """Where the records of the run's variant lie: two variants may well end with the same weights."""
        return self.records / run.variant

    def results(self, runs: Sequence[StudyRun]) -> list[Result]:
        """The records of those `runs` that have ended well, and of the weights they ended with."""
        ended = {run.name: found.weights for run in runs if (found := self.outcome(run)) and not found.failed}
        records, _ = read_results(self.records) if self.records.is_dir() else ([], [])
        return [record for record in records if ended.get(record.model) == record.weights_sha256]

    def log(self, run: StudyRun) -> list[dict[str, Any]]:
        """The rows of the run's log, [] where there is none."""
        return read_rows(self.run_folder(run) / LOG)

    def begun(self, run: StudyRun) -> bool:
        """Is there a run that can be resumed? UsageError for one of another recipe or other images."""
        if not (self.run_folder(run) / FACTS).is_file():
            return False
        _, facts = read_run(self.run_folder(run))
        self._require_same(run, facts.get("recipe") or {}, facts.get("data") or "")
        return True

    def outcome(self, run: StudyRun) -> RunOutcome | None:
        """How `run` ended, None while it has not, or where that cannot be read any more.

        UsageError where it was another recipe or other images.
        """
        path = self._outcome(run)
        if not path.is_file():
            return None
        try:
            found = TypeAdapter(RunOutcome).validate_json(path.read_bytes(), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            log.warning("%s is damaged (%s: %s), so the run counts as not scored", path,
                        ".".join(map(str, first["loc"])) or "JSON", first["msg"])
            return None
        self._require_same(run, found.recipe, found.data)
        return found

    def finished(self, run: StudyRun) -> bool:
        """Is there nothing left to do: failed for good, or scored by all that the study asks for?"""
        found = self.outcome(run)
        return found is not None and bool(found.failed or {*self.study.evaluations} <= {*found.evaluations})

    def keep(self, run: StudyRun, **facts: Any) -> RunOutcome:
        """Write down how `run` ended."""
        outcome = RunOutcome(run.variant, run.seed, self.data, run.recipe.model_dump(mode="json"),
                             list(self.study.evaluations), **facts)
        write_text(self._outcome(run), json.dumps(asdict(outcome), indent=2, sort_keys=True) + "\n", "outcome")
        return outcome

    def known(self, asked: Sequence[StudyRun]) -> list[StudyRun]:
        """The runs `asked` for, and all others of the study that have ended."""
        names = {run.name for run in asked}
        return [run for run in runs_of(self.study, ablations=True) if run.name in names or self.outcome(run)]

    @contextmanager
    def claimed(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        """Have `name` for this process alone; False, unless told to wait, where another process has it."""
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.root / "locks", file=f"{name}.lock", wait=wait))
            except FolderInUse:
                yield False
                return
            yield True

    def _outcome(self, run: StudyRun) -> Path:
        return self.root / "cells" / f"{run.name}.json"

    def _require_same(self, run: StudyRun, recipe: dict[str, Any], data: str) -> None:
        """UsageError unless `recipe` and `data` are those of `run`, settings that move no number aside."""
        changes = weighty_among(changes_between(with_patchwise(recipe), run.recipe))
        if not run.recipe.photometric.patch_share:
            changes.pop("photometric.patchwise", None)  # of no view
        if self.data and data != self.data:
            changes["data"] = data, self.data
        if changes:
            raise UsageError(f"{self.root} holds another study's run {run.name} ({sentence(changes)}); choose "
                             f"another --out, or remove {self.run_folder(run)} and {self._outcome(run)}")


def configurations(*roots: Path) -> int:
    """How many recipes, whatever their seeds, were begun in the study folders `roots`; DataError for damaged facts."""
    return len({_settings_of(facts) for root in roots for facts in root.glob(f"runs/*/{FACTS}")})


def _settings_of(path: Path) -> str:
    """What a number may depend on in a run.json; what an older version did not know yet is at its default."""
    try:
        recipe = json.loads(path.read_text("utf-8")).get("recipe") or {}
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}); put it back, or remove the run and its file in cells/") from None
    with suppress(ValidationError):  # of another version: told apart as it stands
        known = Recipe.model_validate(with_patchwise(recipe))
        recipe = known.model_dump(mode="json")
        recipe["photometric"]["patchwise"] = known.patch_color  # the same for a share of 0, whatever its mode
    return json.dumps({key: value for key, value in recipe.items() if key not in ("run", "data")}, sort_keys=True)


def study_folder(study: Study, out: Path | None, data: str | None, *, planning: bool = False) -> StudyFolder:
    """Where the study goes, by default studies/<name>, and what it works on, which a plan can do without."""
    unnamed = planning and data is None and study.data is None and study.stand_in is not None
    return StudyFolder(out or Path("studies") / study.name, study, "" if unnamed else absolute_name(study.images(data)))
