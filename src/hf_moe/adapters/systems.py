"""The presets of published systems of LoRA experts, one YAML file per key."""

from importlib.resources import files
from typing import Any

import yaml

from ..configuration.configuration_hf_moe import unknown_name_message


PRESETS = files(__package__) / "presets"


def load_system(key: str, variant: str | None = None) -> dict[str, Any]:
    """Return the preset of a system: `key`, `title`, `arxiv`, `year`, `method` and `config`, the fields it sets.

    Args:
        key: the system.
        variant: which of its forms; the first one when `None`.

    Raises:
        ValueError: if no preset has that key, or no such variant; the nearest names are given.
    """
    keys = _keys()
    if key not in keys:
        raise ValueError(unknown_name_message("system of LoRA experts", key, keys))
    preset = yaml.safe_load((PRESETS / f"{key}.yaml").read_text(encoding="utf-8"))
    variants = preset.pop("variants", {})
    if variant is None:
        variant = next(iter(variants), None)
    elif variant not in variants:
        raise ValueError(unknown_name_message(f"variant of {key!r}", variant, list(variants)))
    preset.setdefault("method", "moe_lora")
    preset["config"] = {**preset.get("config", {}), **variants.get(variant, {})}
    return preset


def list_systems() -> list[dict[str, Any]]:
    """Return what `MoeLoraConfig.from_system` can build: `key`, `title`, `arxiv`, `year`, `method` and `config`."""
    return [load_system(key) for key in _keys()]


def _keys() -> list[str]:
    return sorted(item.name.removesuffix(".yaml") for item in PRESETS.iterdir() if item.name.endswith(".yaml"))
