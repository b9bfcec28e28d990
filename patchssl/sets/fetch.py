"""The sets that can be fetched: what each consists of, as data, and how it gets into place.

A set is put together in ROOT/NAME.partial, checked there (`check_sets`) and then named ROOT/NAME; one that was
killed is resumed. fetched.json in the folder says which files it was made of.

A checksum stands here where the publisher, or torchvision, states one. Where none is published, `recorded` is what
two projects have noted independently; a file with another one is reported, not refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from patchssl.runtime.errors import DataError, UsageError, unknown_choice
from patchssl.runtime.lock import locked
from patchssl.runtime.progress import Say
from patchssl.sets.check import FASHION_MD5, RECORD, check_set
from patchssl.sets.download import Wanted, checksum, download
from patchssl.sets.unpack import unpack

FileProgress = Callable[[str, int, int], None]  # what is done, how much of it, how much in all: megabytes or files
_GB = 10**9
_MOST_FAILURES = 3  # files that could not be fetched, before the rest is not tried


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One file of a set: where it is had, how it is checked, and what becomes of it."""

    name: str
    urls: tuple[str, ...]  # in the order in which they are tried
    folder: str = ""  # of the set, for the file or what is in it
    md5: str | None = None  # as published
    recorded: str | None = None  # sha256 as others have noted it; None: not known
    most_bytes: int | None = None  # when unpacked; None: it is no archive
    keep: int | None = None  # parts of a path in the archive that are kept, from its end; None: all
    other_names: tuple[str, ...] = ()  # under which another release of it may lie among one's own archives


@dataclass(frozen=True, kw_only=True)
class FetchableSet:
    """A named set: its home page, its files, and what one should know before fetching it."""

    name: str
    size: str  # of the download, in words
    page: str
    files: tuple[RemoteFile, ...]
    note: str = ""


_INRIA = (  # the site is down at times; its copy at the Internet Archive is last
    "http://pascal.inrialpes.fr/data2/holidays/",
    "http://pascal.inrialpes.fr/data/holidays/",
    "https://web.archive.org/web/20181015092553if_/http://pascal.inrialpes.fr/data/holidays/",
)
_VISSL = "https://dl.fbaipublicfiles.com/vissl/datasets/"  # has the originals and the strong copies only
_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/"
_THOR = "https://thor.robots.ox.ac.uk/datasets/"
_REVISITED = ("https://cmp.felk.cvut.cz/revisitop/data/datasets/", "http://cmp.felk.cvut.cz/revisitop/data/datasets/")
_DISTRACTORS = "http://ptak.felk.cvut.cz/revisitop/revisitop1m/"
_BLURRED = ("The images are those of 2022, with faces blurred: the first release, of which most published numbers are, "
            "is no longer offered. Who has its archives ({}) can give them by --from.")


def _copydays(part: str, folder: str, keep: int, *, mirrored: bool = False, recorded: str | None = None) -> RemoteFile:
    file = f"copydays_{part}.tar.gz"
    return RemoteFile(name=file, urls=tuple(base + file for base in ((_VISSL,) if mirrored else ()) + _INRIA),
                      folder=folder, keep=keep, most_bytes=4 * _GB, recorded=recorded)


def _buildings(file: str, place: str, first_release: str) -> RemoteFile:
    urls = (f"{_OXFORD}{place}buildings/{file}", f"{_THOR}{'oxford' if place == 'ox' else place}-buildings/{file}")
    return RemoteFile(name=file, urls=urls, folder="jpg", keep=1, most_bytes=4 * _GB, other_names=(first_release,))


def _ground_truth(name: str) -> RemoteFile:
    return RemoteFile(name=f"gnd_{name}.pkl", urls=tuple(f"{base}{name}/gnd_{name}.pkl" for base in _REVISITED))


