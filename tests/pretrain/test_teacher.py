"""EMA, centers and Sinkhorn against slow references."""

import copy

import pytest
import torch
from torch import nn

from patchssl.pretrain.centering import EmaCenter, sinkhorn
from patchssl.pretrain.config import HeadConfig
from patchssl.pretrain.head import ProjectionHead
from patchssl.pretrain.teacher import make_teacher, update_teacher

HEAD = HeadConfig(num_prototypes=9, hidden=8, bottleneck=4)


def test_teacher_moves_towards_the_student():
    student = nn.Linear(2, 2)
    teacher = make_teacher(student)
    before = copy.deepcopy(teacher.weight)
    student.weight.data += 1.0
    update_teacher(teacher, student, momentum=0.9)
    torch.testing.assert_close(teacher.weight, before + 0.1)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_center_is_the_moving_mean_of_all_logits():
    torch.manual_seed(0)
    head, center = ProjectionHead(5, HEAD), EmaCenter(9, momentum=0.9)
    expected = torch.zeros(9)
    for _ in range(3):
        tokens = torch.randn(6, 7, 5)
        center.update(head.last_layer, head.bottleneck(tokens).flatten(0, 1).mean(0, keepdim=True))
        logits = torch.stack([head(token) for token in tokens.flatten(0, 1)])  # every token projected, one by one
        expected = 0.9 * expected + 0.1 * logits.mean(0)
    torch.testing.assert_close(center.value, expected[None], rtol=1e-5, atol=1e-6)


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


def test_sinkhorn_equals_the_slow_loop():
    logits = torch.rand(12, 5, generator=torch.Generator().manual_seed(1)) * 2 - 1
    torch.testing.assert_close(sinkhorn(logits, 0.05).double(), slow_sinkhorn(logits, 0.05), rtol=1e-4, atol=1e-7)


def test_sinkhorn_uses_all_prototypes_though_all_tokens_prefer_one():
    logits = torch.zeros(64, 4)
    logits[:, 0] = 1.0
    logits += 0.1 * torch.rand(64, 4, generator=torch.Generator().manual_seed(1))
    plain = (logits / 0.05).softmax(-1).mean(0)
    even = sinkhorn(logits, 0.05)
    assert plain[0] > 0.99
    assert even.mean(0).tolist() == pytest.approx([0.25] * 4, abs=0.02)
    torch.testing.assert_close(even.sum(1), torch.ones(64))
