"""The file of a study: YAML in, frozen and validated values out. A wrong key or value is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, field_validator, model_validator

from patchssl.data.splits import HOLDOUT
from patchssl.eval.tasks import all_tasks
from patchssl.pretrain.config import Recipe
from patchssl.pretrain.recipe import first_few, load_recipe, shipped_or_own
from patchssl.runtime.errors import UsageError, unknown_choice
from patchssl.runtime.seeds import MOST_SEED
from patchssl.runtime.text import cut
from patchssl.runtime.yamltext import load_yaml
from patchssl.views.config import ConfigPart

UNTRAINED = "untrained"  # the variant that every study may have beside its own: the network before its first update
LEAST_ORIGINALS = 20  # as many ranks are scored
Name = Annotated[str, Field(pattern=r"^[a-z0-9]+([.-][a-z0-9]+)*$", max_length=40)]
Settings = dict[str, Any]  # dotted names of a recipe's settings, and their values


class SyntheticCopydays(ConfigPart):
    """A synthetic copy detection set, of the images that the study scores on."""

    originals: Annotated[int, Field(ge=LEAST_ORIGINALS)] = 100
    seed: NonNegativeInt = 0


class StandIn(ConfigPart):
    """What the images are like, for a plan where they are not at hand."""

    images: PositiveInt
    height: PositiveInt
    width: PositiveInt


class Study(ConfigPart):
    """Variants of one recipe with paired seeds, and what they are scored by."""

    name: Name
    data: str | None = None  # what --data says when it is not given
    recipe: str  # a shipped one, or a YAML file, relative to the study's
    settings: Settings = Field(default_factory=dict)  # of every variant
    variants: Annotated[dict[Name, Settings], Field(min_length=1)]
    ablations: dict[Name, Settings] = Field(default_factory=dict)  # further variants, run on request
    ablated: Name | None = None  # the variant that ablations are compared with; without it the reference
    untrained: bool = True  # score the network before its first update as well
    reference: str  # the variant that the others are compared with, seed by seed
    contrasts: tuple[tuple[Name, Name], ...] = ()  # further pairs of variants, the first minus the second
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, le=MOST_SEED)], ...], Field(min_length=1)]
    evaluations: Annotated[tuple[str, ...], Field(min_length=1)] = ("knn", "linear", "patches", "copydays")
    copydays: SyntheticCopydays = SyntheticCopydays()
    split: Literal["test", "validation"] = "test"  # validation: scored on a share of train that is not trained on
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    tried: NonNegativeInt = 0  # configurations that were compared elsewhere before these were chosen
    searches: tuple[Name, ...] = ()  # studies whose folders lie beside this one's: their configurations are counted
    stand_in: StandIn | None = None

    @field_validator("evaluations")
    @classmethod
    def _tasks_are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """What can be scored on the study's own images, and copies made of them; revisited sets cannot be made so."""
        known = [name for name, task in all_tasks().items() if not task.own_layout or name == "copydays"]
        for name in names:
            if name not in known:
                raise ValueError(unknown_choice("evaluation", name, known))
        return names

    @field_validator("variants", "ablations", mode="before")
    @classmethod
    def _no_settings_are_none(cls, values: Any) -> Any:
        """`pwself:` with nothing behind it is the recipe as it is."""
        if not isinstance(values, dict):
            return values
        return {name: {} if settings is None else settings for name, settings in values.items()}

    @model_validator(mode="after")
    def _names_are_told_apart(self) -> Study:
        if twice := sorted({*self.variants} & {*self.ablations}):
            raise ValueError(f"{twice[0]} is both among variants and among ablations")
        if UNTRAINED in self.all_variants():
            raise ValueError(f"no variant can be called {UNTRAINED}: that is the network before its first update")
        for key, name in (("reference", self.reference), ("ablated", self.ablated)):
            if name is not None and name not in self.variants:
                raise ValueError(unknown_choice(key, name, self.variants))
        for name in (name for pair in self.contrasts for name in pair):
            if name not in self.all_variants():
                raise ValueError(unknown_choice("variant of a contrast", name, self.all_variants()))
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)}: one of them stands there twice")
        return self

    def all_variants(self) -> dict[str, Settings]:
        """Variants and ablations, in the order of the file."""
        return {**self.variants, **self.ablations}

    @property
    def base(self) -> str:
        """The variant that ablations are compared with."""
        return self.ablated or self.reference

    def compared_with(self, variant: str) -> str | None:
        """The variant that `variant` is set beside, None for the reference itself."""
        if variant in self.ablations:
            return self.base
        return None if variant == self.reference else self.reference

    def recipe_of(self, variant: str) -> Recipe:
        """The effective recipe of `variant`; UsageError, naming the variant, for a wrong setting."""
        own = {} if variant == UNTRAINED else self.all_variants()[variant]
        try:
            return load_recipe(self.recipe, [*_overrides(self.settings), *_overrides(own)])
        except UsageError as error:
            raise UsageError(f"study {self.name}, variant {variant}: {error}") from None

    def images(self, data: str | None) -> str:
        """What is trained and scored on, of `data` or the study's own; UsageError where neither says it."""
        named = data or self.data
        if named is None:
            raise UsageError(f"study {self.name} names no data: give --data DIR, with train/ and val/ inside")
        return f"{HOLDOUT}{self.validation_share:g}:{named}" if self.split == "validation" else named


def load_study(source: str | Path) -> Study:
    """The study named `source`, or the YAML file at that path, with all its recipes checked.

    Raises UsageError for an unknown name or key (with the nearest right one) and for a value out of range.
    """
    shipped = resources.files("patchssl.study") / "studies"
    return parse_study(shipped_or_own("study", source, shipped), where=str(source), folder=Path(source).parent)


def parse_study(text: str, where: str = "study", folder: Path | None = None) -> Study:
    """A study from YAML `text`; `folder` is what the path of its recipe is relative to."""
    values = load_yaml(text, where)
    if not isinstance(values, dict):
        raise UsageError(f"{where} holds a {type(values).__name__}, a study is a table of keys and values")
    recipe = values.get("recipe")
    if folder is not None and isinstance(recipe, str) and (folder / recipe).is_file():
        values["recipe"] = str(folder / recipe)
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{cut(where, 200)}: {first_few(_sentences(error))}") from None
    for variant in study.all_variants():
        study.recipe_of(variant)
    return study


def _overrides(settings: Settings) -> Sequence[str]:
    """Settings as a recipe takes them; JSON is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _sentences(error: ValidationError) -> Iterable[str]:
    parts: dict[str, type[ConfigPart]] = {"copydays": SyntheticCopydays, "stand_in": StandIn}
    for found in error.errors():
        words = [str(part) for part in found["loc"]]
        key = cut(".".join(words), 100)
        if found["type"] == "extra_forbidden":
            known = parts.get(words[0], Study) if len(words) > 1 else Study
            yield unknown_choice("study key", key, [".".join([*words[:-1], name]) for name in known.model_fields])
        elif found["type"] == "missing":
            yield f"{key} is missing"
        elif found["type"] == "value_error":
            yield str(found["ctx"]["error"])
        else:
            yield f"{key} = {cut(repr(found['input']), 200)}: {found['msg'][0].lower()}{found['msg'][1:]}"
