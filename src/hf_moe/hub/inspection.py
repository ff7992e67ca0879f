"""`hf-moe inspect`: what a checkpoint is, read from its config, its code and the headers of its weights.

Neither weights nor code are loaded: of a repository on the Hub only the small files and the first bytes of the weights
are fetched, and no line of it runs.
"""

import argparse
import ast
import hashlib
import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, constants, parse_local_safetensors_file_metadata
from huggingface_hub.errors import SafetensorsParsingError
from huggingface_hub.utils import SafetensorsFileMetadata, httpx

from ..configuration.layer_maps import at_layer
from ..configuration.reading import is_path, read_text
from ..modeling.mechanisms import mechanism_names
from ..modeling.parts import HostParts, host_parts
from .active_parameters import most_active_parameters
from .bundle import PROCESSING, has_own_processor, unsealed, used_names
from .carried import Renewed, listed_mechanisms, parsed, reasons_to_refresh, renew
from .checkpoint_files import parse_config, tensor_problems
from .contents import (
    GROUPS,
    Shapes,
    active_by_shapes,
    bare_model,
    encoder_parameters,
    expert_tensors,
    group_of,
    packed_weights,
    size,
    whole_model,
)
from .host_facts import host_name


SAME, OTHER, UNKNOWN = "as installed", "differs from the installed one", "not part of the package"


class _Files(NamedTuple):
    """The files of a checkpoint, here or on the Hub."""

    names: list[str]
    commit: str | None
    text: Callable[[str], str]
    header: Callable[[str], SafetensorsFileMetadata]


def inspect_checkpoint(
    source: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> dict[str, Any]:
    """Describe a checkpoint without loading it.

    Args:
        source (`str` or `Path`): a folder, or the name of a repository.
        revision (`str`, *optional*): of the repository.
        token (`str` or `bool`, *optional*): as in `huggingface_hub`.

    Returns:
        `commit`, `host` (its class in Transformers; `None` where decoder, tower and connector were put together),
        `parts` (paths of the decoder, the towers and the connectors), `system`, `num_hidden_layers`, `layers` (the
        kinds of MoE layer), `parameters_total`, `parameters_active` (of the decoder, at most at work on a token, by
        modality), `parameters_encoding` (of the towers and connectors that encode each modality), `bytes` and
        `parameters` by group, `mechanisms` with their sources, `code` (file, SHA-256, how it compares with the
        installed package), `problems`, the versions it was `written_by`, and the reasons to `refresh` its code. Of
        a router that is not installed all parameters count as active, its buffers too, and `num_experts_per_tok`
        experts.

    Raises:
        FileNotFoundError: if there is no such folder or no config in it.
        ValueError: if it is no checkpoint of this library.
        OSError: if the Hub refuses or cannot be reached.
    """
    try:
        files = _local(Path(source)) if is_path(str(source)) else _remote(str(source), revision, token)
        return {"source": str(source), "commit": files.commit, **_describe(str(source), files)}
    except httpx.TransportError as error:
        reason = f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}: {error})"
        raise OSError(f"{source} is no folder here, and {reason}.") from error
    except SafetensorsParsingError as error:
        raise ValueError(f"The weights of {source} are damaged or cut short: {error}") from error


