"""What a resumed run may change of its recipe, and whether the checkpoint there is its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from patchssl.models.checkpoint import NEWEST
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.engine import Engine
from patchssl.pretrain.network import network_spec
from patchssl.pretrain.recipe import dump_recipe, parse_recipe, with_patchwise
from patchssl.pretrain.run.log import write_whole
from patchssl.runtime.errors import CheckpointError, UsageError
from patchssl.runtime.yamltext import load_yaml

RECIPE, FACTS = "recipe.yaml", "run.json"
ALLOW = "--allow-changes"
_LARGEST_BYTES = 16 * 2**20  # of run.json, which lists what was changed

# changes that no number depends on: workers, logging, and where the same images (by fingerprint) now lie
FREE = ("run.", "data")
# what the tensors in a checkpoint, or its place in the data, are made of; of a part all but what is EXCEPTED
FIXED = ("method", "init", "max_images", "model.", "head.", "views.global_size", "optim.batch_size",
         "loss.centering", "loss.center_per_position", "masks.matched")
EXCEPTED = ("model.drop_path", "head.freeze_last_layer_epochs")

Change = tuple[Any, Any]  # value before, value now


def write_run(folder: Path, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Write run.json, which holds the recipe too, and recipe.yaml, its readable copy; a kill in between is harmless."""
    facts = {**facts, "recipe": recipe.model_dump(mode="json")}
    write_whole(folder / FACTS, json.dumps(facts, indent=2, sort_keys=True) + "\n")
    write_whole(folder / RECIPE, dump_recipe(recipe))


