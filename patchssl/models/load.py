"""One string names any backbone: loading is exact or refused, and never falls back to other weights.

    timm:NAME[.TAG]          timm's weights through the Hugging Face hub (HF_HOME, HF_HUB_OFFLINE)
    hf-hub:ORG/NAME[@REV]    a repository on the hub in timm's layout
    random:ARCH?seed=0&...   an untrained network
    py:MODULE:FACTORY        what FACTORY() of one's own module returns; this runs that code
    PATH[#NETWORK][?heads=n] a run folder, an exported folder, or a file of DINO, iBOT, PW-Self, DINOv2 or timm
    pixels[?img_size=32]     the images themselves, no network: for evaluation

Each takes ?img_size=n, the size that it is scored and drawn at.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from patchssl.models.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, Origin, VitBackbone
from patchssl.models.checkpoint import FORMAT, load_checkpoint, require_format
from patchssl.models.identity import identify
from patchssl.models.names import exists, options_in, parse_location, require_network, sized, whole_number
from patchssl.models.networks import (
    NetworkSpec,
    build_vit,
    create,
    default_sizes,
    family_of,
    load_exactly,
    require_arch,
)
from patchssl.models.pixels import is_pixels, open_pixels
from patchssl.models.pretrained import (
    FOLDER_CONFIG,
    LARGEST_SIZE,
    folder_weights,
    load_folder,
    load_hub,
    load_timm,
    read_origin,
    wrap,
)
from patchssl.models.recognize import Layout, describe_left_out, official_stem, recognize, recognize_run
from patchssl.models.weights import BARE, TEACHER, WeightsFile, read_weights, weights_in
from patchssl.runtime.errors import PatchSSLError, UsageError, unknown_choice
from patchssl.runtime.text import shortened

log = logging.getLogger(__name__)

_RANDOM_OPTIONS = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "seed")
_NAMED_REASONS = 3
_METHODS = ("pwself", "dino", "ibot", "supervised", "other")


def load_backbone(uri: str, device: str | torch.device = "cpu") -> Backbone:
    """The backbone that `uri` names (see the module), in evaluation mode on `device`.

    `backbone.notes` says what was decided on the way: which network of a checkpoint, what was left out, what was
    assumed. Raises UsageError for a name or path that does not exist, CheckpointError for weights that are
    damaged, ask to run code, or do not fit in every name and shape.
    """
    name, size = sized(str(uri))
    kind, colon, rest = name.partition(":")
    openers: Mapping[str, Callable[[str], Backbone]] = {
        "timm": load_timm, "hf-hub": load_hub, "random": _from_random, "py": _from_python}
    if is_pixels(name):
        if exists(Path(name)):
            raise UsageError(f"'{name}' means raw pixels, and there is a file or folder of this name: write ./{name} "
                             "for that, or pixels?img_size=32")
        backbone: Backbone = open_pixels(name)
    else:
        backbone = openers[kind](rest) if colon and kind in openers else _from_path(name)
    if size is not None:
        _resize(backbone, size, str(uri))
    for note in backbone.notes:
        log.info("%s: %s", uri, note)
    return backbone.to(device).eval().requires_grad_(False)


def load_network(uri: str, device: str | torch.device = "cpu", *, own_size: bool = False) -> Backbone:
    """As `load_backbone`, where raw pixels are no answer: UsageError for them, with `own_size` for ?img_size= too."""
    require_network(uri, own_size=own_size)
    return load_backbone(uri, device)


def _resize(backbone: Backbone, size: int, uri: str) -> None:
    """Let `backbone` be evaluated at `size` pixels; its position embeddings are interpolated where it has any."""
    if not 0 < size < LARGEST_SIZE or size % backbone.patch_size:
        raise UsageError(f"img_size={size} in {uri} is no multiple of the patch size {backbone.patch_size} between 1 "
                         f"and {LARGEST_SIZE - 1:,} pixels")
    if size != backbone.image_size:
        backbone.notes = (*backbone.notes, f"it is evaluated at {size} px, not at {backbone.image_size}")
        backbone.image_size = size
        backbone.origin = replace(backbone.origin, name=f"{backbone.name}-{size}px")  # records of its own


# untrained networks and one's own ------------------------------------------------------------------------------


def _from_random(rest: str) -> Backbone:
    arch, _, query = rest.partition("?")
    options = options_in(query, _RANDOM_OPTIONS, rest)
    numbers: dict[str, Any] = {name: whole_number(name, value, rest) for name, value in options.items()}
    seed = numbers.pop("seed", 0)
    require_arch(arch)
    if family_of(arch) == "vit":
        size, patch = default_sizes(arch)
        spec = NetworkSpec(arch=arch, image_size=numbers.pop("img_size", size),
                           patch_size=numbers.pop("patch_size", patch), **numbers)
        return untrained_backbone(spec, seed)
    if numbers:
        raise UsageError(f"{', '.join(numbers)} in random:{rest} can be set for plain Vision Transformers only")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = create(arch)
    return wrap(network, arch, arch, IMAGENET_MEAN, IMAGENET_STD, _untrained("random", seed), 224, dino_positions=False)


def untrained_backbone(spec: NetworkSpec, seed: int, name: str = "random") -> VitBackbone:
    """The Vision Transformer that `spec` describes before any training; `seed` fixes its weights."""
    return VitBackbone(build_vit(spec, seed=seed), arch=spec.label(), origin=_untrained(name, seed))


def _untrained(name: str, seed: int) -> Origin:
    return Origin(name=name, method="random", pretrain_epochs=0, seed=seed)


def _from_python(rest: str) -> Backbone:
    """What the user's own factory returns: a Backbone, made with `Backbone.from_module`."""
    module_name, _, factory_name = rest.partition(":")
    if not module_name or not factory_name or module_name.startswith("."):
        raise UsageError(f"py:{rest} is not understood; write py:package.module:factory")
    with _current_folder_first() as here:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UsageError(f"py:{rest}: no module is called {error.name}, neither installed nor in {here}") from None
        except Exception as error:
            raise UsageError(f"py:{rest}: importing {module_name} raised {type(error).__name__}: {error}") from error
        factory = getattr(module, factory_name, None)
        if not callable(factory):
            raise UsageError(f"py:{rest}: the module {module_name} has no function {factory_name}")
        try:
            backbone = factory()
        except PatchSSLError:
            raise
        except Exception as error:
            raise UsageError(f"py:{rest}: your factory raised {type(error).__name__}: {error}") from error
    if not isinstance(backbone, Backbone):
        raise UsageError(f"py:{rest} returned a {type(backbone).__name__}; return patchssl.Backbone.from_module("
                         "network, patch_size=..., mean=..., std=...)")
    backbone.notes = (*backbone.notes, f"py:{rest} ran your own code")
    if unknown := identify(backbone).unknown:
        backbone.notes = (*backbone.notes, "nothing of it is kept in the cache, as it cannot be told from another "
                                           f"network: {shortened(unknown, _NAMED_REASONS)}")
    return backbone


