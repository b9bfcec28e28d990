"""Patch matching beside its peers: time, and how often a rule is right."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchssl.bench.timing import Candidate, machine, median_times, tensor_memory
from patchssl.views.config import ViewConfig
from patchssl.views.crops import draw_views, sample_rng
from patchssl.views.geometry import Crops, View, patch_at, patch_centers, patches_per_side
from patchssl.views.matching import RULES, match_crops, match_patches

PATCH_SIZES = (32, 16, 8)
EMBED_DIM = 384  # ViT-S, for the tokens of similarity matching


def bench_matching(num_images: int = 64, repeats: int = 20, num_pairs: int = 6000) -> dict[str, Any]:
    """Milliseconds to match all 18 pairs of 2 x 224 and 8 x 96 px views of a batch, and the peers' time.

    Peers, timed on an eighth of the batch and scaled up: `match_patches` called pair by pair, and similarity
    matching (each student token takes the teacher token of greatest cosine; random tokens of 384 numbers, the
    network that would make them not counted). "MiB" are the tensors a call makes, at their most, the peers'
    scaled up as their time, though nothing keeps them from going image by image. "quality" is `rule_quality`
    over `num_pairs` pairs.
    """
    views = _drawn(num_images, ViewConfig())
    times: dict[str, dict[str, float]] = {}
    memory: dict[str, dict[str, float]] = {}
    for patch_size in PATCH_SIZES:
        candidates = _matching_candidates(views, patch_size)
        memory[f"patch {patch_size}"] = {name: tensor_memory(partial(candidate.run, 0)) * num_images / candidate.units
                                         for name, candidate in candidates.items() if name != "pair by pair"}
        times[f"patch {patch_size}"] = {name: 1e3 * num_images * seconds
                                        for name, seconds in median_times(candidates, repeats).items()}
    return {
        "what": f"matching all 18 pairs of views (2 x 224 + 8 x 96 px) of {num_images} images on one thread",
        "milliseconds": times,
        "MiB": memory,
        "patches of a global view": {f"patch {p}": patches_per_side(224, p) ** 2 for p in PATCH_SIZES},
        "times faster than": {name: {size: row[name] / row["center"] for size, row in times.items()}
                              for name in ("pair by pair", "similarity")},
        "growth from patch 32 to 8": {name: times["patch 8"][name] / times["patch 32"][name]
                                      for name in times["patch 8"]},
        "quality": {rule: rule_quality(rule, num_pairs) for rule in RULES},
        "repeats": repeats,
        "machine": machine(),
    }


def rule_quality(rule: str, num_pairs: int = 6000, seed: int = 0) -> dict[str, float]:
    """How well `rule` finds the teacher patch that holds a student patch's center, over random pairs.

    A global 224 px and a local 96 px view of a 500 x 375 image, patches of 16 px. "exact": share of matches
    whose teacher patch contains the center; "off by more than a patch": share whose two centers are more than
    one teacher patch apart in height or in width; "matches": how many there are per pair.
    """
    config = ViewConfig(num_global=1, num_local=1)
    teacher, student = (Crops.of(side) for side in zip(*_drawn(num_pairs, config, seed), strict=True))
    found = match_crops(teacher, student, 16, rule)
    image, patch = (found >= 0).nonzero(as_tuple=True)
    matched = found[image, patch]
    y, x = patch_centers(student, 16)
    exact = patch_at(teacher, y, x, 16)[image, patch] == matched
    teacher_y, teacher_x = patch_centers(teacher, 16)
    patch_height, patch_width = teacher.boxes.T[2:] / patches_per_side(224, 16)
    rows = (y[image, patch] - teacher_y[image, matched]).abs() / patch_height[image]
    columns = (x[image, patch] - teacher_x[image, matched]).abs() / patch_width[image]
    return {"exact": float(exact.double().mean()),
            "off by more than a patch": float((torch.maximum(rows, columns) > 1).double().mean()),
            "matches": len(image) / num_pairs}


def _drawn(num_images: int, config: ViewConfig, seed: int = 0) -> list[list[View]]:
    """Views of that many images of 500 x 375 pixels."""
    return [draw_views(sample_rng(seed, 0, index, "crops"), 375, 500, config) for index in range(num_images)]


def _matching_candidates(views: Sequence[Sequence[View]], patch_size: int) -> dict[str, Candidate]:
    """Every rule on the whole batch, the peers on an eighth of it."""
    teacher = _batch_crops([image[:2] for image in views])
    local = _batch_crops([image[2:] for image in views])
    other = Crops(teacher.boxes.flip(1), teacher.mirrored.flip(1), teacher.size)
    rows = Crops(teacher.boxes[:, :, None], teacher.mirrored[:, :, None], teacher.size)
    columns = Crops(local.boxes[:, None], local.mirrored[:, None], local.size)

    def batched(rule: str, turn: int) -> tuple[Tensor, Tensor]:
        return match_crops(teacher, other, patch_size, rule), match_crops(rows, columns, patch_size, rule)

    few = views[:max(1, len(views) // 8)]
    tokens = _random_tokens(len(few), patch_size)
    return {**{rule: Candidate(partial(batched, rule), len(views)) for rule in RULES},
            "pair by pair": Candidate(lambda turn: _pair_by_pair(few, patch_size), len(few)),
            "similarity": Candidate(lambda turn: _similarity(*tokens), len(few))}


def _batch_crops(views: Sequence[Sequence[View]]) -> Crops:
    """V crops of each of B images, boxes (B, V, 4)."""
    flat = Crops.of([view for image in views for view in image])
    shape = (len(views), len(views[0]))
    return Crops(flat.boxes.view(*shape, 4), flat.mirrored.view(shape), flat.size)


def _pair_by_pair(views: Sequence[Sequence[View]], patch_size: int) -> None:
    for image in views:
        for teacher in image[:2]:
            for student in image:
                if student is not teacher:
                    match_patches(teacher, student, patch_size)


def _random_tokens(num_images: int, patch_size: int) -> tuple[Tensor, Tensor]:
    """Normalized tokens (B, 2, N, D) of global and (B, 8, n, D) of local views."""
    generator = torch.Generator().manual_seed(0)
    counts = [(2, patches_per_side(224, patch_size) ** 2), (8, patches_per_side(96, patch_size) ** 2)]
    tokens = [torch.randn(num_images, *count, EMBED_DIM, generator=generator) for count in counts]
    return F.normalize(tokens[0], dim=-1), F.normalize(tokens[1], dim=-1)


def _similarity(teacher: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher token of greatest cosine for each student token of all 18 pairs of each image."""
    def nearest(student: Tensor, teacher: Tensor) -> Tensor:
        return (student @ teacher.mT).argmax(-1)

    return nearest(teacher.flip(1), teacher), nearest(local[:, None].flatten(2, 3), teacher)
