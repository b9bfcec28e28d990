"""The images in a large folder tree, listed once: an index in the cache folder, used while no folder has changed.

Files come and go with a change of the folder that holds them, so that a look at every folder (1,001 in ImageNet's
train/) tells whether the names still hold. What lies in a file is no part of it. No index is kept where that look
cannot be relied on: of file systems in user space, some of which give every folder the time they were mounted at, of
folders that changed just now, and of trees with links that may become folders.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from patchssl.data.decode import EXTENSIONS, Walk, folder_state, walk_images
from patchssl.data.fingerprints import RACY, load_numbers, store_numbers
from patchssl.data.images import Names
from patchssl.runtime.files import index_folder

_WORTH_KEEPING = 20_000  # names: listing fewer takes no time
_VERSION = 1
_HEADER = 6  # numbers: version, folders, names, and bytes of folders, names and others
_MOST_BYTES = 2**31  # of an index


class Tree(NamedTuple):
    """The images below a folder."""

    names: Names  # relative to the root, "/" between the parts, sorted
    others: Mapping[str, int]  # other files, by extension


def list_tree(root: Path) -> Tree:
    """As `decode.list_images`, from the kept index if there is one that holds."""
    place = "\0".join([os.path.realpath(root), *sorted(EXTENSIONS)])  # a plugin may read more of them one day
    kept = index_folder("trees") / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:40]}.names"
    if (tree := _load(kept, root)) is not None:
        return tree
    began = time.time_ns()
    walk = walk_images(root)
    tree = Tree(Names(walk.names), walk.others)
    if len(tree.names) >= _WORTH_KEEPING and _lasts(walk, began):
        _store(kept, walk, tree)
    return tree


def _lasts(walk: Walk, began: int) -> bool:
    """Whether another look at the folders of `walk` would show every change."""
    states = np.array([state for _, state in walk.folders], dtype=np.int64)
    settled = bool(states[:, :2].max() < began - RACY)
    return walk.lasting and settled and not any(map(_in_user_space, set(states[:, 3].tolist())))


def _in_user_space(device: int) -> bool:
    """Whether a device is mounted by FUSE, as buckets of a cloud are; False where the system does not tell."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = [line.split() for line in Path("/proc/self/mountinfo").read_text("utf-8", "replace").splitlines()]
    except OSError:
        return False
    return any(words[2] == number and "-" in words and words[words.index("-") + 1].startswith("fuse")
               for words in lines if len(words) > 3)


def _load(kept: Path, root: Path) -> Tree | None:
    """The tree in the index `kept` if every folder is as it was then."""
    numbers = load_numbers(kept, None, _MOST_BYTES)
    if numbers is None or len(numbers) < _HEADER or numbers[0] != _VERSION:
        return None
    counts, sizes = numbers[1:3].tolist(), numbers[3:_HEADER].tolist()
    shapes = [4 * counts[0], counts[0] + 1, counts[1] + 1, *(-(-size // 8) for size in sizes)]
    if min(*counts, *sizes) < 0 or len(numbers) != _HEADER + sum(shapes):
        return None
    states, folder_ends, name_ends, *blocks = np.split(numbers[_HEADER:], np.cumsum(shapes)[:-1])
    raw = [block.astype("<i8").view(np.uint8)[:size] for block, size in zip(blocks, sizes, strict=True)]
    try:
        folders = Names.from_arrays(raw[0], folder_ends)
        if not all(_state(f"{root}/{folder}") == state
                   for folder, state in zip(folders, states.reshape(-1, 4).tolist(), strict=True)):
            return None
        return Tree(Names.from_arrays(raw[1], name_ends), json.loads(raw[2].tobytes()))
    except ValueError:
        return None


def _state(folder: str) -> list[int] | None:
    try:
        return [*folder_state(os.stat(folder))]  # noqa: PTH116  # a Path takes three times as long
    except OSError:
        return None


def _store(kept: Path, walk: Walk, tree: Tree) -> None:
    folders = Names(name for name, _ in walk.folders)
    folder_block, folder_ends = folders.as_arrays()
    name_block, name_ends = tree.names.as_arrays()
    blocks = [folder_block, name_block, np.frombuffer(json.dumps(dict(tree.others)).encode(), dtype=np.uint8)]
    padded = [np.pad(block, (0, -len(block) % 8)).view("<i8") for block in blocks]
    states = np.array([state for _, state in walk.folders], dtype=np.int64).ravel()
    header = [_VERSION, len(folders), len(tree.names), *map(len, blocks)]
    store_numbers(kept, np.concatenate([header, states, folder_ends, name_ends, *padded]).astype(np.int64))