def _describe(source: str, files: _Files) -> dict[str, Any]:
    if "config.json" not in files.names:
        raise FileNotFoundError(f"{source} holds no config.json: it is no checkpoint.")
    config = parse_config(f"{source}/config.json", files.text("config.json"))
    tensors = {
        name: tensor
        for file in files.names
        if re.fullmatch(r"[^/]+\.safetensors", file)
        for name, tensor in files.header(file).tensors.items()
    }
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    whole = whole_model(config)
    known = bare_model(config) if whole is None else whole
    parts = host_parts(known)
    # Counters and running statistics are state of a model, no parameters.
    state = {name for name, _ in known.named_buffers()} | {name for name in shapes if name.startswith("objectives.")}
    shapes = {name: shape for name, shape in shapes.items() if name not in state}
    groups = _groups(tensors, shapes, parts, packed_weights(known))
    code = {name: files.text(name) for name in files.names if re.fullmatch(r"[^/]+\.py", name)}
    renewed = renew(config, code, has_own_processor(config) and PROCESSING.name in code)
    rows, problems = _compare_code(files, config, code, renewed)
    if not tensors:
        problems.append("there is no weights file (.safetensors)")
    problems += tensor_problems(whole, tensors)
    active = active_by_shapes(config, shapes, parts) if whole is None else most_active_parameters(whole)
    return {
        "host": host_name(config),
        "parts": {"decoder": parts.decoder, "towers": list(parts.towers), "connectors": list(parts.connectors)},
        "system": config.system,
        "num_hidden_layers": config.get_text_config(decoder=True).num_hidden_layers,
        "layers": _layers(config, shapes, parts, whole),
        "parameters_total": sum(group["parameters"] for group in groups.values()),
        "parameters_active": active,
        "parameters_encoding": encoder_parameters(shapes, parts, config),
        "groups": groups,
        "mechanisms": _mechanisms(code),
        "code": rows,
        "problems": problems,
        "written_by": {"hf_moe": config.hf_moe_version, "transformers": config.transformers_version},
        "refresh": reasons_to_refresh(code, renewed),
    }


def _local(folder: Path) -> _Files:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    return _Files(
        names=sorted(path.name for path in folder.iterdir() if path.is_file()),
        commit=None,
        text=lambda name: read_text(folder / name),
        header=lambda name: parse_local_safetensors_file_metadata(folder / name),
    )


def _remote(repo_id: str, revision: str | None, token: str | bool | None) -> _Files:
    api = HfApi(token=token)
    info = api.model_info(repo_id, revision=revision)
    return _Files(
        names=sorted(sibling.rfilename for sibling in info.siblings or []),
        commit=info.sha,
        text=lambda name: Path(api.hf_hub_download(repo_id, name, revision=info.sha)).read_text(encoding="utf-8"),
        header=lambda name: api.parse_safetensors_file_metadata(repo_id, name, revision=info.sha),
    )


def _groups(
    tensors: dict[str, Any], shapes: Shapes, parts: HostParts, packed: dict[str, int]
) -> dict[str, dict[str, int]]:
    """Return the parameters and the bytes of each group that the checkpoint holds something of."""
    groups = {group: {"parameters": 0, "bytes": 0} for group in GROUPS}
    for name, tensor in tensors.items():
        groups[group_of(name, parts)]["bytes"] += tensor.data_offsets[1] - tensor.data_offsets[0]
    for name, shape in shapes.items():
        groups[group_of(name, parts)]["parameters"] += size(shape)
    for path, count in packed.items():
        groups[group_of(path, parts)]["parameters"] += count
    return {name: group for name, group in groups.items() if group["bytes"]}


def _expert_widths(shapes: Shapes, parts: HostParts, layer: int) -> list[int]:
    """Return the inner widths of a layer's routed experts, smallest first."""
    outputs = {name: list(shapes[name])[-1] for name in expert_tensors(shapes, parts, layer)}
    return sorted({width for name, width in outputs.items() if re.search(r"\.(down_proj|w2)(\.weight)?$", name)})


def _layers(config: Any, shapes: Shapes, parts: HostParts, whole: Any) -> list[dict[str, Any]]:
    """Return the kinds of MoE layer, each with its layers, in order of first appearance."""
    moe = config.moe_config
    kinds: dict[str, dict[str, Any]] = {}
    for layer in config.moe_layers():
        names = ("router", "experts", "num_experts", "num_experts_per_tok", "num_shared_experts")
        row = {
            **{name: at_layer(getattr(moe, name), layer) for name in names},
            "banks": {name: bank["num_experts"] for name, bank in (at_layer(moe.expert_banks, layer) or {}).items()},
            "expert_width": _expert_widths(shapes, parts, layer)
            if whole is None
            else sorted(set(whole.moe_layers()[layer].expert_spec.expert_widths)),
        }
        kinds.setdefault(json.dumps(row, sort_keys=True), {"layers": [], **row})["layers"].append(layer)
    return list(kinds.values())


def _mechanisms(code: dict[str, str]) -> list[dict[str, str]]:
    """Return what the checkpoint's own list of mechanisms names, with the source that each file's docstring gives."""
    found = []
    for item in listed_mechanisms(code):
        file = f"{item.module}.py"
        docstring = (ast.get_docstring(parsed(file, code[file])) or "") if file in code else ""
        source = " ".join(docstring.partition("\nSource")[2].lstrip("s:").split())
        found.append({"kind": item.kind, "name": item.name, "file": file, "source": source})
    return found


