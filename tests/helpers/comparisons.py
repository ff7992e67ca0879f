"""A tiny recipe for comparisons: which colour is a picture?"""

import json
from pathlib import Path

import yaml
from PIL import Image


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWER = {**SIZES, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
COLOURS = ["red", "blue", "green", "black"]


def write_recipe(folder: Path) -> str:
    """Write rows and a recipe, and return its path."""
    rows = []
    for number, colour in enumerate(COLOURS * 4):
        Image.new("RGB", (16, 16), colour).save(folder / f"{number}.png")
        rows.append({"question": "<image> which colour ?", "answer": colour, "image": f"{number}.png"})
    for split, chosen in {"train": rows, "test": rows[:4]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    content = {
        "name": "tiny",
        "model": {
            "language_model": {**SIZES, "model_type": "llama", "max_position_embeddings": 64},
            "tokenizer": "words",
            "vision_tower": TOWER,
            "moe_config": {"layers": "all", "num_experts": 4, "granularity": 1, "expert_intermediate_size": 64},
        },
        "data": {"train": {"path": str(folder / "train.jsonl")}, "eval": {"path": str(folder / "test.jsonl")}},
        "training": {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
        "evaluation": {"batch_size": 4},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "tiny.yaml")
