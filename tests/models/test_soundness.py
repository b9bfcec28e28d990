"""Each sign of trouble in numbers planted by hand and found, and networks before and after a little training."""

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
    assert extent_of(torch.tensor([[-3.0, 1.0], [2.0, 4.0]])) == (-3.0, 4.0, 2)
    assert extent_of(torch.tensor(3)) is None
    assert extent_of(torch.ones(0, 3)) is None


@each(("extent", "value", "answer"), [
    ((1.0, 1.0), 1, True), ((1.0, 1.0), 0, False), ((0.0, 1.0), 1, False), ((0.0, 1.0), 0, False),
    ((float("nan"), float("nan")), 0, False),
])
def test_numbers_that_are_all_the_same(extent, value, answer):
    assert Extent(*extent, 1).is_all(value) is answer


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
    assert trouble == ("looks untrained: all norm weights and biases are exactly what they start at",)


@each("arch", ["vit_tiny_patch16_224", "resnet18", "resnet50", "convnext_atto",
               "eva02_tiny_patch14_224"])
def test_timms_untrained_networks_are_recognized(arch):
    """A batch norm at the end of a ResNet's block starts at zero, which is no trouble of its own."""
    (trouble,) = check_numbers(timm.create_model(arch, num_classes=0).state_dict()).trouble
    assert trouble.startswith("looks untrained: ")


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


@each("sign", [
    lambda state: {name: torch.ones_like(t) for name, t in state.items() if t.ndim == 1 and name.endswith(".weight")},
    lambda state: {name: torch.zeros_like(t) for name, t in state.items() if name.endswith(".bias")},
])
def test_one_sign_alone_is_chance(sign):
    network = build_vit(SMALL, seed=0)
    with torch.no_grad():
        state = {name: tensor * 1.5 + 0.01 for name, tensor in network.state_dict().items()}
    assert check_numbers(state) == ((), True)
    assert check_numbers(state | sign(state)) == ((), True)


def test_parameters_are_read_like_tensors(recwarn):
    state = dict(build_vit(SMALL, seed=0).named_parameters())
    assert check_numbers(state) == check_numbers({name: tensor.detach() for name, tensor in state.items()})
    assert not recwarn.list