_FASHION = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
_ALL = (
    FetchableSet(
        name="cifar10", size="170 MB", page="https://www.cs.toronto.edu/~kriz/cifar.html",
        files=(RemoteFile(name="cifar-10-python.tar.gz", md5="c58f30108f718f92721af3b95e74349a", most_bytes=2**28,
                          urls=("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",)),)),
    FetchableSet(
        name="fashion-mnist", size="31 MB", page="https://github.com/zalandoresearch/fashion-mnist",
        files=tuple(RemoteFile(name=name, md5=md5, folder="FashionMNIST/raw", urls=(
            _FASHION + name, f"http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{name}"))
            for name, md5 in FASHION_MD5.items())),
    FetchableSet(
        name="imagenette", size="99 MB", page="https://github.com/fastai/imagenette",
        files=(RemoteFile(name="imagenette2-160.tgz", md5="e793b78cc4c9e9a4ccc0c1155377a412", most_bytes=2**28, keep=3,
                          urls=("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz",)),)),
    FetchableSet(
        name="copydays", size="2.3 GB", page="https://thoth.inrialpes.fr/~jegou/data.php.html",
        note="No checksums are published. The mirror has two of the four archives; the other two are to be had from "
             "INRIA, whose site is down at times, or from the Internet Archive.",
        files=(
            _copydays("original", "original", 1, mirrored=True,
                      recorded="8b85b7914fd0145bc258bde3440f6a622243ca91ee085fe2025ce7bdeb0bfb8e"),
            _copydays("strong", "strong", 1, mirrored=True,
                      recorded="7852c64aa4a37e8329ce08159fc947c16f09c66737db0a2479a90fc9ae40760c"),
            _copydays("jpeg", "jpegqual", 2), _copydays("crop", "crops", 2))),
    FetchableSet(
        name="roxford5k", size="1.9 GB", page="https://www.robots.ox.ac.uk/~vgg/data/oxbuildings/",
        note=_BLURRED.format("oxbuild_images.tgz"),
        files=(_ground_truth("roxford5k"), _buildings("oxbuild_images-v1.tgz", "ox", "oxbuild_images.tgz"))),
    FetchableSet(
        name="rparis6k", size="2.5 GB", page="https://www.robots.ox.ac.uk/~vgg/data/parisbuildings/",
        note=_BLURRED.format("paris_1.tgz, paris_2.tgz"),
        files=(_ground_truth("rparis6k"), *(_buildings(f"paris_{part}-v1.tgz", "paris", f"paris_{part}.tgz")
                                            for part in (1, 2)))),
    FetchableSet(
        name="revisitop1m", size="a million photographs in 100 archives: some hundred GB",
        page="http://cmp.felk.cvut.cz/revisitop/", note="No checksums are published.",
        files=(RemoteFile(name="revisitop1m.txt", urls=(f"{_DISTRACTORS}revisitop1m.txt",)),
               *(RemoteFile(name=f"revisitop1m.{part}.tar.gz", folder="jpg", most_bytes=32 * _GB,
                            urls=(f"{_DISTRACTORS}jpg/revisitop1m.{part}.tar.gz",)) for part in range(1, 101)))),
)
SETS: Mapping[str, FetchableSet] = {entry.name: entry for entry in _ALL}


def get_set(
    name: str,
    root: str | Path,
    *,
    archives: Path | Sequence[Path] | None = None,
    mirror: str | None = None,
    keep_archives: bool = False,
    progress: FileProgress | None = None,
    say: Say | None = None,
) -> Path:
    """Put the set `name` into `root`/NAME, and return that folder; nothing is fetched if it is there and complete.

    `archives` are the set's files, or a folder with them, got by other means: nothing is fetched then, and they stay
    where they are. `mirror` is an address below which the files lie, tried first. What is fetched goes through
    `root`/NAME.archives, which is kept with `keep_archives`. `say` hears what one should know.
    UsageError for an unknown set or mirror; DataError for a file that cannot be had or is not what it should be, for
    a set that does not turn out complete, and for a folder that is there and is not.
    """
    chosen, say = _chosen(name), say or (lambda sentence: None)
    place = Path(root) / name
    if place.exists():
        _require_complete(place, name, "move it away, or give another folder: then it is fetched", progress)
        say(f"{place} is there and complete: nothing is fetched")
        return place
    if mirror is not None and urlsplit(mirror).scheme not in ("http", "https"):
        raise UsageError(f"the mirror '{mirror}' is no address: it begins with https:// or http://")
    stage = place.with_name(f"{name}.partial")
    with _alone(stage):
        task = _Fetch(chosen, stage, place.with_name(f"{name}.archives"), mirror, keep_archives, progress, say)
        task.run(None if archives is None else _own_files(chosen, archives, task.record()))
        _require_complete(stage, name, "remove that folder to begin anew", progress)
    stage.rename(place)
    return place


def _chosen(name: str) -> FetchableSet:
    """The set of this name; UsageError that says what else there is."""
    if name in SETS:
        return SETS[name]
    if name == "imagenet100":
        raise UsageError("imagenet100 is made from ImageNet: patchssl data imagenet100 --from IMAGENET OUT")
    if name.lower().startswith("imagenet") and "nette" not in name.lower():
        raise UsageError("ImageNet cannot be fetched: image-net.org gives it to those who have asked for access; "
                         "unpack it to train/<wnid>/ and val/<wnid>/, then: patchssl data check DIR")
    raise UsageError(unknown_choice("set", name, SETS))


def _require_complete(folder: Path, name: str, remedy: str, progress: FileProgress | None) -> None:
    """DataError with what is wrong with the set in `folder`."""
    report = check_set(folder, name, progress=partial(progress, f"checking {name}") if progress else None)
    if not report.ok:
        problems = "".join(f"\n  {problem}" for problem in report.problems)
        raise DataError(f"{folder} is not the complete set {name}:{problems}\n{remedy[0].upper()}{remedy[1:]}")


