"""Drop path against its definition and timm's rates; draws belong to samples, not to batches."""

import copy

import pytest
import timm
import torch

from patchssl.models.networks import NetworkSpec, build_vit
from patchssl.pretrain.droppath import SampledDropPath, drop_path, set_drop_path_draws, use_sampled_drop_path

SPEC = NetworkSpec(arch="vit_tiny_patch16_224", image_size=16, patch_size=8, embed_dim=12, depth=4,
                   num_heads=3)


def test_draws_below_the_rate_drop_the_rest_is_scaled_up():
    x = torch.arange(1.0, 13.0).view(4, 3, 1)
    found = drop_path(x, torch.tensor([0.0, 0.19, 0.2, 0.99]), rate=0.2)
    torch.testing.assert_close(found, torch.stack([0 * x[0], 0 * x[1], x[2] / 0.8, x[3] / 0.8]))


def test_expectation_is_the_input():
    draws = (torch.arange(1000) + 0.5) / 1000  # evenly spaced, so the mean over them is exact
    kept = drop_path(torch.ones(1000, 2), draws, rate=0.3)
    torch.testing.assert_close(kept.mean(0), torch.ones(2))


def test_the_dtype_stays():
    assert drop_path(torch.ones(2, 3, dtype=torch.bfloat16), torch.rand(2), 0.5).dtype == torch.bfloat16


def network(rate):
    vit = build_vit(SPEC, seed=0)
    for p in vit.parameters():  # timm starts branches so small that dropping one would hardly show
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    return vit, use_sampled_drop_path(vit, rate)


def test_rates_are_timms():
    ours, places = network(0.4)
    theirs = timm.create_model("vit_tiny_patch16_224", depth=4, drop_path_rate=0.4)
    rates = [getattr(place, "drop_prob", 0.0) for b in theirs.blocks for place in (b.drop_path1, b.drop_path2)]
    found = [place.rate for b in ours.blocks for place in (b.drop_path1, b.drop_path2)]
    assert found == pytest.approx(rates)
    assert rates[-1] == pytest.approx(0.4)
    assert places == len(rates) == 8


def test_places_take_their_columns_in_order_of_depth():
    vit, places = network(0.4)
    draws = torch.rand(5, places)
    set_drop_path_draws(vit, draws)
    for i, block in enumerate(vit.blocks):
        assert torch.equal(block.drop_path1.draws, draws[:, 2 * i])
        assert torch.equal(block.drop_path2.draws, draws[:, 2 * i + 1])


def test_a_branch_that_is_dropped_leaves_the_residual_stream_alone():
    vit, places = network(0.5)
    vit.train()
    x = torch.randn(2, 5, 12)
    draws = torch.zeros(2, places)
    draws[1] = 0.999  # kept
    set_drop_path_draws(vit, draws)
    out = vit.blocks[3](x)
    block = copy.deepcopy(vit.blocks[3])
    attended = x[1:] + block.attn(block.norm1(x[1:])) / 0.5
    assert torch.equal(out[0], x[0])
    torch.testing.assert_close(out[1:], attended + block.mlp(block.norm2(attended)) / 0.5)


def test_a_samples_output_does_not_depend_on_its_batch():
    vit, places = network(0.5)
    vit.train()
    images = torch.randn(6, 3, 16, 16)
    draws = torch.rand(6, places, generator=torch.Generator().manual_seed(2))
    set_drop_path_draws(vit, draws)
    together = vit(images)
    for i in range(6):
        set_drop_path_draws(vit, draws[i : i + 1])
        torch.testing.assert_close(vit(images[i : i + 1]), together[i : i + 1])
    set_drop_path_draws(vit, draws.roll(1, 0))
    assert (vit(images) - together).abs().amax(1).min() > 1e-3  # other draws, other outputs


def test_nothing_is_drawn_from_torchs_generator():
    vit, places = network(0.5)
    set_drop_path_draws(vit.train(), torch.rand(2, places))
    before = torch.random.get_rng_state()
    vit(torch.zeros(2, 3, 16, 16))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_identity_in_evaluation():
    vit, _ = network(0.9)
    plain = build_vit(SPEC, seed=0)
    plain.load_state_dict(vit.state_dict())
    images = torch.randn(3, 3, 16, 16)
    assert torch.equal(vit.eval()(images), plain.eval()(images))


@pytest.mark.parametrize("draws", [None, torch.rand(2)])
def test_training_without_the_batchs_draws_is_an_error(draws):
    place = SampledDropPath(0.1)
    place.draws = draws
    with pytest.raises(RuntimeError, match="no draws for this batch"):
        place(torch.ones(3, 4))


def test_draws_for_another_number_of_places_are_an_error():
    vit, places = network(0.1)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        set_drop_path_draws(vit, torch.rand(3, places - 1))
