"""PERFT: what adapters beside a whole MoE block add to it, by the formulas of its compositions."""

import pytest
import torch
from helpers.near import assert_near
from peft import get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from hf_moe import MoeLoraConfig
from hf_moe.adapters.layer import tuner_layers


@pytest.mark.parametrize("variant, adapters", [("R", 8), ("D", 8), ("S", 1)])
def test_adapters_add_to_the_block_what_the_formula_says(randomise, variant, adapters):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    host = MixtralForCausalLM(
        MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=64, num_local_experts=4, num_experts_per_tok=2)
    )
    model = get_peft_model(host, MoeLoraConfig.from_system("perft", variant=variant)).eval()
    randomise(model)
    (layer,) = tuner_layers(model)
    lora_a, lora_b = layer.moe_lora_A["default"], layer.moe_lora_B["default"]
    assert len(lora_a) == adapters
    x = torch.randn(1, 3, 32)
    with torch.no_grad():
        expected = layer.base_layer(x)[0]
        for token in range(3):
            parts = torch.stack([32 / 16 * b @ (a @ x[0, token]) for a, b in zip(lora_a, lora_b, strict=True)])
            if variant == "R":
                r = (layer.moe_lora_router["default"].weight @ x[0, token]).softmax(-1)
                best = r.argsort(descending=True)[:2]
                parts = r[best, None] * parts[best]
            expected[token] += parts.sum(0)
        assert_near(layer(x)[0], expected, 1e-4)
