"""Recipes by every field, and the inputs of a model by every argument."""

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from outcomes import Case
from reader_cases import as_json, checkpoint, put
from values import NONSENSE, count, flag, one_of, optional, positive, real, whole

from hf_moe import HfMoeForConditionalGeneration
from hf_moe.training.recipe import load_recipe


RECIPE: dict[str, Any] = {
    "name": "tried",
    "seed": 0,
    "model": {
        "language_model": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                           "num_attention_heads": 2},
        "tokenizer": "words",
        "vision_tower": "efficientnet-lite0",
        "image_size": 64,
        "feature_stage": 3,
        "system": "moiie",
        "moe_config": {"layers": "every_2"},
    },
    "data": {"train": {"name": "easy_vqa", "limit": 8}, "eval": {"name": "easy_vqa", "limit": 4}, "max_length": 64},
    "training": {"max_steps": 2, "learning_rate": 0.001, "warmup_steps": 1, "bf16": False, "weight_decay": 0.0,
                 "logging_steps": 1, "save_strategy": "no", "lr_scheduler_type": "cosine"},
    "trainable": ["connector", "routers"],
    "evaluation": {"batch_size": 4, "blind": False, "generated": 0},
    "card": {"datasets": ["easy-vqa"], "license": "apache-2.0"},
}  # fmt: skip


def yes_or_no(value: Any) -> bool:
    """`yes` and `1` are bools where one is declared."""
    return flag(value) or (isinstance(value, int) and value in (0, 1))


def text(value: Any) -> bool:
    """YAML reads `1e-3` as a number, also where text is declared."""
    return isinstance(value, str) and bool(value.strip()) and value != "1e-3"


# What may stand in a field, by hand. Text is taken where text is declared, and checked by whoever knows more.
FIELDS: dict[tuple[str, ...], Callable[[Any], bool]] = {
    ("name",): text,
    ("seed",): lambda value: whole(value, 0),
    ("model",): lambda value: False,
    ("model", "language_model"): text,
    ("model", "vision_tower"): optional(text),
    ("model", "tokenizer"): lambda value: False,
    ("model", "image_size"): optional(count),
    ("model", "feature_stage"): optional(lambda value: whole(value, 0, 4) or (value == 0 and not flag(value))),
    ("model", "system"): optional(lambda value: False),
    ("model", "moe_config"): optional(lambda value: value == {}),
    ("model", "moe_config", "layers"): lambda value: value in ([], [1]),
    ("data",): lambda value: False,
    ("data", "train", "limit"): optional(count),
    ("data", "max_length"): optional(count),
    ("training",): optional(lambda value: value == {}),
    ("training", "max_steps"): lambda value: whole(value, 1) or value == -1,
    ("training", "learning_rate"): lambda value: real(value, 0),
    ("training", "warmup_steps"): lambda value: real(value, 0),
    ("training", "bf16"): yes_or_no,
    ("training", "weight_decay"): lambda value: real(value, 0),
    ("training", "logging_steps"): lambda value: count(value) or (real(value, 0, 1) and positive(value)),
    ("training", "save_strategy"): one_of("no", "steps"),
    ("training", "lr_scheduler_type"): one_of("cosine", "linear"),
    ("trainable",): optional(lambda value: False),
    ("evaluation",): optional(lambda value: value == {}),
    ("evaluation", "batch_size"): count,
    ("evaluation", "blind"): yes_or_no,
    ("evaluation", "generated"): lambda value: whole(value, 0),
    ("card",): optional(lambda value: value == {}),
    ("card", "datasets"): lambda value: value == [] or (isinstance(value, list) and all(map(text, value))),
    ("card", "license"): optional(text),
}


def recipe_with(path: tuple[str, ...], value: Any) -> str:
    """Return what a recipe says once it is read, with one field changed."""
    changed = json.loads(json.dumps(RECIPE))
    put(path, value, changed)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tried.yaml"
        file.write_text(yaml.safe_dump(changed), encoding="utf-8")
        return json.dumps(load_recipe(str(file)).to_dict(), sort_keys=True, default=str)


def recipe_cases() -> Iterator[Case]:
    """Yield every field of a recipe with every value that YAML holds, and an unknown field in every section."""
    usual = cache(lambda: recipe_with(("seed",), 0))
    for path, means_something in FIELDS.items():
        for value in filter(as_json, NONSENSE):
            run = partial(recipe_with, path, value)
            yield Case("recipes", path[-1], value, run, usual, means_something(value))
    for section in ((), ("model",), ("data",), ("training",), ("evaluation",), ("card",), ("data", "train")):
        yield Case("recipes", "surprise", "x", partial(recipe_with, (*section, "surprise"), "x"), usual)


@cache
def model() -> HfMoeForConditionalGeneration:
    return HfMoeForConditionalGeneration.from_pretrained(checkpoint()).eval()


def batch() -> dict[str, Any]:
    ids = torch.arange(8, 32).view(2, 12)
    ids[:, 2:6] = 7  # the placeholders of one image each
    pixels = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), "pixel_values": pixels}


def called(name: str, value: Any) -> list[torch.Tensor]:
    """Return the logits and the loss of a model of which one input was changed."""
    with torch.no_grad():
        output = model()(**{**batch(), name: value})
    return [output.logits, output.loss]


IDS = torch.arange(8, 32).view(2, 12)
TENSORS: tuple[Any, ...] = (
    torch.tensor(1),
    torch.ones(2),
    torch.ones(2, 3, dtype=torch.long),
    torch.ones(3, 12, dtype=torch.long),
    torch.ones(2, 12, 1, dtype=torch.long),
    torch.full((2, 12), 1.5),
    torch.full((2, 12), -7),
    torch.full((2, 12), 10_000),
    torch.full((2, 12), float("nan")),
    torch.ones(2, 3, 8, 8).fill_(float("nan")),
    torch.ones(2, 1, 8, 8),
    torch.ones(2, 3, 9, 9),
    torch.ones(5, 3, 8, 8),
    torch.ones(2, 8, 8, 3),
    np.ones((2, 12)),
    IDS.tolist(),
)


def input_cases() -> Iterator[Case]:
    """Yield every argument of a forward with every value, and with tensors of wrong types, shapes and ranges."""
    usual = cache(lambda: called("labels", batch()["labels"]))
    for name in ("input_ids", "attention_mask", "labels", "pixel_values", "mm_token_type_ids", "condition_ids",
                 "routing_overrides"):  # fmt: skip
        for value in (*NONSENSE, *TENSORS):
            if value is None:
                continue  # every one of them may be left out, alone or with others
            yield Case("inputs", name, value, partial(called, name, value), usual)
