"""Training that goes on from given weights: what is taken over, what waits, what is refused."""

import pytest
import torch

from patchssl.models.backbone import VitBackbone
from patchssl.models.load import load_backbone
from patchssl.models.networks import NetworkSpec, build_vit
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.dataset import make_loader
from patchssl.pretrain.engine import Engine
from patchssl.pretrain.network import describe_start, starting_backbone, take_weights
from patchssl.pretrain.recipe import load_recipe
from patchssl.pretrain.run.resume import read_run
from patchssl.pretrain.run.setup import training_images
from patchssl.pretrain.run.start import pretrain, resume
from patchssl.runtime.errors import UsageError

CPU = torch.device("cpu")


def small_recipe(**changes):
    parts = {"model": {"arch": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
             "views": {"global_size": 32, "local_size": 16, "num_local": 1},
             "head": {"num_prototypes": 16, "hidden": 8, "bottleneck": 4, "freeze_last_layer_epochs": 0},
             "optim": {"batch_size": 4, "epochs": 3, "warmup_epochs": 0, "lr": 0.05, "freeze_backbone_epochs": 1}}
    return Recipe.model_validate(parts | changes)


def weights(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def start(tmp_path):
    """A file of weights in DINO's layout, trained at 64 pixels, position embeddings of standard deviation 1."""
    vit = build_vit(NetworkSpec(arch="vit_tiny_patch16_224", image_size=64, patch_size=8, embed_dim=24, depth=2,
                                num_heads=3), seed=11)
    torch.nn.init.normal_(vit.pos_embed, generator=torch.Generator().manual_seed(2))
    path = tmp_path / "start.pth"
    torch.save(vit.state_dict(), path)
    return f"{path}?heads=3"


def test_student_and_teacher_start_from_the_weights_with_a_fresh_head(start):
    recipe = small_recipe(init=start)
    engine, fresh = Engine(recipe, 0, 10, CPU, starting_backbone(recipe)), Engine(recipe, 0, 10, CPU)
    given = load_backbone(start).module.state_dict()
    for network in (engine.student, engine.teacher):
        found = network.backbone.module.state_dict()
        assert [name for name in found if not torch.equal(found[name], given[name])] == ["pos_embed"]
        assert same(weights(network.head), weights(fresh.student.head))


def test_tokens_at_the_new_size_are_those_of_the_given_network(start):
    """Resizing position embeddings once gives what the given network does at that size by itself."""
    recipe = small_recipe(init=start)
    engine = Engine(recipe, 0, 10, CPU, starting_backbone(recipe))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(engine.teacher.eval().backbone.tokens(x), load_backbone(start).tokens(x))


def test_the_backbone_waits_until_the_head_has_learned(start, colors):
    recipe = small_recipe(init=start)
    images = training_images(recipe, colors, 0)
    engine = Engine(recipe, 0, steps_per_epoch=2, device=CPU, start=starting_backbone(recipe))
    before, head = weights(engine.student.backbone), weights(engine.student.head)
    batches = iter(make_loader(recipe, images, 0, engine.num_drop_path, workers=0))
    moved = []
    for _ in range(4):
        engine.train_step(next(batches))
        moved.append(not same(before, weights(engine.student.backbone)))
    assert moved == [False, False, True, True]  # an epoch is two updates here
    assert not same(head, weights(engine.student.head))


def test_without_init_nothing_waits(colors):
    recipe = small_recipe()
    engine = Engine(recipe, 0, steps_per_epoch=2, device=CPU)
    before = weights(engine.student.backbone)
    batches = make_loader(recipe, training_images(recipe, colors, 0), 0, engine.num_drop_path, workers=0)
    engine.train_step(next(iter(batches)))
    assert not same(before, weights(engine.student.backbone))


def test_timm_positions_are_resized_as_timm_does(start):
    path, recipe = start.partition("?")[0], small_recipe()
    vit = build_vit(NetworkSpec(arch="vit_tiny_patch16_224", image_size=64, patch_size=8, embed_dim=24, depth=2,
                                num_heads=3))
    vit.load_state_dict(torch.load(path))
    given = VitBackbone(vit, dino_positions=False)
    engine = Engine(recipe, 0, 10, CPU, given)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(engine.student.eval().backbone.module.forward_features(x), vit.forward_features(x))


@pytest.mark.parametrize(("model", "words"), [
    ({"patch_size": 16}, ["patches of 8 pixels", "model.patch_size = 16"]),
    ({"embed_dim": 48}, ["does not fit", "blocks.0.attn.proj.bias is 24 instead of 48", "set model.arch"]),
    ({"depth": 3}, ["missing: blocks.2.", "set model.arch"]),
])
def test_weights_that_do_not_fit_the_recipe(start, model, words):
    recipe = small_recipe(init=start, model=small_recipe().model.model_dump() | model)
    with pytest.raises(UsageError) as caught:
        Engine(recipe, 0, 10, CPU, starting_backbone(recipe))
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_networks_that_are_not_pretrained():
    with pytest.raises(UsageError, match="only plain Vision Transformers are pretrained"):
        starting_backbone(small_recipe(init="random:resnet18"))
    with pytest.raises(UsageError, match="does not exist"):
        starting_backbone(small_recipe(init="nothing-here.pth"))


def test_what_is_said_about_the_start(start):
    backbone = load_backbone(start)
    said = describe_start(backbone, 32)
    assert "starts from start" in said
    assert "from 64 to 32 pixels" in said
    assert "normalized" not in said
    other = load_backbone(f"{start}&mean=0.5&std=0.5")
    assert "mean (0.5, 0.5, 0.5)" in describe_start(other, 64)
    assert "resized" not in describe_start(other, 64)


def test_a_run_from_given_weights_says_so_and_can_be_resumed(start, colors, tmp_path, tiny):
    overrides = (*tiny, "model.depth=2", f"init={start}", "optim.freeze_backbone_epochs=0.5")
    whole = pretrain("quickstart", colors, tmp_path / "whole", overrides=overrides, device="cpu")
    _, facts = read_run(whole)
    assert facts["init"] == load_backbone(start).weights_sha256
    trained = load_backbone(str(whole))
    assert trained.pretrain_data == "start + colors"
    assert trained.weights_sha256 != facts["init"]
    (whole / "checkpoint.pth").unlink()  # as if killed before the first one
    again = resume(whole, device="cpu")
    assert load_backbone(str(again)).weights_sha256 == trained.weights_sha256


def test_a_resumed_run_needs_the_given_weights_no_more(start, colors, tmp_path, tiny):
    overrides = (*tiny, "model.depth=2", f"init={start}")
    folder = pretrain("quickstart", colors, tmp_path / "run", overrides=overrides, device="cpu")
    file = tmp_path / "start.pth"
    file.unlink()
    assert resume(folder, device="cpu") == folder


def test_other_weights_under_the_same_name(start, colors, tmp_path, tiny):
    overrides = (*tiny, "model.depth=2", f"init={start}")
    folder = pretrain("quickstart", colors, tmp_path / "run", overrides=overrides, device="cpu")
    (folder / "checkpoint.pth").unlink()
    state = torch.load(tmp_path / "start.pth")
    torch.save(state | {"norm.bias": state["norm.bias"] + 1}, tmp_path / "start.pth")
    with pytest.raises(UsageError, match="holds other weights"):
        resume(folder, device="cpu")


def test_a_recipe_names_it(start, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("init: timm:vit_small_patch16_224.dino\noptim: {freeze_backbone_epochs: 2}\n")
    recipe = load_recipe(path)
    assert (recipe.init, recipe.optim.freeze_backbone_epochs) == ("timm:vit_small_patch16_224.dino", 2)


def test_taking_weights_changes_nothing_in_their_source(start):
    given = load_backbone(start)
    before = given.weights_sha256
    backbone = Engine(small_recipe(), 0, 10, CPU).student.backbone
    take_weights(backbone, given)
    with torch.no_grad():
        backbone.module.norm.weight.add_(1)
    assert given.weights_sha256 == before


def test_what_no_tensor_shows_is_compared_too(start):
    path = start.partition("?")[0]
    recipe = small_recipe(init=f"{path}?heads=6")
    with pytest.raises(UsageError, match=r"has 6 as its number of attention heads, the recipe's model .* 3"):
        Engine(recipe, 0, 10, CPU, starting_backbone(recipe))
