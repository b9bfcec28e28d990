"""The projection head against torch's own weight normalization."""

import torch
from torch import nn

from patchssl.pretrain.config import HeadConfig
from patchssl.pretrain.head import ProjectionHead, Prototypes

CONFIG = HeadConfig(num_prototypes=7, hidden=12, bottleneck=5)


def test_prototypes_equal_torchs_weight_norm():
    ours = Prototypes(5, 7, norm=False)
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(5, 7, bias=False))
    theirs.parametrizations.weight.original0.data.copy_(torch.rand(7, 1))
    ours.weight_g.data.copy_(theirs.parametrizations.weight.original0)
    ours.weight_v.data.copy_(theirs.parametrizations.weight.original1)
    x = torch.randn(3, 5)
    torch.testing.assert_close(ours(x), theirs(x))


def test_logits_are_cosines_when_the_last_layer_is_normalized():
    head = ProjectionHead(6, CONFIG)
    head.last_layer.weight_v.data.mul_(100)
    logits = head(torch.randn(50, 6) * 30)
    assert logits.shape == (50, 7)
    assert logits.abs().max() <= 1 + 1e-6
    assert not head.last_layer.weight_g.requires_grad


def test_scaling_a_prototype_changes_nothing():
    head, x = ProjectionHead(6, CONFIG), torch.randn(4, 6)
    before = head(x)
    head.last_layer.weight_v.data[2] *= 9
    torch.testing.assert_close(head(x), before)


def test_patches_may_have_prototypes_of_their_own_behind_the_same_mlp():
    """As iBOT's head, by names and by numbers: MLP, unit length, and one of two weight-normalized layers."""
    head = ProjectionHead(6, HeadConfig(num_prototypes=7, hidden=12, bottleneck=5, shared=False))
    mlp = {f"mlp.{i}.{what}" for i in (0, 2, 4) for what in ("weight", "bias")}
    assert set(head.state_dict()) == mlp | {f"last_layer{n}.weight_{what}" for n in ("", "2") for what in "gv"}
    tokens = torch.randn(4, 6)
    weights = head.last_layer2.weight_v / head.last_layer2.weight_v.norm(dim=1, keepdim=True)
    hidden = head.mlp(tokens)
    torch.testing.assert_close(head.patch_layer(head.bottleneck(tokens)),
                               hidden / hidden.norm(dim=1, keepdim=True) @ weights.T)
    assert not torch.equal(head.last_layer.weight_v, head.last_layer2.weight_v)
    shared = ProjectionHead(6, CONFIG)
    assert shared.patch_layer is shared.last_layer


def test_number_of_layers():
    for layers in (1, 2, 4):
        head = ProjectionHead(6, HeadConfig(num_prototypes=7, hidden=12, bottleneck=5, layers=layers))
        linears = [m for m in head.mlp if isinstance(m, nn.Linear)]
        assert [m.out_features for m in linears] == [12] * (layers - 1) + [5]
        assert not isinstance(head.mlp[-1], nn.GELU)
