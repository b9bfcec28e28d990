"""Centers and Sinkhorn against the plain formulas and slow references."""

import pytest
import torch

from patchssl.pretrain.centering import EmaCenter, centered, ema_center, sinkhorn, teacher_probs
from patchssl.pretrain.config import HeadConfig
from patchssl.pretrain.head import ProjectionHead

HEAD = HeadConfig(num_prototypes=9, hidden=8, bottleneck=4)


def test_probabilities_by_hand():
    """Logits 0.3 and 0.2 less centers 0.1 and 0.2 at temperature 0.1: 2 against 0."""
    probs = teacher_probs(torch.tensor([[0.3, 0.2]]), torch.tensor([[0.1, 0.2]]), 0.1)
    assert probs.tolist() == [pytest.approx([0.8807971, 0.1192029], rel=1e-5)]  # 1 / (1 + e^-2)


@pytest.mark.parametrize("temp", [0.04, 0.07, 1.0])
@pytest.mark.parametrize("rows", [1, 6])
def test_centering_in_place_equals_the_formula(rows, temp):
    """`rows`: one center for all tokens, or one for each."""
    rng = torch.Generator().manual_seed(0)
    logits, center = torch.randn(6, 11, generator=rng), torch.randn(rows, 11, generator=rng)
    divided = logits / temp
    found = centered(divided, center, temp, divided=True)
    assert found is divided
    torch.testing.assert_close(found, (logits - center) / temp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(centered(logits, center, temp), found, rtol=1e-5, atol=1e-5)


def test_half_precision_is_centered_in_float32():
    assert teacher_probs(torch.zeros(2, 3).bfloat16(), torch.zeros(1, 3), 0.04).dtype == torch.float32


@pytest.mark.parametrize("momentum", [0.9, 0.5])
@pytest.mark.parametrize("num_tokens", [1, 42])
def test_the_center_is_the_moving_mean_of_all_logits(num_tokens, momentum):
    """Training sees bottlenecks only; the plain form all logits, every token projected by itself."""
    torch.manual_seed(0)
    head, center = ProjectionHead(5, HEAD), EmaCenter(9, momentum)
    expected, plain = torch.zeros(9), torch.zeros(9)
    for _ in range(3):
        tokens = torch.randn(num_tokens, 5)
        center.update(head.last_layer, head.bottleneck(tokens).mean(0, keepdim=True))
        logits = torch.stack([head(token) for token in tokens])
        plain = ema_center(plain, logits, momentum)
        expected = momentum * expected + (1 - momentum) * sum(logits) / num_tokens
    for found in (center.value[0], plain):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert expected.abs().max() > 1e-3


def test_center_per_position_keeps_positions_apart():
    torch.manual_seed(0)
    head, center = ProjectionHead(5, HEAD), EmaCenter(9, momentum=0.0, positions=7)
    tokens = torch.randn(6, 7, 5)
    center.update(head.last_layer, head.bottleneck(tokens).mean(0))
    torch.testing.assert_close(center.value, head(tokens).mean(0), rtol=1e-5, atol=1e-6)


def slow_sinkhorn(logits, temperature, iterations=3):
    """SwAV's loop, prototypes x samples, in float64."""
    q = (logits.double() / temperature).exp().T
    k, b = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        for i in range(k):
            q[i] = q[i] / q[i].sum() / k
        for j in range(b):
            q[:, j] = q[:, j] / q[:, j].sum() / b
    return (q * b).T


@pytest.mark.parametrize(("num_tokens", "prototypes", "temp"), [(12, 5, 0.05), (3, 40, 0.1), (1, 4, 0.05)])
def test_sinkhorn_equals_the_slow_loop(num_tokens, prototypes, temp):
    logits = torch.rand(num_tokens, prototypes, generator=torch.Generator().manual_seed(1)) * 2 - 1
    torch.testing.assert_close(sinkhorn(logits, temp).double(), slow_sinkhorn(logits, temp), rtol=1e-4, atol=1e-7)


def test_sinkhorn_uses_all_prototypes_though_all_tokens_prefer_one():
    logits = torch.zeros(64, 4)
    logits[:, 0] = 1.0
    logits += 0.1 * torch.rand(64, 4, generator=torch.Generator().manual_seed(1))
    plain = (logits / 0.05).softmax(-1).mean(0)
    even = sinkhorn(logits, 0.05)
    assert plain[0] > 0.99
    assert even.mean(0).tolist() == pytest.approx([0.25] * 4, abs=0.02)
    torch.testing.assert_close(even.sum(1), torch.ones(64))
