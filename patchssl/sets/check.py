"""Whether a dataset on the disk is what it is taken for: recognized by its layout, counted, compared.

What is known of the official sets stands here: how many images they have, and the checksums that their publishers
or torchvision state. Nothing is changed and nothing fetched; every finding that is no praise says what to do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from patchssl.data.arrays import ArraySplits, idx_splits
from patchssl.data.decode import list_folder, list_images
from patchssl.data.open import open_images, split_names
from patchssl.data.unreadable import find_unreadable
from patchssl.runtime.errors import DataError, UsageError, unknown_choice
from patchssl.runtime.findings import Finding, as_text
from patchssl.runtime.progress import Progress
from patchssl.runtime.text import command, shortened
from patchssl.sets.copydays import open_copydays
from patchssl.sets.download import checksum
from patchssl.sets.imagenet import IMAGENETTE_CLASSES, check_imagenet, check_imagenet100, check_imagenette
from patchssl.sets.revisited import GroundTruth, absent_images, present_names, read_ground_truth

RECORD = "fetched.json"  # what `patchssl data get` leaves beside the images

# as torchvision states them (datasets/cifar.py, datasets/mnist.py; Fashion-MNIST's README has the same)
CIFAR10_MD5: Mapping[str, str] = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
FASHION_MD5: Mapping[str, str] = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
# images in the database and queries; sha256 of the copy in uvavision/RerankingTransformer, as none is published
REVISITED: Mapping[str, tuple[int, int, str]] = {
    "roxford5k": (4993, 70, "ba7967754bd2d7d2210a5799f9c45ad5835e269a80ef9d3eba44caa35816c471"),
    "rparis6k": (6322, 70, "d2e729a5293dda7dda8a15c8383424a42e4964a2c4cfea2f32fa85d11d2df499"),
}
DISTRACTORS = 1_001_001  # of revisitop1m (arXiv 1803.11285)
# damaged in the archives themselves (robots.ox.ac.uk/~vgg/data/parisbuildings/corrupt.txt); no ground truth names them
PARIS_DAMAGED = tuple(f"paris_{place}_{number:06d}.jpg" for place, numbers in {
    "louvre": [136, 146], "moulinrouge": [422], "museedorsay": [1059], "notredame": [188],
    "pantheon": [284, 960, 974], "pompidou": [195, 196, 201, 467, 640], "sacrecoeur": [299, 330, 353],
    "triomphe": [662, 833, 863, 867]}.items() for number in numbers)
_COPYDAYS_FOLDERS = ("original", "strong", "jpegqual", "crops")
_WNID = re.compile(r"n\d{8}")
_MOST_LISTED = 10


@dataclass(frozen=True)
class SetReport:
    """What was found in a dataset."""

    path: Path
    kind: str  # a name in CHECKS
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with the set; notes do not count."""
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """A sentence for each finding that is a problem."""
        return [f"{finding.what}: {finding.value}" + (f" ({finding.advice})" if finding.advice else "")
                for finding in self.findings if finding.verdict == "problem"]

    def as_text(self) -> str:
        """Lines for people, problems marked with !"""
        return f"{self.path}: {self.kind}\n{as_text(self.findings)}"

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {"path": str(self.path), "set": self.kind, "ok": self.ok,
                "findings": [asdict(finding) for finding in self.findings]}


def check_set(path: str | Path, name: str | None = None, *, progress: Progress | None = None) -> SetReport:
    """What is in the folder `path`, or whether it is the set `name`, a key of CHECKS.

    With a name the set may also lie in `path`/NAME or `path`/datasets/NAME. A layout that belongs to no known set
    is checked as `images`: every one is decoded. UsageError for an unknown name, DataError where there is no folder
    and where a file that says what belongs to the set cannot be read.
    """
    if name is not None and name not in CHECKS:
        raise UsageError(unknown_choice("set", name, CHECKS))
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{root} is no folder: give the one that holds the dataset" if root.exists() else
                        f"there is no folder {root}")
    if name is not None:
        places = [root, root / name, root / "datasets" / name]
        root = next((place for place in places if _is(place, name)), root)
    kind = name or _recognized(root)
    return SetReport(root, kind, tuple(CHECKS[kind](root, progress)))


def _is(place: Path, name: str) -> bool:
    """Whether a folder has the layout of the set `name`."""
    try:
        return place.is_dir() and _recognized(place) == name
    except DataError:  # several sets lie there
        return False


def _recognized(root: Path) -> str:
    """The set that a folder has the layout of."""
    entries = list_folder(root)
    names = {entry.name for entry in entries}
    if names & {"batches.meta", "cifar-10-batches-py"}:
        return "cifar10"
    if truths := sorted(name for name in names if re.fullmatch(r"gnd_.+\.pkl", name)):
        found = truths[0].removeprefix("gnd_").removesuffix(".pkl")
        return found if found in REVISITED else "revisited"
    if "revisitop1m.txt" in names:
        return "revisitop1m"
    if len(names.intersection(_COPYDAYS_FOLDERS)) > 1:
        return "copydays"
    if (splits := idx_splits(root)) and "fashion" in splits.name.lower():
        return "fashion-mnist"
    classes = {entry.name for split in ("train", "val") if (root / split).is_dir()
               for entry in list_folder(root / split) if _WNID.fullmatch(entry.name)}
    if classes:
        return "imagenette" if classes == IMAGENETTE_CLASSES else "imagenet100" if len(classes) <= 100 else "imagenet"
    return "images"


