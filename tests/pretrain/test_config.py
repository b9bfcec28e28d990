"""Recipes: what is refused, in which words, and that the shipped ones survive a round trip."""

import re
from importlib import resources

import pytest
import yaml
from cases import each

from patchssl.pretrain.config import Recipe
from patchssl.pretrain.recipe import (
    dump_recipe,
    load_recipe,
    parse_recipe,
    recipe_keys,
    recipe_names,
    with_patchwise,
)
from patchssl.pretrain.schedules import values_at
from patchssl.runtime.errors import UsageError

SHIPPED = ["cifar10", "imagenet100", "imagenet1k", "imagenette", "quickstart"]


def refusal(text="", overrides=()):
    with pytest.raises(UsageError) as caught:
        parse_recipe(text, overrides)
    return str(caught.value)


@each("name", recipe_names())
def test_shipped_recipes_load_and_round_trip(name):
    recipe = load_recipe(name)
    assert parse_recipe(dump_recipe(recipe)) == recipe
    assert load_recipe(name, [f"optim.epochs={recipe.optim.epochs}"]) == recipe


def test_the_shipped_recipes_are_there():
    assert set(SHIPPED) <= set(recipe_names())


# argparse defaults of main_dino.py at 7257be6, 26acb86 and c109cd6; the batch is images a GPU times GPUs
AUTHORS = {"cifar10": ("vit_tiny_patch16_224", 1000, 100, 90 * 3),
           "imagenet100": ("vit_base_patch16_224", 10_000, 120, 30 * 3),
           "imagenet1k": ("vit_base_patch16_224", 65_536, 100, 4 * 4)}


@each("name", AUTHORS)
def test_the_authors_recipes_hold_the_authors_settings(name):
    recipe = load_recipe(name)
    optim, loss, views = recipe.optim, recipe.loss, recipe.views
    assert AUTHORS[name] == (recipe.model.arch, recipe.head.num_prototypes, optim.epochs, optim.batch_size)
    assert (optim.lr, optim.min_lr, optim.warmup_epochs) == (5e-4, 1e-6, 10)
    assert (optim.weight_decay, optim.weight_decay_end, optim.clip_grad) == (0.04, 0.4, 3.0)
    assert (optim.teacher_momentum, optim.teacher_momentum_end) == (0.996, 1.0)
    assert (loss.teacher_temp, loss.teacher_temp_start, loss.student_temp) == (0.04, 0.04, 0.1)
    assert (loss.weighting, loss.rule) == ("paper", "paper")
    assert (loss.centering, loss.center_per_position) == ("ema", True)
    assert (views.num_global, views.num_local, views.global_size, views.local_size) == (2, 8, 224, 96)
    assert (views.global_scale, views.local_scale) == ((0.4, 1.0), (0.05, 0.4))
    assert (recipe.head.hidden, recipe.head.bottleneck) == (2048, 256)
    assert (recipe.head.norm_last_layer, recipe.head.freeze_last_layer_epochs) == (True, 1)
    assert (recipe.model.drop_path, recipe.model.patch_size, recipe.patch_color) == (0.1, 16, "layered")


@each("name", [*AUTHORS, "imagenette"])
@each("method", ["dino", "ibot"])
def test_a_baseline_of_their_recipes_needs_no_word_on_color(name, method):
    baseline = load_recipe(name, [f"method={method}", "loss.weighting=balanced", "loss.rule=center"])
    assert baseline.patch_color == "none"
    assert load_recipe(name, ["method=pwself"]).patch_color == "layered"


@each("name", recipe_names())
def test_the_changes_that_a_recipe_names_in_its_comments_are_settings(name):
    text = (resources.files("patchssl.pretrain") / "recipes" / f"{name}.yaml").read_text("utf-8")
    named = {key for line in text.splitlines() for key in re.findall(r"([a-z_]+\.[a-z_]+)=", line.partition("#")[2])}
    assert named - set(recipe_keys()) <= {"loss.class_share"}
    assert bool(named) == (name in AUTHORS)


@each(("name", "changes"), [
    ("cifar10", ["views.shared_in_batch=true", "optim.batch_size=80", "photometric.patchwise=none"]),
    ("cifar10", ["model.patch_size=32", "optim.batch_size=160", "photometric.patchwise=none"]),
    ("imagenet100", ["model.patch_size=8", "views.shared_in_batch=true", "optim.epochs=100", "optim.batch_size=18",
                     "photometric.patchwise=none"]),
    ("imagenet100", ["model.arch=vit_tiny_patch16_224", "head.num_prototypes=1000", "optim.batch_size=270",
                     "optim.precision=fp32", "photometric.patchwise=none"]),
])
def test_other_branches_are_changes_of_the_recipes(name, changes):
    assert load_recipe(name, changes).patch_color == "none"


