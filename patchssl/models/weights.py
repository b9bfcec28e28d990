"""Files of weights from anywhere, read so that nothing in them runs and nothing is held in memory twice.

safetensors and torch's files, a bare network or a training checkpoint with several. What the tensors mean is
`patchssl.models.recognize`' part.
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import re
import reprlib
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchssl.runtime.errors import CheckpointError, DataError, UsageError
from patchssl.runtime.files import is_utf8
from patchssl.runtime.pickles import NUMBERS, require_bounded
from patchssl.runtime.text import cut

BARE = ""  # the name of a network whose tensors lie at the top of the file
TEACHER = "teacher"
BACKBONE = "backbone."  # before the names of a backbone that has a head beside it
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")  # of DDP, torch.compile and FSDP
_SPARE_BYTES, _TIMES_SHARED = 64 * 2**20, 4  # that tensors may have beyond the file, as they may share numbers
_LONGEST_NAME = 500  # letters
_LARGEST_PICKLE, _OLD_PICKLES = 64 * 2**20, 5  # bytes, and how many stand before the numbers in torch's old format
_OTHERS = {rb"\s*<[!?a-zA-Z]": "a web page: the page about the file was saved instead of the file itself",
           rb"version https://git-lfs": "a git-lfs pointer: run 'git lfs pull' where it came from",
           rb"\x1f\x8b": "a gzip archive: unpack it first",
           rb"7z\xbc\xaf": "a 7z archive: unpack it first"}  # by how they begin


@dataclass(frozen=True)
class WeightsFile:
    """What a file of weights holds: networks by name, each tensors by name as they stand there, and the rest."""

    path: Path
    kind: str  # safetensors or torch
    networks: Mapping[str, Mapping[str, Tensor]]
    rest: Mapping[str, Any]  # epoch, args, optimizer, metadata, ...

    def choose(self, network: str | None) -> str:
        """The name of the network to load: `network`, else the teacher, else the only one; CheckpointError."""
        names = sorted(self.networks)
        if network is not None:
            if network not in names:
                there = f"only {', '.join(names)}" if names != [BARE] else "one network without a name"
                raise CheckpointError(f"{self.path} has no '{network}', {there}; choose one as {self.path}#NAME")
            return network
        if TEACHER in names:
            return TEACHER
        if len(names) != 1:
            raise CheckpointError(f"{self.path} holds the networks {', '.join(names)}; choose one as {self.path}#NAME")
        return names[0]

    @property
    def args(self) -> dict[str, Any]:
        """The command line of the training that a checkpoint remembers; empty without one."""
        args = self.rest.get("args")
        if isinstance(args, argparse.Namespace):
            return dict(vars(args))
        return dict(args) if isinstance(args, dict) else {}

    @property
    def epoch(self) -> int | None:
        """Epochs done, as the official training codes count them."""
        epoch = self.rest.get("epoch")
        return epoch if isinstance(epoch, int) and epoch >= 0 else None


def read_weights(path: Path) -> WeightsFile:
    """The file `path`; its tensors lie in a map of the file, which is read when they are used.

    UsageError for a path that is no file, CheckpointError for a file that is damaged, is no file of weights, or
    asks for anything but tensors and plain values.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not a file")
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if not path.stat().st_size:
        raise CheckpointError(f"{path} is empty (0 bytes): its download or copy failed, get it again")
    for beginning, what in _OTHERS.items():
        if re.match(beginning, start):
            raise CheckpointError(f"{path} is {what}")
    if path.suffix.lower() == ".safetensors" or start[8:10] == b'{"':  # whatever it is called
        return _read_safetensors(path)
    return weights_in(read_torch(path), path)


def _read_safetensors(path: Path) -> WeightsFile:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    try:
        if not is_utf8(path):
            return WeightsFile(path, "safetensors", _split_networks(BARE, load(path.read_bytes())), {})
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated, damaged or no safetensors file: {cut(error, 300)}") from None
    _require_names(tensors, path)
    return WeightsFile(path, "safetensors", _split_networks(BARE, tensors), metadata)


