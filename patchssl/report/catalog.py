"""The networks worth naming as a MODEL, read from `models.csv`: what they are, and what others printed of them.

Facts with their sources, none measured here; a cell of the file is empty where nothing was found. The license is
the one that timm's configuration or the authors' repository states. Nothing heavy is imported and no network used.
"""

from __future__ import annotations

import csv
import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from patchssl.report.tables.published import Published, read_published
from patchssl.runtime.errors import UsageError

# benchmarks of `published.csv` that the catalog shows, in the order of the columns
BENCHMARKS = ("imagenet1k-knn", "imagenet1k-linear", "copydays-strong",
              "roxford5k-M", "roxford5k-H", "rparis6k-M", "rparis6k-H")
UNKNOWN = "-"
_METRICS = ("top1", "mAP")
_NUMBERS = ("params", "patch_size", "image_size", "pretrain_epochs")
_NOTES = (
    "Params: without classifier. Epochs, License: as the authors or timm state them; - is not stated.",
    "Scores are percent as others printed them, not measured here, under protocols that differ; of several the first "
    "is shown, --json gives all with their sources. k-NN, Linear: top-1 on ImageNet-1K. Copydays: mAP, strong copies. "
    "ROxford, RParis: mAP, medium/hard.",
    "MODEL can also be a run folder, a file of weights (FILE.pth#student), or another Vision Transformer of timm "
    "(timm:NAME).")


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """One network that can be named as a MODEL; None where a fact was not found."""

    uri: str | None  # what `load_backbone` takes; None: the official file at `url` has to be downloaded first
    name: str
    method: str  # dino, ibot, dinov2, dinov3, mae, supervised, clip, random, pixels
    architecture: str | None  # timm's name
    params: int | None  # of the backbone, without classifier
    patch_size: int | None  # pixels
    image_size: int | None  # pixels
    pretrain_data: str | None
    pretrain_epochs: int | None
    license: str | None
    published_name: str | None  # "method; arch; pretraining" of rows in `published.csv`, several divided by " | "
    url: str | None  # the official file with the same weights
    network: str | None  # the one meant in a file that holds teacher and student
    source: str | None  # where the facts of this row are stated

    @property
    def model(self) -> str:
        """What to write for MODEL: the uri, or the name of the downloaded file and the network in it."""
        if self.uri:
            return self.uri
        file = str(self.url).rpartition("/")[2]
        return f"{file}#{self.network}" if self.network else file


def known_models(pattern: str | None = None) -> list[KnownModel]:
    """The known models in the file's order; with `pattern`, those it is part of or matches as a glob.

    Compared without case to uri, file, name, method, architecture and pretraining data. UsageError with the nearest
    names where none matches.
    """
    models = list(_read_models())
    if not pattern:
        return models
    found = [model for model in models if any(_fits(word, pattern) for word in _words(model))]
    if not found:
        near = _nearest(pattern, models)
        raise UsageError(f"no known model matches '{pattern}'{f'; nearest: {near}' if near else ''}. 'patchssl models' "
                         f"lists all {len(models)}; any Vision Transformer of timm can be named as timm:NAME")
    return found


def published_scores(model: KnownModel) -> dict[str, tuple[Published, ...]]:
    """What is printed of `model`, by benchmark (`BENCHMARKS`): every printed number in the order of the file.

    Benchmarks without a number are skipped, and so is the accuracy of a supervised network's own classifier, which
    papers repeat in their columns of k-NN and linear probes.
    """
    names = set(model.published_name.split(" | ")) if model.published_name else set()
    rows = [row for row in read_published() if _published_name(row) in names and row.metric in _METRICS
            and not row.protocol.startswith("supervised")]
    scores = {benchmark: tuple(row for row in rows if row.benchmark == benchmark) for benchmark in BENCHMARKS}
    return {benchmark: found for benchmark, found in scores.items() if found}


def as_text(models: Sequence[KnownModel], width: int | None = None) -> str:
    """An aligned table, downloads and notes, for a terminal of `width` characters (None: as wide as it gets).

    Columns that do not fit are hidden, the least needed first, and named below the table.
    """
    downloads = [model for model in models if not model.uri]
    table = [[_call(model, downloads), *(column.text(model) for column in _COLUMNS)] for model in models]
    kept = _fitting(table, width)
    headers = ["MODEL", *(column.header for column in _COLUMNS)]
    numeric = [False, *(column.numeric for column in _COLUMNS)]
    widths = _widths(table)
    lines = ["  ".join(row[i].rjust(widths[i]) if numeric[i] else row[i].ljust(widths[i]) for i in kept).rstrip()
             for row in [headers, *table]]
    notes = list(_NOTES)
    if any(model.network for model in downloads):
        notes.insert(0, "full: a training checkpoint; #teacher or #student after its name says which network is meant.")
    if hidden := [header for i, header in enumerate(headers) if i not in kept]:
        notes.insert(0, f"Left out for want of width: {', '.join(hidden)}; a wider terminal or --json shows them.")
    steps = [f"[{number}] download {model.url},\n    then {model.model}" for number, model in enumerate(downloads, 1)]
    wrapped = [textwrap.fill(note, width or 120, subsequent_indent="  ", break_on_hyphens=False) for note in notes]
    return "\n".join([*lines, "", *steps, *wrapped])


