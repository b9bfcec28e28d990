"""Recipes as YAML: read by name or path, changed by `key=value`, written with every value spelled out.

A wrong key or value is refused by its dotted name before anything is computed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from patchssl.pretrain.config import Recipe
from patchssl.runtime.errors import UsageError, unknown_choice
from patchssl.runtime.text import cut
from patchssl.runtime.yamltext import MOST_LETTERS, load_yaml
from patchssl.views.config import ConfigPart

if TYPE_CHECKING:
    from importlib.abc import Traversable

MOST_SENTENCES = 5  # on what is wrong with a file


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return shipped_names(_recipes())


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe named `source` (or the YAML file at that path), with `key=value` overrides such as `optim.lr=1e-3`.

    Raises UsageError for an unknown name or key (with the nearest right one) and for a value out of range.
    """
    return parse_recipe(shipped_or_own("recipe", source, _recipes()), overrides, where=str(source))


def shipped_names(folder: Traversable) -> list[str]:
    """Names of the YAML files in `folder` of the package."""
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def shipped_or_own(kind: str, source: str | Path, folder: Traversable) -> str:
    """The text of the YAML file that `source` names: of one in `folder` of the package, or the path of the user's own.

    UsageError, which calls it `kind`, for an unknown name, a missing file, and one that is no text.
    """
    path, names = Path(source), shipped_names(folder)
    if str(source) in names:
        return (folder / f"{source}.yaml").read_text("utf-8")
    if path.suffix.lower() not in {".yaml", ".yml"}:
        raise UsageError(unknown_choice(kind, str(source), names) + ", or name a .yaml file")
    if not path.is_file():
        raise UsageError(f"{kind} {source} is not a file; shipped are {', '.join(names)}")
    if path.stat().st_size > 4 * MOST_LETTERS:
        raise UsageError(f"{kind} {source} is too large: more than {MOST_LETTERS:,} letters are not read")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{kind} {source} is no text in UTF-8: {error}") from None


def _recipes() -> Traversable:
    return resources.files("patchssl.pretrain") / "recipes"


def parse_recipe(text: str, overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """A recipe from YAML `text`; see `load_recipe`."""
    values = load_yaml(text, where) or {}
    if not isinstance(values, dict):
        raise UsageError(f"{where} holds a {type(values).__name__}, a recipe is a table of keys and values")
    values = {key: value for key, value in values.items() if value is not None}  # an empty part
    values = _read_old_color(values, where)
    for override in overrides:
        _apply_override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{cut(where, 200)}: {first_few(_sentences(error))}") from None


def first_few(sentences: Iterable[str]) -> str:
    """Sentences on what is wrong with a file, as many as can be read; the rest are not made."""
    first = list(islice(sentences, MOST_SENTENCES + 1))
    more = "; and more" if len(first) > MOST_SENTENCES else ""
    return cut("; ".join(first[:MOST_SENTENCES]), 500) + more


def with_patchwise(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's `values` with `patchwise` said; before it existed, `patch_share` was the share of `replace`."""
    color = values.get("photometric")
    if not isinstance(color, dict) or "patch_share" not in color or "patchwise" in color:
        return values
    return {**values, "photometric": {**color, "patchwise": "replace" if color["patch_share"] else "none"}}


def _read_old_color(values: dict[str, Any], where: str) -> dict[str, Any]:
    """`with_patchwise`, with a warning where that is not the color which a recipe would have today."""
    read = with_patchwise(values)
    if read is not values and read["photometric"]["patchwise"] == "replace":
        warnings.warn(f"{where} has photometric.patch_share and no photometric.patchwise: read as patchwise = "
                      "replace, all that there was before; say patchwise = layered for the authors' color",
                      FutureWarning, stacklevel=3)
    return read


def dump_recipe(recipe: Recipe) -> str:
    """The effective recipe as YAML, every value spelled out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def recipe_keys() -> list[str]:
    """Dotted names of every setting of a recipe."""
    return sorted(_keys(Recipe))


def _keys(part: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in part.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, ConfigPart):
            yield from _keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise UsageError(f"override '{cut(override, 100)}' is not key=value, for example optim.epochs=20")
    if key not in recipe_keys():
        raise UsageError(_unknown_key(cut(key, 100)))
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UsageError(f"{parent} in the recipe is a {type(values).__name__}, not a table of keys and values")
    values[last] = load_yaml(value, f"'{override}'")  # 1e-4, text to YAML 1.1, becomes a number in pydantic


def _unknown_key(key: str) -> str:
    """Sentence for a wrong key: the same word in another part comes first, then the keys beside it."""
    part, _, word = key.rpartition(".")
    keys = recipe_keys()
    within = [name for name in keys if name.startswith(f"{key}.")]
    if within:
        return f"recipe key '{key}' is a part, not a value; set one of: {', '.join(within)}"
    elsewhere = [name for name in keys if name.rpartition(".")[2] == word]
    if elsewhere:
        return f"recipe key '{key}' is unknown; did you mean '{elsewhere[0]}'?"
    start = f"{part}." if part else ""
    beside = {start + name.removeprefix(start).partition(".")[0] for name in keys if name.startswith(start)}
    return unknown_choice("recipe key", key, beside or keys)


def _sentences(error: ValidationError) -> Iterable[str]:
    for found in error.errors():
        key = cut(".".join(str(part) for part in found["loc"]), 100)
        if found["type"] == "extra_forbidden":
            yield _unknown_key(key)
        elif found["type"] == "value_error":
            yield str(found["ctx"]["error"])
        else:
            yield f"{key} = {cut(repr(found['input']), 200)}: {found['msg'][0].lower()}{found['msg'][1:]}"
