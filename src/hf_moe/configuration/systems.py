"""Published systems as records, one YAML file each: `systems/<family>/<key>.yaml`.

A record says what a system sets, in one or more forms: a model (`model`, a `moe_config`), an adapter of PEFT
(`adapter`, the fields of its config), what is done to a model that exists (`construct`, as in a stage of a recipe) or
a whole training job (`recipe`, a name). Key and family are those of the path.
"""

import copy
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_type_hints

from .checks import checked, unknown_name_message
from .layer_maps import is_layer_map
from .yaml_text import read_yaml


ROOT = files(__package__) / "systems"
RECIPES = files(__package__) / "recipes"
FORMS = {
    "model": "hf_moe.HfMoeConfig.from_system({key!r}), or system={key!r} in a build",
    "adapter": "hf_moe.MoeLoraConfig.from_system({key!r}), for PEFT",
    "construct": "hf_moe.from_system({key!r}, host=...)",
    "recipe": "hf-moe train {recipe}",
}


@dataclass(frozen=True, kw_only=True)
class SystemRecord:
    """A published system.

    Args:
        key (`str`): the name that users type; the file's.
        family (`str`): the folder's name.
        title (`str`): of the paper.
        arxiv (`str`, *optional*): its number.
        year (`int`, *optional*): of its first publication.
        model (`dict`, *optional*): a `moe_config`.
        config (`dict`, defaults to `{}`): what a model sets beside its `moe_config`, such as the `connector`.
        adapter (`dict`, *optional*): the fields of a [`MoeLoraConfig`], or of the PEFT config that `peft_type` names.
        construct (`dict`, *optional*): constructions by name with their options, as in a stage of a recipe.
        recipe (`str`, *optional*): the recipe that trains it.
        aliases (`list[str]`, defaults to `[]`): further names, also of mechanisms that the system is made of.
        variants (`dict[str, dict]`, defaults to `{}`): forms of the model or adapter by name, each with the fields
            that differ; the first one is the default.
        differs (`list[str]`, defaults to `[]`): where it leaves the paper, a sentence each.
        measured (`list[str]`, defaults to `[]`): pointers into benchmarks/results, such as `"hosts.json#contestants"`.
        check (`list[str]`, defaults to `[]`): the tests that hold what the paper promises, a file or `file::test`.
        host (`str`, defaults to `"llama"`): the type of the small model that an example builds it on.
        build (`str`, *optional*): the example, where it is not the usual one.
    """

    key: str
    family: str
    title: str
    arxiv: str | None = None
    year: int | None = None
    model: dict[str, Any] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] | None = None
    construct: dict[str, Any] | None = None
    recipe: str | None = None
    aliases: list[str] = field(default_factory=list)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    differs: list[str] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)
    check: list[str] = field(default_factory=list)
    host: Literal["jamba", "llama", "llava", "mixtral", "vit"] = "llama"
    build: str | None = None

    @property
    def forms(self) -> list[str]:
        """The forms that the record has: `"model"`, `"adapter"`, `"construct"`, `"recipe"`."""
        return [name for name in FORMS if getattr(self, name) is not None]

    def fields(self, form: str, variant: str | None = None, given: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return what a form sets, as a copy that is the caller's own.

        Args:
            form (`str`): `"model"`, `"adapter"` or `"construct"`.
            variant (`str`, *optional*): which of its variants; the first one when absent.
            given (`dict`, *optional*): fields that go before those of the record, see [`merge_fields`].

        Raises:
            ValueError: if the record does not have this form or variant; what it has is named.
        """
        own = getattr(self, form)
        if own is None:
            doors = " or ".join(FORMS[name].format(key=self.key, recipe=self.recipe) for name in self.forms)
            raise ValueError(f"The system {self.key!r} has no form {form!r}: use {doors}.")
        if variant is None:
            variant = next(iter(self.variants), None)
        elif not self.variants:
            raise ValueError(f"The system {self.key!r} has one form alone: leave variant={variant!r} out.")
        elif variant not in self.variants:
            raise ValueError(unknown_name_message(f"variant of {self.key!r}", variant, list(self.variants)))
        preset = {**own, **self.variants.get(variant or "", {})}
        # YAML's own anchors, and what is given, would be shared.
        return copy.deepcopy({**preset, **{name: merge_fields(preset.get(name), given[name]) for name in given or {}}})

    def place_fields(self, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the fields of `config` with MoE layers of towers and connectors, as a copy.

        Args:
            given (`dict`, *optional*): such fields that go before those of the record, see [`merge_fields`].
        """
        own = {name: value for name, value in self.config.items() if name.endswith("moe_config")}
        named = {name: value for name, value in (given or {}).items() if value is not None}
        return copy.deepcopy(own | {name: merge_fields(own.get(name), value) for name, value in named.items()})


def load_system(key: str) -> SystemRecord:
    """Return the record of a system.

    Args:
        key (`str`): its key, or one of its aliases.

    Raises:
        ValueError: if no record has that name, with the nearest ones; if the file is no record.
    """
    paths = _paths()
    if key in paths:
        return _read(key)
    by_alias = {alias: record.key for record in list_systems() for alias in record.aliases}
    if key not in by_alias:
        raise ValueError(unknown_name_message("system", key, [*paths, *by_alias]))
    return _read(by_alias[key])


def list_systems(form: str | None = None) -> list[SystemRecord]:
    """Return the records of all systems by key, or of those that have a form: `"model"`, `"adapter"`, ..."""
    records = [_read(key) for key in sorted(_paths())]
    return [record for record in records if form is None or form in record.forms]


def systems_by_family() -> dict[str, list[SystemRecord]]:
    """Return the records of all systems by family, both in alphabetical order."""
    records = sorted(list_systems(), key=lambda record: record.family)
    return {family: list(group) for family, group in groupby(records, key=lambda record: record.family)}


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    return sorted(file.name.removesuffix(".yaml") for file in RECIPES.iterdir())


def find_recipe(source: str) -> Traversable:
    """Return the file of a recipe.

    Args:
        source (`str`): a name of [`recipe_names`], the key of a system that has a recipe, or a path.

    Raises:
        FileNotFoundError: if there is none.
    """
    name = (_read(source).recipe if source in _paths() else None) or source
    file = RECIPES / f"{name}.yaml" if name in recipe_names() else Path(source)
    if not file.is_file():
        raise FileNotFoundError(f"{source} is no file; the shipped recipes are: {', '.join(recipe_names())}.")
    return file


def merge_fields(preset: Any, given: Any) -> Any:
    """Return a field of a record with what is given in its place.

    Dicts merge key by key. What replaces the record's is anything else, an empty dict, a layer map and a mechanism of
    another `name`.
    """
    if not isinstance(given, dict) or not given or is_layer_map(given):
        return given
    if isinstance(preset, str):
        preset = {"name": preset}
    if not isinstance(preset, dict) or given.get("name", preset.get("name")) != preset.get("name"):
        return given
    return {**preset, **{key: merge_fields(preset.get(key), value) for key, value in given.items()}}


@cache
def _paths() -> dict[str, tuple[str, Traversable]]:
    """Return the family and the file of each key."""
    found = [(folder.name, file) for folder in ROOT.iterdir() if folder.is_dir() for file in folder.iterdir()]
    return {file.name.removesuffix(".yaml"): (family, file) for family, file in found if file.name.endswith(".yaml")}


def _read(key: str) -> SystemRecord:
    family, file = _paths()[key]
    return read_record(key, family, file.read_text(encoding="utf-8"))


def read_record(key: str, family: str, text: str) -> SystemRecord:
    """Return the record that the text of a file holds.

    Raises:
        ValueError: if it is no YAML mapping; a field is unknown, missing or of another type; it has no form. File and
            field are named.
    """
    place = f"systems/{family}/{key}.yaml"
    content = read_yaml(text, f"record {place}")
    if not isinstance(content, dict):
        raise ValueError(f"{place} must hold the fields of a record, not {content!r:.80}.")
    hints = get_type_hints(SystemRecord)
    known = [name for name in hints if name not in ("key", "family")]
    for name, value in content.items():
        if name not in known:
            raise ValueError(unknown_name_message(f"field of {place}", name, known))
        checked(f"{place}: {name}", value, hints[name])
    for item in fields(SystemRecord):
        if item.name in known and item.name not in content and item.default is item.default_factory is MISSING:
            raise ValueError(f"{place} lacks {item.name!r}.")
    record = SystemRecord(key=key, family=family, **content)
    if not record.forms:
        raise ValueError(f"{place} has no form: give it one of {', '.join(FORMS)}.")
    return record
