"""What a resumed run may change, what it must not, and whose checkpoints it takes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from cases import each

from patchssl.models.checkpoint import load_checkpoint, save_checkpoint
from patchssl.pretrain.recipe import load_recipe, recipe_keys
from patchssl.pretrain.run.resume import EXCEPTED, FIXED, FREE
from patchssl.pretrain.run.start import pretrain, resume
from patchssl.runtime.errors import CheckpointError, UsageError


@pytest.fixture
def run(tiny_run, tmp_path):
    """A finished run of 12 updates that may be changed."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def edit(run, before, after):
    path = run / "recipe.yaml"
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))


def test_names_are_keys_of_a_recipe():
    """A key that is renamed must not fall out of a list unnoticed."""
    for name in (*FREE, *FIXED, *EXCEPTED):
        assert any(key == name or (name.endswith(".") and key.startswith(name)) for key in recipe_keys()), name


def test_an_unchanged_recipe_however_it_is_written(run):
    edit(run, "epochs: 2", "epochs: 2.0  # two of them")
    before = contents(run)
    assert resume(run, ("optim.epochs=2",)) == run
    assert contents(run) == before


def test_what_moves_no_number_can_always_be_changed(run):
    assert resume(run, ("run.workers=1", "run.log_seconds=7")) == run
    recipe, facts = load_recipe(run / "recipe.yaml"), json.loads((run / "run.json").read_text())
    assert (recipe.run.workers, recipe.run.log_seconds) == (1, 7)
    assert facts["changes"] == [{"step": 12, "run.workers": [0, 1], "run.log_seconds": [0.001, 7.0]}]
    assert resume(run) == run


@pytest.mark.parametrize("allowed", [False, True])
def test_what_moves_numbers_is_changed_only_when_allowed(run, allowed):
    before = contents(run)
    if not allowed:
        with pytest.raises(UsageError, match=r"run was begun otherwise: optim\.epochs was 2, now 3; .*--allow-changes"):
            resume(run, ("optim.epochs=3", "run.workers=0"))
        assert contents(run) == before
        return
    assert resume(run, ("optim.epochs=3",), allow_changes=True) == run
    assert load_checkpoint(run)["steps_done"] == 18
    assert json.loads((run / "run.json").read_text())["changes"] == [{"step": 12, "optim.epochs": [2, 3]}]
    assert resume(run) == run  # it is the run's recipe now
    with pytest.raises(UsageError, match=r"optim\.epochs was 3, now 4"):
        resume(run, ("optim.epochs=4",))


def test_an_allowed_change_outlives_a_kill_before_the_next_checkpoint(run, monkeypatch):
    monkeypatch.setattr("patchssl.pretrain.run.start.train", lambda run: None)
    resume(run, ("optim.epochs=3",), allow_changes=True)
    monkeypatch.undo()
    resume(run)
    assert load_checkpoint(run)["steps_done"] == 18


def test_a_resumed_run_lets_go_of_the_file_that_it_was_read_from(run, monkeypatch):
    """Or the disk keeps it beside the two checkpoints, deleted as it is, until the run ends."""
    mapped = []
    monkeypatch.setattr("patchssl.pretrain.run.start.train",
                        lambda run: mapped.append(Path("/proc/self/maps").read_text()))
    held = load_checkpoint(run)
    assert str(run) in Path("/proc/self/maps").read_text()  # it would be seen
    del held
    resume(run)
    assert str(run) not in mapped[0]


def test_a_recipe_edited_by_hand_is_noticed(run):
    edit(run, "epochs: 2", "epochs: 3")
    before = contents(run)
    with pytest.raises(UsageError, match=r"recipe\.yaml was edited since the run began: optim\.epochs was 2, now 3"):
        resume(run)
    assert contents(run) == before
    assert resume(run, ("optim.epochs=2",)) == run  # puts it back
    assert "epochs: 2\n" in (run / "recipe.yaml").read_text()


def test_a_run_of_an_older_version_is_compared_with_its_checkpoint(run):
    facts = json.loads((run / "run.json").read_text())
    del facts["recipe"]
    (run / "run.json").write_text(json.dumps(facts))
    assert resume(run) == run
    edit(run, "epochs: 2", "epochs: 3")
    with pytest.raises(UsageError, match=r"optim\.epochs was 2, now 3"):
        resume(run)