def read_run(folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of the run in `folder`, and what its run.json says: data, fingerprint, seed, versions, recipe."""
    if not (folder / FACTS).is_file():
        raise UsageError(f"{folder} is not a run folder: it has no {FACTS}; a run that was stopped before that was "
                         "written is started again")
    facts = _read_facts(folder / FACTS)
    if (folder / RECIPE).is_file():
        return parse_recipe(_text(folder / RECIPE), where=str(folder / RECIPE)), facts
    if "recipe" not in facts:
        raise UsageError(f"{folder} is not a run folder: it has no {RECIPE}")
    return parse_recipe(yaml.safe_dump(facts["recipe"]), where=str(folder / FACTS)), facts


# what run.json says, and of which kind
_NEEDED: Mapping[str, Any] = {"data": str, "fingerprint": str, "seed": int, "versions": dict, "device": str}
_KNOWN: Mapping[str, Any] = {**_NEEDED, "name": str, "dataset": str, "threads": int, "init": str, "init_from": str,
                             "pretrain_data": str, "recipe": dict, "changes": list}


def require_facts(facts: Mapping[str, Any], folder: Path) -> None:
    """UsageError unless `facts`, of the run in `folder`, say all that it takes to resume it."""
    if lacking := [name for name in _NEEDED if facts.get(name) is None]:
        raise _damaged(folder / FACTS, f"it lacks {', '.join(lacking)}")
    if not isinstance(facts["versions"].get("torch"), str):
        raise _damaged(folder / FACTS, "it does not say which torch the run began with")


def _read_facts(path: Path) -> dict[str, Any]:
    """What the file run.json says; UsageError where it is damaged."""
    try:
        facts = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is no JSON: {error}") from None
    if not isinstance(facts, dict):
        raise _damaged(path, "it holds no JSON object")
    if wrong := [name for name, kind in _KNOWN.items() if not isinstance(facts.get(name), kind | None)]:
        raise _damaged(path, f"{', '.join(wrong)} in it is of another kind")
    return facts


def _text(path: Path) -> str:
    """What stands in a small file of the run folder; UsageError where that is no text."""
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise _damaged(path, f"it is larger than {_LARGEST_BYTES // 2**20} MiB")
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(path, f"it is no text: {error}") from None


def _damaged(path: Path, why: str) -> UsageError:
    return UsageError(f"{path} is damaged: {why}. Bring it back from a copy to resume the run, or start it again; its "
                      "checkpoints can be scored all the same")


def begun_with(facts: Mapping[str, Any], checkpoint: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The settings that a run was begun with, or that were allowed since; an older version's are in its checkpoints."""
    if facts.get("recipe") or not checkpoint:
        return with_patchwise(facts.get("recipe") or {})
    found = load_yaml(str(checkpoint.get("recipe", "")), NEWEST)
    return with_patchwise(found) if isinstance(found, dict) else {}


def changed_recipe(folder: Path, begun: Mapping[str, Any], overrides: Sequence[str],
                   allow: bool) -> tuple[Recipe, dict[str, Change]]:
    """The recipe that the run in `folder` resumes with, and what of it differs from the settings it was `begun` with.

    UsageError, by name, for a change that was not allowed, or that the run's checkpoints cannot follow.
    """
    there, _ = read_run(folder)
    wanted = parse_recipe(dump_recipe(there), overrides, where=" ".join(overrides))
    edited, changes = changes_between(begun, there), changes_between(begun, wanted)
    if impossible := {key: values for key, values in changes.items() if _is_one_of(key, FIXED, EXCEPTED)}:
        raise UsageError(f"{sentence(impossible)}: the checkpoints in {folder} cannot follow that; start a new run, "
                         "or put it back" + (f" in {folder / RECIPE}" if impossible.keys() & edited else ""))
    weighty = weighty_among(changes)
    if weighty and not allow:
        by_hand = weighty.keys() & edited.keys()
        where = f"{folder / RECIPE} was edited since the run began" if by_hand else f"{folder} was begun otherwise"
        raise UsageError(f"{where}: {sentence(weighty)}; put it back, or give {ALLOW}, which makes it another run "
                         "than the one that was begun")
    return wanted, changes


def settle_recipe(folder: Path, recipe: Recipe, facts: dict[str, Any], changes: Mapping[str, Change],
                  steps_done: int) -> None:
    """From now on the run's recipe is `recipe`; run.json remembers what was changed, and since which update."""
    if changes:
        made = {"step": steps_done, **{key: list(both) for key, both in changes.items()}}
        facts |= {"changes": [*facts.get("changes", []), made]}
        if "data" in changes:
            facts["data"] = recipe.data
        if "images" in changes:
            facts["fingerprint"] = changes["images"][1]
    if changes or not (folder / RECIPE).exists() or read_run(folder)[0] != recipe:
        write_run(folder, recipe, facts)


def changes_between(begun: Mapping[str, Any] | Recipe, recipe: Recipe) -> dict[str, Change]:
    """Settings that differ, by dotted name; one that `begun`, of an older version, does not know is skipped."""
    before = _flat(begun.model_dump(mode="json") if isinstance(begun, Recipe) else begun)
    now = _flat(recipe.model_dump(mode="json"))
    return {key: (before[key], now[key]) for key in now if key in before and before[key] != now[key]}


def weighty_among(changes: Mapping[str, Change]) -> dict[str, Change]:
    """Those of `changes` that a number may depend on."""
    return {key: values for key, values in changes.items() if not _is_one_of(key, FREE)}


def require_own_checkpoint(checkpoint: Mapping[str, Any], folder: Path, recipe: Recipe, seed: int) -> None:
    """CheckpointError for a checkpoint of another method, network or seed than the run's."""
    origin = checkpoint["origin"]
    found = {"method": origin.get("method"), "seed": origin.get("seed"), **checkpoint["network"]}
    own = {"method": recipe.method, "seed": seed, **asdict(network_spec(recipe))}
    wrong = {key: (value, found[key]) for key, value in own.items() if key in found and found[key] != value}
    if wrong:
        said = ", ".join(f"{key} {theirs} instead of {ours}" for key, (ours, theirs) in wrong.items())
        raise CheckpointError(f"the checkpoint in {folder} is of another run: {said}; put back the run's own {NEWEST}")


def restore(engine: Engine, checkpoint: dict[str, Any], folder: Path) -> None:
    """Set `engine` to where `checkpoint` was saved; CheckpointError when it does not fit."""
    try:
        engine.load_state_dict(checkpoint)
    except (RuntimeError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise CheckpointError(f"the checkpoint in {folder} does not fit the run's recipe: "
                              f"{' '.join(str(error).split())}") from error
    if engine.steps_done > engine.total_steps:
        epochs = engine.steps_done / engine.steps_per_epoch
        raise UsageError(f"optim.epochs = {engine.recipe.optim.epochs}, but {epochs:g} epochs are done in {folder}; "
                         "ask for more")


def _is_one_of(key: str, names: Sequence[str], excepted: Sequence[str] = ()) -> bool:
    return key not in excepted and any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)


def sentence(changes: Mapping[str, Change]) -> str:
    """What was changed, in words."""
    return ", ".join(f"{key} was {before}, now {now}" for key, (before, now) in changes.items())


def _flat(part: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in part.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
