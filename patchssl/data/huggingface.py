"""Image sets of Hugging Face's `datasets` library: from the hub, saved on the disk, or Parquet files.

`hf:OWNER/NAME[:SPLIT][?config=NAME&image=COLUMN&label=COLUMN]`. The image column is found by its type and the label
column by being a ClassLabel, or by its name, `label`. Rows are read by index from Arrow files that are mapped into
memory, never from code of the set's own: version 4 of the library, which the extra asks for, has no way to run any.
What lies on the hub is downloaded once, Parquet files are converted once, both into the library's cache (HF_HOME).
"""

from __future__ import annotations

import importlib
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from patchssl.data.decode import decode_bytes, decode_image
from patchssl.data.fingerprints import Known, file_states, file_sum, known_files, names_fingerprint
from patchssl.data.images import (
    ImageSet,
    Openers,
    inside,
    labeled_fingerprint,
    labeled_known,
    part_of,
    translated,
    written_labels,
)
from patchssl.data.splits import expand_braces, is_split_word, named_splits, split_files, unused_note
from patchssl.runtime.errors import DataError, UnreadableImage, UsageError
from patchssl.runtime.files import open_regular
from patchssl.runtime.text import query_options

PREFIX = "hf:"
_FORM = "hf:OWNER/NAME[:SPLIT][?config=NAME&image=COLUMN&label=COLUMN]"
_REPO = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_BATCH = 1000  # rows whose sizes are looked at together



@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HubImages(ImageSet):
    """Images in a column of a table, decoded when asked for."""

    table: Any  # datasets.Dataset of the image column alone, not decoded
    column: str
    ids: np.ndarray  # (len,) int64, rows of the table
    allow_truncated: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def pixels(self, index: int) -> np.ndarray:
        name = f"{self.source}, {self.item_name(index)}"
        image = self.table[int(self.ids[index])][self.column] or {}
        if image.get("bytes") is not None:
            return decode_bytes(image["bytes"], name, allow_truncated=self.allow_truncated)
        path = image.get("path")
        if not path or "://" in path:
            raise UnreadableImage(name, f"it lies at {path}, not on this machine" if path else "there is no image")
        return decode_image(path, allow_truncated=self.allow_truncated)

    def item_name(self, index: int) -> str:
        return f"row {self.ids[inside(index, len(self))]:08d}"

    def subset(self, indices: Sequence[int] | np.ndarray) -> HubImages:
        chosen = self._chosen(indices)
        return replace(self, ids=self.ids[chosen], labels=self._labels_at(chosen), source=part_of(self.source))

    @cached_property
    def known(self) -> Known:
        """From numbers of the rows, sizes, content and labels; -1 is the size of what is not in the table."""
        order, names, sizes = self._rows()

        def read(chosen: np.ndarray) -> np.ndarray:
            return np.fromiter(self._sums(self.ids[order][chosen]), dtype=np.int64, count=len(chosen))

        found = known_files(names, sizes, self.allow_truncated, read, self._state)
        return labeled_known(found, order, self)

    @property
    def first_fingerprint(self) -> str:
        order, names, sizes = self._rows()
        entries = zip(names, sizes.tolist(), strict=True)
        return labeled_fingerprint(names_fingerprint(len(self), self.allow_truncated, entries), order, self)

    def _rows(self) -> tuple[list[int], list[str], np.ndarray]:
        """The images in the order of their rows, what these are called, and their sizes."""
        sizes = np.fromiter(self._sizes(), dtype=np.int64, count=len(self.table))
        order = np.argsort(self.ids, kind="stable")
        ids = self.ids[order]
        return order.tolist(), [f"{row:08d}" for row in ids.tolist()], sizes[ids]

    def _sizes(self) -> Iterator[int]:
        compute = importlib.import_module("pyarrow.compute")
        for batch in self.table.with_format("arrow").iter(_BATCH):
            for chunk in batch[self.column].chunks:
                lengths = compute.binary_length(compute.struct_field(chunk, "bytes"))
                yield from compute.fill_null(lengths, -1).to_pylist()

    def _sums(self, rows: np.ndarray) -> Iterator[int]:
        """CRC-32 of the images in `rows`, of a file where the table only names one; -1 where there is neither."""
        for batch in self.table.select(rows).with_format("arrow").iter(_BATCH):
            for chunk in batch[self.column].chunks:
                yield from map(_content_sum, chunk)

    def _state(self) -> bytes:
        """What changes with any of the files that the table is mapped from."""
        return file_states(Path("/"), [file["filename"] for file in self.table.cache_files]).tobytes()

    def with_classes(self, classes: tuple[str, ...]) -> HubImages:
        if self.labels is None or classes == self.classes:
            return self
        return replace(self, classes=classes, labels=translated(self, self.classes, self.labels, classes))


