"""What images have in common with their nearest neighbors, on the textures of 64 px: CSV, a line per run.

    python results/shared_by_neighbors.py studies/textures/runs/dino-0 studies/textures/runs/pwself-0 ...

The share of an attribute's variance that the 20 nearest neighbors of a test image (cosine of features, protocol
`native`) have in common with it: 1 - mean squared difference to them / mean squared difference to all. 0 is chance.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchssl.data.open import open_images
from patchssl.eval.features import extract_features
from patchssl.eval.protocols import knn_protocol
from patchssl.models.load import load_backbone

NEIGHBORS = 20


def attributes(images: Tensor) -> dict[str, Tensor]:
    """Of images (N, 3, S, S) in [0, 1]: mean color (N, 3), spatial frequency (N, 1) and orientation (N, 2).

    Frequency: logarithm of the mean frequency, by power, of the gray image without its mean. Orientation: mean cosine
    and sine of twice the angle of a frequency, by power.
    """
    gray = images.mean(1)
    power = torch.fft.rfft2(gray - gray.mean((1, 2), keepdim=True)).abs() ** 2
    rows, columns = torch.fft.fftfreq(gray.shape[1])[:, None], torch.fft.rfftfreq(gray.shape[2])[None]
    angle = 2 * torch.atan2(rows.expand(power.shape[1:]), columns.expand(power.shape[1:]))

    def mean(of: Tensor) -> Tensor:
        return (power * of).sum((1, 2)) / power.sum((1, 2))

    return {"mean color": images.mean((2, 3)), "frequency": mean(torch.hypot(rows, columns)).log()[:, None],
            "orientation": torch.stack([mean(angle.cos()), mean(angle.sin())], dim=1)}


def shared(features: Tensor, values: Tensor) -> float:
    """Share of the variance of `values` (N, K) that the nearest neighbors by `features` (N, D) have in common."""
    unit = F.normalize(features, dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-2).topk(NEIGHBORS).indices
    near = ((values[:, None] - values[nearest]) ** 2).sum(-1).mean()
    return 1 - float(near / torch.cdist(values, values).square().mean())


def main() -> None:
    images = open_images("textures-64", "val")
    pixels = torch.from_numpy(np.stack([images.pixels(index) for index in range(len(images))]))
    values = attributes(pixels.permute(0, 3, 1, 2) / 255)
    lines = csv.writer(sys.stdout, lineterminator="\n")
    lines.writerow(["run", *values])
    for run in sys.argv[1:]:
        backbone = load_backbone(run, "cpu")
        features = extract_features(backbone, images, knn_protocol(None, backbone.image_size))
        lines.writerow([Path(run).name, *(f"{shared(features, each):.3f}" for each in values.values())])


if __name__ == "__main__":
    main()
