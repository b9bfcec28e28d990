"""What a study found, as tables for people and JSON for machines: a pure function of its folder."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pandas as pd

from patchssl.eval.tasks import study_measures
from patchssl.report.tables.build import NOT_RUN, make_frames, write_tables
from patchssl.report.tables.published import PAPER_DATASETS, plain_name
from patchssl.report.tables.render import to_csv, to_markdown
from patchssl.report.tables.scores import Column
from patchssl.report.tables.seeds import (
    EQUAL_TIME,
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
from patchssl.runtime.console import clock
from patchssl.runtime.files import write_text
from patchssl.study.config import UNTRAINED
from patchssl.study.folder import RunOutcome, StudyFolder, StudyRun, configurations

STEM = "study"
Pair = tuple[str, str]  # two variants: the first minus the second
_NAMED = ["Variant", "What differs", "Seeds"]


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
        study, sure = self.folder.study, self._significant([family for family in self._families() if family.own])
        return {"study": study.name, "data": self.folder.data, "split": study.split, "reference": study.reference,
                "configurations_tried": self.tried, "failed": self.failed, "contrasts": self._contrast_values(),
                "variants": [self._variant(name, sure) for name in self.variants]}

    @property
    def failed(self) -> dict[str, str]:
        """Why, by run."""
        return {name: found.failed for name, found in self.outcomes.items() if found.failed}

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

    def text(self) -> str:
        """All tables in Markdown."""
        study, measures = self.folder.study, self.measures or _expected(self.folder)
        tables = {"Scores": self._scores(measures)}
        for title, pairs, _, between in self._families():
            tables[f"{title}, paired by seed"] = (self._between if between else self._differences)(pairs, measures)
        if self.paces:
            tables["Equal images, equal time"] = self._costs()
        for title, pairs, _, between in self._families():
            timed = [pair for pair in pairs if pair[0] in self.paces]
            if timed and not between:
                tables[f"{title} within the training"] = self._differences(timed, self.curves)
        if plain_name(study.name) in PAPER_DATASETS:
            tables["Published"] = _published(study.name)
        parts = [f"# Study {study.name}", self._what(),
                 *(f"## {title}\n\n{to_markdown(frame)}".rstrip("\n") for title, frame in tables.items())]
        return "\n\n".join(parts) + "\n"

    def write(self) -> list[Path]:
        """Write study.md, study.csv and study.json, and the comparison tables of all records as table.*."""
        texts = {"md": self.text(), "csv": to_csv(pd.DataFrame(self.rows(), dtype=object)),
                 "json": json.dumps(self.as_dict(), indent=2, sort_keys=True) + "\n"}
        paths = [self.folder.root / f"{STEM}.{suffix}" for suffix in texts]
        for path, text in zip(paths, texts.values(), strict=True):
            write_text(path, text, "summary")
        records = self.folder.results([run for runs in self.variants.values() for run in runs])
        return paths + (write_tables(records, self.folder.root, "table") if records else [])

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
        return {"variant": name, "settings": _settings(self.folder, name),
                "compared_with": other, "seeds": [run.seed for run in ended],
                "images": ended[0].images if ended else None, "pace": asdict(pace) if pace else None,
                "train_seconds": [found.train_seconds for found in ended],
                "score_seconds": [found.score_seconds for found in ended], "measures": measures}

    def _families(self) -> list[TestFamily]:
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
        for family in (family for family in self._families() if not family.own):
            sure = self._significant([family])
            found += [{"table": family.title, "variants": list(pair), "title": measure.title, **gap._asdict(),
                       "significant": (pair, measure.title) in sure} for pair in family.pairs
                      for measure in (*self.measures, *self.curves)
                      if (gap := self.difference(measure, *pair)) is not None]
        return found

    def _what(self) -> str:
        """Data, split, budget, and how many configurations were tried."""
        study, ended = self.folder.study, [found for name in self.variants for found in self.ended(name)]
        split = ("scored on the test images" if study.split == "test" else
                 f"scored on {study.validation_share:g} of the train images, held out; the test images were not opened")
        data = self.folder.data or "images that were not named"
        lines = [f"{len(ended)} of {sum(map(len, self.variants.values()))} cells on {data}; {split}."]
        trained = [found for found in ended if found.images]
        if trained:
            images = sorted({found.images for found in trained})
            train, score = (fmean(seconds) for seconds in zip(
                *((found.train_seconds, found.score_seconds) for found in trained), strict=True))
            where = sorted({f"{found.device}, {found.threads} thread{'s' * (found.threads != 1)}" for found in trained})
            lines.append(f"Budget: every run saw {' or '.join(f'{count:,}' for count in images)} images; a cell took "
                         f"{clock(train)} of training and {clock(score)} of scoring on average, all "
                         f"cells together {clock(sum(found.seconds for found in ended))} "
                         f"({'; '.join(where)}).")
        lines.append(f"Configurations tried in all: {self.tried} ({study.tried} before this study"
                     + (f", the others here and in {', '.join(study.searches)})." if study.searches
                        else ", the others are its own)."))
        lines += [f"Failed: {name}: {why}" for name, why in self.failed.items()]
        return "\n\n".join(lines)

    def _scores(self, measures: Sequence[Measure]) -> pd.DataFrame:
        body = [[*self._named(name), *(_shown(self.mean(measure, name)) for measure in measures)]
                for name in self.variants]
        frame = pd.DataFrame(body, columns=[*_NAMED, *(f"{measure.title}, %" for measure in measures)], dtype=object)
        frame.attrs["notes"] = ["± is half of the 95 % t-interval of the mean over n seeds.",
                                *_protocols(measures)]
        return frame

    def _differences(self, pairs: Sequence[Pair], measures: Sequence[Measure]) -> pd.DataFrame:
        """Of variants that are all set beside the same one."""
        return self._gaps(pairs, _NAMED, [self._named(name) for name, _ in pairs], measures,
                          f"Variant minus {pairs[0][1]}")

    def _between(self, pairs: Sequence[Pair], measures: Sequence[Measure]) -> pd.DataFrame:
        """Of any two variants."""
        return self._gaps(pairs, ["First", "Second"], pairs, measures, "First minus second")

    def _gaps(self, pairs: Sequence[Pair], titles: Sequence[str], heads: Sequence[Sequence[str]],
              measures: Sequence[Measure], what: str) -> pd.DataFrame:
        """A line per pair, which begins with its head."""
        tested = self.tested(measures, pairs)
        body = [[*head, *(_shown(self.difference(measure, *pair)) for measure in measures)]
                for pair, head in zip(pairs, heads, strict=True)]
        frame = pd.DataFrame(body, columns=[*titles, *(f"{measure.title}, points" for measure in measures)],
                             dtype=object)
        frame.attrs["bold"] = [(pairs.index(pair), place + len(titles)) for (pair, place), sure in tested.items()
                               if sure]
        frame.attrs["notes"] = [
            f"{what}, mean over the n seeds that both have, and its 95 % t-interval; an interval is "
            "not corrected for the number of comparisons.", *([
            f"Bold: significant at the 5 % level among all {len(tested)} tests of this table together (paired t-test, "
            "Holm's correction)."] if tested else [])]
        return frame

    def _costs(self) -> pd.DataFrame:
        """Pace, what fits into the time of the cheapest one of the core, and the in-training k-NN at either."""
        reference = self.paces.get(self.folder.study.reference)
        body = []
        for name, pace in self.paces.items():
            ratio = f"{pace.seconds_per_image / reference.seconds_per_image:.2f}" if reference else ""
            share = pace.images_in_time / pace.images
            body.append([*self._named(name), f"{1000 * pace.seconds_per_image:.2f}", ratio, f"{pace.images:,}",
                         f"{pace.images_in_time:,.0f} ({share:.0%})",
                         *(_shown(self.mean(measure, name)) for measure in self.curves)])
        titles = ["s per 1,000 images", "to reference", "images", "images in equal time"]
        frame = pd.DataFrame(body, columns=[*_NAMED, *titles, *(f"{measure.title}, %" for measure in self.curves)],
                             dtype=object)
        frame.attrs["notes"] = [
            "Time: the median pace of all log rows of a variant, k-NN and pauses left out. Equal time is that of the "
            "variant whose whole run takes the least, ablations aside.",
            f"{EQUAL_TIME}: read off each run's own curve after as many images as fit into that time. A run that is "
            "read before its end has not brought its learning rate down yet, which counts against it: a variant with "
            "fewer optim.epochs shows what a whole schedule in that time gives.",
            "The k-NN in training classifies training images by others, not the images of the scores above."]
        return frame

    def _named(self, name: str) -> list[str]:
        seeds = [str(found.seed) for found in self.ended(name)]
        own = [f"{key}={json.dumps(value)}" for key, value in _settings(self.folder, name).items()]
        what = "before the first update" if name == UNTRAINED else ", ".join(own)
        return [name, what, ", ".join(seeds) or NOT_RUN]


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


def _expected(folder: StudyFolder) -> list[Measure]:
    """The columns there will be."""
    return [Measure(title, task, "", "", metric, {}) for (task, metric), title in study_measures().items()
            if task in folder.study.evaluations]


def _published(dataset: str) -> pd.DataFrame:
    """What others print for the dataset, under the protocol they print it for."""
    shown = ("knn", "top1@20"), ("linear", "top1")
    columns = [Column(task, dataset, "dino", metric, "", "") for task, metric in shown]
    return make_frames([], columns, [], [])[0]


def _settings(folder: StudyFolder, variant: str) -> dict[str, Any]:
    return folder.study.all_variants().get(variant, {})


def _protocols(measures: Sequence[Measure]) -> list[str]:
    said = [f"{measure.title}: {measure.task} on {measure.dataset}, protocol {measure.protocol}."
            for measure in measures if measure.protocol]
    return list(dict.fromkeys(said))


def _shown(found: Mean | Paired | None) -> str:
    return NOT_RUN if found is None else str(found)


def _percent(found: Mean | Paired | None, names: Sequence[str]) -> dict[str, float | None]:
    bounds = (found.mean, found.low, found.high) if found else (None, None, None)
    return {name: None if value is None else round(100 * value, 4)
            for name, value in zip(names, bounds, strict=True)}