def _check_cifar10(root: Path, progress: Progress | None) -> Iterator[Finding]:
    folder = root / "cifar-10-batches-py"
    yield from _check_files(folder if folder.is_dir() else root, CIFAR10_MD5, "cifar10", progress)


def _check_files(folder: Path, md5: Mapping[str, str], name: str, progress: Progress | None) -> Iterator[Finding]:
    """One finding for each file whose checksum is known."""
    again = f"fetch it anew: {command('data', 'get', name, 'ROOT')}"
    for done, (file, right) in enumerate(md5.items(), 1):
        if not (folder / file).is_file():
            yield Finding(file, f"not in {folder}", "problem", again)
        elif checksum(folder / file, "md5") != right:
            yield Finding(file, "damaged, or not the official file: its md5 is another one", "problem", again)
        else:
            yield Finding(file, "the official file, by its md5")
        if progress:
            progress(done, len(md5))


def _check_fashion(root: Path, progress: Progress | None) -> Iterator[Finding]:
    """Packed files by their checksums, and what is read from packed or unpacked ones by its counts."""
    places = (root / "FashionMNIST" / "raw", root / "raw", root)
    folder = next((place for place in places if place.is_dir() and idx_splits(place)), root)
    packed = {file: md5 for file, md5 in FASHION_MD5.items() if (folder / file).is_file()}
    yield from _check_files(folder, packed, "fashion-mnist", progress)
    splits = idx_splits(folder)
    yield _counted_fashion(splits, "train", 60_000)
    yield _counted_fashion(splits, "val", 10_000)


