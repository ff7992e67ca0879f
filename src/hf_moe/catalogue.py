"""What is known of a published system, as text: its record, equations, differences, checks, numbers and a build.

`hf-moe list systems` and `hf-moe show KEY` print it, and `tools/system_pages.py` writes it as pages.
"""

import argparse
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .configuration.layer_maps import layer_values
from .configuration.moe_config import objective_entry
from .configuration.systems import SystemRecord, load_system
from .modeling.mechanisms import get_mechanism
from .modeling.registry import KINDS


# In a checkout; an installed package has neither results nor tests.
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TINY = "hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4"
WORDS = f"{TINY}, vocab_size=512"
# A kind of its own: what PEFT puts beside a layer is no mechanism of a model.
ADAPTER_EXPERTS = "adapter experts"
# The routing of the MoE that is adapted, which a model of its own has no use for.
HOST_ROUTER = ("router", "host")
# What experts are made of, in the form `construct` of a record.
SOURCE = "source"
# How an example makes the model that a system is built on.
HOSTS = {
    "jamba": f"""\
from transformers import JambaConfig, JambaForCausalLM

mixers = dict(num_key_value_heads=4, attn_layer_period=4, attn_layer_offset=3)
host = JambaForCausalLM(JambaConfig({WORDS}, num_experts=1, **mixers))""",
    "llama": f"""\
from transformers import LlamaConfig, LlamaForCausalLM

host = LlamaForCausalLM(LlamaConfig({WORDS}))""",
    "llava": f"""\
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

text, vision = LlamaConfig({WORDS}), CLIPVisionConfig({TINY})
host = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=9))""",
    "mixtral": f"""\
from transformers import MixtralConfig, MixtralForCausalLM

host = MixtralForCausalLM(MixtralConfig({WORDS}, num_key_value_heads=2))""",
    "vit": f"""\
from transformers import ViTConfig, ViTForImageClassification

host = ViTForImageClassification(ViTConfig({TINY}))""",
}


def mechanisms_of(record: SystemRecord) -> list[tuple[str, str]]:
    """Return kind and name of every mechanism that a record names, in any of its forms."""
    forms = [record.model, record.config, record.adapter, record.construct, *record.variants.values()]
    named = [item for fields in forms for item in _named(fields or {})]
    of_adapters = {"experts": ADAPTER_EXPERTS} if record.adapter is not None else {}
    return list(dict.fromkeys((of_adapters.get(kind, kind), name) for kind, name in named))


def _named(fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in fields.items():
        if key == "objectives":
            yield from (("objective", objective_entry(*item)[0]) for item in value.items())
        elif key in (*KINDS, SOURCE):
            values = [item if isinstance(item, dict) else {"name": item} for item in layer_values(value)]
            yield from ((key, item["name"]) for item in values if item.get("name"))
        elif isinstance(value, dict):
            yield from _named(value)


def build_lines(record: SystemRecord) -> str:
    """Return a Python program of a few lines that builds the system and saves it."""
    if record.build is not None:
        return record.build.strip()
    return (
        f"import hf_moe\n{HOSTS[record.host]}\n"
        f'model = hf_moe.from_system("{record.key}", host=host)\n'
        f'model.save_pretrained("{record.key}")'
    )


def page(record: SystemRecord) -> str:
    """Return everything about a system, as Markdown."""
    source = f", [arXiv:{record.arxiv}](https://arxiv.org/abs/{record.arxiv})" if record.arxiv else ""
    year = f", {record.year}" if record.year else ""
    forms = {name: getattr(record, name) for name in (*record.forms, "config", "variants") if getattr(record, name)}
    sections = [
        f"# {record.key}\n\n*{record.title}*{year}{source}. Family: {record.family}.",
        f"## What it sets\n\n```yaml\n{yaml.safe_dump(forms, sort_keys=False, width=110).strip()}\n```",
        f"## Build it\n\n```python\n{build_lines(record)}\n```",
    ]
    if record.recipe:
        sections.append(f"Train it, from data to checkpoint: `hf-moe train {record.recipe}`.")
    # What the system is named for comes before what it is built on.
    mechanisms = sorted(mechanisms_of(record), key=lambda item: item[1] not in (record.key, *record.aliases))
    sections += [_mechanism(kind, name) for kind, name in mechanisms]
    if record.differs:
        sections.append("## Where it leaves the paper\n\n" + "\n".join(f"- {item}" for item in record.differs))
    sections.append("## What the tests check\n\n" + "\n".join(f"- `{item}`" for item in record.check))
    if record.measured:
        sections.append("## Numbers")
        sections += [numbers(pointer) for pointer in record.measured]
    file = f"src/hf_moe/configuration/systems/{record.family}/{record.key}.yaml"
    return "\n\n".join([*sections, f"The record: `{file}`."]) + "\n"


def mechanism_class(kind: str, name: str) -> type:
    """Return the class of a mechanism, also of those that adapters alone can run."""
    # Imported where they are asked for: PEFT takes seconds, and an environment may not have it.
    if kind == SOURCE:
        from .construction.expert_sources import source_class

        return source_class(name)
    if kind == ADAPTER_EXPERTS:
        from .adapters.experts import EXPERT_KINDS

        return EXPERT_KINDS[name]
    if (kind, name) == HOST_ROUTER:
        from .adapters.host_router import HostRouter

        return HostRouter
    return get_mechanism(kind, name)


def _mechanism(kind: str, name: str) -> str:
    """Return what the file of a mechanism says of it."""
    module = sys.modules[mechanism_class(kind, name).__module__]
    file = f"src/{module.__name__.replace('.', '/')}.py"
    return f"## {kind.capitalize()} `{name}`\n\n{inspect.getdoc(module)}\n\nThe code: `{file}`."


def numbers(pointer: str) -> str:
    """Return what a pointer into benchmarks/results leads to, as a table of the numbers in each row.

    Args:
        pointer (`str`): a file and a path in it, `"hosts.json#contestants/moiie"`.

    Raises:
        ValueError: if the file has no such path.
    """
    file, _, path = pointer.partition("#")
    if not RESULTS.is_dir():
        return f"`benchmarks/results/{pointer}`, in the repository."
    rows: Any = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    for name in path.split("/"):
        if name not in rows:
            raise ValueError(f"benchmarks/results/{file} has no {path!r}: it lacks {name!r} beside {list(rows)}.")
        rows = rows[name]
    rows = rows if isinstance(rows, list) else [rows]
    columns = [name for name, value in rows[0].items() if isinstance(value, int | float | str)]
    table = [columns, ["---"] * len(columns), *([_number(row.get(name)) for name in columns] for row in rows)]
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    return f"`benchmarks/results/{pointer}`\n\n{lines}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hf-moe show`."""
    parser.add_argument("key", help="a key of `hf-moe list systems`, or a name of one of its mechanisms")


def run(args: argparse.Namespace) -> int:
    """Run `hf-moe show`."""
    print(page(load_system(args.key)), end="")
    return 0
