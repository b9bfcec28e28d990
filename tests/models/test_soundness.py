"""Each sign of trouble in numbers planted by hand and found, and networks before and after a little training."""

import pytest
import timm
import torch
from cases import each

from patchssl.models.networks import NetworkSpec, build_vit
from patchssl.models.soundness import Extent, check_numbers, extent_of

SMALL = NetworkSpec(arch="vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)


def drawn():
    """Tensors of no network in particular, none of them suspicious."""
    generator = torch.Generator().manual_seed(0)
    names = {"blocks.0.fc.weight": (8, 4), "norm.weight": (8,), "norm.bias": (8,), "pos_embed": (1, 5, 8)}
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}


def test_what_is_measured_of_a_tensor():
    tensor = torch.tensor([[-3.0, 1.0], [2.0, 4.0]])
    found = extent_of("blocks.3.fc.weight", tensor)
    assert found[:4] == (-3.0, 4.0, 2, 4)
    assert found.deviation == pytest.approx((26 / 3) ** 0.5)  # squares of -4, 0, 1, 3 over n - 1
    assert extent_of("head.weight", tensor) == (-3.0, 4.0, 2, 4, None)
    assert extent_of("blocks.3.fc.bias", tensor[0]).deviation is None
    assert extent_of("num_batches_tracked", torch.tensor(3)) is None
    assert extent_of("empty.weight", torch.ones(0, 3)) is None


@each(("extent", "value", "answer"), [
    ((1.0, 1.0), 1, True), ((1.0, 1.0), 0, False), ((0.0, 1.0), 1, False), ((0.0, 1.0), 0, False),
    ((float("nan"), float("nan")), 0, False),
])
def test_numbers_that_are_all_the_same(extent, value, answer):
    assert Extent(*extent, 1, 8, None).is_all(value) is answer


def test_sound_numbers():
    assert check_numbers(drawn()) == ((), True)
    assert check_numbers({}) == ((), True)


@each("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_each_value_that_is_not_finite_is_counted(dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in drawn().items()}
    tensors["norm.bias"][1:3] = torch.nan
    tensors["pos_embed"][0, :3, 0] = torch.inf
    tensors["blocks.0.fc.weight"][0] = -torch.inf
    found = check_numbers(tensors)
    assert found.trouble == ("3 tensors hold 2 NaN and 7 infinite values: blocks.0.fc.weight, norm.bias, pos_embed",)
    assert not found.finite


def test_the_first_few_names_are_given():
    found = check_numbers({f"blocks.{i}.fc.weight": torch.full((2, 2), torch.nan) for i in range(5)})
    assert found.trouble == (
        "5 tensors hold 20 NaN and 0 infinite values: blocks.0.fc.weight, blocks.1.fc.weight, blocks.2.fc.weight and 2 "
        "more",)


@each(("name", "shape", "suspicious"), [
    ("blocks.0.fc.weight", (3, 3), True), ("patch_embed.proj.weight", (4, 3, 2, 2), True),
    ("pos_embed", (1, 5, 8), True), ("norm.weight", (8,), True), ("norm.bias", (8,), False),
    ("cls_token", (1, 1, 8), False), ("blocks.0.fc.bias", (8,), False),
])
def test_which_tensors_may_not_be_zero(name, shape, suspicious):
    found = check_numbers(drawn() | {name: torch.zeros(shape)})
    assert found.trouble == ((f"1 tensor is zero throughout: {name}",) if suspicious else ())
    assert found.finite


def test_a_single_zero_is_no_trouble():
    assert check_numbers({"fc.weight": torch.tensor([[0.0, 0.0], [0.0, 1e-9]])}) == ((), True)


@each("seed", range(5))
def test_an_untrained_vit_is_recognized(seed):
    trouble = check_numbers(build_vit(SMALL, seed=seed).state_dict()).trouble
    assert trouble == (
        "looks untrained, 3 of 3 signs hold: all norm weights are exactly 1, all biases that start at 0 are still 0, "
        "the weight matrices of all blocks have the standard deviation 0.02 they are drawn with",)


@each("arch", ["vit_tiny_patch16_224", "resnet18", "resnet50", "convnext_atto",
               "eva02_tiny_patch14_224"])
def test_timms_untrained_networks_are_recognized(arch):
    """A batch norm at the end of a ResNet's block starts at zero, which is no trouble of its own."""
    (trouble,) = check_numbers(timm.create_model(arch, num_classes=0).state_dict()).trouble
    assert trouble.startswith("looks untrained, ")


def steps(network, optimizer, count=1):
    """A few updates on noise."""
    for _ in range(count):
        optimizer.zero_grad()
        network(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))).square().mean().backward()
        optimizer.step()
    return network.state_dict()


def test_one_update_is_seen():
    network = build_vit(SMALL, seed=0)
    state = steps(network, torch.optim.AdamW(network.parameters(), lr=1e-4))
    assert check_numbers(state) == ((), True)


def test_the_statistics_of_one_batch_are_seen():
    """A ResNet that saw images, its weights untouched, has two signs left of three."""
    network = timm.create_model("resnet18", num_classes=0)
    state = steps(network, torch.optim.SGD(network.parameters(), lr=0.0))
    (trouble,) = check_numbers(state).trouble
    assert trouble.startswith("looks untrained, 2 of 3 signs hold: ")
    assert "batch norms" not in trouble


@each("sign", [
    lambda state: {name: torch.ones_like(t) for name, t in state.items() if t.ndim == 1 and name.endswith(".weight")},
    lambda state: {name: torch.zeros_like(t) for name, t in state.items() if name.endswith(".bias")},
    lambda state: {name: t for name, t in build_vit(SMALL, seed=1).state_dict().items() if t.ndim == 2},
])
def test_one_sign_alone_is_chance(sign):
    network = build_vit(SMALL, seed=0)
    with torch.no_grad():
        state = {name: tensor * 1.5 + 0.01 for name, tensor in network.state_dict().items()}
    assert check_numbers(state) == ((), True)
    assert check_numbers(state | sign(state)) == ((), True)


@each(("factor", "holds"), [(1.0, True), (1.015, True), (0.985, True), (1.03, False), (0.97, False)])
def test_how_far_a_deviation_may_be_off(factor, holds):
    """Two per cent in large matrices: here 400,000 numbers, whose deviation chance moves by 0.1 %."""
    matrix = torch.randn(400, 1000, generator=torch.Generator().manual_seed(0)) * 0.02 * factor
    trouble = check_numbers({"blocks.0.fc.weight": matrix, "norm.weight": torch.ones(400)}).trouble
    assert bool(trouble) is holds


def test_parameters_are_read_like_tensors(recwarn):
    state = dict(build_vit(SMALL, seed=0).named_parameters())
    assert check_numbers(state) == check_numbers({name: tensor.detach() for name, tensor in state.items()})
    assert not recwarn.list
