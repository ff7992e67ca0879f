"""The presets of published systems of LoRA experts, one YAML file per key."""

from importlib.resources import files
from typing import Any

import yaml

from ..configuration.configuration_hf_moe import unknown_name_message
from ..configuration.systems import list_systems


PRESETS = files(__package__) / "presets"


def load_system(key: str, variant: str | None = None) -> dict[str, Any]:
    """Return the preset of a system.

    Args:
        key: the system.
        variant: which of its forms; the first one when `None`.

    Returns:
        `key`, `title`, `arxiv`, `year`, `method`, `variants`, a list of their names, and `config`, the fields it sets.

    Raises:
        ValueError: if no preset has that key, or no such variant; the nearest names are given.
    """
    keys = _keys()
    if key not in keys:
        if key in [system["key"] for system in list_systems()]:
            raise ValueError(f"{key!r} is a system of whole models: hf_moe.HfMoeConfig.from_system({key!r}).")
        raise ValueError(unknown_name_message("system of LoRA experts", key, keys))
    preset = yaml.safe_load((PRESETS / f"{key}.yaml").read_text(encoding="utf-8"))
    variants = preset.get("variants", {})
    if variant is None:
        variant = next(iter(variants), None)
    elif not variants:
        raise ValueError(f"The system {key!r} has one form alone: leave variant={variant!r} out.")
    elif variant not in variants:
        raise ValueError(unknown_name_message(f"variant of {key!r}", variant, list(variants)))
    preset |= {"method": preset.get("method", "moe_lora"), "variants": list(variants)}
    preset["config"] = {**preset["config"], **variants.get(variant, {})}
    return preset


def list_lora_systems() -> list[dict[str, Any]]:
    """Return what `MoeLoraConfig.from_system` can build, each as `load_system` returns it."""
    return [load_system(key) for key in _keys()]


def merge_fields(preset: Any, given: Any) -> Any:
    """Return a field of a preset with what is given in its place.

    Dicts merge key by key. What replaces the preset's is anything else, an empty dict, and a mechanism of another
    `name`.
    """
    if not isinstance(given, dict) or not given:
        return given
    if isinstance(preset, str):
        preset = {"name": preset}
    if not isinstance(preset, dict) or given.get("name", preset.get("name")) != preset.get("name"):
        return given
    return {**preset, **{key: merge_fields(preset.get(key), value) for key, value in given.items()}}


def _keys() -> list[str]:
    return sorted(item.name.removesuffix(".yaml") for item in PRESETS.iterdir() if item.name.endswith(".yaml"))