def _content_sum(image: Any) -> int:
    """CRC-32 of an Arrow struct of bytes and path, either of which may be missing."""
    content, path = (image["bytes"], image["path"]) if image.is_valid else (None, None)
    if content is not None and content.is_valid:
        return zlib.crc32(content.as_buffer())
    return file_sum(path.as_py()) if path is not None and path.is_valid else -1


@dataclass(frozen=True)
class _HubRequest:
    """What a name asks for."""

    repo: str
    split: str | None
    config: str | None = None
    image: str | None = None
    label: str | None = None


def hub_splits(uri: str, allow_truncated: bool) -> Openers:
    """The splits of a set on the hub, hf:OWNER/NAME; looked up there, or in the library's cache."""
    wanted = _parsed(uri)
    datasets = _library()
    with _in_words(uri):
        names = (expand_braces(wanted.split) if wanted.split else
                 datasets.get_dataset_split_names(wanted.repo, wanted.config))
    chosen, note = _chosen(names, uri, f"choose as in {PREFIX}{wanted.repo}:{{train,test}}")

    def opened(name: str, split: str) -> ImageSet:
        with _in_words(uri):
            table = datasets.load_dataset(wanted.repo, wanted.config, split=name)
        return _images(table, wanted.repo.rpartition("/")[2], split, f"{name} of {PREFIX}{wanted.repo}", wanted,
                       allow_truncated, note)

    return {split: partial(opened, name, split) for split, name in chosen.items()}


def is_saved(root: Path) -> bool:
    """Whether a folder is what `save_to_disk` wrote."""
    names = ("dataset_dict.json",), ("dataset_info.json", "state.json")
    return any(all((root / name).is_file() for name in files) for files in names)


def saved_splits(root: Path, allow_truncated: bool, query: str = "") -> Openers:
    """The splits of what `save_to_disk` wrote; `query` names its columns, as in image=COLUMN&label=COLUMN."""
    wanted = _HubRequest("", None, **_columns(query, str(root)))
    with _in_words(str(root)):
        saved = _library().load_from_disk(str(root))
    place = root.resolve()
    tables = dict(saved) if isinstance(saved, dict) else {"all": saved}
    chosen, note = _chosen(list(tables), str(root), f"choose as in {root}/{{train,test}}")
    return {split: partial(_images, tables[key], place.parent.name if is_split_word(place.name) else place.name, split,
                           f"saved dataset {root}", wanted, allow_truncated, note)
            for split, key in chosen.items()}


def parquet_splits(files: Sequence[Path], allow_truncated: bool, query: str = "") -> Openers:
    """The splits of Parquet files, told by their names as in train-00000-of-00002.parquet; `query` as above."""
    by_name = split_files(files) if len(files) > 1 else {"all": list(files)}
    return {split: partial(open_parquet, paths, split, allow_truncated, query) for split, paths in by_name.items()}


def open_parquet(files: Sequence[Path], split: str, allow_truncated: bool, query: str = "") -> HubImages:
    """The images of Parquet files, in the files' order."""
    wanted = _HubRequest("", None, **_columns(query, str(files[0])))
    home = files[0].resolve().parent
    where = f"Parquet file {files[0]}" if len(files) == 1 else f"{len(files):,} Parquet files in {files[0].parent}"
    with _in_words(where):
        for path in files:
            open_regular(path).close()  # a pipe would never end
        table = _library().load_dataset("parquet", data_files={"train": [str(path) for path in files]}, split="train")
    if split == "all" and len(files) == 1:
        name = files[0].stem
    else:
        name = home.parent.name if home.name == "data" or is_split_word(home.name) else home.name
    return _images(table, name, split, where, wanted, allow_truncated)


def _columns(query: str, where: str) -> dict[str, str]:
    """Columns that are named behind the "?" of a path."""
    options = query_options(query, where)
    if set(options) - {"image", "label"} or (query and not options):
        raise UsageError(f"'?{query}' behind {where} is not understood; write ?image=COLUMN&label=COLUMN")
    return options


