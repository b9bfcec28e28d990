"""What is exported, and how files that were written are compared with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from patchssl.models.backbone import Backbone, ConvolutionalBackbone, TransformerBackbone, VitBackbone
from patchssl.models.checkpoint import FORMAT, load_checkpoint
from patchssl.models.load import load_network
from patchssl.models.names import parse_location
from patchssl.models.pretrained import FOLDER_WEIGHTS
from patchssl.models.weights import BARE, WeightsFile, read_weights, weights_in
from patchssl.runtime.errors import CheckpointError

_SCHEMES = ("timm:", "hf-hub:", "random:", "py:")  # of a MODEL that is no path


@dataclass(frozen=True)
class ExportSource:
    """A backbone and, where it came from one, the file that may hold its head and its twin."""

    uri: str
    backbone: Backbone
    file: WeightsFile | None
    network: str  # of `file`

    @property
    def of_run(self) -> bool:
        """Is this a network that patchssl trained, from its own checkpoint?"""
        return self.file is not None and self.file.rest.get("format") == FORMAT

    def require_weights(self, sha256: str, what: str) -> None:
        """CheckpointError unless `sha256` is that of the backbone's weights."""
        if sha256 != self.backbone.weights_sha256:
            raise CheckpointError(f"{what} would hold other weights than {self.uri}: was a new checkpoint saved "
                                  "meanwhile? Nothing was exported, run it again")


class Written(NamedTuple):
    """What was found of a format after writing: the largest difference as a share of the largest feature, and notes."""

    difference: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """One format: why a source cannot be written in it (None: it can), and the function that writes and checks it."""

    obstacle: Callable[[ExportSource], str | None]
    write: Callable[[ExportSource, Path], Written]


def open_source(uri: str) -> ExportSource:
    """The backbone that `uri` names, and its file; raises as `load_backbone` does."""
    backbone = load_network(uri, own_size=True)
    if uri.startswith(_SCHEMES):
        return ExportSource(uri, backbone, None, BARE)
    path, network, _ = parse_location(uri)
    if path.is_dir() and (path / FOLDER_WEIGHTS).is_file():
        return ExportSource(uri, backbone, None, BARE)
    file = weights_in(load_checkpoint(path), path) if path.is_dir() else read_weights(path)
    return ExportSource(uri, backbone, file, file.choose(network))


def sample_images(count: int, height: int, width: int) -> Tensor:
    """Normalized images (count, 3, height, width) of noise, always the same."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def sizes_to_compare(backbone: Backbone) -> list[tuple[int, int]]:
    """Heights and widths: the training size, and others for a network of timm; a user's own may take no other."""
    size, patch = backbone.image_size, backbone.patch_size
    trained = [(size, size)]
    if not isinstance(backbone, VitBackbone | TransformerBackbone | ConvolutionalBackbone):
        return trained
    return [*trained, (size + 2 * patch, size + 2 * patch), (size, size + 3 * patch), (size + patch + 1, size)]


def compare_tokens(found: Backbone, source: ExportSource, sizes: list[tuple[int, int]], most: float,
                   what: str) -> float:
    """`require_close` over all tokens at each of `sizes`."""
    return max(require_close(_tokens(found, *size), _tokens(source.backbone, *size), most, what) for size in sizes)


def _tokens(backbone: Backbone, height: int, width: int) -> Tensor:
    images = sample_images(2, height, width)
    return backbone.tokens(images) if backbone.has_class_token else backbone.patch_tokens(images)


def require_close(found: Tensor, expected: Tensor, most: float, what: str) -> float:
    """The largest difference as a share of the largest value expected; CheckpointError where it is above `most`."""
    if not expected.isfinite().all():
        raise CheckpointError("the network's features are not finite: its weights are broken; nothing was exported")
    if found.shape != expected.shape:
        raise CheckpointError(f"{what} would give {tuple(found.shape)} numbers, the network gives "
                              f"{tuple(expected.shape)}; nothing was exported, please report it")
    off = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not off <= most:
        raise CheckpointError(f"{what} would give features that are off by {off:.1e} of the largest, more than "
                              f"{most:.0e}; nothing was exported, please report it")
    return off


def alone(tensor: Tensor) -> Tensor:
    """`tensor` in memory of its own: a part of a larger one would be saved with all of it."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
