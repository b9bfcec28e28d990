"""Which folders, files and members of archives are train, val or classes, told by what they are called.

`holdout:SHARE:DATA` splits once more: the train images of DATA without a fixed share of them, and that share in the
place of val. It is for a search: what is chosen on the share that was held out has never looked at DATA's own val
images, which are not even opened. The draw is the same for every run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from patchssl.data.images import ImageSet
from patchssl.runtime.errors import DataError, UsageError
from patchssl.runtime.text import shortened

SPLIT_WORDS: Mapping[str, tuple[str, ...]] = {  # in any case, the first that is there; test is val where no val is
    "train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}
_RANGE = re.compile(r"([0-9]{1,12})\.\.([0-9]{1,12})")
_MOST_BRACES = 20
_MOST_FILES = 100_000
_MOST_LISTED = 20
_LONGEST_SHOWN = 300  # characters of a path
HOLDOUT = "holdout:"
_SEED = 2310


def is_split_word(name: str) -> bool:
    """Whether `name` stands for a split.

    >>> is_split_word("Validation"), is_split_word("train2017")
    (True, False)
    """
    return any(name.lower() in words for words in SPLIT_WORDS.values())


def named_splits(names: Iterable[str], where: str) -> dict[str, str]:
    """Which of `names` are train and val, of those that lie side by side in `where`, by SPLIT_WORDS.

    DataError for two that differ in upper and lower case only.

    >>> named_splits(["test", "Train", "validation"], "x")
    {'train': 'Train', 'val': 'validation'}
    """
    by_word: dict[str, list[str]] = {}
    for name in sorted(names):
        by_word.setdefault(name.lower(), []).append(name)
    found = {}
    for split, words in (("train", SPLIT_WORDS["train"]), ("val", (*SPLIT_WORDS["val"], *SPLIT_WORDS["test"]))):
        if word := next((word for word in words if word in by_word), None):
            if len(by_word[word]) > 1:
                alike = " and ".join(by_word[word])
                raise DataError(f"{where} holds {alike}, of which either may be meant; rename one")
            found[split] = by_word[word][0]
    return found


def unused_note(found: Mapping[str, str], names: Iterable[str], how: str) -> str:
    """What is said of further splits among `names`, "" where there are none; `how` to choose another."""
    unused = sorted(name for name in names if is_split_word(name) and name not in found.values())
    return f"{', '.join(unused)} beside {' and '.join(found.values())} not used: {how}" if found and unused else ""


def choose_splits(where: str, folders: Iterable[str], has_images: bool,
                  holds_folders: Callable[[str], bool]) -> dict[str, str]:
    """The folders that are splits, of those that lie side by side in `where`: {"train": "train", "val": "valid"}.

    `has_images`: whether images lie beside them. Empty where the folders are classes, or hold images of one kind.
    """
    present = set(folders)
    found = named_splits(present, where)
    if len(found) == 2:
        return found
    if len(alike := sorted(filter(is_split_word, present))) > 1:
        raise DataError(f"{where} holds {'/, '.join(alike)}/; call what to train on train/ and the rest val/")
    # a lone train/ among others may be a class, the vehicle: as a split it has folders of its own
    if "train" in found and holds_folders(found["train"]):
        return found
    return found if len(present) == 1 and not has_images else {}


def apart_from_strays(names: Sequence[str]) -> tuple[Sequence[str], str]:
    """`names` without the few that lie right in the root beside folders of classes, and what to say about those.

    Few: one in ten, or a single one where folders hold several images. More of them are kept: then the folders are no
    classes, as of a tree of photographs, which is said, too.

    >>> apart_from_strays(["a/1.png", "a/2.png", "b/1.png", "b/2.png", "x.png"])
    (['a/1.png', 'a/2.png', 'b/1.png', 'b/2.png'], 'left out 1 image beside the 2 class folders: x.png')
    """
    strays = [name for name in names if "/" not in name]
    folders = {name.partition("/")[0] for name in names if "/" in name} if strays else set()
    if len(folders) < 2:
        return names, ""
    count = f"{len(strays):,} image{'s' * (len(strays) != 1)}"
    if 10 * len(strays) <= len(names) or (len(strays) == 1 and len(names) - 1 > len(folders)):
        kept = [name for name in names if "/" in name]
        return kept, f"left out {count} beside the {len(folders):,} class folders: {shortened(strays, 5)}"
    return names, (f"the {len(folders):,} folders are not taken for classes, as {count} "
                         f"lie{'s' * (len(strays) == 1)} beside them: {shortened(strays, 5)}")


def split_files(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by the split that a word of their names tells, as in imagenet-train-0007.tar; "all" if none tells any.

    Beside val, test is skipped, as of folders. DataError where some names tell a split and others none.
    """
    home = Path(os.path.commonpath([path.parent for path in files]))
    by_word: dict[str, list[Path]] = {}
    for path in files:
        words = set(re.findall("[a-z]+", os.fspath(path.relative_to(home)).lower()))
        split = next((split for split, names in SPLIT_WORDS.items() if words.intersection(names)), "")
        by_word.setdefault(split, []).append(path)
    without = by_word.pop("", [])
    if not by_word:
        return {"all": without}
    if without:
        names = shortened([path.name for path in without], 5)
        raise DataError(f"of {len(files):,} files in {home}, {len(without):,} have no train, val or test in their "
                        f"names: {names}; rename or remove them, or choose with a pattern such as "
                        f"{home}/{{train,val}}-{{000..009}}.tar")
    found = {"train": by_word.get("train"), "val": by_word.get("val") or by_word.get("test")}
    return {split: paths for split, paths in found.items() if paths}


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for, as a shell writes them: numbers keep their zeros.

    >>> expand_braces("{train-{08..10},val-0}.tar")
    ['train-08.tar', 'train-09.tar', 'train-10.tar', 'val-0.tar']
    """
    if pattern.count("{") > _MOST_BRACES:
        raise UsageError(f"{pattern} has more than {_MOST_BRACES} braces")
    names = _expanded(pattern, pattern)
    if any("}" in name for name in names):
        raise UsageError(f"a brace in {pattern} is closed and not opened")
    return names


def _expanded(text: str, pattern: str) -> list[str]:
    """What a part of `pattern` stands for."""
    before, opened, rest = text.partition("{")
    if not opened:
        return [text]
    inside, after = _up_to_its_end(rest, pattern)
    choices = _choices(inside, pattern)
    tails = _expanded(after, pattern)
    if len(choices) * len(tails) > _MOST_FILES:
        raise UsageError(f"{pattern} stands for more than {_MOST_FILES:,} files")
    return [before + choice + tail for choice in choices for tail in tails]


def _up_to_its_end(rest: str, pattern: str) -> tuple[str, str]:
    """What lies in a brace, and what follows it."""
    depth = 1
    for at, sign in enumerate(rest):
        depth += (sign == "{") - (sign == "}")
        if not depth:
            return rest[:at], rest[at + 1:]
    raise UsageError(f"a brace in {pattern} is opened and not closed")


def _choices(inside: str, pattern: str) -> list[str]:
    if span := _RANGE.fullmatch(inside):
        first, last = int(span[1]), int(span[2])
        if last < first or last - first >= _MOST_FILES:
            raise UsageError(f"{{{inside}}} in {pattern} is no range of at most {_MOST_FILES:,} numbers that go up")
        width = len(span[1]) if span[1].startswith("0") else 0
        return [f"{number:0{width}d}" for number in range(first, last + 1)]
    parts, depth = [""], 0
    for sign in inside:
        depth += (sign == "{") - (sign == "}")
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    if len(parts) == 1:
        raise UsageError(f"{{{inside}}} in {pattern} is neither numbers, {{000..009}}, nor words, {{train,val}}")
    return [name for part in parts for name in _expanded(part, pattern)]


def require_files(paths: Sequence[Path], what: str) -> None:
    """DataError that lists those of `paths` that are no files, up to a limit; `what` is what named them."""
    missing = [path for path in paths if not os.path.isfile(path)]  # noqa: PTH113  # a Path refuses overlong names
    if missing:
        lines = [f"  {str(path)[:_LONGEST_SHOWN]}" for path in missing[:_MOST_LISTED]]
        if len(missing) > _MOST_LISTED:
            lines.append(f"  and {len(missing) - _MOST_LISTED:,} more")
        raise DataError("\n".join([f"{what}: {len(missing):,} of {len(paths):,} files are not there:", *lines]))


def parse_holdout(data: str) -> tuple[float, str]:
    """Share and DATA of `holdout:SHARE:DATA`; UsageError where it is not that.

    >>> parse_holdout("holdout:0.2:textures")
    (0.2, 'textures')
    """
    text, _, inner = data.removeprefix(HOLDOUT).partition(":")
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not (0 < share < 1 and inner):
        raise UsageError(f"'{data}' is not holdout:SHARE:DATA with a share between 0 and 1, such as "
                         "holdout:0.2:textures")
    return share, inner


def holdout_splits(openers: Mapping[str, Callable[[], ImageSet]], share: float) -> dict[str, Callable[[], ImageSet]]:
    """Train and val of `holdout:SHARE:DATA` from the `openers` of DATA's splits, of which only the first is used."""
    whole = next(iter(openers.values()))

    def part(split: str) -> ImageSet:
        images = whole()
        count = round(share * len(images))
        if not 0 < count < len(images):
            raise DataError(f"{share:g} of the {len(images)} images of {images.name} leaves one part empty")
        order = np.random.Generator(np.random.PCG64(_SEED)).permutation(len(images))
        chosen = np.sort(order[:count] if split == "val" else order[count:])
        return replace(images.subset(chosen), name=f"{images.name}-holdout", split=split)

    return {split: lambda split=split: part(split) for split in ("train", "val")}  # type: ignore[misc]
