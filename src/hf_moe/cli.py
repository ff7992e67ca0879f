"""The command line: `hf-moe build`, `train`, `compare`, `inspect`, `pack`, `push`, `list`, `show` and others."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from huggingface_hub.errors import StrictDataclassError

from . import list_mechanisms
from .configuration.systems import systems_by_family


# Each module has `add_arguments(parser)` and `run(args) -> int`; it is imported when its command runs, since `train`
# needs packages that the others do not.
COMMANDS = {
    "build": ("hf_moe.construction.command", "make a checkpoint from a decoder, a vision tower and a system"),
    "compare": ("hf_moe.training.comparison", "train systems on the same start, data and active parameters"),
    "demo": ("hf_moe.hub.demo", "open a page that asks a checkpoint and shows its routing"),
    "inspect": ("hf_moe.hub.inspection", "show what a checkpoint is, without loading it"),
    "pack": ("hf_moe.construction.packing", "write a trained checkpoint with its experts in a smaller form"),
    "push": ("hf_moe.hub.push", "upload a checkpoint to the Hub, in one commit"),
    "refresh": ("hf_moe.hub.refresh", "write the code of a checkpoint anew, and check that it answers as before"),
    "show": ("hf_moe.catalogue", "tell all of a published system: equations, differences, checks, numbers, a build"),
    "space": ("hf_moe.hub.space", "write that page as a Space of the Hub, and upload it"),
    "train": ("hf_moe.training.run", "run a recipe: data, model, training, evaluation, checkpoint"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 2 where what was asked cannot be done, 130 where it was interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="hf-moe", description="Multimodal Mixture-of-Experts models.")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="show what this version can build")
    listing.add_argument("what", choices=("systems", "mechanisms"))
    listing.set_defaults(run=_list)
    try:
        for name, (module_name, purpose) in COMMANDS.items():
            command = commands.add_parser(name, help=purpose)
            if name in arguments[:1]:
                module = importlib.import_module(module_name)
                module.add_arguments(command)
                command.set_defaults(run=module.run)
        args = parser.parse_args(arguments)
        return args.run(args)
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        return _end(2, f"error: {' '.join(str(error).split())}", error)
    except KeyboardInterrupt as error:
        return _end(130, "interrupted.", error)


def _end(code: int, message: str, error: BaseException) -> int:
    """Print what ended a command, with what was noted about it on its way, and return the exit code."""
    for line in (message, *getattr(error, "__notes__", ())):
        print(f"hf-moe: {line}", file=sys.stderr)
    return code


def _list(args: argparse.Namespace) -> int:
    if args.what == "systems":
        for family, records in systems_by_family().items():
            print(f"{family}:")
            for record in records:
                source = f" (arXiv:{record.arxiv})" if record.arxiv else ""
                print(f"  {record.key:22} {', '.join(record.forms):14} {record.title}{source}")
    else:
        from .modeling.registry import KINDS

        for kind in KINDS:
            print(f"{kind + ':':11} {', '.join(list_mechanisms(kind))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
