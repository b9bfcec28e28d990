"""One string names any backbone: loading is exact or refused, and never falls back to other weights.

    timm:NAME[.TAG]          timm's weights through the Hugging Face hub (HF_HOME, HF_HUB_OFFLINE)
    hf-hub:ORG/NAME[@REV]    a repository on the hub in timm's layout
    random:ARCH?seed=0&...   an untrained network
    py:MODULE:FACTORY        what FACTORY() of one's own module returns; this runs that code
    PATH[#NETWORK][?heads=n] a run folder, an exported folder, or a file of DINO, iBOT, PW-Self, DINOv2 or timm
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import torch
from torch import Tensor, nn

from patchssl.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    ConvolutionalBackbone,
    Origin,
    TransformerBackbone,
    VitBackbone,
)
from patchssl.checkpoint import FORMAT, load_checkpoint, require_format
from patchssl.errors import CheckpointError, PatchSSLError, UsageError, one_of
from patchssl.hub import hub_file, hub_json
from patchssl.layouts import Layout, describe_left_out, official_stem, recognize, recognize_run
from patchssl.networks import (
    NetworkSpec,
    build_vit,
    create,
    default_sizes,
    family_of,
    has_arch,
    load_exactly,
    pretrained_config,
    require_arch,
    require_tag,
    require_vit,
)
from patchssl.weights import BARE, TEACHER, WeightsFile, read_weights, weights_in

log = logging.getLogger(__name__)

HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
FOLDER_WEIGHTS, FOLDER_CONFIG = "model.safetensors", "config.json"
LARGEST_SIZE = 100_000  # channels, pixels, ... that a config.json may ask for
OPENING_ARGS = ("pretrained", "checkpoint_path", "cache_dir")  # arguments of timm.create_model that open files
_RANDOM_OPTIONS = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "seed")
_FILE_OPTIONS = ("heads", "mean", "std", "method")
_METHODS = ("pwself", "dino", "ibot", "supervised", "other")


def load_backbone(uri: str, device: str | torch.device = "cpu") -> Backbone:
    """The backbone that `uri` names (see the module), in evaluation mode on `device`.

    `backbone.notes` says what was decided on the way: which network of a checkpoint, what was left out, what was
    assumed. Raises UsageError for a name or path that does not exist, CheckpointError for weights that are
    damaged, ask to run code, or do not fit in every name and shape.
    """
    kind, colon, rest = str(uri).partition(":")
    openers: Mapping[str, Callable[[str], Backbone]] = {
        "timm": _from_timm, "hf-hub": _from_hub, "random": _from_random, "py": _from_python}
    backbone = openers[kind](rest) if colon and kind in openers else _from_path(str(uri))
    for note in backbone.notes:
        log.info("%s: %s", uri, note)
    return backbone.to(device).eval().requires_grad_(False)


# timm and the hub ----------------------------------------------------------------------------------------------


def _from_timm(name: str) -> Backbone:
    arch, _, tag = name.partition(".")
    require_arch(arch)
    family_of(arch)
    require_tag(arch, tag)
    config = pretrained_config(name)
    repo = config.get("hf_hub_id") if config else None
    if config is None or not repo:
        raise CheckpointError(f"timm:{name} has no weights on the Hugging Face hub; choose another tag")
    state, left_out = _timm_state(read_weights(hub_file(repo, HUB_WEIGHTS)), config)
    full = f"{arch}.{config['tag']}"
    notes = (*(() if tag else (f"timm's default weights of {arch} are taken: {full}",)), *left_out)
    return _timm_backbone(arch, {}, config, state, f"timm:{full}", full, notes)


def _from_hub(rest: str) -> Backbone:
    repo, _, revision = rest.partition("@")
    config = hub_json(repo, FOLDER_CONFIG, revision or None)
    weights = read_weights(hub_file(repo, HUB_WEIGHTS, revision or None))
    return _from_timm_config(config, weights, f"hf-hub:{rest}", repo.rpartition("/")[2])


def _from_folder(folder: Path) -> Backbone:
    """A folder in timm's layout, as `patchssl export` writes it."""
    weights = _folder_weights(folder) or folder / FOLDER_WEIGHTS
    return _from_timm_config(read_config(folder / FOLDER_CONFIG), read_weights(weights), str(folder),
                             folder.resolve().name)


