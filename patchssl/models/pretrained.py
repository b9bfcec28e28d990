"""Weights in timm's layout: of timm itself, of a repository on the hub, of a folder that was exported.

A config.json comes from anywhere: it may set sizes and words, and nothing that makes timm open a file.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from patchssl.models.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    ConvolutionalBackbone,
    Origin,
    TransformerBackbone,
    VitBackbone,
)
from patchssl.models.hub import hub_file, hub_json
from patchssl.models.networks import (
    create,
    family_of,
    load_exactly,
    pretrained_config,
    require_arch,
    require_tag,
    require_vit,
)
from patchssl.models.recognize import describe_left_out
from patchssl.models.weights import WeightsFile, read_weights
from patchssl.runtime.errors import CheckpointError, UsageError
from patchssl.runtime.yamltext import load_json

HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
FOLDER_WEIGHTS, FOLDER_CONFIG = "model.safetensors", "config.json"
LARGEST_SIZE = 100_000  # channels, pixels, ... that a config.json may ask for
OPENING_ARGS = ("pretrained", "checkpoint_path", "cache_dir")  # arguments of timm.create_model that open files


def load_timm(name: str) -> Backbone:
    """timm's network NAME[.TAG] with its weights, through the Hugging Face hub."""
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


def load_hub(rest: str) -> Backbone:
    """The repository ORG/NAME[@REVISION] on the hub, in timm's layout."""
    repo, _, revision = rest.partition("@")
    config = hub_json(repo, FOLDER_CONFIG, revision or None)
    weights = read_weights(hub_file(repo, HUB_WEIGHTS, revision or None))
    return backbone_of_config(config, weights, f"hf-hub:{rest}", repo.rpartition("/")[2])


def load_folder(folder: Path) -> Backbone:
    """A folder in timm's layout, as `patchssl export` writes it."""
    weights = folder_weights(folder) or folder / FOLDER_WEIGHTS
    return backbone_of_config(read_config(folder / FOLDER_CONFIG), read_weights(weights), str(folder),
                             folder.resolve().name)


def folder_weights(folder: Path) -> Path | None:
    """The file of weights in a folder in timm's layout, None without one."""
    return next((folder / name for name in HUB_WEIGHTS if (folder / name).is_file()), None)


def read_config(path: Path) -> dict[str, Any]:
    """A timm config.json; CheckpointError for one that is not there or is damaged."""
    try:
        config = load_json(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not a table")
    return config


def backbone_of_config(config: Mapping[str, Any], weights: WeightsFile, where: str, name: str) -> Backbone:
    """The network that a config.json found at `where` describes; CheckpointError for one that cannot be trusted."""
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
    origin = read_origin(own["origin"], where) if own.get("origin") else Origin(
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


def read_origin(record: Any, where: str) -> Origin:
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