def _parsed(uri: str) -> _HubRequest:
    place, _, query = uri.removeprefix(PREFIX).partition("?")
    repo, _, split = place.partition(":")
    options = query_options(query, uri)
    if not _REPO.fullmatch(repo) or set(options) - {"config", "image", "label"} or (query and not options):
        raise UsageError(f"'{uri}' is not understood; write {_FORM}, and a folder of that name as ./{uri}")
    return _HubRequest(repo, split or None, **options)


def _chosen(names: Sequence[str], where: str, how: str) -> tuple[dict[str, str], str]:
    """The names of train and val among those of a set's splits, a single other one is "all"; and a note."""
    found = named_splits(names, where)
    if not found and len(names) != 1:
        raise DataError(f"{where} has no split called train, val, validation or test, only {', '.join(names)}; choose "
                        "one as hf:OWNER/NAME:SPLIT, or the folder of one")
    return found or {"all": names[0]}, unused_note(found, names, how)


def _images(table: Any, name: str, split: str, source: str, wanted: _HubRequest, allow_truncated: bool,
            note: str = "") -> HubImages:
    """The images and labels of a datasets.Dataset."""
    if not len(table):
        raise DataError(f"0 images in {source}")
    column = _image_column(table.features, source, wanted.image)
    classes, labels = _labels(table, source, wanted.label)
    images = table.select_columns([column]).cast_column(column, _library().Image(decode=False))
    return HubImages(name=name, split=split, source=source, classes=classes, labels=labels, table=images,
                     column=column, ids=np.arange(len(table)), allow_truncated=allow_truncated, note=note)


def _image_column(features: Mapping[str, Any], source: str, wanted: str | None) -> str:
    """The column of images: by its type, else by holding bytes, as files have it that other programs wrote."""
    kinds = _library()
    by_type = [name for name, kind in features.items() if isinstance(kind, kinds.Image)]
    by_bytes = [name for name, kind in features.items() if kind == kinds.Value("binary")
                or (isinstance(kind, dict) and kind.get("bytes") == kinds.Value("binary"))]
    found = by_type or by_bytes
    if wanted is not None:
        found = [name for name in (*by_type, *by_bytes) if name == wanted]
    if len(found) != 1:
        held = ", ".join(f"{name} ({kind})" for name, kind in features.items())
        count = "several columns" if found else "no column"
        raise DataError(f"{source} has {count} of images{f' called {wanted}' if wanted else ''}: it holds {held}; "
                        "choose by ?image=COLUMN behind the name or path, in quotes for a shell")
    return found[0]


def _labels(table: Any, source: str, wanted: str | None) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Classes and labels from the column of labels, () and None without one."""
    features = table.features
    typed = [name for name, kind in features.items() if isinstance(kind, _library().ClassLabel)]
    if wanted is not None and wanted not in features:
        raise DataError(f"{source} has no column {wanted}, only {', '.join(features)}")
    if wanted is None and "label" not in features and len(typed) > 1:
        raise DataError(f"{source} has several columns of labels, {', '.join(typed)}; choose by ?label=COLUMN "
                        "behind the name or path, in quotes for a shell")
    column = wanted or ("label" if "label" in features else next(iter(typed), None))
    if column is None:
        return (), None
    values = table.select_columns([column]).with_format(None)[:][column]
    if all(value is None or value == -1 for value in values):  # test splits whose labels are kept secret
        return (), None
    if column not in typed:
        return written_labels(["" if value is None else str(value) for value in values], source)
    if any(value is None or value < 0 for value in values):
        raise DataError(f"{source}: some images have no label in the column {column}, others have one")
    return tuple(features[column].names), np.array(values, dtype=np.int64)


def _library() -> Any:
    try:
        library = importlib.import_module("datasets")
        library.load_dataset  # noqa: B018  # a folder called datasets imports too, as an empty package
    except (ImportError, AttributeError) as error:
        raise UsageError(f"this needs the library 'datasets', which is not installed ({error}); "
                         "pip install 'patchssl[datasets]'") from None
    return library


@contextmanager
def _in_words(where: str) -> Iterator[None]:
    """What the library raises becomes one sentence about `where`."""
    try:
        yield
    except (DataError, UsageError):
        raise
    except Exception as error:  # connections, access, formats: the library has no base class for them
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise DataError(f"{where} cannot be opened: {first}") from error
