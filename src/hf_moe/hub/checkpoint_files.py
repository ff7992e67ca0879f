"""Reads the files of a checkpoint as the commands need them; a damaged one is an error that names it."""

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import SafetensorsParsingError, StrictDataclassFieldValidationError
from safetensors import safe_open

from ..configuration.configuration_hf_moe import HfMoeConfig
from ..configuration.reading import check_config_fields, parse_object, read_object, read_text
from ..modeling.loading import INDEX, INTEGERS, files_of_index
from .bundle import relative_imports
from .contents import whole_model


OTHER_JSON_FILES = ("generation_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json")


def read_config(folder: Path) -> Any:
    """Return the config of a model of this library; refuse one that is damaged, or that of another model."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: it is no checkpoint.")
    return parse_config(str(path), read_text(path))


def parse_config(name: str, text: str) -> Any:
    """Return the config in the text of a file, see [`read_config`]."""
    plain = parse_object(name, text)
    if plain.get("model_type") != HfMoeConfig.model_type:
        given = plain.get("model_type")
        raise ValueError(f"{name} is of model_type {given!r}; this command is for {HfMoeConfig.model_type!r}.")
    check_config_fields(name, plain)
    try:
        return HfMoeConfig.from_dict(plain)
    except (AttributeError, KeyError, TypeError, StrictDataclassFieldValidationError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def weights_files(folder: Path) -> list[str]:
    """Return the names of the weights files that a checkpoint must hold."""
    return files_of_index(folder / INDEX) if (folder / INDEX).is_file() else ["model.safetensors"]


def check_whole(folder: Path) -> None:
    """Refuse a checkpoint with a missing or damaged file; every value of the weights is read once."""
    for name in OTHER_JSON_FILES:
        if (folder / name).is_file():
            read_object(folder / name)
    tensors: dict[str, Any] = {}
    home: dict[str, str] = {}
    for name in weights_files(folder):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}, which its index names.")
        own = _tensors(folder / name)
        tensors |= own
        home |= dict.fromkeys(own, name)
    if (folder / INDEX).is_file() and read_object(folder / INDEX)["weight_map"] != home:
        raise ValueError(f"{folder / INDEX} does not name the tensors that the weights files hold: save them again.")
    for path in sorted(folder.glob("*.py")):
        try:
            compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{path} is damaged: it is no Python code ({error}).") from error
        for module in relative_imports(read_text(path)):
            if not (folder / f"{module}.py").is_file():
                raise FileNotFoundError(f"{folder} lacks {module}.py, which {path.name} imports.")
    problems = tensor_problems(whole_model(read_config(folder)), tensors)
    problems += _no_numbers(folder, sorted(set(home.values())))
    if problems:
        raise ValueError(f"{folder} does not hold the weights of the model in its config.json: {'; '.join(problems)}.")


def _no_numbers(folder: Path, files: list[str]) -> list[str]:
    """Return which tensors hold values that are no finite numbers."""
    found = []
    for file in files:
        with safe_open(folder / file, framework="pt") as weights:
            values = ((name, weights.get_tensor(name)) for name in weights.keys())  # noqa: SIM118
            wrong = [
                name for name, value in values if value.is_floating_point() and not value.float().isfinite().all()
            ]
        found += [f"{file} holds NaN or infinity in {name}" for name in wrong]
    return found[:3]


def _tensors(path: Path) -> dict[str, Any]:
    """Return what the header of a weights file that is whole says of each tensor."""
    try:
        tensors = parse_local_safetensors_file_metadata(path).tensors
    except SafetensorsParsingError as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    end = max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
    if not tensors or path.stat().st_size != header + end:
        given = f"its header names {end:,} bytes of weights, and it holds {path.stat().st_size - header:,}"
        raise ValueError(f"{path} is damaged or cut short: {given}.")
    return tensors


def tensor_problems(model: torch.nn.Module | None, tensors: dict[str, Any]) -> list[str]:
    """Return what the weights lack of a [`whole_model`], and what they have beside it.

    Nothing is said of a model whose mechanisms are not all installed, nor of a host's own names, under which older
    versions saved the experts one by one.
    """
    if model is None or any(re.search(r"\.experts\.\d+\.", name) for name in tensors):
        return []
    own = model.state_dict()
    counters = tuple(name for name in [*own, *tensors] if name.startswith("objectives."))
    optional = {*model.all_tied_weights_keys, *counters}
    shared = {name: (own[name], tensors[name]) for name in own if name in tensors}
    problems = {
        "lack": [name for name in own if name not in tensors and name not in optional],
        "hold, and the model has not,": [name for name in tensors if name not in own and name not in counters],
        "differ in shape:": [
            name for name, (one, other) in shared.items() if one.numel() and tuple(one.shape) != tuple(other.shape)
        ],
        "are integers, and should be floats:": [
            name for name, (one, other) in shared.items() if one.is_floating_point() and other.dtype in INTEGERS
        ],
    }
    return [
        f"the weights {what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in problems.items()
        if names
    ]
