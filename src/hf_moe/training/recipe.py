"""Recipes: a whole training job as one YAML file."""

from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig

from ..adapters import MoeLoraConfig
from ..adapters.systems import load_system
from ..configuration.configuration_hf_moe import unknown_name_message


RECIPES = Path(str(files("hf_moe.configuration") / "recipes"))
DTYPES = ("float32", "bfloat16", "float16")
# What a recipe of an adapter may say of its base and of the evaluation.
BASE_OPTIONS = ("base", "revision", "dtype")
ADAPTER_EVALUATION = ("batch_size", "bf16")
# What a recipe may say of an adapter: the fields of the config, but not what PEFT itself fills in.
ADAPTER_FIELDS = sorted({item.name for item in fields(MoeLoraConfig)} - {item.name for item in fields(PeftConfig)})


@dataclass
class Stage:
    """One stage of a training job.

    Args:
        name: of the stage and of its folder.
        trainable: parts that are trained, see [`train_only`]; while experts evolve, `experts` is expert 1.
        training: fields of `TrainingArguments` that override the recipe's.
        construct: what becomes of the previous stage's model before this one: `{upcycle: options}` and, with the
            experts that evolved, `{assemble: options}` make a MoE of a dense model, `{convert_router: options}`
            exchanges the routers; see [`construct`].
        evolve: `layers` and options of [`ExpertEvolution`], for experts that evolve beside the training.
        objectives: replace the model's; empty for none.
        learning_rate_scales: factors on the learning rate, by part as in `trainable`.
    """

    name: str
    trainable: list[str]
    training: dict[str, Any] = field(default_factory=dict)
    construct: dict[str, dict[str, Any]] | None = None
    evolve: dict[str, Any] | None = None
    objectives: dict[str, Any] | None = None
    learning_rate_scales: dict[str, float] = field(default_factory=dict)


@dataclass
class Recipe:
    """One training job.

    Args:
        name: of the run; the default output folder is `runs/<name>`.
        model: keyword arguments of [`build_model`]; `tokenizer: words` trains one on the data's text. For an adapter
            the `base` (a decoder as [`load_language_model`] takes it, or a checkpoint of this library), its `revision`
            on the Hub and its `dtype`.
        adapter: the fields of a [`MoeLoraConfig`], or `system`, `variant` and what differs from that preset. The base
            is frozen, and the adapter alone is trained and saved.
        data: `train` and `eval` sources, see [`load_rows`]; `max_length` in tokens, *optional*.
        training: fields of `TrainingArguments`.
        trainable: parts that are trained, see [`train_only`].
        stages: where the job has several, see [`Stage`]; each takes over the model of the one before.
        evaluation: `batch_size`, `bf16` (score under autocast), `blind` (also score with the image features zeroed),
            `generated` (questions that are also answered by `generate`).
        card: `datasets`, `base_models` and `license` for the model card.
        seed: of the weights, the data order and the training.
    """

    name: str
    model: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    trainable: list[str] = field(default_factory=lambda: ["connector", "routers", "experts", "embeddings", "backbone"])
    stages: list[Stage] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] | None = None
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data, without what does not apply to it."""
        foreign = ("adapter",) if self.adapter is None else ("trainable", "stages")
        return {name: value for name, value in asdict(self).items() if name not in foreign}


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(source: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe by name or from a YAML file.

    Args:
        source: a name of [`recipe_names`] or a path.
        overrides: `key.subkey=value` strings; values are YAML.

    Raises:
        FileNotFoundError: if there is neither a file nor a shipped recipe of that name.
        ValueError: if a field is unknown or missing, an override is not of the form above, the training is to
            evaluate in between, or an adapter's recipe has what only a model's takes.
    """
    path = Path(source) if Path(source).is_file() else RECIPES / f"{Path(source).stem}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{source} is no file; the shipped recipes are: {', '.join(recipe_names())}.")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for override in overrides or []:
        _override(content, override)
    _check_fields(Recipe, content, f"recipe {path.name}")
    stages = content.pop("stages", [])
    _check_training(content.get("training", {}), f"recipe {path.name}")
    for number, stage in enumerate(stages, start=1):
        _check_fields(Stage, stage, f"stage {number} of {path.name}")
        _check_training(stage.get("training", {}), f"stage {number} of {path.name}")
    if "base" in content["model"] or content.get("adapter") is not None:
        _check_adapter(content, bool(stages), f"recipe {path.name}")
    return Recipe(**content, stages=[Stage(**stage) for stage in stages])


