"""What a recipe asks for, tried before its data is read and its weights are loaded: files, mechanisms, stages.

A model is tried without memory, on the meta device: its parts are made, its stages constructed one after the other,
and what each would train is counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from ..configuration import HfMoeConfig, MoeConfig
from ..configuration.configuration_hf_moe import PLACE_FIELDS, unknown_name_message
from ..configuration.systems import load_system
from ..construction.build import composed_config
from ..construction.evolution import ExpertEvolution
from ..construction.expert_sources import build_source
from ..construction.host_plan import plan_host
from ..construction.materialisation import empty_model
from ..construction.packaged import PACKAGED
from ..construction.pretrained import local_config
from ..construction.refusals import host_class_of
from ..data.sources import DATASETS, check_source
from ..modeling.mechanisms import get_mechanism
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.parts import host_parts
from ..modeling.registry import build
from .constructions import construct_stage, evolution_of
from .parts import Selector, selects, train_only
from .sections import Recipe, Stage


# Files that a source of rows may name as a plain string.
ROW_FILES = (".jsonl", ".json", ".csv", ".parquet")


# What wrong options raise in the code that they reach.
REFUSALS = (
    ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, ArithmeticError, StrictDataclassError
)  # fmt: skip


@contextmanager
def named(what: str) -> Iterator[None]:
    """Make a `ValueError` that says what it is about of every error of what is tried inside."""
    try:
        yield
    except REFUSALS as error:
        # A bare KeyError is no more than the key.
        text = (
            str(error) if isinstance(error, ValueError | StrictDataclassError) else f"{type(error).__name__}: {error}"
        )
        raise ValueError(f"{what} is refused. {text}") from error


def check_sources(recipe: Recipe, place: str) -> None:
    """Check the sources of rows and of weights, as far as it goes without reading them.

    Raises:
        FileNotFoundError: if a file or a folder is not there.
        ValueError: if an option of a source is unknown or has a wrong value, or a known data set has another name.
    """
    for part in ("train", "eval"):
        source = recipe.data.get(part)
        key = f"data.{part}"
        if isinstance(source, str):
            source = {"path": source} if source.endswith(ROW_FILES) else {}
        source = {} if source is None else source
        if isinstance(recipe.data.get(part), dict):
            with named(f"{key} of the {place}"):
                check_source(source)
        name = source.get("name")
        if isinstance(name, str) and "hub" not in source and name not in DATASETS:
            raise ValueError(unknown_name_message(f"data set in {key}.name of the {place}", name, list(DATASETS)))
        split = "train" if part == "train" else "test"
        for option, what in (("path", "file"), ("image_folder", "folder")):
            given = source.get(option)
            if given is None:
                continue
            found = Path(given.replace("{split}", split) if option == "path" else given).expanduser()
            # A path may be a folder of files.
            if not (found.is_dir() or (what == "file" and found.is_file())):
                raise FileNotFoundError(f"The {place} has {key}.{option}={given!r}, and there is no such {what}.")
    for option in ("language_model", "vision_tower", "base", "host", "processor"):
        given = recipe.model.get(option)
        if isinstance(given, str) and not _may_exist(given):
            known = ", ".join(PACKAGED)
            raise FileNotFoundError(
                f"The {place} has model.{option}={given!r}, which is no folder here and cannot be an id of the Hub. "
                f"Models that come in packages: {known}."
            )


def _may_exist(source: str) -> bool:
    if source in PACKAGED or Path(source).exists():
        return True
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return not source.endswith(".gguf")


def check_model(recipe: Recipe, place: str) -> None:
    """Try the model of a recipe and its stages, as far as they are known without weights.

    Raises:
        ValueError: naming the field that cannot be built.
    """
    model = recipe.model
    if model.get("system") is not None:
        with named(f"model.system of the {place}"):
            load_system(model["system"]).fields("model")
    with named(f"model.source of the {place}"):
        build_source(model.get("source") or "copies")
    _check_fields(model, "model", f"the {place}")
    config = (_check_host if "host" in model else _check_parts)(model, place)
    if config is not None:
        check_stages(config, recipe, place)
    else:
        for stage in recipe.stages or [Stage(recipe.name, recipe.trainable)]:
            with named(f"trainable of the {place}"):
                for selector in stage.trainable:
                    Selector.read(selector)


def _check_host(model: dict[str, Any], place: str) -> HfMoeConfig | None:
    """Return the config of a host with MoE layers, where it is known without the Hub."""
    source, moe_config = model["host"], deepcopy(model.get("moe_config") or {})
    fresh = isinstance(source, dict)
    if fresh and "processor" not in model:
        raise ValueError(
            f"The {place} has a fresh host and no processor: add model.processor, the folder or Hub id of a processor "
            "for such models."
        )
    with named(f"model.host of the {place}"):
        config = (_fresh_config if fresh else local_config)(source)
        host = None if config is None else empty_model(host_class_of(config), config)
    places = {name: model.get(name) for name in PLACE_FIELDS.values()}
    with named(f"model.moe_config of the {place}"):
        return None if host is None else _on_meta(plan_host(host, model.get("system"), moe_config, places).config)


def _on_meta(config: HfMoeConfig) -> HfMoeConfig:
    """Try to make the model of a config, and return the config."""
    with torch.device("meta"):
        HfMoeForConditionalGeneration._from_config(deepcopy(config))
    return config


def _check_fields(given: Any, section: str, place: str) -> None:
    for name in ("moe_config", *PLACE_FIELDS.values()):
        with named(f"{section}.{name} of {place}"):
            MoeConfig(**deepcopy(given.get(name) or {}))


def _check_parts(model: dict[str, Any], place: str) -> HfMoeConfig | None:
    """Return the config of a model that is put together, where it is known without the Hub; towers are left out."""
    config = None
    fresh = isinstance(model["language_model"], dict)
    if fresh and "tokenizer" not in model:
        raise ValueError(f"The {place} has a fresh decoder and no tokenizer: add model.tokenizer: words.")
    with named(f"model.language_model of the {place}"):
        text_config = (_fresh_config if fresh else local_config)(model["language_model"])
        if text_config is not None and not fresh:
            with torch.device("meta"):
                decoder = AutoModelForCausalLM.from_config(text_config)
    if isinstance(model.get("vision_tower"), dict):
        with named(f"model.vision_tower of the {place}"):
            _fresh_config(model["vision_tower"])
    if (connector := model.get("connector")) is not None:
        with named(f"model.connector of the {place}"), torch.device("meta"):
            if not isinstance(connector.get("name"), str):
                raise ValueError(f"A connector needs a name: {{name: mlp}}, for example; got {connector!r}.")
            options = {name: value for name, value in connector.items() if name != "name"}
            # Of any sizes: what is tried are the options.
            build("connector", get_mechanism("connector", connector["name"]), options, 8, 8)
    moe_config = model.get("moe_config") or {}
    with named(f"model.moe_config of the {place}"):
        if fresh and text_config is not None:
            config = composed_config(text_config, model.get("system"), deepcopy(moe_config))
        elif text_config is not None:
            config = plan_host(decoder, model.get("system"), deepcopy(moe_config)).config
        if config is None:
            return None
        for name in PLACE_FIELDS.values():
            setattr(config, name, None)
        return _on_meta(config)


def _fresh_config(source: dict[str, Any]) -> Any:
    """Return the config of a model from scratch, after a check of its type and fields."""
    options = dict(source)
    model_type = options.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        near = get_close_matches(str(model_type), list(CONFIG_MAPPING), n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"model_type={model_type!r} is no model of Transformers.{hint}")
    config = AutoConfig.for_model(model_type, **options)
    known = {item.name for item in fields(config)} | set(config.attribute_map)
    for name in options:
        # What a config does not know, and does not convert either, it keeps beside its fields.
        if name not in known and name in vars(config):
            raise ValueError(unknown_name_message(f"field of {type(config).__name__}", name, sorted(known)))
    return config


def check_stages(config: HfMoeConfig, recipe: Recipe, place: str) -> None:
    """Try what a recipe trains, stage by stage, on a model without memory.

    Raises:
        ValueError: naming the stage and the field that does not fit, or that trains nothing.
    """
    with torch.device("meta"):
        model = HfMoeForConditionalGeneration._from_config(deepcopy(config))
        evolution: ExpertEvolution | None = None
        for number, stage in enumerate(recipe.stages or [Stage(recipe.name, recipe.trainable)], start=1):
            where = f"stage {number} ({stage.name}) of the {place}" if recipe.stages else place
            for method, given in (stage.construct or {}).items():
                if method != "convert_router":
                    _check_fields(given, f"construct.{method}", where)
            with named(f"construct or objectives of {where}"):
                model = construct_stage(model, stage, evolution, recipe.seed)
            with named(f"evolve of {where}"):
                evolution = evolution_of(stage, model, recipe.seed)
                first = set()
                if evolution is not None:
                    first = evolution.first_names(model)
                    evolution.experts = [dict(evolution.first_expert(model)) for _ in evolution.beta_ranges]
            _check_trained(model, stage, first, where, has_tower="vision_tower" in recipe.model)
            if stage.loss == "entropy" and model.objectives.by_name:
                raise ValueError(
                    f"loss=entropy of {where} gives the model no labels, by which the objectives "
                    f"{', '.join(model.objectives.by_name)} weigh the rows: set objectives: {{}} there."
                )


def _check_trained(model: Any, stage: Stage, first: set[str], where: str, has_tower: bool) -> None:
    # A tower and its connector that are put beside a decoder are not part of what is tried here.
    def unseen(selector: str) -> bool:
        return has_tower and Selector.read(selector).part in ("tower", "connector")

    with named(f"trainable of {where}"):
        counts = train_only(model, stage.trainable, first)
        nothing = not counts and not any(map(unseen, stage.trainable))
    if nothing:
        raise ValueError(f"trainable={stage.trainable} of {where} selects no parameter: nothing would be trained.")
    parts = host_parts(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for selector in stage.learning_rate_scales:
        with named(f"learning_rate_scales of {where}"):
            seen = not unseen(selector)
        if seen and not any(selects(selector, name, parts) for name in trained):
            raise ValueError(f"learning_rate_scales of {where}: {selector!r} selects nothing that is trained there.")
