"""model.onnx: normalized images in, one vector per image out, for onnxruntime and its like."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from patchssl.export.source import ExportSource, Format, Written, require_close, sample_images
from patchssl.models.backbone import Backbone
from patchssl.runtime.errors import CheckpointError

ONNX_FILE = "model.onnx"
ONNX_WEIGHTS = f"{ONNX_FILE}.data"  # beside it, where a network is too large for one file
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_LARGEST_BYTES = 1_900_000_000  # one file of ONNX ends at 2 GiB
_CLOSE = 1e-4


class _FeatureNetwork(nn.Module):
    """A backbone whose forward pass gives one vector per image."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, D)."""
        return self.backbone.features(image)


def obstacle(_source: ExportSource) -> str | None:
    """Which packages are missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    return f"it needs {', '.join(missing)}: pip install 'patchssl[onnx]'" if missing else None


def write(source: ExportSource, folder: Path) -> Written:
    """Write model.onnx: image (batch, 3, S, S) to embedding (batch, D); onnxruntime has to give the same."""
    import onnx

    backbone, path = source.backbone, folder / ONNX_FILE
    images = sample_images(2, backbone.image_size, backbone.image_size)
    large = sum(tensor.nbytes for tensor in backbone.module.state_dict().values()) > _LARGEST_BYTES
    with _quiet("onnxscript", "onnx_ir", "torch.onnx"):
        torch.onnx.export(_FeatureNetwork(backbone).eval(), (images,), path, dynamo=True, verbose=False,
                          external_data=large,
                          input_names=["image"], output_names=["embedding"], dynamic_shapes=({0: "batch"},))
    _label(path, backbone)
    onnx.checker.check_model(str(path))
    return Written(_difference(path, backbone))


def _label(path: Path, backbone: Backbone) -> None:
    """Put in what the file still says when parted from its card; take out torch's notes, which name local paths."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    numbers = {"mean": backbone.mean, "std": backbone.std}
    facts = {name: " ".join(map(str, values)) for name, values in numbers.items()}
    onnx.helper.set_model_props(model, {"name": backbone.name, "weights_sha256": backbone.weights_sha256, **facts})
    onnx.save(model, path)


def _difference(path: Path, backbone: Backbone) -> float:
    """How far onnxruntime is off, on one image and on three."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.log_severity_level = 3  # errors
    session = InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    if not isinstance(session.get_inputs()[0].shape[0], str):
        raise CheckpointError(f"{ONNX_FILE} would take one number of images only: torch could not follow the network's "
                              "code; leave the format onnx out")
    off = 0.0
    for count in (1, 3):
        images = sample_images(count, backbone.image_size, backbone.image_size)
        found = torch.from_numpy(session.run(["embedding"], {"image": images.numpy()})[0])
        off = max(off, require_close(found, backbone.features(images), _CLOSE, ONNX_FILE))
    return off


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Only errors from the loggers `names`: torch's export tells of every step it takes."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


ONNX = Format(obstacle, write)
