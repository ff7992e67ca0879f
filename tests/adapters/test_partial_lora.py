"""Partial LoRA: what tokens of the new modality get, in linear layers and in the stacks of a MoE host, by formula."""

import torch
from helpers.near import assert_near
from peft import get_peft_model
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from hf_moe import MoeLoraConfig
from hf_moe.adapters.layer import tuner_layers


def test_tokens_of_the_new_modality_alone_get_the_scaled_update(randomise):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    host = MixtralForCausalLM(
        MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=64, num_local_experts=4, num_experts_per_tok=2)
    )
    model = get_peft_model(host, MoeLoraConfig.from_system("moe_redundancy_plora")).eval()
    randomise(model)
    block = model.base_model.model.model.layers[0]
    linear, stacks = block.self_attn.o_proj, block.mlp.experts
    seen = {}
    for module in (linear, stacks):
        module.register_forward_hook(lambda module, args, output: seen.update({module: (args, output)}))
    image = torch.tensor([[0, 1, 1, 0, 0, 1]])
    with torch.no_grad():
        model(input_ids=torch.arange(5, 11)[None], mm_token_type_ids=image)
        (x,), found = seen[linear]
        delta = 32 / 16 * linear.moe_lora_B["default"][0] @ linear.moe_lora_A["default"][0]
        expected = linear.base_layer(x) + image[..., None] * F.linear(x, delta)
        assert_near(found, expected, 1e-4)

        (x, index, weight), found = seen[stacks]
        changes = {
            layer.parameter_name: 32 / 16 * layer.moe_lora_B["default"][0] @ layer.moe_lora_A["default"][0]
            for layer in tuner_layers(stacks)
        }
        host = stacks.get_base_layer()
        for token, new in enumerate(image[0]):
            expected = torch.zeros(32)
            for expert, share in zip(index[token], weight[token], strict=True):
                both, down = (
                    getattr(host, name)[expert] + new * changes[name][expert] for name in ("gate_up_proj", "down_proj")
                )
                gate, up = (both @ x[token]).chunk(2)
                expected += share * (down @ (F.silu(gate) * up))
            torch.testing.assert_close(found[token], expected, atol=1e-3, rtol=1e-4)
