"""`hf-moe pack`: the experts of a trained checkpoint in a smaller form, which answers as before and does not learn."""

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..configuration.configuration_hf_moe import PLACE_FIELDS
from ..configuration.layer_maps import map_layers
from ..configuration.reading import read_text
from ..hub.bundle import replace_text
from ..hub.card import refresh_digests
from ..hub.inspection import inspect_checkpoint
from ..modeling.mechanisms import get_mechanism
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.routing import Experts


# Files of weights, which the packed ones take the place of.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def pack_experts(model: HfMoeForConditionalGeneration) -> None:
    """Pack the experts of a model, in place, where their kind has a packed form; towers and connectors too.

    Args:
        model: its `config` is changed with it, so that what is saved opens packed.

    Raises:
        ValueError: if no experts have such a form, or they are packed already.
    """
    places = [getattr(model.config, name, None) for name in ("moe_config", *PLACE_FIELDS.values())]
    banks = [module for block in model.moe_blocks().values() for module in block.experts.modules()]
    packable = [bank for bank in banks if isinstance(bank, Experts) and bank.can_be_packed and not bank.packed_weights]
    if not packable:
        raise ValueError(
            "No experts of this model can be packed: those of the kind 'mote_ternary' can, once, where they are not "
            "packed yet."
        )
    for bank in packable:
        bank.pack()
    for moe in places:
        if moe is not None:
            moe.experts = map_layers(moe.experts, _packed)


def _packed(experts: dict[str, Any]) -> dict[str, Any]:
    cls: Any = get_mechanism("experts", experts["name"])
    return {**experts, "packed": True} if cls.can_be_packed else experts


def pack_checkpoint(source: str | Path, output: str | Path) -> dict[str, dict[str, int]]:
    """Write a checkpoint with packed experts; everything else is that of `source`, its processor and card included.

    The folder appears when it is complete.

    Args:
        source (`str` or `Path`): a checkpoint's folder.
        output (`str` or `Path`): the new folder.

    Returns:
        `parameters` and `bytes` of the routed experts, `"before"` and `"after"`.

    Raises:
        FileNotFoundError: if there is no such folder.
        FileExistsError: if there is something at `output`.
        ValueError: if it is no checkpoint, or its experts cannot be packed.
    """
    target = Path(output).absolute()
    if target.exists():
        raise FileExistsError(f"{output} exists: choose another folder.")
    before = inspect_checkpoint(Path(source))
    model = HfMoeForConditionalGeneration.from_pretrained(source, dtype="auto")
    pack_experts(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        fresh = Path(scratch) / target.name
        shutil.copytree(source, fresh, ignore=shutil.ignore_patterns(*WEIGHTS))
        model.save_pretrained(fresh)
        if (fresh / "README.md").is_file():
            replace_text(fresh / "README.md", refresh_digests(read_text(fresh / "README.md"), fresh))
        after = inspect_checkpoint(fresh)
        os.replace(fresh, target)
    return {"before": before["groups"]["routed experts"], "after": after["groups"]["routed experts"]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hf-moe pack`."""
    parser.add_argument("source", help="a checkpoint's folder")
    parser.add_argument("-o", "--output", required=True, help="the new checkpoint's folder")


def run(args: argparse.Namespace) -> int:
    """Run `hf-moe pack`."""
    groups = pack_checkpoint(args.source, args.output)
    for name, group in groups.items():
        bits = 8 * group["bytes"] / group["parameters"]
        print(f"routed experts {name:6}: {group['bytes']:>16,} bytes, {bits:.2f} bits for each of their parameters")
    return 0
