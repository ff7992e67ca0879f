"""The page of `space_app.py` on this machine, with a checkpoint from a folder."""

import argparse

from .host_facts import EXAMPLES
from .space import check_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hf-moe demo`."""
    parser.add_argument("folder", help="the checkpoint, for example runs/demo/checkpoint")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")


def run(args: argparse.Namespace) -> int:
    """Run `hf-moe demo`, until it is interrupted."""
    folder = check_folder(args.folder)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError("The page needs gradio: pip install 'hf-moe[space]'") from error
    from .space_app import serve

    serve(str(folder), examples=folder / EXAMPLES, server_port=args.port)
    return 0
