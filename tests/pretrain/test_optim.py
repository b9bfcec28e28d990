"""Parameter groups and clipping against slow loops."""

import pytest
import torch
from torch import nn

from patchssl.pretrain.optim import clip_per_parameter, make_optimizer, set_step_values
from patchssl.pretrain.schedules import StepValues


def with_gradients(*grads):
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    return parameters


def test_each_tensor_is_clipped_by_itself():
    parameters = with_gradients(torch.tensor([3.0, 4.0]), torch.tensor([[0.3, 0.4]]), torch.zeros(2))
    norm = clip_per_parameter(parameters, max_norm=1.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)
    torch.testing.assert_close(parameters[1].grad, torch.tensor([[0.3, 0.4]]))
    assert torch.equal(parameters[2].grad, torch.zeros(2))
    assert float(norm) == pytest.approx((25 + 0.25) ** 0.5)


def test_zero_switches_clipping_off():
    parameters = with_gradients(torch.tensor([3.0, 4.0]))
    clip_per_parameter(parameters, max_norm=0)
    assert parameters[0].grad.tolist() == [3.0, 4.0]


def test_a_parameter_without_gradient_is_left_alone():
    parameters = [nn.Parameter(torch.ones(2)), *with_gradients(torch.tensor([30.0]))]
    assert float(clip_per_parameter(parameters, 3.0)) == 30.0
    assert parameters[0].grad is None


def test_a_loss_summed_over_images_moves_weights_as_its_mean_clipped_at_less():
    """What `lambda-sum` says of the authors' sum over the 4 images of a GPU: 3 / 4 in place of a clip_grad of 3."""
    rng, ends, reached = torch.Generator().manual_seed(0), [], 0
    grads = [[scale * torch.randn(3, 2, generator=rng), 0.1 * torch.randn(3, generator=rng)]
             for scale in (0.1, 2.0, 0.5, 0.2, 1.0)]
    for images, clip in ((4, 3.0), (1, 3.0 / 4), (1, 3.0)):
        model = nn.Linear(2, 3)
        model.weight.data.fill_(1.0)
        model.bias.data.fill_(1.0)
        optimizer = make_optimizer(model, torch.device("cpu"))
        set_step_values(optimizer, StepValues(0.1, 0.5, 0.99, 0.04, 0.04, 1.0, False, False))
        for of_step in grads:
            for p, grad in zip(model.parameters(), of_step, strict=True):
                p.grad = images * grad
                reached += images == 4 and p.grad.norm() > clip
            clip_per_parameter(model.parameters(), clip)
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert 1 < reached < 5  # clipped at some steps, which is what a scale of the loss changes
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)
    assert (ends[0] - ends[2]).abs().max() > 0.01


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    model[0].weight.data.fill_(1.0)
    optimizer = make_optimizer(model, torch.device("cpu"))
    set_step_values(optimizer, StepValues(0.1, 0.5, 0.99, 0.04, 0.04, 1.0, False, False))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.data, torch.full((2, 3), 1 - 0.1 * 0.5))
    assert torch.equal(model[1].weight.data, torch.ones(2))


def test_frozen_parameters_are_not_optimized():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optimizer = make_optimizer(model, torch.device("cpu"))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 1
