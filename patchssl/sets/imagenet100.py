"""ImageNet-100: a hundred classes of ImageNet under a root of their own, as links to ImageNet's class folders.

Several sets go by this name. Two lists of classes are shipped: `cmc`, of Contrastive Multiview Coding (Tian et al.),
which most papers on self-supervision use, and `kaggle`, of kaggle.com/datasets/ambityga/imagenet100, which the
authors of PW-Self name. They have few classes in common, so scores on the one do not compare with scores on the other.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

from patchssl.data.decode import is_folder, list_folder
from patchssl.runtime.errors import DataError, UsageError, unknown_choice
from patchssl.runtime.files import read_regular
from patchssl.runtime.progress import Progress
from patchssl.runtime.text import shortened
from patchssl.sets.photos import PhotoFolder, staged_folder

NUM_CLASSES = 100
_LISTS = {"cmc": "imagenet100.txt", "kaggle": "imagenet100-kaggle.txt"}
_WNID = re.compile(r"n\d{8}")
_MOST_LISTED = 10
_LARGEST_BYTES = 2**20  # of a list of a hundred classes


def known_lists() -> tuple[str, ...]:
    """Names of the lists that are shipped, the usual one first."""
    return tuple(_LISTS)


def class_list(which: str | Path = "cmc") -> tuple[str, ...]:
    """The hundred classes of a shipped list or of a text file, one WordNet id a line, # for comments.

    UsageError for an unknown name, DataError for a file that does not hold a hundred different ids.
    """
    if isinstance(which, str) and which in _LISTS:
        path = Path(__file__).with_name(_LISTS[which])
    elif isinstance(which, str) and not Path(which).is_file():
        raise UsageError(f"no file is called '{which}', and {unknown_choice('the list', which, _LISTS)}, "
                         "or name a file")
    else:
        path = Path(which)
    try:
        lines = read_regular(path, _LARGEST_BYTES).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"the list of classes {path} cannot be read: {error}") from error
    names = [name for line in lines if (name := line.partition("#")[0].strip())]
    if strange := [name for name in names if not _WNID.fullmatch(name)]:
        raise DataError(f"{path} holds '{strange[0]}', which is no WordNet id: those look like n01440764")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{path} names {shortened(twice, _MOST_LISTED)} more than once")
    if len(names) != NUM_CLASSES:
        raise DataError(f"{path} names {len(names)} classes; ImageNet-100 has {NUM_CLASSES}")
    return tuple(names)


def make_imagenet100(
    imagenet: str | Path,
    out: str | Path,
    *,
    classes: str | Path = "cmc",
    copy: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Make `out`/train and `out`/val with a link to the folder of each of the hundred `classes` in `imagenet`.

    `classes` is what `class_list` takes. With `copy` the images are copied, for disks and systems without links.
    Nothing lies at `out` before all of it is there. UsageError for an `out` that is not empty or lies in `imagenet`;
    DataError with the classes that a split of `imagenet` lacks, and where links cannot be made.
    """
    names, source, target = class_list(classes), Path(imagenet), Path(out)
    for split in ("train", "val"):
        _require_classes(source, split, names)
    with staged_folder(target, [PhotoFolder(source, [])]) as stage:
        for done, (split, name) in enumerate([(split, name) for split in ("train", "val") for name in names], 1):
            (stage / split).mkdir(exist_ok=True)
            _bring((source / split / name).resolve(), stage / split / name, copy)
            if progress:
                progress(done, 2 * len(names))
    return target


def _require_classes(imagenet: Path, split: str, names: tuple[str, ...]) -> None:
    """DataError unless all classes are folders with something in them."""
    folder = imagenet / split
    if not folder.is_dir():
        inner = imagenet / "ILSVRC" / "Data" / "CLS-LOC"
        hint = f"; give {inner}" if (inner / split).is_dir() else ""
        raise DataError(f"there is no folder {folder}: give ImageNet's own, with train/<wnid>/ and val/<wnid>/{hint}")
    present = {entry.name for entry in list_folder(folder) if is_folder(entry)}
    if absent := [name for name in names if name not in present]:
        unsorted = "; val must be sorted into class folders first" if split == "val" and not present else ""
        raise DataError(f"{folder} lacks {len(absent)} of the {len(names)} classes: "
                        f"{shortened(absent, _MOST_LISTED)}{unsorted}")
    if empty := [name for name in names if not list_folder(folder / name)]:
        raise DataError(f"{folder} has no images in {shortened(empty, _MOST_LISTED)}")


def _bring(source: Path, target: Path, copy: bool) -> None:
    """A link to a folder, or its copy."""
    try:
        if copy:
            shutil.copytree(source, target)
        else:
            target.symlink_to(source, target_is_directory=True)
    except (OSError, shutil.Error) as error:
        remedy = "make room or choose another disk" if copy else "copy the images instead (--copy)"
        raise DataError(f"{target} cannot be made from {source} ({error}): {remedy}") from error
