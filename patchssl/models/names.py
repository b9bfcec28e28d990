"""What a MODEL string says: the path, the network and the options in it, without opening anything."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from patchssl.models.networks import family_of, has_arch
from patchssl.models.pixels import is_pixels
from patchssl.runtime.errors import UsageError, unknown_choice
from patchssl.runtime.text import query_options

FILE_OPTIONS = ("heads", "mean", "std", "method")


class Location(NamedTuple):
    """A path, which network of it, and options, as in runs/mine#student?heads=3."""

    path: Path
    network: str | None
    options: dict[str, str]


def parse_location(uri: str) -> Location:
    """The parts of PATH#NETWORK?OPTION=VALUE; UsageError for a path that does not exist."""
    if uri and exists(Path(uri)):
        return Location(Path(uri), None, {})
    place, _, query = uri.partition("?")
    query, _, late = query.partition("#")
    place, _, network = place.partition("#")
    path = Path(os.path.expanduser(place))  # noqa: PTH111 - leaves the name of no user as it is
    require_network(uri)
    if not place or not exists(path):
        raise UsageError(f"model '{uri}' does not exist{_near(uri, path)}, and nothing else is loaded in its place. A "
                         "model is a run folder, a file of weights, or timm:..., hf-hub:..., random:..., py:...; "
                         "'patchssl models' lists names")
    return Location(path, network or late or None, options_in(query, FILE_OPTIONS, uri))


def absolute_model(uri: str) -> str:
    """What names the model `uri` from any working folder: paths in full, names as they are."""
    if exists(Path(uri)):
        return str(Path(uri).absolute())
    place, mark, rest = next(((*uri.partition(mark),) for mark in uri if mark in "?#"), (uri, "", ""))
    path = Path(os.path.expanduser(place))  # noqa: PTH111 - leaves the name of no user as it is
    return f"{path.absolute()}{mark}{rest}" if place and exists(path) else uri


def sized(uri: str) -> tuple[str, int | None]:
    """`uri` without its img_size, and that; networks that are made at a size keep it."""
    name, mark, query = uri.partition("?")
    of_vit = uri.startswith("random:") and has_arch(name[7:]) and family_of(name[7:]) == "vit"
    if not mark or is_pixels(uri) or of_vit or exists(Path(uri)):
        return uri, None
    network = "".join(query.partition("#")[1:])
    options = query.removesuffix(network).split("&")
    sizes = [option for option in options if option.startswith("img_size=")]
    if not sizes:
        return uri, None
    if len(sizes) > 1:
        raise UsageError(f"{uri}: img_size= stands twice; keep one")
    rest = "&".join(option for option in options if option not in sizes)
    return name + ("?" + rest if rest else "") + network, whole_number("img_size", sizes[-1].partition("=")[2], uri)


def require_network(uri: str, *, own_size: bool = False) -> None:
    """UsageError where `uri` means raw pixels or, with `own_size`, asks for a size that the network does not have."""
    if is_pixels(uri) and not exists(Path(uri)):
        raise UsageError(f"'{uri}' means raw pixels, which are no network: eval scores them, here a network is "
                         "needed")
    if own_size and sized(uri)[1] is not None:
        raise UsageError(f"{uri}: img_size= says what a network is scored and drawn at, here it is taken as it is; "
                         "leave it out")


def options_in(query: str, allowed: tuple[str, ...], where: str) -> dict[str, str]:
    options = query_options(query, where)
    for name in options:
        if name not in allowed:
            raise UsageError(unknown_choice("option", name, allowed) + f" in {where}")
    return options


def whole_number(name: str, value: str, where: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", value):
        raise UsageError(f"option {name}={value} in {where} is not a whole number below 10^18")
    return int(value)


def exists(path: Path) -> bool:
    """Is there a file or folder? A name that none can have is not there either."""
    try:
        return path.exists()
    except OSError:  # too long, or in a folder that may not be looked into
        return False


def _near(uri: str, path: Path) -> str:
    """What a wrong name was probably meant to be: a kind of model, a name of timm, or what lies beside it."""
    kind, colon, rest = uri.partition(":")
    if colon and (kinds := get_close_matches(kind, ("timm", "hf-hub", "random", "py"), n=1)):
        return f" (did you mean {kinds[0]}:{rest}?)"
    if has_arch(uri.partition(".")[0]):
        return f" (did you mean timm:{uri}?)"
    try:
        near = get_close_matches(path.name, sorted(entry.name for entry in path.parent.iterdir()), n=1)
    except OSError:
        return ""
    if near == [path.name]:
        return ": it is a link to nothing"
    return f" (did you mean {path.parent / near[0]}?)" if near else ""