@contextmanager
def _current_folder_first() -> Iterator[str]:
    """Modules of the current folder can be imported, where the command line does not look by itself."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield here
    finally:
        sys.path.remove(here)


# files and folders ---------------------------------------------------------------------------------------------


def _from_path(uri: str) -> Backbone:
    path, network, options = parse_location(uri)
    if path.is_dir() and (path / FOLDER_CONFIG).is_file() and folder_weights(path) is not None:
        if network or options:
            raise UsageError(f"{path} is one network and says all about itself; leave out what follows it")
        return load_folder(path)
    weights = weights_in(load_checkpoint(path), path) if path.is_dir() else read_weights(path)
    if weights.rest.get("format") == FORMAT:
        return load_run(weights, network, options)
    return load_official(weights, network, options)


def load_run(weights: WeightsFile, network: str | None, options: Mapping[str, str]) -> Backbone:
    """The backbone of a checkpoint that patchssl wrote; the teacher's unless `network` is "student"."""
    require_format(weights.rest, weights.path)
    if options:
        raise UsageError(f"{weights.path} says all about itself; leave out ?{'&'.join(options)}")
    chosen = weights.choose(network)
    layout = recognize_run(weights, chosen)
    vit = load_exactly(partial(build_vit, layout.spec), layout.state, layout.arch, f"{weights.path}#{chosen}")
    origin = read_origin(weights.rest["origin"], str(weights.path))
    name = origin.name if chosen == TEACHER else f"{origin.name}-{chosen}"
    return wrap(vit, layout.arch, layout.spec.label(), IMAGENET_MEAN, IMAGENET_STD, replace(origin, name=name),
                layout.spec.image_size, dino_positions=True, notes=_notes(layout, weights, network))


def load_official(weights: WeightsFile, network: str | None, options: Mapping[str, str]) -> Backbone:
    """The backbone of a file that another project wrote."""
    path, chosen = weights.path, weights.choose(network)
    where = f"{path}#{chosen}" if chosen else str(path)
    heads = whole_number("heads", options["heads"], where) if "heads" in options else None
    layout = recognize(weights, chosen, heads)
    if heads and layout.spec is None:
        raise UsageError(f"{where} is a ResNet without attention heads; leave out ?heads={heads}")
    make = partial(build_vit, layout.spec) if layout.spec else partial(create, layout.arch)
    module = load_exactly(make, layout.state, layout.arch, where)
    label = layout.spec.label() if layout.spec else layout.arch
    size = layout.spec.image_size if layout.spec else 224
    method = options.get("method", layout.method)
    if method not in _METHODS:
        raise UsageError(unknown_choice("method", method, _METHODS))
    origin = Origin(name=official_stem(path) + (f"-{network}" if network else ""), method=method,
                    pretrain_epochs=weights.epoch)
    mean, std = (_numbers(options.get(name), default, name)
                 for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))
    return wrap(module, layout.arch, label, mean, std, origin, size, dino_positions=layout.dino_positions,
                notes=_notes(layout, weights, network))


def _notes(layout: Layout, weights: WeightsFile, asked: str | None) -> tuple[str, ...]:
    """What the user should know of the choices made for a file."""
    names = sorted(weights.networks)
    chosen = weights.choose(asked)
    notes = [*layout.notes]
    if asked is None and chosen != BARE:
        others = [f"#{name}" for name in names if name != chosen]
        notes.append(f"the {chosen} is loaded" + (f"; {', '.join(others)} chooses another network" if others else ""))
    if left_out := describe_left_out(layout.left_out):
        notes.append(left_out)
    return tuple(notes)


def _numbers(text: str | None, default: tuple[float, ...], name: str) -> tuple[float, ...]:
    """The numbers of mean=0.5,0.5,0.5, or of mean=0.5 for all three."""
    if text is None:
        return default
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 3) or not all(abs(n) < LARGEST_SIZE and (name != "std" or n > 0) for n in numbers):
        raise UsageError(f"{name}={text} is not one number, nor three between commas; a std is above 0")
    return numbers * 3 if len(numbers) == 1 else numbers


def open_model(model: str, device: torch.device, say: Callable[[str], None]) -> Backbone:
    """`load_backbone`, saying what was decided on the way and how images will be normalized."""
    backbone = load_backbone(model, device)
    if is_pixels(model):
        return backbone
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (backbone.mean, backbone.std))
    for note in (*backbone.notes, f"images are normalized by mean {mean} and std {std}"):
        say(f"{backbone.name}: {note}")
    return backbone
