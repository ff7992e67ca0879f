"""Writes docs/configuration.md from the code.

python tools/config_reference.py
"""

import inspect
import re
import sys
from pathlib import Path
from typing import Any, get_args

from hf_moe import HfMoeConfig, MoeConfig, list_mechanisms
from hf_moe.configuration.checks import Interval, in_words, option_hints
from hf_moe.configuration.composed_config import ComposedConfig
from hf_moe.modeling.mechanisms import get_mechanism


ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration reference

Written from the code by `make docs`; edit the docstrings, not this file.

A model is described by one `HfMoeConfig`: the config of its host, every field under its own name, and a `moe_config`
that says which layers of the host's decoder are mixtures of experts and what they are made of. The host is any model
of Transformers with a language head, by its `host_type`, or one that is put together from a decoder, a vision tower
and a connector. A published system fills the `moe_config`:

```python run
from transformers import CLIPVisionConfig, LlamaConfig

from hf_moe import HfMoeConfig

config = HfMoeConfig.from_system(
    "moiie",
    text_config=LlamaConfig(),
    vision_config=CLIPVisionConfig(),
    image_token_id=31999,
    moe_config={"num_experts": 8},  # overrides the record's
)
```

```python run
from transformers import Qwen2_5_VLConfig

hosted = HfMoeConfig.on_host(Qwen2_5_VLConfig(), "Qwen2_5_VLForConditionalGeneration", moe_config={"num_experts": 4})
```

A mechanism is named by a dict, `{"name": "top_k", "norm_topk_prob": false}`; without options its name alone will do.
An unknown name or option is an error that gives the nearest valid ones, and a value of another type than declared or
out of its range is one that gives both. A string that spells a number, as YAML reads `1e-3`, is taken for it where a
number is declared. Any value of `moe_config` may be a map from layer to value, at any depth:
`{"default": 8, "3": 16}`.
"""

KINDS = {
    "router": ("Routers", "`moe_config.router`: which experts a token uses."),
    "experts": ("Experts", "`moe_config.experts`: what an expert is."),
    "objective": (
        "Objectives",
        "`moe_config.objectives`: auxiliary losses, by name. The value is a coefficient, or a dict of `coef` and "
        'options: `{"load_balance": {"coef": 0.01, "scope": "sequence"}, "router_z": 0.001}`. Every one takes '
        '`layer_reduction`: `"mean"` over the MoE layers, the default, or `"sum"`. Two of one kind have labels, under '
        "which they are logged, and say their name: "
        '`{"experts": {"name": "load_balance", "coef": 0.01}, "devices": {"name": "load_balance", "coef": 0.05, '
        '"expert_groups": 4}}`.',
    ),
    "connector": ("Connectors", "`connector`: the module between the vision tower and the decoder."),
}


def documented_arguments(cls: type) -> dict[str, tuple[str, str]]:
    """Return the entries of a docstring's `Args:` section, name to (what stands in parentheses, description)."""
    section = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)*)", inspect.getdoc(cls) or "", flags=re.MULTILINE)
    entries: dict[str, tuple[str, str]] = {}
    # An entry begins at the first indent, what is indented further belongs to it.
    for entry in re.split(r"\n(?=[ ]{4}\S)", section.group(1).rstrip()) if section else []:
        found = re.match(r"\s*([\w, ]+?)\s*(?:\((.*?)\))?:\s+(.*)", entry, flags=re.DOTALL)
        if found is None:
            raise ValueError(f"{cls.__name__}: an entry of Args is not of the form `name: text`: {entry.strip()!r}")
        names, facts, text = found.groups()
        for name in names.split(", "):
            entries[name] = (facts or "", " ".join(text.split()))
    return entries


def config_section(cls: type) -> str:
    """Return the fields of a config class. Raises KeyError for a field without documentation."""
    documented = documented_arguments(cls)
    lines = ["- `{}` ({}): {}".format(name, *documented[name]) for name in cls.__annotations__]
    return f"## {cls.__name__}\n\n" + "\n".join(lines) + "\n"


def declaration(hint: Any) -> str:
    """Return the type that an annotation declares, and the range beside it."""
    ranges = re.findall(r"\b(?:be|lie) (.*)", "\n".join(str(item) for item in dict.fromkeys(ranges_within(hint))))
    return ", ".join([f"`{in_words(hint)}`", *ranges])


def ranges_within(hint: Any) -> list[Interval]:
    if isinstance(hint, Interval):
        return [hint]
    return [item for part in getattr(hint, "__metadata__", ()) + get_args(hint) for item in ranges_within(part)]


def mechanism_section(kind: str, name: str) -> str:
    """Return what a mechanism's file says about it, and its options. Raises KeyError for an undocumented option."""
    cls = get_mechanism(kind, name)
    documented = documented_arguments(cls)
    options = [p for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]
    hints = option_hints(cls, 0)
    lines = [
        f"- `{option.name}` ({declaration(hints[option.name])}, default `{option.default!r}`): "
        f"{documented[option.name][1]}"
        for option in options
    ]
    about = inspect.getdoc(sys.modules[cls.__module__])
    return f"### {name}\n\n{about}\n\n" + ("\n".join(lines) if lines else "No options.") + "\n"


def own_mechanisms(kind: str) -> list[str]:
    """Return this library's mechanisms, without those that somebody registered."""
    return [name for name in list_mechanisms(kind) if get_mechanism(kind, name).__module__.startswith("hf_moe.")]


def reference() -> str:
    """Return the text of docs/configuration.md."""
    sections = [INTRODUCTION, *map(config_section, (HfMoeConfig, ComposedConfig, MoeConfig))]
    for kind, (title, introduction) in KINDS.items():
        sections += [
            f"## {title}\n\n{introduction}\n",
            *(mechanism_section(kind, name) for name in own_mechanisms(kind)),
        ]
    # Docstrings link to a class by [`Name`].
    return re.sub(r"\[(`[^`]+`)\](?!\()", r"\1", "\n".join(sections))


def main() -> None:
    REFERENCE.write_text(reference(), encoding="utf-8")
    print(f"Wrote {REFERENCE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