def _compare_code(files: _Files, config: Any, code: dict[str, str], renewed: Renewed) -> tuple[list[dict], list[str]]:
    """Compare the bundled files with what the installed package would write, and with what the card lists."""
    problems = [
        f"the installed package has no {kind} {name!r}"
        for kind, names in used_names(config).items()
        for name in names
        if name not in mechanism_names(kind)
    ]
    problems += [f"{name} is missing" for name in sorted(set(renewed.files) - set(code))]
    card = files.text("README.md") if "README.md" in files.names else ""
    listed = dict(re.findall(r"^\| `([^`]+\.py)` \| `([0-9a-f]{64})` \|$", card, flags=re.MULTILINE))
    rows = []
    for name, text in code.items():
        digest = hashlib.sha256(text.encode()).hexdigest()
        if name not in renewed.files or name in renewed.carried:
            state = UNKNOWN
        else:
            state = SAME if unsealed(text) == unsealed(renewed.files[name]) else OTHER
        rows.append({"file": name, "sha256": digest, "state": state})
        if listed.get(name, digest) != digest:
            problems.append(f"{name} is not the file whose SHA-256 the card lists")
    return rows, problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hf-moe inspect`."""
    parser.add_argument("source", help="a checkpoint's folder, or user/name on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")


def run(args: argparse.Namespace) -> int:
    """Run `hf-moe inspect`."""
    found = inspect_checkpoint(args.source, revision=args.revision)
    print(f"{found['source']}" + (f" at {found['commit']}" if found["commit"] else ""))
    print(f"Host: {found['host'] or 'put together'}")
    for kind, paths in found["parts"].items():
        print(f"  {kind}: {', '.join([paths] if isinstance(paths, str) else paths) or 'none'}")
    system = f", system {found['system']}" if found["system"] else ""
    print(f"\n{found['num_hidden_layers']} decoder layers{system}. Layers with a mixture of experts:")
    for row in found["layers"]:
        width = " and ".join(map(str, row["expert_width"])) or "unknown"
        banks = " + ".join(f"{name} {count}" for name, count in row["banks"].items())
        banks = f", banks {banks}" if banks else ""
        print(
            f"  {', '.join(map(str, row['layers']))}: {row['num_experts']} experts of width {width}{banks}, "
            f"{row['num_experts_per_tok']} per token, {row['num_shared_experts']} shared"
        )
        for kind in ("router", "experts"):
            options = ", ".join(f"{name}={value}" for name, value in row[kind].items() if name != "name")
            print(f"    {kind} {row[kind]['name']}" + (f" ({options})" if options else ""))
    print(f"\n{found['parameters_total']:,} parameters; of the decoder, at most at work on a token:")
    for name, count in found["parameters_active"].items():
        encoding = found["parameters_encoding"][name]
        print(f"  {count:>16,}  {name}" + (f", and {encoding:,} that encode it" if encoding else ""))
    print("\nParameters and bytes by group:")
    for name, group in found["groups"].items():
        bits = f", {8 * group['bytes'] / group['parameters']:.4g} bits each" if group["parameters"] else ""
        print(f"  {group['parameters']:>16,} {group['bytes']:>16,}  {name}{bits}")
    print("\nMechanisms:")
    for item in found["mechanisms"]:
        print(f"  {item['kind']} {item['name']}: {item['source'] or 'no source named'}")
    print(f"\nCode, compared with hf-moe {version('hf-moe')}:")
    for item in found["code"]:
        print(f"  {item['sha256']}  {item['file']}: {item['state']}")
    for problem in found["problems"]:
        print(f"  ! {problem}")
    ours, theirs = (found["written_by"][name] or "(version unknown)" for name in ("hf_moe", "transformers"))
    print(f"Written by hf-moe {ours} with Transformers {theirs}.")
    if found["refresh"]:
        print(f"The code should be written anew, with `hf-moe refresh {found['source']}`:")
        for reason in found["refresh"]:
            print(f"  {reason}")
    return 0
