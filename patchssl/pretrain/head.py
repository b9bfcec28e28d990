"""The projection head: tokens to logits over prototypes (DINO, arXiv 2104.14294, appendix C)."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchssl.pretrain.config import HeadConfig


class ProjectionHead(nn.Module):
    """MLP with GELU to an L2-normalized bottleneck, then weight-normalized prototypes without bias.

    Patch tokens meet the same prototypes as class tokens, or with `shared: false` prototypes of their own behind the
    same MLP: iBOT's `last_layer2` (arXiv 2111.07832; bytedance/ibot, models/head.py).
    """

    def __init__(self, in_dim: int, config: HeadConfig) -> None:
        super().__init__()
        widths = [in_dim, *[config.hidden] * (config.layers - 1), config.bottleneck]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            layers += [nn.GELU()] if i else []
            layers.append(nn.Linear(before, after))
        self.mlp = nn.Sequential(*layers)
        self.last_layer = Prototypes(config.bottleneck, config.num_prototypes, norm=config.norm_last_layer)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer2 = None if config.shared else Prototypes(config.bottleneck, config.num_prototypes,
                                                                 norm=config.norm_last_layer)

    @property
    def patch_layer(self) -> Prototypes:
        """The prototypes of patch tokens."""
        return self.last_layer if self.last_layer2 is None else self.last_layer2

    def bottleneck(self, tokens: Tensor) -> Tensor:
        """Unit vectors (..., bottleneck) of tokens (..., D)."""
        return F.normalize(self.mlp(tokens), dim=-1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (..., K) of class tokens (..., D)."""
        return self.last_layer(self.bottleneck(tokens))


class Prototypes(nn.Module):
    """Linear map without bias whose rows are directions times a length (length 1 and fixed with `norm`).

    Parameters are named as torch's classic `weight_norm` names them, as in DINO's files.
    """

    def __init__(self, bottleneck: int, num_prototypes: int, *, norm: bool) -> None:
        super().__init__()
        self.num_prototypes = num_prototypes
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=not norm)
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, bottleneck))
        nn.init.kaiming_uniform_(self.weight_v, a=5**0.5)  # nn.Linear's own start

    def rows(self) -> Tensor:
        """The prototypes (K, bottleneck) themselves: directions times lengths."""
        return F.normalize(self.weight_v, dim=1) * self.weight_g

    def forward(self, bottleneck: Tensor) -> Tensor:
        """Logits (..., K) of unit vectors (..., bottleneck)."""
        return F.linear(bottleneck, self.rows())