def as_json(models: Sequence[KnownModel]) -> str:
    """The facts, what to write for MODEL, and every printed score (a fraction) with protocol and source."""
    return json.dumps([_record(model) for model in models], indent=2)


@cache
def _read_models() -> tuple[KnownModel, ...]:
    text = (resources.files("patchssl.report") / "models.csv").read_text("utf-8")
    return tuple(_known_model(row) for row in csv.DictReader(text.splitlines()))


def _known_model(row: dict[str, str]) -> KnownModel:
    cells: dict[str, Any] = {name: cell or None for name, cell in row.items()}
    return KnownModel(**cells | {name: int(cells[name]) for name in _NUMBERS if cells[name]})


def _published_name(row: Published) -> str:
    return f"{row.method}; {row.arch}; {row.pretraining}"


def _words(model: KnownModel) -> list[str]:
    """What a pattern is compared to."""
    file = (model.url or "").rpartition("/")[2]
    words = (model.model, model.name, model.method, model.architecture, model.pretrain_data, file)
    return [word for word in words if word]


def _fits(word: str, pattern: str) -> bool:
    return pattern.lower() in word.lower() or fnmatchcase(word.lower(), pattern.lower())


def _nearest(pattern: str, models: Sequence[KnownModel]) -> str:
    """Up to three names that begin like `pattern` or resemble it as a whole."""
    whole = {word.lower(): word for model in models for word in _words(model)}
    starts = {word[:len(pattern)]: original for word, original in reversed(whole.items())}
    near = get_close_matches(pattern.lower(), starts | whole, n=6)
    return ", ".join(list(dict.fromkeys(f"'{(starts | whole)[word]}'" for word in near))[:3])


class _ModelColumn(NamedTuple):
    header: str
    need: int  # where the terminal is narrow the least needed column goes first
    numeric: bool
    text: Callable[[KnownModel], str]


def _call(model: KnownModel, downloads: Sequence[KnownModel]) -> str:
    return model.uri or f"[{downloads.index(model) + 1}] download"


def _count(params: int | None) -> str:
    """
    >>> _count(21_665_664), _count(1_136_479_232)
    ('21.7 M', '1.14 B')
    """
    if not params:
        return UNKNOWN if params is None else "0"
    return f"{params / 1e9:.2f} B" if params >= 1e9 else f"{params / 1e6:.1f} M"


def _cell(value: str | int | None) -> str:
    return UNKNOWN if value is None else str(value)


def _score(*benchmarks: str) -> Callable[[KnownModel], str]:
    """A cell with the first number that is printed for each of `benchmarks`, in percent."""
    def text(model: KnownModel) -> str:
        scores = published_scores(model)
        cells = [f"{100 * scores[name][0].value:.1f}" if name in scores else UNKNOWN for name in benchmarks]
        return "/".join(cells) if any(name in scores for name in benchmarks) else UNKNOWN
    return text


_COLUMNS = (
    _ModelColumn("Name", 11, False, lambda model: model.name),
    _ModelColumn("Params", 10, True, lambda model: _count(model.params)),
    _ModelColumn("Patch", 5, True, lambda model: _cell(model.patch_size)),
    _ModelColumn("Image", 2, True, lambda model: _cell(model.image_size)),
    _ModelColumn("Pretrained on", 6, False, lambda model: _cell(model.pretrain_data)),
    _ModelColumn("Epochs", 3, True, lambda model: _cell(model.pretrain_epochs)),
    _ModelColumn("License", 7, False, lambda model: _cell(model.license)),
    _ModelColumn("k-NN", 9, True, _score("imagenet1k-knn")),
    _ModelColumn("Linear", 8, True, _score("imagenet1k-linear")),
    _ModelColumn("Copydays", 4, True, _score("copydays-strong")),
    _ModelColumn("ROxford", 1, True, _score("roxford5k-M", "roxford5k-H")),
    _ModelColumn("RParis", 0, True, _score("rparis6k-M", "rparis6k-H")),
)


def _widths(table: Sequence[Sequence[str]]) -> list[int]:
    headers = ["MODEL", *(column.header for column in _COLUMNS)]
    return [max(map(len, cells)) for cells in zip(headers, *table, strict=True)]


def _fitting(table: Sequence[Sequence[str]], width: int | None) -> list[int]:
    """Numbers of the columns that fit in `width`; MODEL and Name always stay."""
    widths = _widths(table)
    kept = list(range(len(widths)))
    while width is not None and len(kept) > 2 and sum(widths[i] + 2 for i in kept) - 2 > width:
        kept.remove(min(kept[2:], key=lambda i: _COLUMNS[i - 1].need))
    return kept


def _record(model: KnownModel) -> dict[str, Any]:
    printed = {benchmark: [{"value": round(row.value, 6), "protocol": row.protocol, "source": row.source}
                           for row in rows]
               for benchmark, rows in published_scores(model).items()}
    return {"model": model.model, **asdict(model), "published": printed}
