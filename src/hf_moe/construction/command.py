"""`hf-moe build`: a checkpoint folder from its parts, and a report of what it holds."""

import argparse
import ctypes
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..analysis.routing_statistics import RoutingStatistics, active_parameters
from ..hub.card import write_card
from ..hub.probe import probe_inputs
from .build import build_model
from .step_zero import StepZero


LARGEST_SHARD = 5_000_000_000  # in bytes
# From malloc.h: blocks of this many bytes and more get a mapping of their own.
M_MMAP_THRESHOLD, MAPPED_FROM = -3, 2**18
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_checkpoint(output: str | Path, overwrite: bool = False, **options: Any) -> dict[str, Any]:
    """Build a model and write its checkpoint: weights, config, processor, chat template and code.

    The folder appears when it is complete; a failed build leaves nothing behind, and the old folder as it was.

    Args:
        output: the checkpoint's folder.
        overwrite: replace the folder if it is a checkpoint already.
        options: arguments of [`build_model`].

    Returns:
        `parameters_total`, `parameters_active` by modality, `bytes` of the weights, and, where the decoder had
        weights, `logit_difference` at step 0 and whether the model is `exact` by design.

    Raises:
        FileExistsError: if the folder holds something and may not be replaced.
    """
    target = Path(output).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not overwrite:
            raise FileExistsError(f"{output} exists and is not empty: choose another folder, or pass --overwrite.")
        if not (target / "config.json").is_file():
            raise FileExistsError(f"{output} is not a checkpoint (no config.json), so it is not replaced.")
    _return_freed_memory()
    checks: list[StepZero] = []
    model, processor = build_model(**options, on_check=checks.append)
    report: dict[str, Any] = {
        "parameters_total": sum(parameter.numel() for parameter in model.parameters()),
        "parameters_active": probe_active_parameters(model),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        fresh = Path(scratch) / target.name
        for part in filter(None, (model.config.text_config, model.config.vision_config)):
            if not _is_hub_id(part.name_or_path):
                part.name_or_path = ""  # a folder of this machine means nothing elsewhere
        model.save_pretrained(fresh, max_shard_size=LARGEST_SHARD)
        processor.save_pretrained(fresh)
        # The card, by which the folder can be pushed, needs a package that a build alone does not.
        if importlib.util.find_spec("jinja2") is not None:
            sources = (options.get("language_model"), options.get("vision_tower"))
            hub_ids = [source for source in sources if isinstance(source, str) and _is_hub_id(source)]
            write_card(fresh, model=model, report=report, base_models=hub_ids, license=None)
        report["bytes"] = sum(file.stat().st_size for file in fresh.glob("*.safetensors"))
        if target.exists():
            os.replace(target, Path(scratch) / "replaced")
        os.replace(fresh, target)
    for check in checks:
        report |= vars(check)
    return report


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not Path(source).exists()


def _return_freed_memory() -> None:
    """Have the C library give the memory of a freed tensor back to the system.

    Left alone, glibc keeps up to 32 MiB of every block for later ones, which seldom fit: a quarter of a model is lost.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)


@torch.no_grad()
def probe_active_parameters(model: PreTrainedModel, seed: int = 0) -> dict[str, int]:
    """Return the decoder parameters that an average token of text, and of an image, uses at random inputs."""
    inputs = {name: tensor.to(model.device) for name, tensor in probe_inputs(model.config, seed).items()}
    floating = {name: tensor.to(model.dtype) for name, tensor in inputs.items() if tensor.is_floating_point()}
    statistics = RoutingStatistics()
    statistics.update(model(output_routing=True, **inputs | floating).routing)
    return active_parameters(model, statistics)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hf-moe build`."""
    add = parser.add_argument
    add("--language-model", required=True, help="Hub id, folder, .gguf file or packaged model; may be a MoE already")
    add("--vision-tower", help="Hub id, folder or packaged model; a model of text alone when absent")
    add("--system", help="a key of `hf-moe list systems`; top_k, or a MoE decoder's own routing, when absent")
    add("-o", "--output", required=True, help="the checkpoint's folder")
    add("--overwrite", action="store_true", help="replace the checkpoint that the folder holds")
    add(
        "--moe-config",
        type=json.loads,
        metavar="JSON",
        help="fields that override the system's: '{\"num_experts\": 8}'",
    )
    add("--connector", type=json.loads, metavar="JSON", help='default: \'{"name": "mlp"}\'')
    add("--image-size", type=int, help="side of the images in pixels, where the tower leaves it open")
    add("--feature-stage", type=int, help="stage of a packaged convolutional tower")
    add("--noise", type=float, default=0.0, help="noise on the expert copies, relative to their standard deviation")
    add("--seed", type=int, default=0)
    add("--dtype", choices=DTYPES, default="float32", help="of the weights; routers stay float32")


def run(args: argparse.Namespace) -> int:
    """Run `hf-moe build`."""
    report = build_checkpoint(
        args.output,
        args.overwrite,
        language_model=args.language_model,
        vision_tower=args.vision_tower,
        system=args.system,
        moe_config=args.moe_config,
        connector=args.connector,
        image_size=args.image_size,
        feature_stage=args.feature_stage,
        noise_std=args.noise,
        seed=args.seed,
        dtype=DTYPES[args.dtype],
    )
    active = report["parameters_active"]
    print(f"{args.output}: {report['bytes'] / 2**20:.1f} MiB of weights")
    print(f"parameters: {report['parameters_total']:,} in total")
    for modality, count in active.items():
        print(f"decoder parameters active per {modality} token: {count:,}")
    if "logit_difference" in report:
        design = "" if report["exact"] else " (not exact by design)"
        print(f"largest logit difference to the decoder at step 0: {report['logit_difference']:.1e}{design}")
    return 0
