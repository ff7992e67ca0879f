"""Keeps checkpoints of the current code for the tests of all later versions.

    cd tests && python -m helpers.release_checkpoint format
    cd tests && python -m helpers.release_checkpoint code

`format` is run once, when a version with a new `CONFIG_FORMAT` is released: it writes `released/<format>/`, the config
and the weights. `code` is run with the lowest and the newest release of Transformers, before a version is released: it
writes `released_code/<versions>/`, a whole checkpoint with its code and what it answered. Neither writes over one.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig

import hf_moe
from helpers.hub.checkpoints import record, tiny_processor
from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.configuration.configuration_hf_moe import CONFIG_FORMAT


INTEGRATION = Path(__file__).parents[1] / "integration"
RELEASED, RELEASED_CODE = INTEGRATION / "released", INTEGRATION / "released_code"
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
# Maps from layer to value, banks and a balancing buffer: what a later reader could misread.
MOE = {
    "layers": [1, 2],
    "num_experts": {"default": 4, "2": 3},
    "num_experts_per_tok": 2,
    "num_shared_experts": {"default": 0, "2": 1},
    "expert_intermediate_size": 8,
    "router": {"1": {"name": "moiie"}, "2": {"name": "deepseek_v3"}},
    "objectives": {"load_balance": {"coef": 0.02, "scope": "sequence"}, "router_z": 0.001},
}


def inputs() -> dict[str, torch.Tensor]:
    pixels = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
    return {"input_ids": torch.tensor([[2, 4, 4, 4, 4, 7, 8, 9]]), "pixel_values": pixels}


def make_model() -> HfMoeForConditionalGeneration:
    torch.manual_seed(0)
    text = LlamaConfig(**SIZES, vocab_size=32, num_hidden_layers=3, num_key_value_heads=1, pad_token_id=0)
    vision = CLIPVisionConfig(**SIZES, num_hidden_layers=1, image_size=8, patch_size=4)
    config = HfMoeConfig(text_config=text, vision_config=vision, image_token_id=4, moe_config=MOE)
    return HfMoeForConditionalGeneration(config).eval()


def keep_format() -> None:
    folder = RELEASED / str(CONFIG_FORMAT)
    folder.mkdir(parents=True)
    model = make_model()
    with torch.no_grad():
        logits = model(**inputs()).logits[0, -1]
    model.save_pretrained(folder)
    # What is kept is what a newer version reads; the code of the old one would only repeat the history.
    for path in folder.glob("*.py"):
        path.unlink()
    (folder / "logits.json").write_text(json.dumps(logits.tolist()) + "\n")


def keep_code() -> None:
    folder = RELEASED_CODE / f"hf_moe_{hf_moe.__version__}_transformers_{transformers.__version__}"
    folder.mkdir(parents=True)
    model = make_model()
    processor = tiny_processor()
    processor.image_processor.size = {"shortest_edge": 8}
    processor.image_processor.crop_size = {"height": 8, "width": 8}
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    record(folder, model, processor)
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)


if __name__ == "__main__":
    {"format": keep_format, "code": keep_code}[sys.argv[1]]()