def _counted_fashion(splits: ArraySplits | None, split: str, right: int) -> Finding:
    """A tenth of the images is of each class, which tells Fashion-MNIST from others of its size."""
    again = "patchssl data get fashion-mnist ROOT"
    if splits is None or split not in splits.readers:
        return Finding(split, "no images", "problem", again)
    try:
        pixels, labels, _ = splits.readers[split]()
    except DataError as error:
        return Finding(split, str(error), "problem", again)
    if labels is None:
        return Finding(split, "no labels", "problem", again)
    counts = np.bincount(labels, minlength=10)
    value = f"{' x '.join(f'{length:,}' for length in pixels.shape)}, {counts.min():,} to {counts.max():,} of a class"
    if pixels.shape == (right, 28, 28) and (counts == right // 10).all():
        return Finding(split, value)
    return Finding(split, f"{value}, instead of {right:,} x 28 x 28 and {right // 10:,}", "problem",
                   "this is MNIST or another set of its kind, or damaged")


def _check_copydays(root: Path, progress: Progress | None) -> Iterator[Finding]:
    try:
        found = open_copydays(root, needs_distractors=False, needs_whitening=False)
    except DataError as error:
        yield Finding("blocks", str(error), "problem", "patchssl data get copydays ROOT, or put the missing archives "
                                                       "into place by hand")
        return
    yield (Finding("blocks", found.describe()) if found.official else
           Finding("blocks", found.describe(), "note", "scores on it compare models with each other only"))
    for extra, number in (("distractors", "10,000"), ("whitening", "20,000")):
        count = len(list_images(root / extra).names) if (root / extra).is_dir() else 0
        lacking = f"the protocol dino needs them (its authors took {number} photographs), dino-no{extra} does not"
        yield Finding(extra, f"{count:,} images", *(() if count else ("note", lacking)))


def _check_revisited(root: Path, progress: Progress | None, *, name: str | None = None) -> Iterator[Finding]:
    """The set `name`, or every one that has a gnd_NAME.pkl in `root`."""
    paths = sorted(root.glob("gnd_*.pkl")) if name is None else [root / f"gnd_{name}.pkl"]
    if not paths:
        yield Finding("ground truth", f"no gnd_NAME.pkl in {root}", "problem", "patchssl data get roxford5k ROOT")
    for path in paths:
        found = path.stem.removeprefix("gnd_")
        again = command("data", "get", found, "ROOT") if found in REVISITED else "make the set anew"
        try:
            truth = read_ground_truth(path)
        except DataError as error:
            yield Finding(path.name, str(error), "problem", again)
            continue
        yield _counted_truth(path, found, truth, again)
        absent = absent_images(truth, root / "jpg")
        number = len(truth.image_names())
        yield _counted_files(root / "jpg", number, absent, again)
        if found in REVISITED:
            yield from _about_release(root)


def _counted_files(folder: Path, number: int, absent: list[str], again: str) -> Finding:
    """How many of `number` files are there, all but `absent`."""
    count = f"{number - len(absent):,} of {number:,} in {folder}"
    if absent:
        return Finding("images", f"{count}; missing: {shortened(absent, _MOST_LISTED)}", "problem", again)
    return Finding("images", count)


def _counted_truth(path: Path, name: str, truth: GroundTruth, again: str) -> Finding:
    """The ground truth's counts against those of the official one, if it is called like it."""
    counts = f"{len(truth.imlist):,} images, {len(truth.qimlist):,} queries"
    if name not in REVISITED:
        return Finding(path.name, counts)
    images, queries, known = REVISITED[name]
    if (len(truth.imlist), len(truth.qimlist)) != (images, queries):
        return Finding(path.name, f"{counts} instead of {images:,} and {queries}", "problem", again)
    if checksum(path) != known:
        return Finding(path.name, f"{counts}, as they should be, but not byte for byte the file that others use",
                       "note", "no checksum is published; if scores are odd, get it anew")
    return Finding(path.name, f"{counts}, byte for byte the file that others use")


def _about_release(root: Path) -> Iterator[Finding]:
    """Which release of Oxford's or Paris's images, and the damaged ones."""
    if damaged := [name for name in PARIS_DAMAGED if (root / "jpg" / name).is_file()]:
        yield Finding("damaged images", f"{len(damaged)} that are damaged in the official archives too; no ground "
                                        "truth names them")
    archives = [name for name in _taken_in(root) if name.lower().endswith((".tgz", ".tar.gz"))]
    if not archives:
        yield Finding("faces", "blurred (since 2022) or not, cannot be told from the files", "note",
                      "earlier published numbers are of the first release, which was not blurred")
    elif any("-v1" in name for name in archives):
        yield Finding("faces", f"blurred: these are the images of 2022 ({', '.join(archives)})", "note",
                      "earlier published numbers are of the first release, which was not blurred")
    else:
        yield Finding("faces", f"as in the first release ({', '.join(archives)})")


def _taken_in(root: Path) -> list[str]:
    """Names of the files that a set was made of, as `patchssl data get` has noted them; none if it did not."""
    try:
        files = json.loads((root / RECORD).read_text("utf-8"))["files"]
        return [str(entry["file"]) for entry in files.values()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []


def _check_distractors(root: Path, progress: Progress | None) -> Iterator[Finding]:
    again = "patchssl data get revisitop1m ROOT"
    if not (root / "revisitop1m.txt").is_file():
        yield Finding("revisitop1m.txt", f"the list of the images is not in {root}", "problem", again)
        return
    names = (root / "revisitop1m.txt").read_text("utf-8", errors="replace").splitlines()
    if len(names) == DISTRACTORS:
        yield Finding("revisitop1m.txt", f"{len(names):,} names")
    else:
        yield Finding("revisitop1m.txt", f"{len(names):,} names instead of {DISTRACTORS:,}", "problem", again)
    absent = []
    for start in range(0, len(names), 1000):
        part = names[start : start + 1000]
        absent += [name for name, file in zip(part, present_names(part, root / "jpg"), strict=True) if file is None]
        if progress:
            progress(start + len(part), len(names))
    yield _counted_files(root / "jpg", len(names), absent, again)


def _check_images(root: Path, progress: Progress | None) -> Iterator[Finding]:
    """One's own images: what was understood, and every one decoded."""
    opened = {split: open_images(root, None if split == "all" else split)  # type: ignore[arg-type]
              for split in split_names(root)}
    total, before = sum(map(len, opened.values())), 0
    for split, images in opened.items():
        def told(done: int, _: int, before: int = before) -> None:
            if progress:
                progress(before + done, total)

        yield Finding(split, images.describe())
        if bad := find_unreadable(images, progress=told):
            listed = shortened([f"{name} ({reason})" for name, reason in bad], _MOST_LISTED)
            yield Finding(split, f"{len(bad):,} of {len(images):,} cannot be read: {listed}", "problem",
                          "repair or remove them")
        before += len(images)
    if set(opened) == {"train", "val"} and (unknown := set(opened["val"].classes) - set(opened["train"].classes)):
        yield Finding("val", f"has classes that train has not: {shortened(sorted(unknown), _MOST_LISTED)}", "problem",
                      "give both the same class folders")


Check = Callable[[Path, Progress | None], Iterable[Finding]]
CHECKS: Mapping[str, Check] = {
    "cifar10": _check_cifar10,
    "fashion-mnist": _check_fashion,
    "imagenet": check_imagenet,
    "imagenet100": check_imagenet100,
    "imagenette": check_imagenette,
    "copydays": _check_copydays,
    "roxford5k": partial(_check_revisited, name="roxford5k"),
    "rparis6k": partial(_check_revisited, name="rparis6k"),
    "revisited": _check_revisited,
    "revisitop1m": _check_distractors,
    "images": _check_images,
}