def _folder_weights(folder: Path) -> Path | None:
    """The file of weights in a folder in timm's layout, None without one."""
    return next((folder / name for name in HUB_WEIGHTS if (folder / name).is_file()), None)


def read_config(path: Path) -> dict[str, Any]:
    """A timm config.json; CheckpointError for one that is not there or is damaged."""
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not a table")
    return config


def _from_timm_config(config: Mapping[str, Any], weights: WeightsFile, where: str, name: str) -> Backbone:
    arch = config.get("architecture")
    if not isinstance(arch, str):
        kind = f"a '{config['model_type']}' of the transformers library" if "model_type" in config else "no network"
        raise CheckpointError(f"{where} describes {kind}; timm's config.json names an 'architecture'")
    try:
        require_arch(arch)
        family_of(arch)
    except UsageError as error:
        raise CheckpointError(f"{where}: {error}") from None
    settings = {**config, **_table(config, "pretrained_cfg", where), "patchssl": _table(config, "patchssl", where)}
    settings.setdefault("classifier", (pretrained_config(arch) or {}).get("classifier"))
    state, notes = _timm_state(weights, settings)
    args = _model_args(_table(config, "model_args", where), len(state), where)
    return _timm_backbone(arch, args, settings, state, where, name, notes)


def _table(config: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """The table `name` in `config`, empty if it is not there; CheckpointError for something else in its place."""
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} says {name} is a {type(found).__name__}; a table is needed")
    return found


def _model_args(args: Mapping[str, Any], num_tensors: int, where: str) -> dict[str, Any]:
    """What a config.json changes of timm's architecture: plain sizes and words, none that makes timm open a file."""
    for name, value in args.items():
        parts = value if isinstance(value, list) else [value]
        sizes = [part for part in parts if isinstance(part, int | float)]
        plain = all(part is None or isinstance(part, str | int | float) for part in parts)
        most = num_tensors if "depth" in name or name == "layers" else LARGEST_SIZE
        if not plain or not all(abs(size) <= most for size in sizes) or name.startswith(OPENING_ARGS):
            raise CheckpointError(f"{where} has model_args that set {name}, which is refused: only sizes up to {most} "
                                  "and words can be set, and nothing that opens a file")
    return {name: value for name, value in args.items() if name != "num_classes"}


