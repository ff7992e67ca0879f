"""Writes the model card of a checkpoint: what the model is, what was measured, and what code it runs."""

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..configuration.layer_maps import at_layer
from ..configuration.moe_config import objective_entry
from ..configuration.reading import is_path
from ..configuration.systems import load_system
from ..modeling.parts import HostParts, host_parts
from .active_parameters import most_active_parameters
from .bundle import used_mechanisms
from .contents import encoder_parameters
from .host_facts import host_name, modalities, model_tags, packages, pipeline_tag
from .results import metric_name, scores, write_evaluation
from .usage import usage


# Beside this file in an installed package, in its own folder in the repository.
REPOSITORY = Path(__file__).parents[3]
KINDS_OF_MODEL = {
    "text-generation": "language",
    "image-text-to-text": "vision-language",
    "video-text-to-text": "video-language",
    "audio-text-to-text": "audio-language",
}
LICENSES = (Path(__file__).with_name("LICENSE"), REPOSITORY / "LICENSE")


def write_card(
    folder: str | Path,
    *,
    model: Any,
    report: dict[str, Any],
    recipe: dict[str, Any] | None = None,
    pictures: Sequence[str] = (),
    base_models: Sequence[str] = (),
    datasets: Sequence[str] = (),
    license: str | None = "apache-2.0",
    language: str | Sequence[str] = (),
) -> Path:
    """Write README.md into a saved checkpoint, the evaluation files of its numbers, and LICENSE; return its path.

    What the report does not hold is left out. `LICENSE` is the text of Apache-2.0, which the code is under. For
    weights under another license it becomes `LICENSE-CODE`: put the text of theirs into `LICENSE`.

    Args:
        folder (`str` or `Path`): the checkpoint, with its code: the model and the processor have been saved to it.
        model (`Any`): the `HfMoeForConditionalGeneration` that was saved.
        report (`dict[str, Any]`): any of [`~hf_moe.hub.results.SHOWN`], such as `accuracy`,
            `accuracy_by_question_type`, `evaluated` (questions), `parameters_active` (by modality), `co2_eq_emissions`
            (in the Hub's form).
        recipe (`dict[str, Any]`, *optional*): the training job as plain data, *optional*; the model takes its `name`,
            else that of the folder.
        pictures (`Sequence[str]`, *optional*, defaults to `()`): files in the folder.
        base_models (`Sequence[str]`, *optional*, defaults to `()`): ids of the pretrained parts.
        datasets (`Sequence[str]`, *optional*, defaults to `()`): what the model was trained on; the results are listed
            under the first one.
        license (`str`, *optional*, defaults to `'apache-2.0'`): of the weights, an identifier of the Hub; `None` where
            it is not known.
        language (`str` or `Sequence[str]`, *optional*, defaults to `()`): codes of the languages that the model reads
            and writes, such as `"en"`.

    Raises:
        FileNotFoundError: if the folder holds no checkpoint, or a picture is not in it.
        ImportError: if jinja2 is not installed.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: save the model and the processor there first.")
    missing = [name for name in pictures if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {', '.join(missing)}: write the pictures into the checkpoint first.")
    template = card_template("card.md.jinja")
    report = write_evaluation(folder, report, datasets)
    config = model.config
    parts = host_parts(model)
    taken = modalities(config)
    task = pipeline_tag(config)
    base_models = list(base_models) or _host_of_recipe(recipe)
    metadata = {
        "library_name": "transformers",
        "tags": ["moe", *model_tags(config), "custom_code", "hf_moe"],
        "license": license,
        "language": language,
        "base_model": base_models or None,
        # The Hub takes several base models for a merge of them.
        "base_model_relation": "finetune" if base_models else None,
        "co2_eq_emissions": report.get("co2_eq_emissions"),
    }
    return write_readme(
        folder,
        template,
        task,
        metadata,
        report=report,
        recipe=recipe,
        datasets=datasets,
        system=config.system,
        config=config,
        decoder=config.get_text_config(decoder=True),
        host=host_name(config),
        kind=KINDS_OF_MODEL.get(task, "multimodal"),
        requirements=["torch", "transformers", *packages(config)],
        tower=_tower_name(config) if host_name(config) is None and len(taken) > 1 else None,
        encoders=_encoders(model, parts),
        layers=(layers := _layer_rows(model)),
        diagram=_diagram(model, parts, layers),
        modalities=taken,
        at_work=_at_work(model, parts, report),
        usage=usage(folder, config),
        objectives={label: objective_entry(label, value)[1] for label, value in config.moe_config.objectives.items()},
        sources=_sources(config),
        pictures=pictures,
        base_models=base_models,
        code=_digest_rows(folder),
        code_license=_write_license(folder, license),
    )


def card_template(name: str) -> Any:
    """Return a template of jinja2 for a card."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError("Model cards need jinja2: pip install 'hf-moe[train]'") from error
    places = (Path(__file__).with_name(name), REPOSITORY / "model_cards" / name)
    text = next(path for path in places if path.is_file()).read_text(encoding="utf-8")
    return Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined).from_string(text)


def write_readme(folder: Path, template: Any, task: str, metadata: dict[str, Any], **facts: Any) -> Path:
    """Render a card, with the accuracies in its metadata too where there is a data set, and return its path."""
    recipe, datasets, language = facts["recipe"], list(facts["datasets"]), metadata["language"]
    results = [
        EvalResult(task, datasets[0], datasets[0], "accuracy", value, metric_name=metric_name(kind))
        for kind, value in scores(facts["report"]).items()
        if datasets
    ]
    shared = {
        "model_name": recipe["name"] if recipe else folder.resolve().name,
        "pipeline_tag": task,
        "language": [language] if isinstance(language, str) else list(language) or None,
        "datasets": datasets or None,
        "eval_results": results or None,
    }
    facts |= {
        "metadata": ModelCardData(**metadata | shared).to_yaml(),
        "name": shared["model_name"],
        "folder": folder.resolve().name,
        "recipe": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else None,
        "system": load_system(facts["system"]) if facts["system"] else None,
    }
    path = folder / "README.md"
    path.write_text(re.sub(r"\n{3,}", "\n\n", template.render(facts)).strip() + "\n", encoding="utf-8")
    return path