@each("change", ["model.depth=2", "model.patch_size=16", "head.num_prototypes=64", "max_images=40",
                 "optim.batch_size=4", "views.global_size=40", "init=random:vit_tiny_patch16_224",
                 "loss.centering=ema"])
def test_what_a_checkpoint_cannot_follow_is_refused_though_changes_are_allowed(run, change):
    key, value = change.split("=")
    before = contents(run)
    with pytest.raises(UsageError, match=rf"{key} was .*, now {value}.*cannot follow that; start a new run"):
        resume(run, (change,), allow_changes=True)
    assert contents(run) == before


def test_fewer_epochs_than_are_done(run):
    with pytest.raises(UsageError, match=r"optim\.epochs = 1, but 2 epochs are done"):
        resume(run, ("optim.epochs=1",), allow_changes=True)


@pytest.mark.parametrize(("part", "key", "value", "words"), [
    ("origin", "method", "dino", "method dino instead of pwself"), ("origin", "seed", 5, "seed 5 instead of 0"),
    ("network", "depth", 7, "depth 7 instead of 1"), ("network", "image_size", 224, "image_size 224 instead of 32")])
def test_a_checkpoint_of_another_run_is_refused_by_name(run, part, key, value, words):
    checkpoint = load_checkpoint(run)
    save_checkpoint(run, checkpoint | {part: checkpoint[part] | {key: value}})
    with pytest.raises(CheckpointError, match=rf"the checkpoint in .*run is of another run: {words}"):
        resume(run)


def test_a_checkpoint_whose_tensors_do_not_fit_is_refused(run):
    checkpoint = load_checkpoint(run)
    teacher = {name: torch.zeros(2, 2) if "fc1" in name else value for name, value in checkpoint["teacher"].items()}
    save_checkpoint(run, checkpoint | {"teacher": teacher})
    with pytest.raises(CheckpointError, match=r"does not fit the run's recipe: .*fc1"):
        resume(run)


def test_a_checkpoint_put_there_from_another_method(run, colors, tiny, tmp_path):
    other = pretrain("quickstart", colors, tmp_path / "dino", device="cpu",
                     overrides=(*tiny, "method=dino", "photometric.patchwise=none", "optim.epochs=1"))
    shutil.copy(other / "checkpoint.pth", run / "checkpoint.pth")
    with pytest.raises(CheckpointError, match="method dino instead of pwself"):
        resume(run)


@pytest.fixture
def old_run(tiny_run, colors, tiny, tmp_path):
    """A run of 12 updates with replaced color, as versions wrote it that did not know `patchwise`."""
    run = pretrain("quickstart", colors, tmp_path / "old", device="cpu", overrides=(
        *tiny, "photometric.patchwise=replace", "photometric.patch_share=0.5"))

    def older(recipe):
        color = {key: value for key, value in recipe["photometric"].items() if key not in ("patchwise", "patch")}
        return recipe | {"photometric": color}

    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"recipe": older(facts["recipe"])}))
    (run / "recipe.yaml").write_text(yaml.safe_dump(older(yaml.safe_load((run / "recipe.yaml").read_text()))))
    checkpoint = load_checkpoint(run)
    save_checkpoint(run, checkpoint | {"recipe": yaml.safe_dump(older(yaml.safe_load(checkpoint["recipe"])))})
    return run


def test_a_run_of_before_patchwise_goes_on_with_replaced_color(old_run):
    with pytest.warns(FutureWarning, match="recipe.yaml has photometric.patch_share and no photometric.patchwise"):
        assert resume(old_run, ("optim.epochs=3",), allow_changes=True) == old_run
    assert load_checkpoint(old_run)["steps_done"] == 18
    recipe = load_recipe(old_run / "recipe.yaml")
    assert (recipe.patch_color, recipe.photometric.patch_share) == ("replace", 0.5)
    assert yaml.safe_load(load_checkpoint(old_run)["recipe"])["photometric"]["patchwise"] == "replace"


def test_a_run_of_before_patchwise_is_not_made_layered_unasked(old_run):
    with pytest.warns(FutureWarning), pytest.raises(
            UsageError, match=r"photometric\.patchwise was replace, now layered.*--allow-changes"):
        resume(old_run, ("photometric.patchwise=layered",))