def adapter_config(options: dict[str, Any]) -> MoeLoraConfig:
    """Return the configuration that a recipe's `adapter` describes.

    Raises:
        ValueError: if a field, the system or its variant is unknown, or a value is refused.
    """
    options = dict(options)
    system, variant = options.pop("system", None), options.pop("variant", None)
    known = ["system", "variant", *ADAPTER_FIELDS]
    for name in options:
        if name not in known:
            raise ValueError(unknown_name_message("field of the adapter", name, known))
    if system is None:
        if variant is not None:
            raise ValueError(f"adapter.variant={variant!r} is a form of a published system: name that in `system`.")
        return MoeLoraConfig(**options)
    if load_system(system, variant)["method"] != "moe_lora":
        raise ValueError(f"adapter.system={system!r} is a method of PEFT's own, which no recipe trains.")
    return MoeLoraConfig.from_system(system, variant=variant, **options)


def _check_adapter(content: dict[str, Any], in_stages: bool, place: str) -> None:
    model, adapter = content["model"], content.get("adapter")
    if not isinstance(adapter, dict) or not isinstance(model.get("base"), str):
        raise ValueError(
            f"The {place} needs both model.base, the name of a model, and adapter, the fields of a MoeLoraConfig, to "
            f"train an adapter; it has model: {model!r} and adapter: {adapter!r}."
        )
    for kind, given, known in (
        ("field of the model of an adapter's recipe", model, BASE_OPTIONS),
        ("field of the evaluation of an adapter's recipe", content.get("evaluation", {}), ADAPTER_EVALUATION),
    ):
        for name in given:
            if name not in known:
                raise ValueError(unknown_name_message(kind, name, list(known)))
    if model.get("dtype", "float32") not in DTYPES:
        raise ValueError(unknown_name_message("dtype of the base", model["dtype"], list(DTYPES)))
    if in_stages or "trainable" in content:
        name = "stages" if in_stages else "trainable"
        raise ValueError(f"The {place} has {name}, and an adapter's has none: what is trained is the adapter.")
    adapter_config(adapter)


def _check_fields(cls: type, content: dict[str, Any], place: str) -> None:
    known = [item.name for item in fields(cls)]
    for name in content:
        if name not in known:
            raise ValueError(unknown_name_message(f"field of the {place}", name, known))
    needed = [item.name for item in fields(cls) if item.default is MISSING and item.default_factory is MISSING]
    missing = [name for name in needed if name not in content]
    if missing:
        raise ValueError(f"The {place} lacks {', '.join(missing)}.")


def _check_training(training: dict[str, Any], place: str) -> None:
    # Here, because the trainer would say so only when the stage begins, after hours of those before it.
    for name in ("load_best_model_at_end", "eval_strategy"):
        if training.get(name) not in (None, False, "no"):
            raise ValueError(
                f"The {place} sets training.{name}={training[name]!r}: a recipe evaluates once, after its training. "
                "Remove it, or train with HfMoeTrainer and an eval_dataset."
            )


def _override(content: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator:
        raise ValueError(f"--set {override!r}: expected key=value, for example training.max_steps=10.")
    *parents, last = key.split(".")
    for parent in parents:
        # A stage goes by its number from 0.
        content = content[int(parent)] if isinstance(content, list) else content.setdefault(parent, {})
    content[last] = yaml.safe_load(value)