# recipes from before `patchwise` existed

def test_an_old_share_of_views_is_read_as_replaced_color_and_said(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("photometric: {patch_share: 0.3, jitter: 0.7}\n")
    with pytest.warns(FutureWarning, match=re.escape(f"{path} has photometric.patch_share and no")) as told:
        recipe = load_recipe(path)
    assert len(told) == 1 and "patchwise = replace" in str(told[0].message)
    assert (recipe.patch_color, recipe.photometric.patch_share, recipe.photometric.jitter) == ("replace", 0.3, 0.7)
    with pytest.warns(FutureWarning):
        assert parse_recipe("photometric: {patch_share: 0.3}", ["photometric.patchwise=layered"]) == Recipe(
            photometric={"patch_share": 0.3})
    with pytest.warns(FutureWarning), pytest.raises(UsageError, match=r"patchwise = replace: method dino"):
        parse_recipe("photometric: {patch_share: 0.3}", ["method=dino"])


@pytest.mark.filterwarnings("error")
@each("text, changes, color, share", [
    ("photometric: {patch_share: 0}", [], "none", 0),
    ("photometric: {patch_share: 0.0}\nmethod: ibot", [], "none", 0),
    ("photometric: {patch_share: 0.3, patchwise: replace}", [], "replace", 0.3),
    ("photometric: {patch_share: 0.3, patchwise: layered}", [], "layered", 0.3),
    ("photometric: {patch_share: 0.3, patchwise: none}", [], "none", 0.3),
    ("photometric: {patchwise: replace}", [], "replace", 1),
    ("photometric: {jitter: 0.5}", [], "layered", 1),
    ("photometric:", ["photometric.patch_share=0.4"], "layered", 0.4),
    ("", ["photometric.patch_share=0.4"], "layered", 0.4),
    ("", ["photometric.patch_share=0"], "none", 0),
    ("", ["photometric.patch.hue=0.2"], "layered", 1),
    ("method: dino", ["photometric.patch_share=0"], "none", 0)])
def test_what_is_no_old_share_is_read_without_a_word(text, changes, color, share):
    recipe = parse_recipe(text, changes)
    assert (recipe.patch_color, recipe.photometric.patch_share) == (color, share)


def test_reading_old_color_leaves_what_was_given_as_it_was():
    given = {"photometric": {"patch_share": 0.5}}
    assert with_patchwise(given) == {"photometric": {"patch_share": 0.5, "patchwise": "replace"}}
    assert given == {"photometric": {"patch_share": 0.5}}
    for other in ({}, {"photometric": None}, {"photometric": {"patchwise": "none", "patch_share": 1}}):
        assert with_patchwise(other) is other


@each("mode", ["layered", "replace"])
def test_a_baseline_is_refused_patch_wise_color(mode):
    sentence = refusal(overrides=["method=dino", f"photometric.patchwise={mode}"])
    assert f"photometric.patchwise = {mode}: method dino colors whole views, set it to none" in sentence


def test_the_learning_rate_follows_the_batch_as_theirs_does():
    """5e-4 x (images a GPU x GPUs) / 256, at the end of the warm-up."""
    recipe = load_recipe("imagenet100")
    assert values_at(10 * 7, recipe, steps_per_epoch=7).lr == pytest.approx(5e-4 * (30 * 3) / 256)


def test_imagenette_differs_from_the_authors_recipes_in_size_alone():
    own, theirs = load_recipe("imagenette"), load_recipe("cifar10")
    changed = ["model.arch=vit_small_patch16_224", "optim.epochs=200", "optim.batch_size=256"]
    assert own == load_recipe("cifar10", changed)
    assert own != theirs


def test_a_dumped_recipe_spells_out_every_setting():
    dumped = yaml.safe_load(dump_recipe(Recipe()))

    def leaves(table, prefix=""):
        for key, value in table.items():
            yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]

    assert sorted(leaves(dumped)) == recipe_keys()
    assert {"method", "model.arch", "optim.lr", "views.global_scale", "run.workers"} <= set(recipe_keys())


