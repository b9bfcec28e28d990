"""Whitening: features are centered, turned to their principal axes and scaled to unit variance there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from patchssl.eval.database import as_features
from patchssl.runtime.errors import DataError, UsageError, unknown_choice
from patchssl.runtime.progress import Progress

RULES = ("dino", "pca")
_ROWS = 1024  # of features in double precision at a time
_DINO_FLOOR = 1e-5  # of the largest eigenvalue
_NO_VARIANCE = 1e-12  # of the largest eigenvalue: what float32 features leave by rounding

AnyFeatures = TypeVar("AnyFeatures", Tensor, np.ndarray)


@dataclass(frozen=True, eq=False)
class Whitening:
    """x -> `matrix` (x - `mean`): `mean` (D,) and `matrix` (dims, D), float32, axes by falling variance."""

    rule: str
    mean: Tensor
    matrix: Tensor

    @classmethod
    def fit(
        cls,
        features: Tensor | np.ndarray,
        rule: str = "dino",
        *,
        dims: int | None = None,
        progress: Progress | None = None,
    ) -> Whitening:
        """Learn it from `features` (N, D), keeping the first `dims` axes (default: all D).

        `dino`: as facebookresearch/dino, eval_copy_detection.py and utils.PCA: the mean is removed from what
        is whitened, but the axes are those of the *uncentered* features, with eigenvalues of at least 1e-5 of
        the largest. `pca`: axes of the centered features, as FAISS's "PCAW<dims>" but for a common factor.
        Computed in double precision; `progress` counts rows. DataError for NaN, for fewer images than
        dimensions and for kept axes without variance (under `dino`: for none with any).
        """
        if rule not in RULES:
            raise UsageError(unknown_choice("whitening rule", rule, RULES))
        rows = as_features(features, "whitening").cpu()
        count, width = rows.shape
        kept = width if dims is None else dims
        if not 1 <= kept <= width:
            raise UsageError(f"whitening to {kept} dimensions was asked for; the features have {width}")
        if count < width:
            raise DataError(
                f"{count:,} whitening images are too few for features of {width:,} dimensions: at least {width:,} "
                "are needed, ten times as many are better; or evaluate without whitening"
            )
        mean = rows.mean(dim=0, dtype=torch.float64)
        covariance = _second_moment(rows, mean if rule == "pca" else torch.zeros_like(mean), progress)
        values, axes = (part.flip(-1) for part in torch.linalg.eigh(covariance))
        _require_variance(values, kept if rule == "pca" else 1, count)
        scales = values[:kept].clamp(min=values[0] * _DINO_FLOOR if rule == "dino" else 0).rsqrt()
        return cls(rule, mean.float(), (axes[:, :kept] * scales).T.float().contiguous())

    def apply(self, features: AnyFeatures) -> AnyFeatures:
        """`features` (N, D) -> (N, dims) float32, an array or a tensor as given; DataError for NaN or another D.

        They are not L2-normalized afterwards.
        """
        rows = as_features(features, "given")
        dims, width = self.matrix.shape
        if rows.shape[1] != width:
            raise DataError(
                f"features of {rows.shape[1]} dimensions cannot be whitened as those of {width}; both must come "
                "from one network and one pooling"
            )
        white, mean, matrix = rows.new_empty(len(rows), dims), self.mean.to(rows.device), self.matrix.to(rows.device)
        for start in range(0, len(rows), _ROWS):
            torch.mm(rows[start : start + _ROWS] - mean, matrix.T, out=white[start : start + _ROWS])
        return white.numpy() if isinstance(features, np.ndarray) else white


def _second_moment(rows: Tensor, center: Tensor, progress: Progress | None) -> Tensor:
    """Mean of (x - center)(x - center)^T over `rows` (N, D): (D, D) float64."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for start in range(0, len(rows), _ROWS):
        block = rows[start : start + _ROWS].double() - center
        total.addmm_(block.T, block)
        if progress is not None:
            progress(start + len(block), len(rows))
    return total / len(rows)


def _require_variance(values: Tensor, kept: int, count: int) -> None:
    """DataError unless the first `kept` of the eigenvalues, in falling order, are more than rounding."""
    alive = int((values > values[0].clamp(min=0) * _NO_VARIANCE).sum())
    if alive < kept:
        raise DataError(
            f"the {count:,} whitening images vary along {alive} of {len(values)} dimensions, and scaling the "
            f"other ones to unit variance would blow up noise: give more and different images, or keep at most "
            f"{alive} dimensions"
        )