def read_torch(path: Path) -> Any:
    """The content of a file that `torch.save` wrote: tensors and plain values, or CheckpointError.

    Of all classes only argparse.Namespace, which DINO's checkpoints hold, is made; numpy's numbers, which their
    optimizers hold, are read by stand-ins. Tensors are mapped, not read, where the format allows it.
    """
    try:
        if whole := zipfile.is_zipfile(path):
            _require_sound(path)
        _require_bounded(path, whole=whole)
        allowed: list[Any] = [argparse.Namespace, *((stand_in, name) for name, stand_in in NUMBERS.items())]
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files of old versions of torch
            if is_utf8(path):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=whole)
            else:
                with path.open("rb") as file:
                    content = torch.load(file, map_location="cpu", weights_only=True)
        _require_numbers(content, path)
        return content
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from None
    except MemoryError:
        raise
    except Exception as error:  # which one depends on the byte that is wrong: a name, a length, a checksum, ...
        first = str(error).splitlines()[0].split(". ")[0] if str(error) else ""
        reason = first if " " in first else f"{type(error).__name__} while reading"
        raise CheckpointError(f"{path} is truncated, damaged or no file of weights: {reason}") from None


def _require_sound(path: Path) -> None:
    """CheckpointError for a zip archive with a wrong checksum, or that torch cannot have written."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise CheckpointError(f"{path} is a compressed zip archive, and torch's are not: unpack it; if it was made "
                                  "of a file of weights that was unpacked, get that file again")
        if sum(part.file_size for part in parts) > path.stat().st_size:
            raise CheckpointError(f"{path} is damaged: its parts are larger than the file")
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: its part {damaged} has a wrong checksum")


def _require_bounded(path: Path, *, whole: bool) -> None:
    """CheckpointError for a pickle that few bytes make large, before torch builds it; damage is left for torch to name.

    `whole`: a zip archive, with one pickle; else several lie before the numbers.
    """
    try:
        with contextlib.suppress(ValueError, LookupError, zipfile.BadZipFile):
            for file, size in _pickles(path, whole=whole):
                for _ in range(1 if whole else _OLD_PICKLES):
                    require_bounded(file, size)
    except DataError as error:
        raise CheckpointError(f"{path} is damaged or no file of weights: {error}") from None


def _pickles(path: Path, *, whole: bool) -> Iterator[tuple[BytesIO, int]]:
    if not whole:
        with path.open("rb") as file:
            start = file.read(_LARGEST_PICKLE)
        yield BytesIO(start), len(start)
        return
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if part.filename.endswith("data.pkl"):
                if part.file_size > _LARGEST_PICKLE:
                    raise DataError(f"its part {part.filename} is larger than {_LARGEST_PICKLE // 2**20} MiB")
                yield BytesIO(archive.read(part)), part.file_size


def _require_numbers(content: Any, path: Path) -> None:
    """CheckpointError for tensors with more numbers than the file holds: one number can be said to be billions."""
    total, most = 0, _TIMES_SHARED * path.stat().st_size + _SPARE_BYTES
    for name, tensor in _tensors_in(content):
        if tensor.layout != torch.strided or tensor.is_meta:
            continue
        size = tensor.numel() * tensor.element_size()
        if size > (there := tensor.untyped_storage().nbytes()):
            raise CheckpointError(f"{path} is damaged or no file of weights: its tensor {name} of the shape "
                                  f"{tuple(tensor.shape)[:8]} needs {size:,} bytes and has {there:,}, used repeatedly")
        total += size
        if total > most:
            raise CheckpointError(f"{path} is damaged or no file of weights: its tensors have more than {most:,} "
                                  f"bytes, and the file {path.stat().st_size:,}")


def _tensors_in(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in containers of any kind, each once, with what it is called there."""
    seen, waiting = set[int](), [("", content)]
    while waiting:
        name, value = waiting.pop()
        if id(value) in seen:
            continue
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, argparse.Namespace):
            waiting.append((name, vars(value)))
        elif isinstance(value, Mapping):
            waiting += [(reprlib.repr(key), part) for key, part in value.items()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += [(name, part) for part in value]
        else:
            continue
        seen.add(id(value))


def _refusal(path: Path, message: str) -> str:
    """Sentence for a pickle that weights-only loading refuses."""
    if asked := re.search(r"GLOBAL (\S+)", message):
        return (f"{path} asks to run {asked[1]} and was refused; files of weights hold tensors and plain values. "
                "Nothing of it was executed")
    # torch's own sentence goes on to advise loading without protection
    return (f"{path} is damaged or no file of weights: neither safetensors nor what torch.save writes. Nothing of it "
            "was executed")


def _require_names(names: Iterable[str], path: Path) -> None:
    """CheckpointError for names that no sentence can hold; what is printed shows the others safely."""
    for name in names:
        if len(name) > _LONGEST_NAME:
            raise CheckpointError(f"{path} is damaged or no file of weights: it has the name {reprlib.repr(name)}, and "
                                  f"names have at most {_LONGEST_NAME} letters")


def weights_in(content: Any, path: Path) -> WeightsFile:
    """The networks in what `read_torch` gave for `path`; CheckpointError for none."""
    if not isinstance(content, Mapping):
        what = "a single tensor" if isinstance(content, Tensor) else f"a {type(content).__name__}"
        raise CheckpointError(f"{path} holds {what}; weights are a table of names and tensors")
    if _is_network(content):
        _require_names(content, path)
        return WeightsFile(path, "torch", _split_networks(BARE, _bare_tensors(content)), {})
    found = {name: _bare_tensors(part) for name, part in content.items()
             if isinstance(name, str) and isinstance(part, Mapping) and _is_network(part)}
    _require_names([*found, *(name for part in found.values() for name in part)], path)
    networks = found if len(found) != 1 else _split_networks(*next(iter(found.items())))
    if not networks:
        there = ", ".join(sorted(map(reprlib.repr, content))[:10]) or "nothing"
        raise CheckpointError(f"{path} holds no network, only {there}")
    return WeightsFile(path, "torch", networks, {name: part for name, part in content.items() if name not in found})


def _split_networks(name: str, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Student and teacher of a table whose every tensor is called teacher.* or student.*, else the table as it is."""
    split: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        network, dot, rest = unwrapped(full).partition(".")
        if not dot or network not in (TEACHER, "student"):
            return {name: tensors}
        split.setdefault(network, {})[rest] = tensor
    return split


def _is_network(part: Mapping[Any, Any]) -> bool:
    """Tensors, some of them called weights; a loss with its centers or an optimizer is none."""
    return (all(isinstance(name, str) and isinstance(value, Tensor) for name, value in part.items())
            and any(name.endswith(".weight") for name in part))


def _bare_tensors(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers without what a file can hang on a tensor: attributes that hide its own functions."""
    return {name: Tensor.detach(tensor) for name, tensor in part.items()}


def unwrapped(name: str) -> str:
    """A tensor's name without what DDP, FSDP and torch.compile put before or into it.

    >>> unwrapped("module.backbone._orig_mod.blocks.0.norm1.weight")
    'backbone.blocks.0.norm1.weight'
    """
    for wrapper in WRAPPERS:
        if name.startswith(wrapper):
            return unwrapped(name.removeprefix(wrapper))
    for wrapper in WRAPPERS[1:]:
        name = name.replace(f".{wrapper}", ".")
    return name.replace("backbone.module.", "backbone.", 1) if name.startswith("backbone.module.") else name


def split_head(state: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], list[str]]:
    """The backbone's tensors of a network under their plain names, and the names of all others.

    A network with `backbone.*` has all others outside its backbone; one without is a backbone itself.
    """
    plain = {unwrapped(name): tensor for name, tensor in state.items()}
    if len(plain) != len(state):
        raise CheckpointError(f"{where} holds tensors twice, with and without the prefixes {', '.join(WRAPPERS)}")
    inside = sorted(name for name in plain if name.startswith(BACKBONE))
    if not inside:
        return plain, []
    backbone = {name.removeprefix(BACKBONE): plain[name] for name in inside}
    return backbone, sorted(plain.keys() - set(inside))
