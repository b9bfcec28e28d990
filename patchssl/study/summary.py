"""What a study found: means, differences and tests over its seeds, a pure function of its folder.

Here for machines, as JSON and rows; `tables` says it to people.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from patchssl.report.tables.seeds import (
    Mean,
    Measure,
    Pace,
    Paired,
    curve_measures,
    mean_over_seeds,
    measures_of,
    paces_of,
    paired_over_seeds,
)
from patchssl.report.tables.stats import holm
from patchssl.study.config import UNTRAINED
from patchssl.study.folder import RunOutcome, StudyFolder, StudyRun, configurations

Pair = tuple[str, str]  # two variants: the first minus the second


class TestFamily(NamedTuple):
    """Differences of one table, which are tested together."""

    title: str
    pairs: list[Pair]
    own: bool = False  # every variant beside what it is compared with
    between: bool = False  # any two variants, or else all to the same one


@dataclass(frozen=True)
class StudySummary:
    """What is known of a study's runs by now."""

    folder: StudyFolder
    variants: Mapping[str, Sequence[StudyRun]]
    outcomes: Mapping[str, RunOutcome]  # by run
    measures: Sequence[Measure]  # of records
    curves: Sequence[Measure]  # of logs
    paces: Mapping[str, Pace]
    tried: int

    def as_dict(self) -> dict[str, Any]:
        """For machines: fractions and seconds; differences, paired by seed, are to what a variant is compared with."""
        study, sure = self.folder.study, self._significant([family for family in self.families() if family.own])
        return {"study": study.name, "data": self.folder.data, "split": study.split, "reference": study.reference,
                "configurations_tried": self.tried, "failed": self.failed, "contrasts": self._contrast_values(),
                "variants": [self._variant(name, sure) for name in self.variants]}

    @property
    def failed(self) -> dict[str, str]:
        """Why, by run."""
        return {name: found.failed for name, found in self.outcomes.items() if found.failed}

    def settings(self, variant: str) -> dict[str, Any]:
        """What of the recipe `variant` changes; nothing before the first update."""
        return self.folder.study.all_variants().get(variant, {})

    def ended(self, variant: str) -> list[RunOutcome]:
        """The runs of `variant` that have a result."""
        found = [self.outcomes[run.name] for run in self.variants[variant] if run.name in self.outcomes]
        return [outcome for outcome in found if not outcome.failed]

    def mean(self, measure: Measure, variant: str) -> Mean | None:
        """Over the seeds there are."""
        return mean_over_seeds(measure.values.get(variant, {}))

    def difference(self, measure: Measure, variant: str, other: str | None = None) -> Paired | None:
        """To the `other` variant, or the one it is set beside, on the seeds that both have."""
        values, other = measure.values, other or self.folder.study.compared_with(variant)
        return None if other is None else paired_over_seeds(values.get(other, {}), values.get(variant, {}))

    def tested(self, measures: Sequence[Measure], pairs: Sequence[Pair]) -> dict[tuple[Pair, int], bool]:
        """By pair and place in `measures`: is the difference significant among all that are tested together?"""
        gaps = {(pair, place): self.difference(measure, *pair) for pair in pairs
                for place, measure in enumerate(measures)}
        p_values = {at: gap.p for at, gap in gaps.items() if gap is not None and gap.p is not None}
        return dict(zip(p_values, holm([*p_values.values()]), strict=True))

    def rows(self) -> list[dict[str, Any]]:
        """One row per variant and measure, percent, for study.csv."""
        found = []
        for measure in (*self.measures, *self.curves):
            for variant in self.variants:
                mean, gap = self.mean(measure, variant), self.difference(measure, variant)
                if mean is not None:
                    found.append({
                        "variant": variant, "task": measure.task, "dataset": measure.dataset,
                        "protocol": measure.protocol, "metric": measure.metric, "measure": measure.title,
                        **_percent(mean, ("mean", "low", "high")), "n": mean.n,
                        "compared_with": self.folder.study.compared_with(variant),
                        **_percent(gap, ("difference", "difference_low", "difference_high")),
                        "p": None if gap is None or gap.p is None else round(gap.p, 6),
                        "pairs": None if gap is None else gap.n})
        return found

    def _variant(self, name: str, sure: Collection[tuple[Pair, str]]) -> dict[str, Any]:
        ended, pace, other = self.ended(name), self.paces.get(name), self.folder.study.compared_with(name)
        measures = []
        for measure in (*self.measures, *self.curves):
            if (mean := self.mean(measure, name)) is not None:
                gap = self.difference(measure, name)
                said = {**gap._asdict(), "significant": ((name, other), measure.title) in sure} if gap else None
                measures.append({"title": measure.title, "task": measure.task, "dataset": measure.dataset,
                                 "protocol": measure.protocol, "metric": measure.metric, **mean._asdict(),
                                 "by_seed": {str(seed): value for seed, value in measure.values[name].items()},
                                 "difference": said})
        return {"variant": name, "settings": self.settings(name),
                "compared_with": other, "seeds": [run.seed for run in ended],
                "images": ended[0].images if ended else None, "pace": asdict(pace) if pace else None,
                "train_seconds": [found.train_seconds for found in ended],
                "score_seconds": [found.score_seconds for found in ended], "measures": measures}

    def families(self) -> list[TestFamily]:
        """Every table of differences; ablations have tables of their own, and weaken no other's tests."""
        study, here = self.folder.study, [*self.variants]
        core, ablations = ([name for name in here if (name in study.ablations) is wanted] for wanted in (False, True))
        contrasts = [pair for pair in study.contrasts if {*pair} <= {*here}]
        found = [TestFamily(f"Differences to {study.reference}",
                            [(name, study.reference) for name in core if name != study.reference], own=True),
                 TestFamily("Differences between variants", [pair for pair in contrasts if {*pair} <= {*core}],
                            between=True),
                 *(TestFamily(f"Ablations: differences to {other}", [(name, other) for name in ablations],
                              own=other == study.base)
                   for other in dict.fromkeys([study.base, study.reference])),
                 TestFamily("Ablations: differences between variants",
                            [pair for pair in contrasts if not {*pair} <= {*core}], between=True)]
        return [family for family in found if family.pairs]

    def _significant(self, families: Sequence[TestFamily]) -> set[tuple[Pair, str]]:
        """Pair of variants and title of what the tables of `families` print bold."""
        return {(pair, measures[place].title) for family in families for measures in (self.measures, self.curves)
                for (pair, place), sure in self.tested(measures, family.pairs).items() if sure}

    def _contrast_values(self) -> list[dict[str, Any]]:
        """Of all pairs beyond every variant and what it is compared with, as their own tables say it."""
        found = []
        for family in (family for family in self.families() if not family.own):
            sure = self._significant([family])
            found += [{"table": family.title, "variants": list(pair), "title": measure.title, **gap._asdict(),
                       "significant": (pair, measure.title) in sure} for pair in family.pairs
                      for measure in (*self.measures, *self.curves)
                      if (gap := self.difference(measure, *pair)) is not None]
        return found


