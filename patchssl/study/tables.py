"""What a study found, as tables in Markdown for people, and all of it written to its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import pandas as pd

from patchssl.eval.records import Result
from patchssl.eval.tasks import study_measures
from patchssl.report.tables.build import NOT_RUN, make_frames, write_tables
from patchssl.report.tables.published import PAPER_DATASETS, only_named_so, plain_name
from patchssl.report.tables.render import to_csv, to_markdown
from patchssl.report.tables.scores import Column
from patchssl.report.tables.seeds import EQUAL_TIME, Mean, Measure, Paired
from patchssl.runtime.console import clock
from patchssl.runtime.files import write_text
from patchssl.study.config import UNTRAINED
from patchssl.study.folder import StudyFolder
from patchssl.study.summary import Pair, StudySummary

STEM = "study"
_NAMED = ["Variant", "What differs", "Seeds"]


def study_text(summary: StudySummary) -> str:
    """All tables in Markdown."""
    study, measures = summary.folder.study, summary.measures or _expected(summary.folder)
    tables = {"Scores": _scores(summary, measures)}
    for title, pairs, _, between in summary.families():
        tables[f"{title}, paired by seed"] = (_between if between else _differences)(summary, pairs, measures)
    if summary.paces:
        tables["Equal images, equal time"] = _costs(summary)
    for title, pairs, _, between in summary.families():
        timed = [pair for pair in pairs if pair[0] in summary.paces]
        if timed and not between:
            tables[f"{title} within the training"] = _differences(summary, timed, summary.curves)
    if plain_name(study.name) in PAPER_DATASETS and not any(
            only_named_so(record, study.name) for record in _records(summary) if record.task in ("knn", "linear")):
        tables["Published"] = _published(study.name)
    parts = [f"# Study {study.name}", _what(summary),
             *(f"## {title}\n\n{to_markdown(frame)}".rstrip("\n") for title, frame in tables.items())]
    return "\n\n".join(parts) + "\n"


def write_study(summary: StudySummary) -> list[Path]:
    """Write study.md, study.csv and study.json, and the comparison tables of all records as table.*."""
    texts = {"md": study_text(summary), "csv": to_csv(pd.DataFrame(summary.rows(), dtype=object)),
             "json": json.dumps(summary.as_dict(), indent=2, sort_keys=True) + "\n"}
    paths = [summary.folder.root / f"{STEM}.{suffix}" for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_text(path, text, "summary")
    records = _records(summary)
    return paths + (write_tables(records, summary.folder.root, "table") if records else [])


def _records(summary: StudySummary) -> list[Result]:
    return summary.folder.results([run for runs in summary.variants.values() for run in runs])


def _what(summary: StudySummary) -> str:
    """Data, split, budget, and how many configurations were tried."""
    study, ended = summary.folder.study, [found for name in summary.variants for found in summary.ended(name)]
    split = ("scored on the test images" if study.split == "test" else
             f"scored on {study.validation_share:g} of the train images, held out; the test images were not opened")
    data = summary.folder.data or "images that were not named"
    lines = [f"{len(ended)} of {sum(map(len, summary.variants.values()))} cells on {data}; {split}."]
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
    lines.append(f"Configurations tried in all: {summary.tried} ({study.tried} before this study"
                 + (f", the others here and in {', '.join(study.searches)})." if study.searches
                    else ", the others are its own)."))
    lines += [f"Failed: {name}: {why}" for name, why in summary.failed.items()]
    return "\n\n".join(lines)


def _scores(summary: StudySummary, measures: Sequence[Measure]) -> pd.DataFrame:
    body = [[*_named(summary, name), *(_shown(summary.mean(measure, name)) for measure in measures)]
            for name in summary.variants]
    frame = pd.DataFrame(body, columns=[*_NAMED, *(f"{measure.title}, %" for measure in measures)], dtype=object)
    frame.attrs["notes"] = ["± is half of the 95 % t-interval of the mean over n seeds.",
                            *_protocols(measures)]
    return frame


def _differences(summary: StudySummary, pairs: Sequence[Pair], measures: Sequence[Measure]) -> pd.DataFrame:
    """Of variants that are all set beside the same one."""
    return _gaps(summary, pairs, _NAMED, [_named(summary, name) for name, _ in pairs], measures,
                 f"Variant minus {pairs[0][1]}")


def _between(summary: StudySummary, pairs: Sequence[Pair], measures: Sequence[Measure]) -> pd.DataFrame:
    """Of any two variants."""
    return _gaps(summary, pairs, ["First", "Second"], pairs, measures, "First minus second")


def _gaps(summary: StudySummary, pairs: Sequence[Pair], titles: Sequence[str], heads: Sequence[Sequence[str]],
          measures: Sequence[Measure], what: str) -> pd.DataFrame:
    """A line per pair, which begins with its head."""
    tested = summary.tested(measures, pairs)
    body = [[*head, *(_shown(summary.difference(measure, *pair)) for measure in measures)]
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


def _costs(summary: StudySummary) -> pd.DataFrame:
    """Pace, what fits into the time of the cheapest one of the core, and the in-training k-NN at either."""
    reference = summary.paces.get(summary.folder.study.reference)
    body = []
    for name, pace in summary.paces.items():
        ratio = f"{pace.seconds_per_image / reference.seconds_per_image:.2f}" if reference else ""
        share = pace.images_in_time / pace.images
        body.append([*_named(summary, name), f"{1000 * pace.seconds_per_image:.2f}", ratio, f"{pace.images:,}",
                     f"{pace.images_in_time:,.0f} ({share:.0%})",
                     *(_shown(summary.mean(measure, name)) for measure in summary.curves)])
    titles = ["s per 1,000 images", "to reference", "images", "images in equal time"]
    frame = pd.DataFrame(body, columns=[*_NAMED, *titles, *(f"{measure.title}, %" for measure in summary.curves)],
                         dtype=object)
    frame.attrs["notes"] = [
        "Time: the median pace of all log rows of a variant, k-NN and pauses left out. Equal time is that of the "
        "variant whose whole run takes the least, ablations aside.",
        f"{EQUAL_TIME}: read off each run's own curve after as many images as fit into that time. A run that is "
        "read before its end has not brought its learning rate down yet, which counts against it: a variant with "
        "fewer optim.epochs shows what a whole schedule in that time gives.",
        "The k-NN in training classifies training images by others, not the images of the scores above."]
    return frame


def _named(summary: StudySummary, name: str) -> list[str]:
    seeds = [str(found.seed) for found in summary.ended(name)]
    own = [f"{key}={json.dumps(value)}" for key, value in summary.settings(name).items()]
    what = "before the first update" if name == UNTRAINED else ", ".join(own)
    return [name, what, ", ".join(seeds) or NOT_RUN]


def _expected(folder: StudyFolder) -> list[Measure]:
    """The columns there will be."""
    return [Measure(title, task, "", "", metric, {}) for (task, metric), title in study_measures().items()
            if task in folder.study.evaluations]


def _published(dataset: str) -> pd.DataFrame:
    """What others print for the dataset, under the protocol they print it for."""
    shown = ("knn", "top1@20"), ("linear", "top1")
    columns = [Column(task, dataset, "dino", metric, "", "") for task, metric in shown]
    return make_frames([], columns, [], [])[0]


def _protocols(measures: Sequence[Measure]) -> list[str]:
    said = [f"{measure.title}: {measure.task} on {measure.dataset}, protocol {measure.protocol}."
            for measure in measures if measure.protocol]
    return list(dict.fromkeys(said))


def _shown(found: Mean | Paired | None) -> str:
    return NOT_RUN if found is None else str(found)
