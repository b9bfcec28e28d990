"""Synthetic sets for copy detection and retrieval, from any folder of photographs.

`make_copydays` writes the layout of INRIA Copydays, `make_revisited` that of revisited Oxford and Paris: for
machines without the official sets, and for one's own pictures. Scores on a synthetic set compare models with each
other, not with published numbers.

The same photographs, seed and size give the same files with the same versions of Pillow and NumPy; every image
has a generator of its own, so that neither order nor number of workers matters. OUT/made.json says where each
image comes from and what was done to it. Nothing lies at OUT before all of it is there.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import PIL
from PIL import Image

from patchssl.runtime.errors import UsageError
from patchssl.runtime.progress import Progress, Steps
from patchssl.runtime.text import shortened
from patchssl.sets.copydays import BLOCKS, CROP_PERCENTS, JPEG_QUALITIES, PREFIX
from patchssl.sets.edits import Draws
from patchssl.sets.landmarks import HARD_VIEWS, draw_landmark, easy_view, junk_view
from patchssl.sets.photos import LEAST_SIDE, QUALITY, Intake, find_photographs, in_order, staged_folder
from patchssl.sets.strong import STRONG_EDITS

SetRecord = dict[str, Any]  # what is written down about an image, plain JSON values

MOST_ORIGINALS = 7000
_FIRST_NAME = 3000  # Copydays' own originals are 2000xx to 2999xx
_COPYDAYS, _STRONG, _REVISITED, _ORDER = 1, 2, 3, 4  # kinds of generators
_NUM_EASY, _NUM_HARD, _NUM_JUNK = 2, 3, 1  # views of each landmark
_OFFICIAL = ("roxford5k", "rparis6k", "revisitop1m")


@dataclass(frozen=True, kw_only=True)
class SyntheticSet:
    """What was made; `left_out` says for each photograph that could not serve, why."""

    root: Path
    counts: Mapping[str, int]
    left_out: Mapping[str, str]

    def describe(self) -> str:
        """One line: where it lies, how many images of each kind, what was skipped."""
        counts = ", ".join(f"{count:,} {kind}" for kind, count in self.counts.items())
        if not self.left_out:
            return f"{self.root}: {counts}"
        reasons = shortened([f"{name} ({reason})" for name, reason in self.left_out.items()], 5)
        number = len(self.left_out)
        return f"{self.root}: {counts}; skipped {number:,} photograph{'s' * (number != 1)}: {reasons}"


def make_copydays(folder: str | Path, out: str | Path, *, seed: int = 0, size: int | None = 1024,
                  distractors: str | Path | None = None, whitening: str | Path | None = None, workers: int = 1,
                  progress: Progress | None = None) -> SyntheticSet:
    """Make a set in Copydays' layout at `out` from the photographs in `folder`, scaled down to `size` pixels.

    Original i is original/NNNN00.jpg with NNNN = 3000 + i; its copies in jpegqual/Q and crops/P have the same
    name; its strong copies are strong/NNNN01.jpg and, for every other original, NNNN02.jpg.
    jpegqual: a quarter of either side, saved at quality Q ("scale 1/16 (pixels)"); crops: P percent of the area
    cut away, around one drawn place per original ("surface removed"; both after the dataset's own page,
    lear.inrialpes.fr/~jegou/data.php#copydays); strong: one kind of `STRONG_EDITS` each, dealt evenly.
    `distractors` and `whitening` are folders of further photographs, scaled down into folders of these names.

    Photographs that are too small, of one color or like an earlier one are skipped: a copy has one original.
    `progress` counts photographs read and originals copied. UsageError for an `out` that is not empty,
    DataError for unreadable files, all listed, and for fewer than two photographs.
    """
    _check_numbers(seed, size, workers)
    given = {"original": folder, "distractors": distractors, "whitening": whitening}
    sources = {kind: find_photographs(Path(place)) for kind, place in given.items() if place is not None}
    originals = sources["original"]
    if len(originals.names) > MOST_ORIGINALS:
        raise UsageError(f"{folder} holds {len(originals.names):,} photographs and names are left for "
                         f"{MOST_ORIGINALS:,} originals: give a folder with fewer")
    steps = Steps(progress, sum(len(source.names) for source in sources.values()) + len(originals.names))
    with staged_folder(Path(out), sources.values()) as stage:
        intake = Intake(size, workers, steps)
        taken = {"original": intake.take("original", originals, stage / "original", _FIRST_NAME, "{}00")}
        for kind in sorted(sources.keys() - taken.keys()):
            taken[kind] = intake.take(kind, sources[kind], stage / kind, 0, "{:06d}", distinct=kind == "distractors")
        intake.require(taken, sources)
        images = _sources_of(taken)
        for block in BLOCKS:
            (stage / block).mkdir(parents=True, exist_ok=True)
        _write_all(partial(_write_copies, stage, seed), list(taken["original"]), workers, steps, images)
        _write_listing(stage, "copydays", seed, size, images, intake.left_out)
    return SyntheticSet(root=Path(out), counts=_counted(images), left_out=intake.left_out)


def make_revisited(folder: str | Path, out: str | Path, *, name: str = "made", seed: int = 0,
                   num_queries: int | None = None, size: int = 640, workers: int = 1,
                   progress: Progress | None = None) -> SyntheticSet:
    """Make a set in the layout of revisited Oxford and Paris at `out`: jpg/*.jpg and gnd_NAME.pkl.

    Every photograph in `folder`, or the first `num_queries` of them, is a query with a box around its landmark,
    drawn; the database holds two easy, three hard and one junk view of each landmark, and the photographs that
    are no query. Longest sides are `size` pixels or less. What is skipped and what is refused: see
    `make_copydays`; UsageError also for a `name` that a file cannot have or an official set has.
    """
    _check_numbers(seed, size, workers)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in _OFFICIAL:
        raise UsageError(f"a synthetic set cannot be called '{name}': take letters, digits, - and _, and no official "
                         f"name ({', '.join(_OFFICIAL)})")
    if num_queries is not None and num_queries < 1:
        raise UsageError(f"{num_queries} queries were asked for: ask for one or more")
    source = find_photographs(Path(folder))
    steps = Steps(progress, 2 * len(source.names))
    with staged_folder(Path(out), [source]) as stage:
        intake = Intake(size, workers, steps)
        taken = {"jpg": intake.take("jpg", source, stage / "jpg", 0, name + "_{:04d}")}
        intake.require(taken, {"jpg": source})
        images = _sources_of(taken)
        queries = list(taken["jpg"])[:num_queries]
        _write_all(partial(_write_views, stage, seed), queries, workers, steps, images)
        truth = _ground_truth(images, queries, seed)
        (stage / f"gnd_{name}.pkl").write_bytes(pickle.dumps(truth, protocol=2))
        _write_listing(stage, "revisited", seed, size, images, intake.left_out)
    counts = {"queries": len(queries), "database images": len(truth["imlist"])}
    return SyntheticSet(root=Path(out), counts=counts, left_out=intake.left_out)


def _sources_of(taken: Mapping[str, Mapping[str, str]]) -> dict[str, SetRecord]:
    """Records of photographs that were taken over: by file, the name in the folder they come from."""
    return {f"{folder}/{stem}.jpg": {"source": name} for folder, names in taken.items() for stem, name in names.items()}


def _write_all(
    write: Callable[[tuple[int, str]], dict[str, SetRecord]],
    stems: list[str],
    workers: int,
    steps: Steps,
    images: dict[str, SetRecord],
) -> None:
    """Call `write` with the number and the stem of every photograph; its records join `images`."""

    def note(made: dict[str, SetRecord]) -> None:
        for file, record in made.items():
            images.setdefault(file, {}).update(record)
        steps.one()

    in_order(write, list(enumerate(stems)), workers, note)
    steps.rest()


def _write_copies(stage: Path, seed: int, item: tuple[int, str]) -> dict[str, SetRecord]:
    """Write all copies of original number `item[0]`, whose stem is `item[1]`; what was done, by file."""
    index, stem = item
    photo = _open(stage / "original" / f"{stem}.jpg")
    made: dict[str, SetRecord] = {}
    small = photo.resize((max(1, round(photo.width / 4)), max(1, round(photo.height / 4))), Image.Resampling.LANCZOS)
    for quality in JPEG_QUALITIES:
        file = f"jpegqual/{quality}/{stem}.jpg"
        small.save(stage / file, "JPEG", quality=quality)
        made[file] = {"original": stem, "quality": quality, "size": list(small.size)}
    place = Draws(seed, _COPYDAYS, index)
    across, down = place.real("across", 0, 1), place.real("down", 0, 1)
    for percent in CROP_PERCENTS:
        file, box = f"crops/{percent}/{stem}.jpg", crop_box(photo.size, percent, across, down)
        photo.crop(box).save(stage / file, "JPEG", quality=QUALITY)
        made[file] = {"original": stem, "box": list(box)}
    kinds = _dealt(seed, list(STRONG_EDITS))
    for copy in range(1 + index % 2):
        before = index + index // 2 + copy  # strong copies made before this one
        kind, draws = kinds[before % len(kinds)], Draws(seed, _STRONG, index, copy)
        file = f"strong/{stem[:PREFIX]}{copy + 1:02d}.jpg"
        STRONG_EDITS[kind](photo, draws).save(stage / file, "JPEG", quality=QUALITY)
        made[file] = {"original": stem, "kind": kind, "draws": draws.record}
    return made


def crop_box(size: tuple[int, int], percent: int, across: float, down: float) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is left of `size` = (width, height) without `percent` of the area.

    The sides keep their ratio. `across` and `down` in [0, 1] tell how much of what is cut away lies at the left
    and at the top; boxes of a larger percentage lie within those of a smaller one.

    >>> crop_box((100, 50), 75, 0.5, 1.0)
    (25, 25, 75, 50)
    """
    share = math.sqrt(1 - percent / 100)
    left, top = round(across * size[0] * (1 - share)), round(down * size[1] * (1 - share))
    right = size[0] - round((1 - across) * size[0] * (1 - share))
    bottom = size[1] - round((1 - down) * size[1] * (1 - share))
    return left, top, right, bottom


def _write_views(stage: Path, seed: int, item: tuple[int, str]) -> dict[str, SetRecord]:
    """Write the views of the landmark of query number `item[0]`, whose stem is `item[1]`; records by file."""
    index, stem = item
    photo = _open(stage / "jpg" / f"{stem}.jpg")
    draws = Draws(seed, _REVISITED, index)
    landmark = draw_landmark(photo, draws)
    made: dict[str, SetRecord] = {f"jpg/{stem}.jpg": {"bbx": list(landmark), "draws": draws.record}}
    kinds = _dealt(seed, list(HARD_VIEWS))
    hard = [kinds[(_NUM_HARD * index + number) % len(kinds)] for number in range(_NUM_HARD)]
    for number, kind in enumerate(["easy"] * _NUM_EASY + hard + ["junk"] * _NUM_JUNK):
        draws = Draws(seed, _REVISITED, index, number + 1)
        level = kind if kind in ("easy", "junk") else "hard"
        view = {"easy": easy_view, "junk": junk_view}.get(kind) or HARD_VIEWS[kind]
        file = f"jpg/{stem}_{number + 1}.jpg"
        _enlarged(view(photo, landmark, draws)).save(stage / file, "JPEG", quality=QUALITY)
        made[file] = {"query": stem, "level": level, "kind": kind, "draws": draws.record}
    return made


def _enlarged(view: Image.Image) -> Image.Image:
    """`view`, enlarged where its short side is below the least that half of it may still be a few patches."""
    if (short := min(view.size)) >= LEAST_SIDE:
        return view
    size = round(view.width * LEAST_SIDE / short), round(view.height * LEAST_SIDE / short)
    return view.resize(size, Image.Resampling.BICUBIC)


def _ground_truth(images: dict[str, SetRecord], queries: list[str], seed: int) -> dict[str, Any]:
    """The content of gnd_NAME.pkl: names without extension and, for each query, its box and its positives."""
    stems = {PurePosixPath(file).stem: record for file, record in images.items()}
    asked = set(queries)
    database = [stem for stem in stems if stem not in asked]
    database = [database[i] for i in Draws(seed, _ORDER).order(len(database))]  # ties must favor none
    gnd = {stem: {"bbx": [float(side) for side in stems[stem]["bbx"]], "easy": [], "hard": [], "junk": []}
           for stem in queries}
    for index, stem in enumerate(database):
        if "query" in stems[stem]:
            gnd[stems[stem]["query"]][stems[stem]["level"]].append(index)
    return {"imlist": database, "qimlist": queries, "gnd": [gnd[stem] for stem in queries]}


def _open(path: Path) -> Image.Image:
    """An image that this module has written."""
    with Image.open(path) as file:
        return file.convert("RGB")


def _dealt(seed: int, kinds: list[str]) -> list[str]:
    """`kinds` in an order of the seed's own."""
    return [kinds[i] for i in Draws(seed, _ORDER).order(len(kinds))]


def _check_numbers(seed: int, size: int | None, workers: int) -> None:
    if seed < 0 or workers < 1 or (size is not None and size < 2 * LEAST_SIDE):
        raise UsageError(f"seed {seed}, size {size}, workers {workers}: the seed is 0 or more, the size "
                         f"{2 * LEAST_SIDE} pixels or more, and there is at least one worker")


def _write_listing(
    stage: Path, layout: str, seed: int, size: int | None, images: Mapping[str, SetRecord], left_out: Mapping[str, str]
) -> None:
    """made.json: how the set came about, image by image."""
    versions = {"numpy": np.__version__, "pillow": PIL.__version__}
    listing = {"layout": layout, "seed": seed, "size": size, "versions": versions, "images": images,
               "left_out": left_out}
    (stage / "made.json").write_text(json.dumps(listing, indent=1, sort_keys=True) + "\n")


def _counted(images: Mapping[str, SetRecord]) -> dict[str, int]:
    """How many files there are of each kind: below each of the topmost folders."""
    return dict(Counter(PurePosixPath(file).parts[0] for file in images))