@each(("text", "nearest"), [
    ("optim: {epoch: 3}", "'optim.epochs'"),
    ("optim: {learning_rate: 3, batchsize: 3}", "'optim.batch_size'"),
    ("lr: 1", "'optim.lr'"),  # the right word in the wrong place
    ("optimizer: {lr: 1}", "'optim'"),
    ("head: {num_global: 1}", "'views.num_global'"),
    ("metod: dino", "'method'"),
    ("loss: {center: ema}", "'loss.centering'"),
])
def test_an_unknown_key_in_a_file_answers_with_the_nearest(text, nearest):
    assert f"did you mean {nearest}" in refusal(text)


@each(("override", "nearest"), [
    ("optim.epoch=3", "'optim.epochs'"),
    ("epochs=3", "'optim.epochs'"),
    ("optimizer.lr=1", "'optim.lr'"),
    ("optimm.epoch=1", "'optim.epochs'"),
    ("views.patch_size=8", "'model.patch_size'"),
])
def test_an_unknown_key_in_an_override_answers_with_the_nearest(override, nearest):
    sentence = refusal(overrides=[override])
    assert f"'{override.split('=')[0]}' is unknown" in sentence
    assert f"did you mean {nearest}" in sentence


def test_overriding_a_whole_part_says_what_it_holds():
    sentence = refusal(overrides=["model=vit_small"])
    assert "model" in sentence
    assert "model.arch" in sentence


@each(("override", "value"), [
    ("optim.lr=1e-4", 1e-4),
    ("optim.lr=5.0e-04", 5e-4),
    ("optim.lr=1", 1.0),
    ("optim.epochs=20", 20),
    ("views.global_scale=[0.25, 1]", (0.25, 1.0)),
    ("photometric.blur=[1, .5, 0]", (1.0, 0.5, 0.0)),
    ("head.norm_last_layer=false", False),
    ("head.norm_last_layer=true", True),
    ("model.depth=null", None),
    ("model.depth=", None),
    ("loss.centering=sinkhorn", "sinkhorn"),
    ("data=/some/dir with spaces=and signs", "/some/dir with spaces=and signs"),
])
def test_overrides_are_read_as_yaml(override, value):
    found = parse_recipe("method: pwself", [override])
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_wins_and_beats_the_file():
    recipe = parse_recipe("optim: {epochs: 5, lr: 1}", ["optim.epochs=6", "optim.epochs=7"])
    assert (recipe.optim.epochs, recipe.optim.lr) == (7, 1)


def test_an_override_reaches_a_part_that_the_file_leaves_empty():
    assert parse_recipe("optim:\n  # nothing yet\n", ["optim.epochs=6"]).optim.epochs == 6


@each(("override", "words"), [
    ("optim.epochs=0", ["optim.epochs = 0", "greater than 0"]),
    ("optim.epochs=many", ["optim.epochs = 'many'", "integer"]),
    ("optim.lr=-1e-3", ["optim.lr", "-1e-3", "greater than 0"]),
    ("optim.lr=.inf", ["optim.lr = inf", "finite"]),
    ("optim.lr=.nan", ["optim.lr = nan"]),
    ("optim.min_lr=.inf", ["optim.min_lr = inf", "finite"]),
    ("views.global_scale=[.nan, 1]", ["views.global_scale"]),
    ("photometric.patch_share=1.5", ["photometric.patch_share = 1.5", "less than or equal to 1"]),
    ("photometric.hue=0.6", ["photometric.hue = 0.6", "0.5"]),
    ("views.global_scale=[0.5, 0.4]", ["views.global_scale = [0.5, 0.4]", "ascending"]),
    ("views.global_scale=[0, 0.4]", ["views.global_scale = [0.0, 0.4]", "positive"]),
    ("views.local_scale=[0.1, 1.5]", ["views.local_scale = [0.1, 1.5]", "at most 1"]),
    ("views.global_scale=[0.5]", ["views.global_scale"]),
    ("views.global_scale=0.5", ["views.global_scale = 0.5"]),
    ("views.num_global=0", ["views.num_global = 0"]),
    ("model.drop_path=1", ["model.drop_path = 1", "less than 1"]),
    ("loss.centering=batch", ["loss.centering = 'batch'", "'ema' or 'sinkhorn'"]),
    ("loss.rule=centre", ["loss.rule = 'centre'", "'center'", "'paper'"]),
    ("method=moco", ["method = 'moco'", "'pwself'", "'dino'"]),
    ("views.global_size=100", ["views.global_size = 100", "model.patch_size = 16", "not a multiple"]),
    ("views.local_size=40", ["views.local_size = 40", "model.patch_size = 16", "not a multiple"]),
])
def test_wrong_values_are_refused_by_dotted_name(override, words):
    sentence = refusal(overrides=[override])
    assert [word for word in words if word not in sentence] == [], sentence


