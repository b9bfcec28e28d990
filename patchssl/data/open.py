"""Image sets: what the user names becomes images by index, with labels where there are any.

`open_images` recognizes what is named and hands it on: folders and arrays are opened here, text lists by `lists`,
archives and WebDataset shards by `packed`, sets of Hugging Face's library and Parquet files by `huggingface`, sets of
timm's factory by `torchvision`, a train split without a part of it by `splits`. `open_pair` gives train and val with
the same id for the same class.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from patchssl.data.archives import is_archive_name
from patchssl.data.arrays import Arrays, ArraySplits, cifar_splits, idx_splits
from patchssl.data.decode import EXTENSIONS, is_folder, is_image_name, left_out, list_folder
from patchssl.data.depth import with_depth_note
from patchssl.data.huggingface import PREFIX as HUB
from patchssl.data.huggingface import hub_splits, is_saved, open_parquet, parquet_splits, saved_splits
from patchssl.data.images import ArrayImages, FileImages, ImageSet, Names, Openers, class_folders
from patchssl.data.lists import is_list_name, open_list
from patchssl.data.packed import open_packed, packed_splits
from patchssl.data.splits import (
    HOLDOUT,
    apart_from_strays,
    choose_splits,
    expand_braces,
    holdout_splits,
    is_split_word,
    named_splits,
    parse_holdout,
    require_files,
    split_files,
    unused_note,
)
from patchssl.data.torchvision import PREFIX as TIMM
from patchssl.data.torchvision import lasting_uri, timm_splits
from patchssl.data.trees import Tree, list_tree
from patchssl.runtime.errors import DataError, UsageError, unknown_choice

__all__ = [
    "NAMED_SETS",
    "ImageSet",
    "Split",
    "absolute_name",
    "open_images",
    "open_pair",
    "split_names",
]

Split = Literal["train", "val"]
NAMED_SETS: Mapping[str, int] = {"textures": 32, "textures-64": 64}  # name -> side in pixels


def open_images(data: str | Path, split: Split | None = None, *, allow_truncated: bool = False) -> ImageSet:
    """The images that `data` names: a path, a set's name (`textures`), hf:..., timm:... or holdout:SHARE:DATA.

    A path is a folder with train/ and val/ (or valid/, test/), a folder of class folders, any tree of unlabeled
    images, IDX files, CIFAR's official layout, a text list, a zip or tar, Parquet files, what `save_to_disk` wrote, or
    a folder of such files; braces name several files, as in shards-{000..009}.tar or {train,val}.txt. A path that
    looks like a name or a pattern is written with ./ in front. Without `split`: train where images are split, else all.
    With `allow_truncated`, files that end early count as readable; this is part of the fingerprint.
    UsageError for an unknown name, DataError for what is missing on the disk, an absent split included.
    """
    return _opened(_splits(data, allow_truncated), data, split)


def split_names(data: str | Path) -> tuple[str, ...]:
    """The splits of `data`: those of "train" and "val" that are there, or "all" where nothing is split."""
    return tuple(_splits(data, allow_truncated=False))


def open_pair(data: str | Path, *, allow_truncated: bool = False) -> tuple[ImageSet, ImageSet]:
    """Train and val, labels of both being ids into train's classes.

    DataError names the classes of val that train does not have; the other way round does no harm.
    """
    openers = _splits(data, allow_truncated)
    train, val = _opened(openers, data, "train"), _opened(openers, data, "val")
    return train, (val if train.labels is None else val.with_classes(train.classes))


def absolute_name(data: str | Path) -> str:
    """What names `data` from any working folder: names as they are, paths in full."""
    if isinstance(data, str) and (data in NAMED_SETS or data.startswith(HUB)):
        return data
    if isinstance(data, str) and data.startswith(TIMM):
        return lasting_uri(data)
    if isinstance(data, str) and data.startswith(HOLDOUT):
        share, inner = parse_holdout(data)
        return f"{HOLDOUT}{share:g}:{absolute_name(inner)}"
    return str(Path(data).expanduser().absolute())




def _opened(openers: Openers, data: str | Path, split: Split | None) -> ImageSet:
    if split is None:
        return with_depth_note(next(iter(openers.values()))())
    if split not in openers:
        there = (
            "it is not split: that would be a train/ and a val/ folder, side by side"
            if "all" in openers
            else f"it has only {', '.join(openers)}"
        )
        raise DataError(f"{data} has no {split} images: {there}")
    return with_depth_note(openers[split]())


def _splits(data: str | Path, allow_truncated: bool) -> Openers:
    """What `data` names, by split; of images and labels nothing is read yet."""
    if isinstance(data, str):
        if data in NAMED_SETS:
            return {split: partial(_open_textures, data, split) for split in ("train", "val")}
        if data.startswith(HUB):
            return hub_splits(data, allow_truncated)
        if data.startswith(HOLDOUT):
            share, inner = parse_holdout(data)
            return holdout_splits(_splits(inner, allow_truncated), share)
        if data.startswith(TIMM):
            from timm.data import create_dataset

            return timm_splits(data, create_dataset, allow_truncated)
    place, query = _place_and_query(data)
    if isinstance(data, str) and "{" in place and not os.access(place, os.F_OK):
        files = [Path(name).expanduser() for name in expand_braces(place)]
        if not query and all(path.is_dir() for path in files):
            return _chosen_folders(files, place, allow_truncated)
        require_files(files, place)
        return _file_splits(files, allow_truncated, query)
    return _splits_below(_existing(data if not query else place), query, allow_truncated)


def _place_and_query(data: str | Path) -> tuple[str, str]:
    """A path and the columns that are named behind its "?", "" where there are none or a file is called so."""
    place, mark, query = str(data).rpartition("?")
    return (place, query) if mark and isinstance(data, str) and not os.access(data, os.F_OK) else (str(data), "")


def _splits_below(root: Path, query: str, allow_truncated: bool) -> Openers:
    """What lies at `root`, by split."""
    if not query and (splits := cifar_splits(root) or idx_splits(root)):
        return {split: partial(_open_arrays, root, splits, split) for split in splits.readers}
    if not root.is_dir():
        return _file_splits([root], allow_truncated, query)
    if is_saved(root):
        return saved_splits(root, allow_truncated, query)
    folders, note = _split_folders(root)
    if folders and not query:
        return {split: partial(_open_folder, folder, split, allow_truncated, note)
                for split, folder in folders.items()}
    if found := _set_files(root):
        return _file_splits(found, allow_truncated, query)
    if query:
        raise DataError(f"{root} is no table, so '?{query}' chooses nothing in it")
    return {"all": partial(_open_folder, root, "all", allow_truncated)}


def _chosen_folders(folders: Sequence[Path], pattern: str, allow_truncated: bool) -> Openers:
    """Train and val of folders that are named one by one, as in DIR/{train,test}."""
    chosen = named_splits([folder.name for folder in folders], pattern)
    if len(chosen) != len(folders):
        raise DataError(f"{pattern} names {len(folders)} folders; name two, one called train and one val or test")

    def opened(folder: Path, split: str) -> ImageSet:
        openers = _splits(folder, allow_truncated)
        if "all" not in openers:
            raise DataError(f"{folder} is named as {split} and holds {' and '.join(openers)} images")
        return replace(openers["all"](), split=split)

    return {split: partial(opened, next(folder for folder in folders if folder.name == name), split)
            for split, name in chosen.items()}


def _file_splits(files: Sequence[Path], allow_truncated: bool, query: str = "") -> Openers:
    """The splits of files that hold or name images: lists, archives or Parquet files."""
    kinds = {_kind(path.name) for path in files}
    if query and kinds != {"parquet"}:
        raise DataError(f"{files[0]} is no table, so '?{query}' chooses nothing in it")
    if kinds == {"archive"}:
        return packed_splits(files, allow_truncated)
    if kinds == {"parquet"}:
        return parquet_splits(files, allow_truncated, query)
    if kinds != {"list"}:
        raise DataError(
            f"{files[0]} is a file; images are read from a folder, from an archive (.zip, .tar), from what a list "
            "names (.txt, .lst, .list, .tsv), or from .parquet"
            if len(kinds) == 1
            else f"{files[0]} and {len(files) - 1:,} more are of several kinds; name files of one kind"
        )
    lists = split_files(files) if len(files) > 1 else {"all": list(files)}
    if more := next((paths for paths in lists.values() if len(paths) > 1), None):
        raise DataError(f"{more[0]} and {more[1]} name images of one split; join them")
    return {split: partial(open_list, paths[0], split, allow_truncated) for split, paths in lists.items()}


def _kind(name: str) -> str | None:
    """What a file holds by its name, None for anything but sets of images."""
    if is_list_name(name):
        return "list"
    if is_archive_name(name):
        return "archive"
    return "parquet" if name.lower().endswith(".parquet") else None


def _set_files(root: Path) -> list[Path]:
    """The files in `root` that are the set: lists called train and val, or archives where no images lie beside."""
    entries = list_folder(root)
    lists = {path.stem: path for path in sorted(Path(entry.path) for entry in entries if is_list_name(entry.name))}
    if len(named := named_splits(lists, str(root))) == 2:
        return [lists[stem] for stem in named.values()]
    folders = [entry for entry in entries if is_folder(entry)]
    if any(is_image_name(entry.name) for entry in entries):
        return []
    if [entry.name for entry in folders] == ["data"]:  # where the hub keeps a set's Parquet files
        return sorted(Path(entry.path) for entry in list_folder(root / "data") if _kind(entry.name) == "parquet")
    return [] if folders else _packed_files(root)


def _packed_files(root: Path) -> list[Path]:
    """Archives and Parquet files in a folder."""
    return sorted(Path(entry.path) for entry in list_folder(root) if _kind(entry.name) in ("archive", "parquet"))


def _existing(data: str | Path) -> Path:
    """`data` as a path that is there."""
    path = Path(data)
    if path.parts[:1] == ("~",):
        path = path.expanduser()
    if str(data) and os.access(path, os.F_OK):
        if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
            raise DataError(f"the folder {path} is there, but you may not read it")
        return path
    if isinstance(data, str) and "/" not in data:
        raise UsageError(f"no file or folder is called '{data}', and {unknown_choice('the set', data, NAMED_SETS)}")
    raise DataError(f"{data} does not exist, and is not the name of a set: {', '.join(NAMED_SETS)}")


def _split_folders(root: Path) -> tuple[dict[str, Path], str]:
    """train/ and val/ (or what val is called) below `root`, nothing if it holds classes or images; and a note."""
    entries = list_folder(root)
    folders = [entry.name for entry in entries if is_folder(entry)]
    beside = sum(is_image_name(entry.name) for entry in entries)
    found = choose_splits(str(root), folders, beside > 0,
                          lambda name: any(is_folder(entry) for entry in list_folder(root / name)))
    other = next((name for name in sorted(folders) if is_split_word(name) and name not in found.values()), "")
    notes = [unused_note(found, folders, f"choose as in {root}/{{{found.get('train')},{other}}}"),
             f"left out {beside:,} image{'s' * (beside != 1)} beside them" if found and beside else ""]
    return {split: root / name for split, name in found.items()}, "; ".join(filter(None, notes))


def _open_folder(root: Path, split: str, allow_truncated: bool, note: str = "") -> ImageSet:
    """All images below `root`, labeled if they lie in two or more class folders; without any, those in archives."""
    listing = list_tree(root)
    if not listing.names and (files := _packed_files(root)):
        opener = open_parquet if _kind(files[0].name) == "parquet" else open_packed
        return replace(opener(files, split, allow_truncated), note=note)
    if not listing.names:
        raise DataError(_no_images(root, listing))
    names, strays = apart_from_strays(listing.names)
    found = class_folders(names)
    classes, labels = found if found is not None and len(found[0]) > 1 else ((), None)
    place = root.resolve()
    return FileImages(
        name=place.parent.name if is_split_word(place.name) else place.name,
        split=split,
        source=f"folder {root}",
        classes=classes,
        labels=labels,
        root=root,
        names=names if isinstance(names, Names) else Names(names),
        allow_truncated=allow_truncated,
        others=listing.others,
        note="; ".join(filter(None, (note, strays))),
    )


def _no_images(root: Path, listing: Tree) -> str:
    held = f"it holds {left_out(listing.others)}" if listing.others else "it holds no files at all"
    return f"0 images in {root}; {held}. Images are: {', '.join(sorted(EXTENSIONS))}"


def _open_arrays(root: Path, splits: ArraySplits, split: str) -> ArrayImages:
    return _array_images(splits.readers[split](), splits.name, split, f"{splits.kind} in {root}")


def _open_textures(name: str, split: str) -> ArrayImages:
    from patchssl.data.textures import CLASSES, textures

    pixels, labels = textures(split, NAMED_SETS[name])
    return _array_images(Arrays(pixels, labels, CLASSES), name, split, f"the embedded set {name}")


def _array_images(arrays: Arrays, name: str, split: str, source: str) -> ArrayImages:
    high, wide = arrays.pixels.shape[1:3]
    return ArrayImages(
        name=name,
        split=split,
        source=f"{source} ({high} x {wide} px)",
        classes=arrays.classes,
        labels=arrays.labels,
        array=arrays.pixels,
        ids=np.arange(len(arrays.pixels)),
    )
