"""Recipes: a whole training job as one YAML file."""

from dataclasses import fields
from typing import Any

from peft import PeftConfig

from ..adapters import MoeLoraConfig
from ..configuration.configuration_hf_moe import unknown_name_message
from ..configuration.systems import find_recipe, load_system
from ..configuration.yaml_text import read_yaml
from .arguments import check_arguments, check_training
from .checks import check_model, check_sources, named
from .schema import fit, refuse_words
from .sections import SECTIONS, Host, Recipe, Stage


# What a recipe may say of an adapter: the fields of the config, but not what PEFT itself fills in.
ADAPTER_FIELDS = sorted({item.name for item in fields(MoeLoraConfig)} - {item.name for item in fields(PeftConfig)})


def load_recipe(source: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe by name or from a YAML file, and check all that can be checked without its data and weights.

    YAML is read as version 1.2 says: `no` is text and `1e-2` a number. A value that says the same in another form than
    its field declares (`"1e-2"`, `yes` for a bool) becomes what is declared.

    Args:
        source: a name, the key of a system or a path, see [`find_recipe`].
        overrides: `key.subkey=value` strings; values are YAML. A stage goes by its number from 0.

    Raises:
        FileNotFoundError: if there is neither a file nor a shipped recipe of that name, or a file that the recipe
            names is missing.
        ValueError: if the recipe is not YAML; a field is unknown, missing or has a value that it does not take; an
            override is not of the form above; the training is to evaluate in between; an adapter's recipe has what
            only a model's takes. File, section and field are named.
    """
    path = find_recipe(source)
    place = f"recipe {path.name}"
    try:
        content = read_yaml(path.read_text(encoding="utf-8"), place)
    except UnicodeDecodeError as error:
        raise ValueError(f"The {place} is no text in UTF-8: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"The {place} has to be a mapping with at least name, model and data; it is {content!r:.80}.")
    for override in overrides or []:
        _override(content, override)
    recipe = _checked(content, place, path.name)
    check_sources(recipe, place)
    if recipe.adapter is not None:
        with named(f"adapter of the {place}"):
            adapter_config(recipe.adapter)
    else:
        check_model(recipe, place)
    return recipe


def adapter_config(options: dict[str, Any]) -> MoeLoraConfig:
    """Return the configuration that a recipe's `adapter` describes.

    Raises:
        ValueError: if a field, the system or its variant is unknown, or a value is refused.
    """
    options = dict(options)
    system, variant = options.pop("system", None), options.pop("variant", None)
    known = ["system", "variant", *ADAPTER_FIELDS]
    for name in options:
        if name not in known:
            raise ValueError(unknown_name_message("field of the adapter", str(name), known))
    for name, value in (("system", system), ("variant", variant)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"adapter.{name}={value!r}: expected text.")
    if system is None:
        if variant is not None:
            raise ValueError(f"adapter.variant={variant!r} is a form of a published system: name that in `system`.")
        return MoeLoraConfig(**options)
    if "peft_type" in load_system(system).fields("adapter", variant):
        raise ValueError(f"adapter.system={system!r} is a method of PEFT's own, which no recipe trains.")
    return MoeLoraConfig.from_system(system, variant=variant, **options)


def _checked(content: dict[str, Any], place: str, file: str) -> Recipe:
    """Return the recipe with every field of its declared type."""
    model, adapter = content.get("model"), content.get("adapter")
    of_adapter = adapter is not None or (isinstance(model, dict) and "base" in model)
    if of_adapter and not (
        isinstance(adapter, dict) and isinstance(model, dict) and isinstance(model.get("base"), str)
    ):
        raise ValueError(
            f"The {place} needs both model.base, the name of a model, and adapter, the fields of a MoeLoraConfig, to "
            f"train an adapter; it has model: {model!r} and adapter: {adapter!r}."
        )
    stages = content.get("stages")
    in_stages = isinstance(stages, list) and all(isinstance(stage, dict) for stage in stages)
    # Stages go first one by one, so that an error says which.
    numbered = enumerate(stages, start=1) if in_stages and stages is not None else ()
    checked = [fit(stage, Stage, f"stage {number} of {file}") for number, stage in numbered]
    fitted = fit({**content, "stages": [] if in_stages else stages}, Recipe, place)
    for name, kinds in SECTIONS.items():
        if name in fitted:
            kind = Host if name == "model" and "host" in fitted[name] else kinds[of_adapter]
            fitted[name] = fit(fitted[name], kind, place, name)
    for owner, where in ((fitted, place), *((stage, f"stage {n} of {file}") for n, stage in enumerate(checked, 1))):
        if "training" in owner:
            owner["training"] = check_training(owner["training"], where)
    if of_adapter and (checked or "trainable" in content):
        name = "stages" if checked else "trainable"
        raise ValueError(f"The {place} has {name}, and an adapter's has none: what is trained is the adapter.")
    if checked and "trainable" in content:
        raise ValueError(f"The {place} has trainable beside stages: each stage has its own.")
    recipe = Recipe(**{**fitted, "stages": [Stage(**stage) for stage in checked]})
    _check_names(recipe, place)
    for key in ("model", "adapter"):
        refuse_words(getattr(recipe, key), place, key)
    for number, stage in enumerate(recipe.stages):
        for key in ("construct", "evolve", "objectives"):
            refuse_words(getattr(stage, key), place, f"stages.{number}.{key}")
    check_arguments(recipe.training, recipe.seed, place)
    for number, stage in enumerate(recipe.stages, start=1):
        check_arguments({**recipe.training, **stage.training}, recipe.seed, f"stage {number} of {file}")
    return recipe


def _check_names(recipe: Recipe, place: str) -> None:
    # Folders are named after them.
    names = [("name", recipe.name), *((f"stages.{n}.name", stage.name) for n, stage in enumerate(recipe.stages))]
    for key, name in names:
        if not name.strip() or name in (".", "..") or set(name) & set("/\\\0"):
            raise ValueError(f"The {place} has {key}={name!r}, expected a name that can be a folder's.")
    if recipe.evaluation and recipe.data.get("eval") is None:
        raise ValueError(f"The {place} has an evaluation and no data.eval to score: add it, or set evaluation={{}}.")


def _override(content: dict[str, Any], override: str) -> None:
    """Set one value of a recipe by its `key=value`."""
    key, separator, text = override.partition("=")
    names = key.split(".")
    if not separator or not all(names):
        raise ValueError(f"--set {override!r}: expected key=value, for example training.max_steps=10.")
    holder: Any = content
    for depth, name in enumerate(names):
        above = ".".join(names[:depth]) or "the recipe"
        if isinstance(holder, list):
            if not name.isdecimal() or int(name) >= len(holder):
                raise ValueError(
                    f"--set {override!r}: {above} holds {len(holder)} items, numbered from 0; got {name!r}."
                )
        elif not isinstance(holder, dict):
            raise ValueError(f"--set {override!r}: {above} is {holder!r}, which has no field {name!r}.")
        place: Any = int(name) if isinstance(holder, list) else name
        if depth == len(names) - 1:
            holder[place] = read_yaml(text, f"value of --set {override!r}")
        else:
            if isinstance(holder, dict) and holder.get(place) is None:
                holder[place] = {}
            holder = holder[place]