@each(("overrides", "words"), [
    (["views.num_global=1", "views.num_local=0"], ["views.num_global = 1", "num_local = 0", "at least two"]),
    (["loss.weighting=paper", "loss.patch_weight=0.5"], ["loss.patch_weight", "loss.weighting = balanced"]),
    (["loss.weighting=paper", "loss.patch_warmup_epochs=3"], ["loss.patch_warmup_epochs"]),
    (["loss.weighting=lambda", "loss.patch_weight=0.5"], ["loss.patch_weight", "loss.class_share = 0.9"]),
    (["loss.weighting=lambda-sum", "loss.patch_warmup_epochs=3"], ["loss.patch_warmup_epochs", "'lambda-sum'"]),
    (["loss.class_share=0.8"], ["loss.class_share = 0.8", "'balanced'", "lambda or lambda-sum"]),
    (["loss.weighting=paper", "loss.class_share=0"], ["loss.class_share = 0.0", "'paper'"]),
    (["loss.weighting=lambda", "loss.class_share=1.5"], ["loss.class_share = 1.5", "less than or equal to 1"]),
    (["method=ibot", "loss.weighting=lambda"], ["loss.weighting = lambda", "method ibot", "balanced"]),
    (["method=ibot", "loss.matches_per_pair=4"], ["loss.matches_per_pair = 4", "method ibot"]),
    (["loss.center_per_position=true", "loss.centering=sinkhorn"],
     ["loss.center_per_position = true", "loss.centering = ema"]),
    (["masks.matched=true", "method=ibot", "photometric.patch_share=0"], ["masks.matched = true", "method pwself"]),
    (["run.shard=true", "optim.precision=fp16"], ["run.shard = true", "optim.precision = fp16", "bf16"]),
])
def test_combinations_that_mean_nothing_are_refused(overrides, words):
    sentence = refusal(overrides=overrides)
    assert [word for word in words if word not in sentence] == [], sentence


def test_all_wrong_values_are_told_at_once():
    sentence = refusal("optim: {epochs: 0, lr: fast}\nmodel: {depht: 3}")
    assert [word for word in ("optim.epochs", "optim.lr", "'model.depth'") if word not in sentence] == []


def test_the_size_of_local_views_does_not_matter_when_there_are_none():
    recipe = parse_recipe("", ["views.num_local=0", "views.global_size=28", "model.patch_size=14"])
    assert (recipe.views.num_views, recipe.views.local_size % 14) == (2, 96 % 14)


def test_dino_needs_whole_view_color_only():
    assert parse_recipe("method: dino\nphotometric: {patch_share: 0}").method == "dino"


@each(("text", "words"), [
    ("- a\n- b\n", "a list"),
    ("optim: [1, 2", "is not YAML"),
    ("optim: 3\n", "optim = 3"),
])
def test_what_is_no_table_of_keys_is_refused(text, words):
    assert words in refusal(text)


@pytest.mark.parametrize("override", ["optim.epochs", "optim.epochs=[1"])
def test_an_override_that_cannot_be_read(override):
    assert override.split("=")[-1] in refusal(overrides=[override])


def test_an_override_below_something_that_is_no_table():
    assert "optim" in refusal("optim: 3", ["optim.lr=1"])


def test_recipes_are_found_by_name_by_path_or_not_at_all(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {epochs: 4}\n")
    assert load_recipe(path).optim.epochs == 4
    assert load_recipe(str(path), ["optim.epochs=5"]).optim.epochs == 5
    with pytest.raises(UsageError, match="did you mean 'quickstart'"):
        load_recipe("quikstart")
    with pytest.raises(UsageError, match=r"nothing\.yaml is not a file.*quickstart"):
        load_recipe(tmp_path / "nothing.yaml")


def test_a_recipe_says_which_file_is_wrong(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {epochs: -4}\n")
    with pytest.raises(UsageError, match=r"mine\.yaml: optim\.epochs = -4"):
        load_recipe(path)


def test_values_cannot_be_changed_later():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().optim.lr = 3


@each(("text", "overrides", "words"), [
    ("optim:\n  epochs: 5\n  epochs: 6\n", [], "recipe: key 'epochs' stands twice, in lines 2 and 3"),
    ("", ["optim={epochs: 1}"], "'optim' is a part"),
    ("", ["photometric.blur={a: 1, a: 2}"], "key 'a' stands twice, in line 1"),
    ("", ["optim.lr=[1"], "'optim.lr=[1' is not YAML"),
])
def test_a_key_given_twice_is_refused(text, overrides, words):
    assert words in refusal(text, overrides)