def _own_files(chosen: FetchableSet, archives: Path | Sequence[Path], done: Mapping[str, Any]) -> dict[str, Path]:
    """By file of the set, the file among `archives`; DataError with the ones that are absent and not `done`."""
    given = [archives] if isinstance(archives, Path) else list(archives)
    there: dict[str, Path] = {}
    for path in given:
        if not path.exists():
            raise DataError(f"there is no file or folder {path}")
        there |= {entry.name: entry for entry in (path.iterdir() if path.is_dir() else [path]) if entry.is_file()}
    found = {file.name: there[name] for file in chosen.files for name in reversed((file.name, *file.other_names))
             if name in there}
    if absent := [file for file in chosen.files if file.name not in found and file.name not in done]:
        listed = "".join(f"\n  {file.name}, from {file.urls[0]}" for file in absent[:10])
        more = f"\n  and {len(absent) - 10} more" if len(absent) > 10 else ""
        raise DataError(f"{len(absent)} of the {len(chosen.files)} files of {chosen.name} are not in "
                        f"{', '.join(map(str, given))}:{listed}{more}")
    return found


@contextmanager
def _alone(stage: Path) -> Iterator[None]:
    """The folder `stage`, locked against another process that fetches the same set."""
    try:
        stage.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{stage} cannot be written: {error.strerror or error}") from error
    try:
        with locked(stage, "wait for it to end"):
            yield
    finally:
        with suppress(OSError):  # only if nothing came of it
            stage.rmdir()


@dataclass(frozen=True)
class _Fetch:
    """A set on its way into `stage`."""

    chosen: FetchableSet
    stage: Path
    downloads: Path
    mirror: str | None
    keep_archives: bool
    progress: FileProgress | None
    say: Say

    def record(self) -> dict[str, Any]:
        """The files that are in the stage already, as fetched.json says."""
        try:
            return dict(json.loads((self.stage / RECORD).read_text("utf-8"))["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def run(self, own: Mapping[str, Path] | None) -> None:
        """Bring in what is not there yet: from `own` files, or from the web."""
        if self.chosen.note:
            self.say(f"{self.chosen.name} ({self.chosen.size}): {self.chosen.note}")
        failures: list[str] = []
        for file in self.chosen.files:
            if file.name in self.record() or len(failures) == _MOST_FAILURES:
                continue
            try:
                source = self._fetched(file) if own is None else own[file.name]
            except DataError as error:
                failures.append(str(error))  # the others can be had meanwhile
                continue
            self._bring_in(file, source)
            if own is None and not self.keep_archives:
                source.unlink()  # room for the next one
        if not failures and own is None and not self.keep_archives:
            shutil.rmtree(self.downloads, ignore_errors=True)
        if failures:
            raise DataError("\n".join(failures) + f"\n{self.chosen.name} is described at {self.chosen.page}; its files "
                            "can also be given by --from, once got by other means")

    def _fetched(self, file: RemoteFile) -> Path:
        urls = file.urls if self.mirror is None else (f"{self.mirror.rstrip('/')}/{file.name}", *file.urls)
        return download(urls, self.downloads / file.name, md5=file.md5,
                        progress=self._megabytes(f"fetching {file.name}"))

    def _megabytes(self, what: str) -> Callable[[int, int | None], None] | None:
        """A callback that takes bytes, and shows megabytes; only the last one reaches the whole."""
        if self.progress is None:
            return None
        show = self.progress

        def tell(done: int, total: int | None) -> None:
            whole = done // 10**6 + 1 if total is None else -(-total // 10**6)
            show(f"{what} (MB)", whole if done == total else done // 10**6, whole)

        return tell

    def _bring_in(self, file: RemoteFile, source: Path) -> None:
        """Check `source`, unpack or copy it, and note that it is there."""
        if wrong := Wanted(md5=file.md5).objection(source):
            raise DataError(f"{source} is not {file.name} as it was published: {wrong}")
        sha256 = checksum(source)
        if file.recorded not in (None, sha256):
            self.say(f"{source} is not the file that others have got: its sha256 is {sha256}, theirs {file.recorded}")
        folder = self.stage / file.folder
        folder.mkdir(parents=True, exist_ok=True)
        if file.most_bytes is None:
            shutil.copyfile(source, folder / file.name)
        else:
            unpack(source, folder, most_bytes=file.most_bytes, keep=file.keep,
                   progress=self._megabytes(f"unpacking {source.name}"))
        entry = {"file": source.name, "bytes": source.stat().st_size, "sha256": sha256}
        content = {"set": self.chosen.name, "files": self.record() | {file.name: entry}}
        saved = self.stage / f"{RECORD}.partial"
        saved.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        saved.replace(self.stage / RECORD)
