"""Signs of a healthy or a collapsing run, and what to say about them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from patchssl.pretrain.crossentropy import MatchStats
from patchssl.pretrain.pairs import MatchPlan

FEW_TOKENS = 16  # fewer cannot span many dimensions


def entropy(probs: Tensor) -> Tensor:
    """Mean entropy (nats) of the rows of `probs` (..., K)."""
    return torch.special.entr(probs).sum(-1).mean()


def marginal_entropy(probs: Tensor) -> Tensor:
    """Entropy (nats) of the mean of all rows of `probs` (..., K): how many prototypes are in use, as a logarithm."""
    return torch.special.entr(probs.flatten(0, -2).mean(0)).sum()


def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the normalized singular values of centered `features` (B, D).

    Roy and Vetterli, "The effective rank" (EUSIPCO 2007): 1 when all lie on a line, min(B - 1, D) at most.
    """
    values = torch.linalg.svdvals(features.float() - features.float().mean(0))
    shares = values / values.sum().clamp(min=1e-12)
    return torch.special.entr(shares).sum().exp()


def feature_spread(features: Tensor) -> Tensor:
    """Root mean square distance of unit-length `features` (B, D) from their mean: 0 collapsed, near 1 spread out."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    return (unit - unit.mean(0)).square().sum(-1).mean().sqrt()


def class_health(teacher_probs: Tensor, student_logits: Tensor, weight: Tensor,
                 class_term: Tensor) -> dict[str, Tensor]:
    """What class tokens say of the training: entropies (nats) of teacher and student, and how far they are apart.

    `teacher_probs` (B, G, K), `student_logits` (B, V, K) divided by their temperature, `weight` (B, G, V) of each
    pair in the cross-entropy `class_term`. KL(teacher || student) is exact under any weighting.
    """
    entropies = torch.special.entr(teacher_probs).sum(-1)  # (B, G)
    own = (weight.sum(-1) * entropies).sum()
    return {"teacher_entropy": entropies.mean(), "marginal_entropy": marginal_entropy(teacher_probs),
            "student_entropy": entropy(student_logits.float().softmax(-1)),
            "class_kl": (class_term - own) / weight.sum().clamp(min=1e-12)}


def patch_health(stats: MatchStats, plan: MatchPlan, patch_term: Tensor) -> dict[str, Tensor]:
    """The same of patch tokens; 0 where there are no matches. KL is the mean over matches, weighted as the loss."""
    pairs = plan.num_pairs.clamp(min=1e-6)
    kl = (patch_term - stats.matched_entropy / pairs) / (plan.weight.sum() / pairs).clamp(min=1e-12)
    return {"patch_entropy": stats.teacher_entropy, "patch_marginal_entropy": stats.marginal_entropy, "patch_kl": kl}


def collapse_warnings(row: dict[str, Any], num_prototypes: int, *, num_tokens: int = 64,
                      best_rank: float = 0.0) -> dict[str, str]:
    """What a log row says about collapse, in words, by a name for each kind; empty for a healthy one.

    `num_tokens`: class tokens that the rank was taken of, too few of which say nothing; `best_rank`: the highest
    rank of earlier rows. Call it after the learning rate's warm-up: every network starts with uniform targets.
    """
    top, rank = math.log(num_prototypes), row["effective_rank"]
    found = _of_targets(row["teacher_entropy"], row["marginal_entropy"], top, "images")
    if max(row["matched_share_global"], row["matched_share_local"]) > 0:
        found |= _of_targets(row["patch_entropy"], row["patch_marginal_entropy"], top, "patches")
    if (rank < 2 and num_tokens >= FEW_TOKENS) or row["feature_spread"] < 0.05:
        found["collapsed"] = (f"the class tokens hardly differ (effective rank {rank:.1f}, spread "
                              f"{row['feature_spread']:.2f}): the features have collapsed; try "
                              "loss.centering=sinkhorn, a longer loss.patch_warmup_epochs or a lower optim.lr")
    elif rank < best_rank / 3 and num_tokens >= FEW_TOKENS:
        found["falling"] = (f"the effective rank of the class tokens has fallen from {best_rank:.1f} to {rank:.1f}: "
                            "features are collapsing into few dimensions; try a lower optim.lr or loss.patch_weight")
    return found


def _of_targets(mean: float, marginal: float, top: float, of: str) -> dict[str, str]:
    """The two ways in which targets say nothing: the same for all prototypes, or for all images."""
    found = {}
    if mean > 0.98 * top:
        found[f"uniform {of}"] = (f"the teacher's targets of {of} are almost uniform (entropy {mean:.2f} of ln K = "
                                  f"{top:.2f}): nothing is learned; lower loss.teacher_temp or raise optim.lr")
    if marginal < 0.05 * top:
        found[f"equal {of}"] = (f"almost all {of} get the same few prototypes: the network has collapsed; try "
                                "loss.centering=sinkhorn, a lower optim.lr or a lower loss.patch_weight")
    return found
