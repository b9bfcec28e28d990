"""What a file of weights is, what evaluates it, and what is wrong with it.

The code that loads a network is asked first, with tensors that have shapes and no content; then the numbers are
read from the map of the file, one tensor at a time, so that a file of any size needs the memory of its largest one.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import torch
from torch import Tensor

from patchssl.models.backbone import Backbone, TransformerBackbone, VitBackbone
from patchssl.models.checkpoint import FORMAT, NEWEST, PREVIOUS, load_checkpoint
from patchssl.models.facts import Facts, Inspection, NetworkReport
from patchssl.models.hub import hub_file, hub_json
from patchssl.models.load import load_backbone, load_official, load_run
from patchssl.models.names import parse_location, require_network
from patchssl.models.networks import Misfit, as_float32, build_vit, create, misfit, pretrained_config, state_sha256
from patchssl.models.pretrained import FOLDER_CONFIG, FOLDER_WEIGHTS, HUB_WEIGHTS, backbone_of_config, read_config
from patchssl.models.recognize import Layout, recognize, recognize_run
from patchssl.models.soundness import check_numbers, is_plain
from patchssl.models.weights import WeightsFile, read_weights, weights_in
from patchssl.runtime.errors import CheckpointError, UsageError
from patchssl.runtime.progress import Progress
from patchssl.runtime.text import command

IMAGENETS = "ImageNet's"


def inspect_model(uri: str, progress: Progress | None = None) -> Inspection:
    """Inspect what `load_backbone` takes: a file, a run folder, an exported folder, or timm:... and hf-hub:... names.

    `progress` is called with tensors read and tensors to read. Raises UsageError for a name without a file or a
    wrong option, and CheckpointError for a file that is no file of weights or has not the network asked for; weights
    that are incomplete or of an unknown network are reported, not refused.
    """
    source = _find(uri)
    default, file_trouble = None, list(source.trouble)
    try:
        default = source.weights.choose(None)
    except CheckpointError as error:
        if source.asked is None:
            file_trouble.append(str(error))
    chosen = source.weights.choose(source.asked) if source.asked is not None else default
    names = sorted(source.weights.networks, key=lambda name: (name != chosen, name))
    found = [_look(source, name, default) for name in names]
    networks = _read_numbers(found, progress)
    return Inspection(
        model=uri, file=str(source.weights.path), size_bytes=source.weights.path.stat().st_size,
        kind=_kind(source.weights), networks=networks, default=default, chosen=chosen,
        steps_done=_whole_or_none(source.weights.rest.get("steps_done")), normalization=source.normalization,
        file_trouble=(*file_trouble, *_twins(networks)), command=_command(source, networks, default, chosen))


# where the weights are -------------------------------------------------------------------------------------------


class _InspectedFile(NamedTuple):
    """A file that was found and the parts of loading that belong to it."""

    place: str  # a path, or a whole name
    asked: str | None
    options: Mapping[str, str]
    weights: WeightsFile
    normalization: str
    build: Callable[[WeightsFile, str | None], Backbone]
    layout_of: Callable[[str], Layout] | None = None  # None: the tensors have timm's names
    framework: str = "timm"
    trouble: tuple[str, ...] = ()


def _find(uri: str) -> _InspectedFile:
    require_network(uri, own_size=True)
    kind, colon, rest = uri.partition(":")
    if colon and kind in ("py", "random"):
        what = "it would run your code" if kind == "py" else "an untrained network has no file"
        raise UsageError(f"{uri} is not inspected: {what}; name a run folder or a file of weights")
    if colon and kind == "timm":
        return _timm_source(uri, rest)
    if colon and kind == "hf-hub":
        repo, _, revision = rest.partition("@")
        config = hub_json(repo, FOLDER_CONFIG, revision or None)
        weights = read_weights(hub_file(repo, HUB_WEIGHTS, revision or None))
        return _config_source(uri, config, weights, repo.rpartition("/")[2])
    path, network, options = parse_location(uri)
    if path.is_dir() and (path / FOLDER_CONFIG).is_file() and (path / FOLDER_WEIGHTS).is_file():
        if network or options:
            raise UsageError(f"{path} is one network and says all about itself; leave out what follows it")
        config, weights = read_config(path / FOLDER_CONFIG), read_weights(path / FOLDER_WEIGHTS)
        return _config_source(str(path), config, weights, path.resolve().name)
    weights, trouble = _run_weights(path) if path.is_dir() else (read_weights(path), ())
    source = _file_source(str(path), network, options, weights)
    return source._replace(trouble=trouble)


def _timm_source(uri: str, name: str) -> _InspectedFile:
    """timm's weights `name`."""
    backbone = load_backbone(uri, "meta")
    repo = (pretrained_config(name) or {})["hf_hub_id"]
    weights = read_weights(hub_file(repo, HUB_WEIGHTS))
    return _InspectedFile(uri, None, {}, weights, "timm's record of these weights", lambda stand_in, network: backbone)


