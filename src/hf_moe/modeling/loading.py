"""Checks of a load: every tensor was read, no file is damaged, and the code that runs is the checkpoint's."""

import copy
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..configuration.reading import check_files, read_object


INDEX = "model.safetensors.index.json"
JSON_FILES = ("config.json", "generation_config.json", INDEX)
INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
# One expert of a stack, as the files of Mixtral and others have it.
ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


def check_checkpoint_files(source: Any) -> None:
    """Refuse a folder whose JSON files, or whose list of weights files, are damaged."""
    check_files(source, JSON_FILES)
    index = Path(source) / INDEX
    if index.is_file():
        files_of_index(index)


def files_of_index(index: Path) -> list[str]:
    """Return the weights files that an index names."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} is damaged: its 'weight_map' must name a file for every tensor. Download it again.")
    return sorted(set(names.values()))


def damaged_weights(source: Any, error: SafetensorError) -> OSError:
    """Return the error that names the damaged weights file."""
    damaged = [path.name for path in sorted(Path(source).glob("*.safetensors")) if not _is_readable(path)]
    return OSError(
        f"A weights file (.safetensors) of {source} is damaged or cut short"
        f"{': ' + ', '.join(damaged) if damaged else ''}: {error}. Copy or download it again."
    )


def _is_readable(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return bool(file.keys())
    except (SafetensorError, OSError):
        return False


def check_number_types(source: Any, floats: set[str]) -> None:
    """Refuse a folder whose weights files hold integers for `floats`: cast ones have lost their digits."""
    for path in sorted(Path(source).glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in floats.intersection(file.keys()):
                if (dtype := file.get_slice(name).get_dtype()) in INTEGERS:
                    raise ValueError(f"{path} holds {name} as {dtype}, but a weight is a float: save the model again.")


def check_tensors(source: Any, report: dict[str, Any], has_head: bool, ignore_shapes: bool) -> None:
    """Refuse weights that are not those of the model; a missing tensor would be drawn at random.

    Args:
        source: the checkpoint.
        report: what `from_pretrained` returns with `output_loading_info`.
        has_head: whether the model has all parts of a checkpoint; without its head it leaves the head's tensors.
        ignore_shapes: the user's `ignore_mismatched_sizes`.
    """
    wrong = []
    if report["missing_keys"]:
        wrong.append(_listed("lack", report["missing_keys"]))
    if report["unexpected_keys"] and has_head:
        wrong.append(_listed("hold tensors that the model does not have:", report["unexpected_keys"]))
    if report["mismatched_keys"] and not ignore_shapes:
        shapes = [
            f"{key} of shape {tuple(stored)}, not {tuple(own)}" for key, stored, own in report["mismatched_keys"]
        ]
        wrong.append(_listed("hold", shapes))
    if wrong:
        raise ValueError(
            f"The weights of {source} are not those of the model in its config.json: they {'; they '.join(wrong)}. "
            "Restore the files of the checkpoint."
        )


def convert_host_names(model: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
    """Give weights for `load_state_dict` the names of the modules; `Trainer` reads checkpoints so.

    Versions before this one saved the experts of some hosts under the host's own names, which only `from_pretrained`
    undoes. A pre-hook of `load_state_dict`, which edits `state_dict`.

    Raises:
        ValueError: if the weights are in several files: each is loaded by itself, and lacks experts of a stack.
    """
    given = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    own = model.state_dict().keys()
    if not any(ONE_EXPERT.search(name) for name in given.keys() - own):
        return
    try:
        converted, report = type(model).from_pretrained(
            None,
            config=copy.deepcopy(model.config),
            state_dict=given,
            dtype=model.dtype,
            output_loading_info=True,
        )
    except RuntimeError as error:
        raise _needs_whole_folder() from error
    if report["missing_keys"]:
        raise _needs_whole_folder()
    for name in given.keys() - own - set(report["unexpected_keys"]):
        del state_dict[prefix + name]
    for name, tensor in converted.state_dict().items():
        # What the objectives have counted is not part of every checkpoint.
        if not name.startswith("objectives."):
            state_dict.setdefault(prefix + name, tensor)


def _needs_whole_folder() -> ValueError:
    return ValueError(
        "These weights bear the names of the decoder's own files, and are only a part of the model: a checkpoint in "
        "several files, which is loaded file by file. Write it anew with model.from_pretrained(folder)"
        ".save_pretrained(folder), which keeps everything else in the folder, and load it again."
    )


def _listed(verb: str, names: Any) -> str:
    shown = sorted(map(str, names))
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    return f"{verb} {', '.join(shown[:3])}{more}"


def refuse_edited_code(folder: Path) -> None:
    """Refuse a folder whose code was edited after its save if this process runs the code as it was before."""
    for running in sorted(Path(__file__).parent.glob("*.py")):
        edited = folder / running.name
        if edited.is_file() and edited.read_bytes() != running.read_bytes():
            # The second line is the digest of all files, which tells the code of two checkpoints apart.
            digests = [path.read_bytes().split(b"\n", 2)[1:2] for path in (running, edited)]
            if digests[0] == digests[1]:
                raise ValueError(
                    f"{edited} was edited after its checkpoint was saved, and this process has opened a checkpoint "
                    "with the code as it was before: Transformers cannot tell them apart. Open the edited one in a "
                    "process of its own."
                )