def _timm_state(weights: WeightsFile, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a file in timm's layout without the classifier that `config` names, and a note on those."""
    classifier = config.get("classifier")
    names = classifier if isinstance(classifier, list | tuple) else (classifier,)
    state = weights.networks[weights.choose(None)]
    outside = {"mask_token", *(f"{head}.{part}" for head in names for part in ("weight", "bias"))} & state.keys()
    note = describe_left_out(sorted(outside))
    return {name: tensor for name, tensor in state.items() if name not in outside}, (note,) if note else ()


def _timm_backbone(arch: str, args: Mapping[str, Any], config: Mapping[str, Any], state: Mapping[str, Tensor],
                   where: str, name: str, notes: tuple[str, ...]) -> Backbone:
    """A backbone of timm's `arch`, whose tensors are timm's own, by timm's record `config` of the weights."""
    make = partial(_create_from_config, arch, dict(args), where)
    network = load_exactly(make, state, arch, where)
    own = config.get("patchssl") or {}
    dino = config.get("tag") == "dino"
    # DINOv2 resizes as DINO does; its networks with registers, which take timm's way, were trained so
    as_dino = dino or (config.get("tag") == "lvd142m" and "_dinov2" in arch)
    origin = _origin(own["origin"], where) if own.get("origin") else Origin(
        name=name, method="dino" if dino else "other", pretrain_data="ImageNet-1K" if dino else None)
    mean, std = _triple(config, "mean", IMAGENET_MEAN, where), _triple(config, "std", IMAGENET_STD, where)
    if min(std) <= 0:
        raise CheckpointError(f"{where} has a std of {std}; numbers above 0 are needed")
    label = str(own.get("arch", arch))
    return wrap(network, arch, label, mean, std, origin, _input_size(config, where),
                dino_positions=as_dino or own.get("positions") == "dino", notes=notes)


def _create_from_config(arch: str, args: dict[str, Any], where: str) -> nn.Module:
    try:
        return create(arch, **args)
    except MemoryError:
        raise
    except Exception as error:  # arguments from a file make timm raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{where}: timm cannot build {arch} with {args}: {reason}") from None


def _input_size(config: Mapping[str, Any], where: str) -> int:
    """Pixels of a side of the images that the network was trained on."""
    channels, height, width = _triple(config, "input_size", (3, 224, 224), where)
    if channels != 3 or not 1 <= width <= LARGEST_SIZE:
        raise CheckpointError(f"{where} has an input_size of {channels:g} x {height:g} x {width:g}; color images are "
                              "needed, written as [3, height, width]")
    return int(width)


def _triple(config: Mapping[str, Any], name: str, default: tuple[float, ...], where: str) -> tuple[float, ...]:
    """The three numbers `name`, as the mean of red, green and blue."""
    value = config.get(name)
    if value is None:
        return default
    numbers = tuple(value) if isinstance(value, list | tuple) else ()
    if len(numbers) != 3 or not all(isinstance(n, int | float) and abs(n) <= LARGEST_SIZE for n in numbers):
        raise CheckpointError(f"{where} says {name} is {reprlib.repr(value)}; three numbers are needed")
    return tuple(float(number) for number in numbers)


def _origin(record: Any, where: str) -> Origin:
    """What a file of ours says of its own past; CheckpointError for anything that does not belong there."""
    words, numbers = ("name", "method", "pretrain_data"), ("pretrain_epochs", "seed")
    if not isinstance(record, dict) or not all(
            value is None or isinstance(value, str if name in words else int | float)
            for name, value in record.items()) or record.keys() - {*words, *numbers}:
        raise CheckpointError(f"{where} says of its origin {reprlib.repr(record)}; words for {', '.join(words)} and "
                              f"numbers for {' and '.join(numbers)} are needed")
    return Origin(**record)


def wrap(network: nn.Module, arch: str, label: str, mean: tuple[float, ...], std: tuple[float, ...], origin: Origin,
         image_size: int, *, dino_positions: bool, notes: tuple[str, ...] = ()) -> Backbone:
    """The backbone around a network of timm's `arch`; `label` is what records call the architecture."""
    backbone: Backbone
    if (family := family_of(arch)) == "vit":
        backbone = VitBackbone(require_vit(network, arch), dino_positions=dino_positions, mean=mean, std=std,
                               arch=label, origin=origin)
    elif family == "transformer":
        backbone = TransformerBackbone(network, mean=mean, std=std, arch=label, origin=origin)
    else:
        backbone = ConvolutionalBackbone(network, mean=mean, std=std, image_size=image_size, arch=label, origin=origin)
    backbone.notes = notes
    return backbone


# untrained networks and one's own ------------------------------------------------------------------------------


def _from_random(rest: str) -> Backbone:
    arch, _, query = rest.partition("?")
    options = _options(query, _RANDOM_OPTIONS, rest)
    numbers: dict[str, Any] = {name: _whole(name, value, rest) for name, value in options.items()}
    seed = numbers.pop("seed", 0)
    origin = Origin(name="random", method="random", pretrain_epochs=0, seed=seed)
    require_arch(arch)
    if family_of(arch) == "vit":
        size, patch = default_sizes(arch)
        spec = NetworkSpec(arch=arch, image_size=numbers.pop("img_size", size),
                           patch_size=numbers.pop("patch_size", patch), **numbers)
        return VitBackbone(build_vit(spec, seed=seed), arch=spec.label(), origin=origin)
    if numbers:
        raise UsageError(f"{', '.join(numbers)} in random:{rest} can be set for plain Vision Transformers only")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = create(arch)
    return wrap(network, arch, arch, IMAGENET_MEAN, IMAGENET_STD, origin, 224, dino_positions=False)


def _options(query: str, allowed: tuple[str, ...], where: str) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in allowed:
            raise UsageError(one_of("option", name, allowed) + f" in {where}")
    return options


def _whole(name: str, value: str, where: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", value):
        raise UsageError(f"option {name}={value} in {where} is not a whole number below 10^18")
    return int(value)


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


class Location(NamedTuple):
    """A path, which network of it, and options, as in runs/mine#student?heads=3."""

    path: Path
    network: str | None
    options: dict[str, str]


def parse_location(uri: str) -> Location:
    """The parts of PATH#NETWORK?OPTION=VALUE; UsageError for a path that does not exist."""
    if uri and _exists(Path(uri)):
        return Location(Path(uri), None, {})
    place, _, query = uri.partition("?")
    query, _, late = query.partition("#")
    place, _, network = place.partition("#")
    path = Path(os.path.expanduser(place))  # noqa: PTH111 - leaves the name of no user as it is
    if place == "pixels" and not _exists(path):
        raise UsageError(f"'{uri}' means raw pixels, which are no network: eval scores them, here a network is "
                         "needed")
    if not place or not _exists(path):
        raise UsageError(f"model '{uri}' does not exist{_near(uri, path)}, and nothing else is loaded in its place. A "
                         "model is a run folder, a file of weights, or timm:..., hf-hub:..., random:..., py:...; "
                         "'patchssl models' lists names")
    return Location(path, network or late or None, _options(query, _FILE_OPTIONS, uri))


def _exists(path: Path) -> bool:
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


def _from_path(uri: str) -> Backbone:
    path, network, options = parse_location(uri)
    if path.is_dir() and (path / FOLDER_CONFIG).is_file() and _folder_weights(path) is not None:
        if network or options:
            raise UsageError(f"{path} is one network and says all about itself; leave out what follows it")
        return _from_folder(path)
    weights = weights_in(load_checkpoint(path), path) if path.is_dir() else read_weights(path)
    if weights.rest.get("format") == FORMAT:
        return _from_run(weights, network, options)
    return _from_official(weights, network, options)


def _from_run(weights: WeightsFile, network: str | None, options: Mapping[str, str]) -> Backbone:
    """The backbone of a checkpoint that patchssl wrote; the teacher's unless `network` is "student"."""
    require_format(weights.rest, weights.path)
    if options:
        raise UsageError(f"{weights.path} says all about itself; leave out ?{'&'.join(options)}")
    chosen = weights.choose(network)
    layout = recognize_run(weights, chosen)
    vit = load_exactly(partial(build_vit, layout.spec), layout.state, layout.arch, f"{weights.path}#{chosen}")
    origin = _origin(weights.rest["origin"], str(weights.path))
    name = origin.name if chosen == TEACHER else f"{origin.name}-{chosen}"
    return wrap(vit, layout.arch, layout.spec.label(), IMAGENET_MEAN, IMAGENET_STD, replace(origin, name=name),
                layout.spec.image_size, dino_positions=True, notes=_notes(layout, weights, network))


def _from_official(weights: WeightsFile, network: str | None, options: Mapping[str, str]) -> Backbone:
    """The backbone of a file that another project wrote."""
    path, chosen = weights.path, weights.choose(network)
    where = f"{path}#{chosen}" if chosen else str(path)
    heads = _whole("heads", options["heads"], where) if "heads" in options else None
    layout = recognize(weights, chosen, heads)
    if heads and layout.spec is None:
        raise UsageError(f"{where} is a ResNet without attention heads; leave out ?heads={heads}")
    make = partial(build_vit, layout.spec) if layout.spec else partial(create, layout.arch)
    module = load_exactly(make, layout.state, layout.arch, where)
    label = layout.spec.label() if layout.spec else layout.arch
    size = layout.spec.image_size if layout.spec else 224
    method = options.get("method", layout.method)
    if method not in _METHODS:
        raise UsageError(one_of("method", method, _METHODS))
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
