"""Whether a router is constant is asked of its decision as a whole, not only of what it did on a few hidden states."""

import pytest
import torch
from torch import nn

from hf_moe.adapters.constant_routing import RoutingVaries, constant_gates
from hf_moe.modeling.routing import ExpertAssignment, MoELayerSpec, Router


class FavouringRouter(Router):
    """One expert with weight 1, nearly always the first: only rare hidden states overcome its bias."""

    def __init__(self, spec: MoELayerSpec):
        super().__init__(spec)
        self.weight = nn.Parameter(torch.eye(spec.num_experts, spec.hidden_size))
        self.register_buffer("bias", torch.tensor([1e3] + [0.0] * (spec.num_experts - 1)))

    def forward(self, hidden_states, context):
        logits = hidden_states.float() @ self.weight.T + self.bias
        index = logits.argmax(-1, keepdim=True)
        return ExpertAssignment(index, torch.ones_like(index).float(), self.spec.num_experts, router_logits=logits)


def test_a_choice_that_hidden_states_rarely_change_is_no_constant_one():
    router = FavouringRouter(MoELayerSpec(0, 8, 4, 1, 2))
    with pytest.raises(RoutingVaries, match="decides by the hidden state of a token"):
        constant_gates(router)
    nn.init.zeros_(router.weight)  # then the bias alone decides
    torch.testing.assert_close(constant_gates(router), torch.tensor([1.0, 0.0, 0.0, 0.0]))
