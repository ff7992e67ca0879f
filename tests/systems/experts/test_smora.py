"""SMoRA: every rank of one LoRA is an expert of a sigmoid gate, whose balancing bias also weighs."""

import pytest
import torch
from helpers.near import assert_near
from peft import get_peft_model
from torch import nn

from hf_moe import MoeLoraConfig
from hf_moe.adapters.layer import tuner_layers
from hf_moe.modeling.routing_context import RoutingContext


class Toy(nn.Module):
    """One frozen linear layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5, bias=False)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("options, weighs", [({}, True), ({"bias_in_weights": False}, False)])
def test_two_of_four_ranks_add_what_the_formula_says(options, weighs):
    torch.manual_seed(0)
    config = MoeLoraConfig.from_system(
        "smora", target_modules=["linear"], num_experts=4, num_experts_per_tok=2, router={"name": "smora", **options}
    )
    model = get_peft_model(Toy(), config).eval()
    layer = next(tuner_layers(model))
    router = layer.moe_lora_router["default"]
    x, r, a, b = torch.randn(3, 3), torch.randn(4, 3), torch.randn(4, 3), torch.randn(5, 4)
    bias = torch.tensor([0.0, 0.9, -0.4, 0.2])
    router.weight.data = r
    router.e_score_correction_bias.copy_(bias)
    layer.moe_lora_A["default"].data = a[:, None]
    layer.moe_lora_B["default"].data = b.T[..., None].clone()

    s = torch.sigmoid(x @ r.T)
    assert set(s[0].topk(2).indices.tolist()) != set((s[0] + bias).topk(2).indices.tolist())
    expected = []
    for token in range(3):
        active = (s[token] + bias).argsort(descending=True)[:2]
        weight = (s[token] + bias if weighs else s[token])[active]
        gate = torch.zeros(4).scatter(0, active, 2 * weight / weight.sum())
        expected.append(layer.base_layer(x[token]) + 16 / 2 * b @ (gate * (a @ x[token])))
    assert_near(model(x), torch.stack(expected), 1e-5)


def test_the_bias_follows_the_load_of_a_step_and_has_no_gradient():
    torch.manual_seed(0)
    router = {"name": "smora", "bias_update_rate": 0.25}
    fields = {"num_experts": 4, "num_experts_per_tok": 1, "router": router, "target_modules": ["linear"]}
    config = MoeLoraConfig.from_system("smora", **fields)
    settings = config.settings("linear")
    gate = config.build_router(config.spec(0, 4, settings), settings)
    gate.initialize(0.02)
    gate.weight.data = 4.0 * torch.eye(4)
    x = torch.eye(4)[[0, 0, 0, 1, 1, 2, 2, 2]]
    context = RoutingContext.all_text(x[None])
    decision = gate(x, context)
    decision.expert_weight.sum().backward()
    gate.accumulate(decision, context)
    gate.end_step()
    # Loads 3, 2, 3, 0; their mean is 2.
    assert gate.e_score_correction_bias.tolist() == [-0.25, 0.0, -0.25, 0.25]
    assert not gate.e_score_correction_bias.requires_grad