def summarize(folder: StudyFolder, runs: Sequence[StudyRun]) -> StudySummary:
    """All that is known by now of `runs` and of whatever else of the study has ended."""
    runs = folder.known(runs)
    variants: dict[str, list[StudyRun]] = {}
    for run in runs:
        variants.setdefault(run.variant, []).append(run)
    if UNTRAINED in variants:
        variants = {UNTRAINED: variants.pop(UNTRAINED), **variants}
    outcomes = {run.name: found for run in runs if (found := folder.outcome(run)) is not None}
    whole = {name: {run.seed: folder.log(run) for run in own if run.trained and run.name in outcomes
                    and not outcomes[run.name].failed} for name, own in variants.items()}
    logs = {name: runs for name, runs in whole.items() if runs}
    sizes = {name: own[0].recipe.optim.batch_size for name, own in variants.items()}
    paces = paces_of(logs, sizes, folder.study.ablations)
    folders = [folder.root, *(folder.root.parent / name for name in folder.study.searches)]
    tried = folder.study.tried + configurations(*folders)
    return StudySummary(folder, variants, outcomes, measures_of(folder.results(runs)),
                        curve_measures(logs, paces, sizes), paces, tried)


def _percent(found: Mean | Paired | None, names: Sequence[str]) -> dict[str, float | None]:
    bounds = (found.mean, found.low, found.high) if found else (None, None, None)
    return {name: None if value is None else round(100 * value, 4)
            for name, value in zip(names, bounds, strict=True)}
