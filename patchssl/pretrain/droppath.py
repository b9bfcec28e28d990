"""Drop path whose draws come with the sample, so that they depend on no rank, worker or step before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def drop_path(x: Tensor, draws: Tensor, rate: float) -> Tensor:
    """Rows of `x` (B, ...) with a draw (B,) in [0, 1) below `rate` become 0, the others are divided by 1 - rate."""
    keep = (draws >= rate).to(x.dtype) / (1 - rate)
    return x * keep.view(-1, *[1] * (x.ndim - 1))


class SampledDropPath(nn.Module):
    """Applies `drop_path` with the draws that `set_drop_path_draws` left here; the identity in evaluation."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.draws: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        if self.draws is None or len(self.draws) != len(x):
            raise RuntimeError("drop path has no draws for this batch: call set_drop_path_draws first")
        return drop_path(x, self.draws, self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def use_sampled_drop_path(vit: Any, rate: float) -> int:
    """Put `SampledDropPath` in both branches of every block, linear in depth as timm's; returns how many."""
    rates = torch.linspace(0, rate, len(vit.blocks)).tolist()
    for block, block_rate in zip(vit.blocks, rates, strict=True):
        block.drop_path1, block.drop_path2 = SampledDropPath(block_rate), SampledDropPath(block_rate)
    return 2 * len(rates)


def set_drop_path_draws(network: nn.Module, draws: Tensor) -> None:
    """Hand the columns of `draws` (B, places) to the network's places, in order of depth."""
    places = [module for module in network.modules() if isinstance(module, SampledDropPath)]
    for place, column in zip(places, draws.unbind(1), strict=True):
        place.draws = column