def refresh_digests(text: str, folder: str | Path) -> str:
    """Return a card with its list of code files as they are in `folder` now."""
    return re.sub(r"(?<=\| File \| SHA-256 \|\n\|---\|---\|\n)(\|.*\n)*", _digest_rows(Path(folder)), text)


def _digest_rows(folder: Path) -> str:
    rows = ((path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in sorted(folder.glob("*.py")))
    return "".join(f"| `{name}` | `{digest}` |\n" for name, digest in rows)


def _write_license(folder: Path, license: str | None) -> str:
    """Write the license of the code and return the name of the file."""
    name = "LICENSE" if license == "apache-2.0" else "LICENSE-CODE"
    source = next(path for path in LICENSES if path.is_file())
    (folder / name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return name


def _diagram(model: Any, parts: HostParts, kinds: list[dict[str, Any]]) -> str:
    """Return the way from text and what is seen or heard to the answer, drawn with letters."""
    config = model.config
    paths = ["text -> embeddings"]
    if host_name(config) is not None:
        ways: dict[tuple[str, ...], list[str]] = {}
        for row in _encoders(model, parts):
            ways.setdefault(row["takes"], []).append(row["path"])
        paths = [*(" -> ".join([", ".join(takes), *way]) for takes, way in ways.items()), *paths]
    elif config.vision_config is not None:
        tower, connector = _tower_name(config), config.connector["name"]
        image = f"image {config.image_size} x {config.image_size}"
        paths.insert(0, f"{image} -> {tower} -> {connector} -> {config.image_seq_length} tokens")
    feed_forward = {
        index: f"{row['router']} -> {row['slots']} of {row['experts']} experts"
        + (f" + {row['shared']} shared" if row["shared"] else "")
        for row in kinds
        for index in row["layers"]
    }
    runs: list[tuple[str, str]] = []
    count = config.get_text_config(decoder=True).num_hidden_layers
    for kind, members in groupby(range(count), key=lambda index: feed_forward.get(index, "feed-forward")):
        first, *rest = members
        runs.append((f"layers {first}-{rest[-1]}" if rest else f"layer {first}", kind))
    width = max(len(label) for label, _ in runs)
    blocks = [f"  {label:{width}}  attention, {kind}" for label, kind in runs]
    return "\n".join([*paths, "  |", *blocks, "  |", "answer"])


def _tower_name(config: Any) -> str:
    """Return what the vision tower is called: a timm architecture, or the type of a Transformers model."""
    tower = config.vision_config
    return tower.architecture if tower.model_type == "timm_wrapper" else tower.model_type


def _layer_rows(model: Any) -> list[dict[str, Any]]:
    """Return the kinds of MoE layer with the layers of each, in order of first appearance."""
    moe = model.config.moe_config
    rows: dict[tuple, dict[str, Any]] = {}
    for index, layer in model.moe_layers().items():
        spec = layer.spec
        widths = " + ".join(f"{name}: {count} x {width}" for name, count, width in spec.banks)
        row = {
            "router": at_layer(moe.router, index)["name"],
            "experts": spec.num_experts,
            "slots": spec.num_experts_per_tok,
            "width": widths or str(spec.expert_intermediate_size),
            "shared": at_layer(moe.num_shared_experts, index),
        }
        rows.setdefault(tuple(row.values()), {**row, "layers": []})["layers"].append(index)
    return list(rows.values())


def _encoders(model: Any, parts: HostParts) -> list[dict[str, Any]]:
    """Return the towers and the connectors of a host: path, class, what each takes, and its own parameters."""
    held: Counter[str | None] = Counter()
    for name, parameter in model.named_parameters():
        held[parts.holder(name)] += parameter.numel()
    return [
        {
            "part": part,
            "path": path,
            "class": type(model.get_submodule(path)).__name__,
            "takes": parts.modalities[path],
            "parameters": held[path],
        }
        for part, paths in {"tower": parts.towers, "connector": parts.connectors}.items()
        for path in paths
    ]


def _at_work(model: Any, parts: HostParts, report: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return rows of parameters at work on a token, by modality."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    encoding = encoder_parameters(shapes, parts, model.config)
    rows = {
        "decoder, on average in the evaluation": report.get("parameters_active") or {},
        "decoder, at most": most_active_parameters(model),
        "tower and connector": {name: count for name, count in encoding.items() if count},
    }
    return {label: row for label, row in rows.items() if row}


def _host_of_recipe(recipe: dict[str, Any] | None) -> list[str]:
    """Return the checkpoint that a recipe names as its host, where it is one of the Hub."""
    host = ((recipe or {}).get("model") or {}).get("host")
    return [host] if isinstance(host, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", host) and not is_path(host) else []


def _sources(config: Any) -> list[dict[str, str]]:
    """Return what the mechanisms in use say about their source, the end of the docstring of each one's file."""
    sources = []
    for kind, classes in used_mechanisms(config).items():
        for name, cls in classes.items():
            _, marker, source = (sys.modules[cls.__module__].__doc__ or "").partition("\nSource")
            if marker:
                text = " ".join(source.lstrip("s:").split())
                linked = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
                sources.append({"kind": kind, "name": name, "source": linked})
    return sources
