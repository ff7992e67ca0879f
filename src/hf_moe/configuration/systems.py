"""The presets: published systems as a `moe_config`, one YAML file per key."""

from importlib.resources import files
from typing import Any

import yaml

from .configuration_hf_moe import unknown_name_message


PRESETS = files(__package__) / "presets"


def load_preset(key: str) -> dict[str, Any]:
    """Return the preset of a system: `key`, `title`, `arxiv`, `year`, `family` and its `moe_config`.

    Raises:
        ValueError: if no preset has that key; the nearest keys are given.
    """
    keys = _keys()
    if key not in keys:
        if (files("hf_moe") / "adapters" / "presets" / f"{key}.yaml").is_file():
            raise ValueError(f"{key!r} is a system of adapters: hf_moe.MoeLoraConfig.from_system({key!r}) for PEFT.")
        raise ValueError(unknown_name_message("system", key, keys))
    return yaml.safe_load((PRESETS / f"{key}.yaml").read_text(encoding="utf-8"))


def list_systems() -> list[dict[str, Any]]:
    """Return what this version can build: `key`, `title`, `arxiv`, `family` and `sets` (fields of `moe_config`)."""
    return [
        {name: preset[name] for name in ("key", "title", "arxiv", "family")} | {"sets": sorted(preset["moe_config"])}
        for preset in map(load_preset, _keys())
    ]


def _keys() -> list[str]:
    return sorted(item.name.removesuffix(".yaml") for item in PRESETS.iterdir() if item.name.endswith(".yaml"))
