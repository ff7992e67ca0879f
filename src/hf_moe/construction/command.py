"""`hf-moe build`: a checkpoint folder from a model or from parts, and a report of what it holds."""

import argparse
import ctypes
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..analysis.routing_statistics import RoutingStatistics, active_parameters
from ..hub.card import write_card
from ..hub.probe import probe_inputs
from .build import build_model
from .in_place import from_host
from .pretrained import host_processor
from .step_zero import StepZero


LARGEST_SHARD = 5_000_000_000  # in bytes
# From malloc.h: blocks of this many bytes and more get a mapping of their own.
M_MMAP_THRESHOLD, MAPPED_FROM = -3, 2**18
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_checkpoint(
    output: str | Path, overwrite: bool = False, *, host: str | Path | None = None, **options: Any
) -> dict[str, Any]:
    """Build a model and write its checkpoint: weights, config, processor, chat template, generation settings and code.

    The folder appears when it is complete; a failed build leaves nothing behind, and the old folder as it was.

    Args:
        output: the checkpoint's folder.
        overwrite: replace the folder if it is a checkpoint already.
        host: a Hub id or folder of a model of Transformers, which becomes a MoE in place and keeps its processor.
        options: arguments of [`from_host`] where there is a host, else of [`build_model`].

    Returns:
        `processor` (its class; `None` where the host has none), `parameters_total`, `parameters_active` by modality,
        `bytes` of the weights, and, where there were weights, `logit_difference` at step 0 and whether the model is
        `exact` by design.

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
    if host is None:
        model, processor = build_model(**options, on_check=checks.append)
    else:
        processor = host_processor(host, options.get("revision"))
        model = from_host(host, **options, on_check=checks.append)
    report: dict[str, Any] = {
        "processor": None if processor is None else type(processor).__name__,
        "parameters_total": sum(parameter.numel() for parameter in model.parameters()),
        "parameters_active": _active_parameters(model, processor),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        fresh = Path(scratch) / target.name
        for part in _with_parts(model.config):
            if not _is_hub_id(part.name_or_path):
                part.name_or_path = ""  # a folder of this machine means nothing elsewhere
        model.save_pretrained(fresh, max_shard_size=LARGEST_SHARD)
        if processor is not None:
            processor.save_pretrained(fresh)
        # The card, by which the folder can be pushed, needs a package that a build alone does not.
        if importlib.util.find_spec("jinja2") is not None:
            sources = (host, options.get("language_model"), options.get("vision_tower"))
            hub_ids = [source for source in sources if isinstance(source, str) and _is_hub_id(source)]
            write_card(fresh, model=model, report=report, base_models=hub_ids, license=None)
        report["bytes"] = sum(file.stat().st_size for file in fresh.glob("*.safetensors"))
        if target.exists():
            os.replace(target, Path(scratch) / "replaced")
        os.replace(fresh, target)
    for check in checks:
        report |= vars(check)
    return report


def _with_parts(config: Any) -> Iterator[Any]:
    """Yield a config and those of its parts."""
    yield config
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            yield from _with_parts(getattr(config, name))


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not Path(source).exists()


def _return_freed_memory() -> None:
    """Have the C library give the memory of a freed tensor back to the system.

    Left alone, glibc keeps up to 32 MiB of every block for later ones, which seldom fit: a quarter of a model is lost.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)


@torch.no_grad()
def _active_parameters(model: PreTrainedModel, processor: Any) -> dict[str, int]:
    """Return the decoder parameters that an average token of each modality uses at random inputs."""
    inputs = {name: tensor.to(model.device) for name, tensor in probe_inputs(model.config, 0, processor).items()}
    floating = {name: tensor.to(model.dtype) for name, tensor in inputs.items() if tensor.is_floating_point()}
    statistics = RoutingStatistics()
    statistics.update(model(output_routing=True, **inputs | floating).routing)
    return active_parameters(model, statistics)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hf-moe build`."""
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="Hub id or folder of a model of Transformers that becomes a MoE in place")
    source.add_argument(
        "--language-model",
        help="Hub id, folder, .gguf file or packaged model; may be a MoE already, with a tower or not",
    )
    add("--vision-tower", help="Hub id, folder or packaged model; a model of text alone when absent")
    add("--system", help="a key of `hf-moe list systems`; top_k, or a MoE's own routing, when absent")
    add("-o", "--output", required=True, help="the checkpoint's folder")
    add("--overwrite", action="store_true", help="replace the checkpoint that the folder holds")
    overrides = "fields that override the system's: '{\"num_experts\": 8}'"
    add("--moe-config", type=json.loads, metavar="JSON", help=overrides)
    add("--connector", type=json.loads, metavar="JSON", help='default: \'{"name": "mlp"}\'')
    add("--image-size", type=int, help="side of the images in pixels, where the tower leaves it open")
    add("--feature-stage", type=int, help="stage of a packaged convolutional tower")
    add("--revision", help="branch, tag or commit of --model on the Hub")
    add(
        "--source",
        type=name_or_options,
        metavar="NAME|JSON",
        help="how the experts start from feed-forwards: copies, drop_upcycling, ...; as in the system when absent",
    )
    add("--noise", type=float, default=0.0, help="noise on the experts, relative to their standard deviation")
    add("--seed", type=int, default=0)
    dtype = "of the weights; that of --model, or float32, when absent; routers stay float32"
    add("--dtype", choices=DTYPES, help=dtype)


def name_or_options(value: str) -> Any:
    """Return an argument that is a name, or a JSON object with a name and options."""
    return json.loads(value) if value.startswith("{") else value


# What of the command line belongs to one kind of source alone.
OF_PARTS = ("vision_tower", "connector", "image_size", "feature_stage")


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of [`build_checkpoint`] that tell what to build from.

    Raises:
        ValueError: if an option belongs to the other kind of source.
    """
    given = [name for name in (*OF_PARTS, "revision") if getattr(args, name) is not None]
    wrong = [name for name in given if (name in OF_PARTS) == (args.model is not None)]
    if wrong:
        source, other = ("--model", "--language-model") if args.model is not None else ("--language-model", "--model")
        raise ValueError(f"--{wrong[0].replace('_', '-')} belongs to {other}, and this is a build from {source}.")
    if args.model is not None:
        dtype = DTYPES.get(args.dtype)
        return {"host": args.model, "revision": args.revision, "noise": args.noise, "dtype": dtype}
    return {
        "language_model": args.language_model,
        "noise_std": args.noise,
        "dtype": DTYPES[args.dtype or "float32"],
        **{name: getattr(args, name) for name in OF_PARTS},
    }


def run(args: argparse.Namespace) -> int:
    """Run `hf-moe build`."""
    report = build_checkpoint(
        args.output,
        args.overwrite,
        system=args.system,
        moe_config=args.moe_config,
        source=args.source,
        seed=args.seed,
        **source_options(args),
    )
    print(f"{args.output}: {report['bytes'] / 2**20:.1f} MiB of weights, {report['processor'] or 'no processor'}")
    print(f"parameters: {report['parameters_total']:,} in total")
    for modality, count in report["parameters_active"].items():
        print(f"decoder parameters active per {modality} token: {count:,}")
    if "logit_difference" in report:
        design = "" if report["exact"] else " (not exact by design)"
        source = "the decoder" if args.model is None else "the host"
        print(f"largest logit difference to {source} at step 0: {report['logit_difference']:.1e}{design}")
    return 0