def _config_source(place: str, config: Mapping[str, Any], weights: WeightsFile, name: str) -> _InspectedFile:
    """Weights beside a config.json in timm's layout."""
    def build(stand_in: WeightsFile, network: str | None) -> Backbone:
        return backbone_of_config(config, stand_in, place, name)

    why = f"as {FOLDER_CONFIG} says; {IMAGENETS} where it says nothing"
    framework = "timm, exported by patchssl" if config.get("patchssl") else "timm"
    return _InspectedFile(place, None, {}, weights, why, build, framework=framework)


def _run_weights(folder: Path) -> tuple[WeightsFile, tuple[str, ...]]:
    """The newest whole checkpoint of a run folder, and what is wrong with a newer one."""
    newest, previous = folder / NEWEST, folder / PREVIOUS
    if newest.exists() and previous.exists():
        try:
            return weights_in(load_checkpoint(newest), newest), ()
        except CheckpointError as error:
            return weights_in(load_checkpoint(previous), previous), (f"{error}; {PREVIOUS} is taken instead",)
    only = previous if previous.exists() else newest
    return weights_in(load_checkpoint(only if only.exists() else folder), only), ()


def _file_source(place: str, asked: str | None, options: Mapping[str, str], weights: WeightsFile) -> _InspectedFile:
    """A run of ours, or a file of another project."""
    own = weights.rest.get("format") == FORMAT
    heads = options.get("heads", "")

    def build(stand_in: WeightsFile, network: str | None) -> Backbone:
        return (load_run if own else load_official)(stand_in, network, options)

    def layout_of(network: str) -> Layout:
        if own:
            return recognize_run(weights, network)
        return recognize(weights, network, int(heads) if heads else None)

    given = [name for name in ("mean", "std") if name in options]
    why = (f"{IMAGENETS}, as in every run of patchssl" if own else f"{' and '.join(given)} as given" if given else
           f"{IMAGENETS}, as DINO, iBOT and PW-Self have it: the file does not say; ?mean=...&std=... sets others")
    return _InspectedFile(place, asked, options, weights, why, build, layout_of)


# what the shapes tell --------------------------------------------------------------------------------------------


class _UnreadNetwork(NamedTuple):
    """A network whose numbers were not read yet."""

    report: NetworkReport
    state: Mapping[str, Tensor]


def _look(source: _InspectedFile, network: str, default: str | None) -> _UnreadNetwork:
    """All of `network` but its numbers: what loading says to its shapes, and where those differ if it refuses them."""
    tensors = source.weights.networks[network]
    asked = None if network == default else network
    backbone, refusal = _build(source, network, asked, tensors)
    layout = _layout(source, network, backbone)
    differing = Misfit([], [], {})
    if refusal and layout.arch:
        with suppress(CheckpointError, UsageError):
            needed = _needed(layout)
            differing = misfit(needed, layout.state)
            backbone, _ = _build(source, network, asked, needed)
    method = source.options.get("method") or layout.method or (backbone.method if backbone else "")
    report = NetworkReport(
        network=network, framework=layout.framework or None, method=method or None, facts=_facts(backbone, layout),
        notes=layout.notes, heads_assumed=any("assumed" in note for note in layout.notes),
        num_tensors=len(layout.state), left_out=layout.left_out,
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        weights_sha256=None, missing=tuple(differing.missing), unexpected=tuple(differing.unexpected),
        misshaped=tuple(f"{name} is {there} instead of {needed}" for name, (needed, there) in differing.shapes.items()),
        trouble=(refusal,) if refusal else (), loads=not refusal)
    return _UnreadNetwork(report, layout.state)


def _layout(source: _InspectedFile, network: str, backbone: Backbone | None) -> Layout:
    """The layout of `network`; without an architecture where nothing tells it."""
    tensors = source.weights.networks[network]
    unknown = Layout(framework=source.framework if not source.layout_of else "", method="", arch="", spec=None,
                     state=tensors)
    if source.layout_of:
        try:
            return source.layout_of(network)
        except CheckpointError:  # which is the reason that loading gives as well
            return unknown
    if backbone is None:
        return unknown
    state = {name: tensors[name] for name in backbone.module.state_dict()}
    return replace(unknown, state=state, left_out=tuple(sorted(tensors.keys() - state.keys())))


