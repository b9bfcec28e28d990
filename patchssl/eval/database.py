"""Vectors to search in, taken a block at a time, so that nothing near their own size is ever held beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchssl.runtime.errors import DataError

Features = Tensor | np.ndarray
Told = Callable[[int], None]  # is told how many vectors or queries more are done
Nearest = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # queries, a block -> similarities and rows of the block
_BLOCK_BYTES = 2**26  # of a database, at a time
_CHECKED_AT_A_TIME = 2048
_LEAST_NORM = 1e-12  # F.normalize divides by no less


@dataclass(frozen=True)
class Database:
    """Vectors (N, D) float32; with `cosine` each row counts as divided by its L2 norm."""

    vectors: Tensor
    cosine: bool = False

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dimensions(self) -> int:
        return self.vectors.shape[1]

    def rows(self, which: slice | Tensor) -> Tensor:
        """The vectors at `which`, divided by their norms under `cosine`; else perhaps a view."""
        rows = self.vectors[which]
        return F.normalize(rows) if self.cosine else rows

    def blocks(self, num_rows: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """All vectors in blocks of `num_rows` (default: 64 MiB), each after the index of its first row."""
        step = num_rows or max(1, _BLOCK_BYTES // (4 * self.dimensions))
        for start in range(0, len(self), step):
            yield start, self.rows(slice(start, start + step))

    def to(self, device: torch.device) -> Database:
        """All vectors on `device`, divided there already."""
        if self.vectors.device == device:
            return self
        moved = torch.empty(self.vectors.shape, device=device)
        for start, block in self.blocks():
            moved[start : start + len(block)] = block
        return Database(moved)


def nearest_by_blocks(database: Database, queries: Tensor, k: int, nearest: Nearest,
                      told: Told) -> tuple[Tensor, Tensor]:
    """The `k` most similar rows of `database`, as `nearest` finds them in each block: (Q, k) on the CPU.

    Every block is read, and its rows divided, once for all `queries` (Q, D); `told` counts queries, in shares of the
    database. Needs (Q, 2k) beside the result.
    """
    best, ids, counted = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64), 0
    for start, block in database.blocks():
        similarities, rows = nearest(queries, block)
        best, ids = torch.cat([best, similarities], dim=1), torch.cat([ids, rows + start], dim=1)
        if best.shape[1] > k:
            best, places = best.topk(k, dim=1)
            ids = ids.gather(1, places)
        done = len(queries) * (start + len(block)) // len(database)
        told(done - counted)
        counted = done
    return best, ids


def as_features(features: Features, what: str) -> Tensor:
    """`features` as (N, D) float32, contiguous; DataError, naming them `what`, where empty or not finite."""
    try:  # numpy knows what torch does not: negative strides, other orders of bytes
        plain = features if isinstance(features, Tensor) else np.ascontiguousarray(features, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"the {what} features are no numbers: {error}") from None
    tensor = torch.as_tensor(plain).detach().to(torch.float32).contiguous()
    if tensor.ndim != 2 or not tensor.numel():
        shape = tuple(tensor.shape)
        raise DataError(f"the {what} features have the shape {shape}; (images, dimensions) is needed")
    finite = torch.empty(len(tensor), dtype=torch.bool)  # a list of parts would keep the heap between them
    for part, found in zip(tensor.split(_CHECKED_AT_A_TIME), finite.split(_CHECKED_AT_A_TIME), strict=True):
        found.copy_(torch.isfinite(part).all(dim=1))
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise DataError(f"{len(bad)} of the {len(tensor)} {what} features hold NaN or infinity, first in row {bad[0]}")
    return tensor


def require_norms(features: Tensor, what: str) -> None:
    """DataError, naming `features` (N, D) float32 `what`, where they cannot be brought to the length 1."""
    norms = torch.linalg.vector_norm(features, dim=1)
    bad = ~torch.isfinite(norms)
    small = (norms < _LEAST_NORM).nonzero().flatten()
    bad[small] = (features[small] != 0).any(dim=1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise DataError(f"{int(bad.sum()):,} of the {len(features):,} {what} cannot be normalized, first in row {row}, "
                        f"whose largest number is {float(features[row].abs().max()):.1e}: their length is beyond "
                        "float32; multiply all features by one constant, which changes no cosine")
