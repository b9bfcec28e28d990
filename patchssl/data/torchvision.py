"""Named sets of timm's dataset factory: `timm:torch/NAME?root=DIR[&download=1]` and `timm:hfds/OWNER/NAME`.

timm wraps torchvision's sets and hands out images by index; arrays stay arrays, and image files go through this
package's own decoder. `hfds/` is what `hf:` is. What timm can only stream (tfds/, wds/, hfids/) has no index, which
the exact shuffle and resume need: that is refused with the way out. Nothing is downloaded unless `download=1` says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from patchssl.data.huggingface import hub_splits
from patchssl.data.images import ArrayImages, ImageSet, Names, Openers
from patchssl.data.lists import ListedImages
from patchssl.runtime.errors import DataError, UsageError
from patchssl.runtime.text import query_options

PREFIX = "timm:"
_FORM = "timm:torch/NAME?root=DIR, or with download=1 timm:torch/NAME?root=DIR&download=1"
_STREAMS = {
    "tfds": "export it once, to folders or to WebDataset shards",
    "wds": "name the shards themselves, as in DIR/train-{0000..0009}.tar",
    "hfids": "name it as hf:OWNER/NAME",
}


def timm_splits(uri: str, create_dataset: Callable[..., Any], allow_truncated: bool) -> Openers:
    """The splits of what timm's `create_dataset` calls `uri` after "timm:"."""
    place, _, query = uri.removeprefix(PREFIX).partition("?")
    kind, _, name = place.partition("/")
    kind = kind.lower()
    if kind == "hfds":
        return hub_splits(f"hf:{name}" + (f"?{query}" if query else ""), allow_truncated)
    if kind in _STREAMS:
        raise UsageError(f"{uri}: timm reads {kind}/ as a stream only, and training needs images by index; "
                         f"{_STREAMS[kind]}")
    options = query_options(query, uri, escaped=False)
    if kind != "torch" or not name or set(options) - {"root", "download"}:
        raise UsageError(f"'{uri}' is not understood; write {_FORM}. A folder or an archive is named by its path")
    if name.lower() in ("image_folder", "folder"):
        raise UsageError(f"{uri}: name the folder itself; timm would mix train and val where a split is missing")
    if not options.get("root"):
        raise UsageError(f"{uri} does not say where the set lies: write {_FORM}")
    root = Path(options["root"]).expanduser()
    if options.get("download", "0") not in ("0", "1"):
        raise UsageError(f"download={options['download']} in {uri} is neither 0 nor 1")
    make = partial(create_dataset, place, root=str(root), download=options.get("download") == "1")
    return {split: partial(_open, make, uri, root, split, allow_truncated) for split in ("train", "val")}


def lasting_uri(uri: str) -> str:
    """`uri` with its root in full, so that it means the same in any working folder."""
    return re.sub(r"(?<=[?&]root=)[^&]+", lambda match: str(Path(match[0]).expanduser().absolute()), uri)


def _open(make: Callable[..., Any], uri: str, root: Path, split: str, allow_truncated: bool) -> ImageSet:
    try:
        found = make(split=split)
    except Exception as error:  # torchvision has no base class for what may be wrong
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        advice = "" if "download=1" in uri else f"; to download it into {root}, add &download=1"
        raise DataError(f"the {split} images of {uri} cannot be opened: {first}{advice}") from error
    name, source = uri.partition("?")[0].rpartition("/")[2].lower(), f"{uri.partition('?')[0]} in {root}"
    if (pixels := getattr(found, "data", None)) is not None:
        array = np.asarray(pixels)
        labels = np.asarray(found.targets)
        labels = (labels[:, 0] if labels.ndim == 2 else labels).astype(np.int64)  # QMNIST's rows begin with it
        high, wide = array.shape[1:3]
        return ArrayImages(name=name, split=split, source=f"{source} ({high} x {wide} px)", labels=labels,
                           classes=_classes(found, labels), array=array, ids=np.arange(len(array)))
    paths, labels = _files(found, uri)
    return ListedImages(name=name, split=split, source=source, classes=_classes(found, labels), labels=labels,
                        root=root, names=Names(os.path.relpath(path, root) for path in paths),
                        allow_truncated=allow_truncated)


def _files(found: Any, uri: str) -> tuple[list[str], np.ndarray]:
    """Paths and labels of a set of torchvision's that lists files."""
    pairs: Sequence[tuple[Any, Any]] | None = getattr(found, "samples", None) or getattr(found, "imgs", None)
    if pairs is None and hasattr(found, "all_categories"):  # INaturalist
        pairs = [(Path(found.root, found.all_categories[category], file), category)
                 for category, file in found.index]
    if not pairs:
        raise DataError(f"{uri}: torchvision's {type(found).__name__} hands out no images by index that can be read")
    return [str(path) for path, _ in pairs], np.array([label for _, label in pairs], dtype=np.int64)


def _classes(found: Any, labels: np.ndarray) -> tuple[str, ...]:
    """Names of the classes: torchvision's own, else the numbers."""
    named = getattr(found, "classes", None) or getattr(found, "all_categories", None) or ()
    names = tuple(name if isinstance(name, str) else ", ".join(name) for name in named)
    largest = int(labels.max(initial=-1))
    return names if len(names) > largest and len(set(names)) == len(names) else tuple(map(str, range(largest + 1)))