def _needed(layout: Layout) -> dict[str, Tensor]:
    """The tensors that a network of this architecture has, without content."""
    with torch.device("meta"):
        module = build_vit(layout.spec) if layout.spec else create(layout.arch)
    return {name: _hollow(tensor) for name, tensor in module.state_dict().items()}


def _build(source: _InspectedFile, network: str, asked: str | None,
           tensors: Mapping[str, Tensor]) -> tuple[Backbone | None, str]:
    """The backbone that loading makes of the shapes of `tensors`, or why it refuses them."""
    # what has no plain numbers is handed over as it is, and refused
    hollow = {name: _hollow(tensor) if is_plain(tensor) else tensor for name, tensor in tensors.items()}
    stand_in = replace(source.weights, networks={**source.weights.networks, network: hollow})
    try:
        return source.build(stand_in, asked), ""
    except CheckpointError as error:
        return None, str(error)


def _hollow(tensor: Tensor) -> Tensor:
    """One zero that is repeated in the shape of `tensor`; half precision as float32, which is not copied later."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.zeros((), dtype=dtype, device="cpu").expand(tensor.shape)


def _facts(backbone: Backbone | None, layout: Layout) -> Facts | None:
    if backbone is None:
        return None
    positions = None
    if isinstance(backbone, VitBackbone | TransformerBackbone):
        positions = "DINO's" if getattr(backbone, "dino_positions", False) else "timm's"
    blocks: Any = getattr(backbone.module, "blocks", None)
    heads = getattr(getattr(blocks[0], "attn", None), "num_heads", None) if blocks else None
    return Facts(
        name=backbone.name, architecture=layout.spec.label() if layout.spec else backbone.arch,
        num_parameters=sum(parameter.numel() for parameter in backbone.module.parameters()),
        patch_size=backbone.patch_size, image_size=backbone.image_size,
        embed_dim=getattr(backbone, "embed_dim", None), depth=getattr(backbone, "depth", None), num_heads=heads,
        mean=backbone.mean, std=backbone.std, positions=positions, pretrain_data=backbone.pretrain_data,
        pretrain_epochs=backbone.pretrain_epochs, seed=backbone.seed)


# what the numbers tell -------------------------------------------------------------------------------------------


class _AsLoaded(Mapping[str, Tensor]):
    """Tensors as loading makes them, each at the moment it is asked for, which is counted."""

    def __init__(self, state: Mapping[str, Tensor], count: Callable[[], None]) -> None:
        self._state, self._count = state, count

    def __getitem__(self, name: str) -> Tensor:
        self._count()
        return as_float32(self._state[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def _read_numbers(found: list[_UnreadNetwork], progress: Progress | None) -> tuple[NetworkReport, ...]:
    """The reports with what needs the numbers: the checksum and what is wrong with them."""
    total = sum(len(state) * (2 if report.loads else 1) for report, state in found)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(min(done, total), total)

    reports = []
    for report, state in found:
        tensors = _AsLoaded(state, count)
        verdict = check_numbers(tensors)
        halves = [dtype for dtype in report.dtypes if "float" in dtype and dtype not in ("float32", "float64")]
        rounded = [f"stored in {', '.join(halves)}, half precision or less; loaded as float32"] if halves else []
        reports.append(replace(report, trouble=(*report.trouble, *verdict.trouble, *rounded),
                               weights_sha256=state_sha256(tensors) if report.loads else None,
                               loads=report.loads and verdict.finite))
    return tuple(reports)


def _twins(networks: tuple[NetworkReport, ...]) -> list[str]:
    return [f"{one.network} and {other.network} are identical: saved before the first update, or one is a copy"
            for one, other in combinations(networks, 2)
            if one.weights_sha256 is not None and one.weights_sha256 == other.weights_sha256]


def _kind(weights: WeightsFile) -> str:
    if weights.kind == "safetensors":
        return "safetensors"
    return "torch zip" if zipfile.is_zipfile(weights.path) else "torch legacy"


def _whole_or_none(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _command(source: _InspectedFile, networks: tuple[NetworkReport, ...], default: str | None,
             chosen: str | None) -> str | None:
    """What evaluates the chosen network; where one has to be named, the first that can be."""
    usable = [report.network for report in networks if report.loads and chosen in (None, report.network)]
    if not usable:
        return None
    network = f"#{usable[0]}" if usable[0] != default else ""
    options = f"?{urlencode(source.options, safe=',')}" if source.options else ""
    return command("eval", "knn", source.place + network + options, "--data", "DIR")
