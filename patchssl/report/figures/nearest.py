"""Matches that a network finds itself: patches whose tokens are each other's nearest, and how many are right.

Where the patches lie in one image is known for two views of it; they are cut and judged as patch correspondence
does, so that the shares are those of its record.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchssl.eval.patches import count_hits, draw_views, nearest_tokens, patches_protocol, view_tokens, with_patches
from patchssl.models.backbone import Backbone
from patchssl.runtime.errors import PatchSSLError, UsageError
from patchssl.views.geometry import Crops, View, patches_per_side
from patchssl.views.matching import match_crops

WRONG, NEIGHBOR, RIGHT = range(3)


class TokenMatches(NamedTuple):
    """M matched patches of two images, the most similar first: ids (M,) int64 and cosines (M,) in [-1, 1]."""

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray


class MatchedViews(NamedTuple):
    """Two views of one image and the matches that a network finds between them."""

    views: tuple[View, View]  # wide and close
    pixels: tuple[np.ndarray, np.ndarray]  # (S, S, 3) uint8 each
    matches: TokenMatches
    verdicts: np.ndarray  # (M,) WRONG, NEIGHBOR or RIGHT
    exact: float  # share of all patches, in both directions, that find the right one by their nearest token
    within1: float  # or a neighbor of it; NaN, both, for views that share no patch
    num_patches: int  # of which these are shares


def mutual_matches(first: Tensor, second: Tensor) -> TokenMatches:
    """Of tokens (N, D) and (M, D) those that are each other's nearest by cosine; PatchSSLError for NaN or infinity.

    Equal tokens: the lower id is the nearest, and comes first.
    """
    if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise PatchSSLError("tokens that hold NaN or infinity have no nearest ones: the weights are damaged or "
                            "the training diverged")
    there, back = (nearest_tokens(a[None], b[None])[0] for a, b in ((first, second), (second, first)))
    own = torch.arange(len(there), device=there.device)
    kept = own[back[there] == own]
    cosine = F.cosine_similarity(first[kept].double(), second[there[kept]].double(), dim=-1)
    order = torch.argsort(cosine, descending=True, stable=True)
    return TokenMatches(*(part[order].cpu().numpy() for part in (kept, there[kept], cosine)))


@torch.inference_mode()
def match_views(backbone: Backbone, pixels: np.ndarray, name: str, *, seed: int = 0) -> MatchedViews:
    """The views that `eval patches` cuts of an image (H, W, 3) uint8 its set calls `name`, matched by `backbone`."""
    network = with_patches(backbone)
    settings = patches_protocol(network, seed=seed).settings
    views, cut = draw_views(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), name, settings)
    side = patches_per_side(settings["view_size"], network.patch_size)
    tokens = view_tokens(network, cut.to(network.device), side).cpu()
    matches = mutual_matches(tokens[0], tokens[1])
    wide, close = (Crops.of([view]) for view in views)
    # [0]: in which patch of the close view the center of each patch of the wide one lies, -1 for none; [1]: the reverse
    right = [match_crops(known, asked, network.patch_size, "center")
             for known, asked in ((close, wide), (wide, close))]
    hits = [count_hits(nearest_tokens(tokens[None, query], tokens[None, 1 - query]), right[query], side)
            for query in (0, 1)]
    total = sum(int((ids >= 0).sum()) for ids in right)
    exact, within1 = (sum(int(counts[kind]) for counts in hits) / total if total else np.nan for kind in (0, 1))
    seen = tuple(view.permute(1, 2, 0).numpy() for view in cut)
    return MatchedViews((views[0], views[1]), (seen[0], seen[1]), matches, _verdicts(matches, right, side), exact,
                        within1, total)


def _verdicts(matches: TokenMatches, right: list[Tensor], side: int) -> np.ndarray:
    """(M,) what geometry says of each match, in the direction that speaks better for it."""
    verdicts = np.full(len(matches.first), WRONG)
    for ids, found, asked in ((right[0], matches.second, matches.first), (right[1], matches.first, matches.second)):
        single = torch.from_numpy(found)[:, None], ids[0][torch.from_numpy(asked)][:, None]
        exact, near = (hits.numpy() for hits in count_hits(*single, side))
        verdicts = np.maximum(verdicts, np.where(exact > 0, RIGHT, np.where(near > 0, NEIGHBOR, WRONG)))
    return verdicts


def match_images(first: np.ndarray, second: np.ndarray) -> TokenMatches:
    """Matches of two maps of patch tokens (rows, columns, D), of one network; ids are row-major."""
    if first.shape[-1] != second.shape[-1]:
        raise UsageError(f"tokens of {first.shape[-1]} and {second.shape[-1]} channels cannot be compared")
    return mutual_matches(*(torch.from_numpy(tokens.reshape(-1, tokens.shape[-1])) for tokens in (first, second)))
