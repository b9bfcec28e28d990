"""From folders of records, runs and images to the page of `patchssl report`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from patchssl.eval.records import Result, plain_text
from patchssl.models.backbone import Backbone
from patchssl.models.load import load_backbone
from patchssl.report.figures.draw import draw_attention
from patchssl.report.figures.matches import draw_view_matches
from patchssl.report.figures.tokens import read_image
from patchssl.report.logs import read_run_log
from patchssl.report.page.galleries import Gallery, galleries_of
from patchssl.report.page.pictures import Pictures, data_url
from patchssl.report.page.render import Content, Figure, render_page
from patchssl.report.page.training import TrainingSection, charts_of, compared, run_folders
from patchssl.report.tables.robustness import robustness_curves
from patchssl.report.tables.vetting import valid_costs, valid_records
from patchssl.runtime.console import Console
from patchssl.runtime.errors import DataError, PatchSSLError, UsageError
from patchssl.runtime.files import write_text
from patchssl.runtime.text import command

PAGE = "index.html"
MOST_NAMED = 5  # problems in one sentence
MOST_GALLERIES = 400  # of a record on a level
NUM_DRAWN = 3  # images of a gallery
EXAMPLES = ("textures-64:0", "textures-64:1", "textures-64:2")


@dataclass(frozen=True)
class WrittenPage:
    """The page that was written, and a sentence for everything that had to be skipped."""

    path: Path
    num_records: int
    num_runs: int
    num_pictures: int
    problems: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"page": str(self.path), "bytes": self.path.stat().st_size, "records": self.num_records,
                "runs": self.num_runs, "pictures": self.num_pictures, "left_out": list(self.problems)}


def make_report(out: Path, *, results: Path, runs: Sequence[Path] = (), data: Sequence[Path] = (),
                models: Sequence[str] = (), images: Sequence[str] = (), console: Console | None = None) -> WrittenPage:
    """Write OUT/index.html from the records below `results` and the run folders `runs`.

    Images of galleries are looked up by name below the folders `data`, `models` are drawn on `images` (files or
    SET:INDEX; default: queries of the galleries, else textures). What is damaged or hostile is skipped and named in
    the page and in `problems`. UsageError for a folder or model that is not there, DataError for such an image and
    where nothing is left to show.
    """
    if missing := [str(folder) for folder in data if not folder.is_dir()]:
        raise UsageError(f"--data {missing[0]} is no folder")
    if out.exists() and not out.is_dir():
        raise DataError(f"the report could not be written: --out {out} is a file; name a folder, which gets {PAGE}")
    folders = run_folders(runs)
    backbones = [load_backbone(model) for model in models]
    for image in images:
        read_image(image)  # a wrong name is known at once
    files, problems = valid_records(results)
    records = list(files.values())
    costs, unsound = valid_costs(results)
    problems += unsound
    trainings = _trainings(folders, problems)
    if not records and not trainings and not costs:
        raise DataError(f"there is nothing to report: {results} holds no result records that can be shown; make one "
                        f"with: {command('eval', 'knn', 'MODEL', '--data', 'DIR', '--results', results)}, or give a "
                        "run as --runs"
                        + "".join(f"; {problem}" for problem in problems[:MOST_NAMED]))
    galleries = _galleries(files, problems)
    pictures = _pictures(galleries[:MOST_GALLERIES], data, console, problems)
    images = images or _examples(galleries, pictures)
    figures = _figures(models, backbones, images, console, problems) if models else []
    content = Content(records, costs, problems, robustness_curves(records), trainings,
                      compared([training.log for training in trainings]), galleries[:MOST_GALLERIES],
                      max(0, len(galleries) - MOST_GALLERIES), pictures, figures)
    path = out / PAGE
    write_text(path, plain_text(render_page(content)), "report")  # names of files may be no UTF-8
    return WrittenPage(path, len(records), len(trainings), len(pictures.urls), tuple(problems))


def _trainings(folders: Sequence[Path], problems: list[str]) -> list[TrainingSection]:
    trainings = []
    for folder in folders:
        try:
            log = read_run_log(folder)
        except DataError as error:
            problems.append(str(error))
            continue
        problems += log.problems
        trainings.append(TrainingSection(log, charts_of(log)))
    return trainings


def _galleries(files: Mapping[Path, Result], problems: list[str]) -> list[Gallery]:
    galleries = []
    for path, record in files.items():
        try:
            galleries += galleries_of(record)
        except DataError as error:
            problems.append(f"the gallery of {path} is left out: {error}")
    return galleries


def _pictures(galleries: Sequence[Gallery], data: Sequence[Path], console: Console | None,
              problems: list[str]) -> Pictures:
    """The pictures of `galleries`, in their order."""
    pictures = Pictures(data)
    wanted = dict.fromkeys((image.name, image.bytes, gallery.record.dataset)
                           for gallery in galleries for image in gallery.images())
    for done, image in enumerate(wanted, 1):
        pictures.number(*image)
        if console:
            console.update(done, len(wanted), what="pictures")
    problems += pictures.problems
    return pictures


def _examples(galleries: Sequence[Gallery], pictures: Pictures) -> list[str]:
    """The first queries of the galleries whose images are there, else three textures."""
    queries = ((gallery, query.query) for gallery in galleries for query in (*gallery.best, *gallery.worst))
    found = (pictures.find(image.name, image.bytes, gallery.record.dataset) for gallery, image in queries)
    return [str(path) for path in islice(dict.fromkeys(filter(None, found)), NUM_DRAWN)] or list(EXAMPLES)


def _figures(models: Sequence[str], backbones: Sequence[Backbone], images: Sequence[str],
             console: Console | None, problems: list[str]) -> list[Figure]:
    """Attention of every model on all `images`, and what they match in two views of the first one.

    What cannot be drawn, as the attention of a network that has none, is named in `problems`.
    """
    figures = []
    speaker = console or Console(quiet=True)
    progress, say = speaker.counter("figures"), speaker.say
    listed, first = ", ".join(Path(image).name for image in images), Path(images[0]).name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        for done, (name, backbone) in enumerate(zip(models, backbones, strict=True)):
            progress(done, len(models) + 1)
            try:
                draw_attention(backbone, images, path, say=say)
                figures.append(Figure(
                    f"Attention of {backbone.name}", "From the class token to the patches in the last block, per head "
                    f"and on average, on {listed}.", data_url("image/png", path.read_bytes()),
                    f"Maps of the attention of {backbone.name} on {listed}"))
            except PatchSSLError as error:
                problems.append(f"the attention of {name} is not drawn: {error}")
        progress(len(models), len(models) + 1)
        try:
            draw_view_matches(backbones, images[0], path, device=torch.device("cpu"), say=say)
            names = ", ".join(backbone.name for backbone in backbones)
            figures.append(Figure(
                f"Matches by the patch tokens of {names}", f"Patches of two views of {first} that are each other's "
                "nearest, and the share that show the same place.", data_url("image/png", path.read_bytes()),
                f"Two views of {first} and lines between the patches that {names} match"))
        except PatchSSLError as error:
            problems.append(f"matches are not drawn: {error}")
        progress(len(models) + 1, len(models) + 1)
    return figures
