"""Whether a router is constant is asked of what it says that it reads, not of what it did on a few hidden states."""

import pytest
import torch
from helpers.mechanisms import CASES
from torch import nn

from hf_moe import MoeLoraConfig
from hf_moe.adapters.constant_routing import RoutingVaries, constant_gates
from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.mechanisms import get_mechanism, mechanism_names
from hf_moe.modeling.routing import Router
from hf_moe.modeling.routing_context import RoutingContext


CONSTANT = {"constant", "condition", "modality", "moore", "uniperceiver_moe"}
NAMES = mechanism_names("router")
OPTIONS = {
    "soft_moe": {"slots_per_expert": 1},
    "modality": {"modalities": ["text", "image", "video", "audio"]},
    "uniperceiver_moe": {"level": "task", "merge": False},
}


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


@pytest.mark.parametrize("name", NAMES)
def test_what_a_router_says_that_it_reads_is_what_it_reads(name):
    cls = get_mechanism("router", name)
    slots = CASES["router"][name].moe.get("num_experts_per_tok", 2)
    router = cls(MoELayerSpec(0, 8, 4, slots, 2, vocab_size=16), **OPTIONS.get(name, {})).eval()
    router.initialize(1.0)
    assert bool(router.reads & {"hidden_states", "input_ids"}) == (name not in CONSTANT)
    if name not in CONSTANT:
        with pytest.raises(RoutingVaries, match="by the (hidden state|word)"):
            constant_gates(router, "text", {"task": 0})
        return
    gates = constant_gates(router, "image", {"task": 1})
    ids = torch.ones(2, 3, dtype=torch.long)
    context = RoutingContext(ids, ids.bool(), ids, {"task": torch.ones(2, dtype=torch.long)})
    decision = router(torch.randn(6, 8), context)
    found = torch.zeros(6, 5).scatter_add(1, decision.expert_index, decision.expert_weight)[:, :4]
    assert torch.equal(found, gates.expand(6, -1))


def test_routing_by_features_of_a_row_is_not_constant():
    router = get_mechanism("router", "uniperceiver_moe")(MoELayerSpec(0, 8, 4, 2, 2), merge=False)
    with pytest.raises(RoutingVaries, match="features of a row, 'attribute'"):
        constant_gates(router, "text", {"attribute": 0})


def test_the_routing_of_a_host_is_never_constant():
    config = MoeLoraConfig(router="host", target_modules=["mlp.experts"])
    router = config.build_router(config.spec(0, 8, config.settings("")), config.settings(""))
    with pytest.raises(RoutingVaries, match="follows the routing of the model"):
        constant_gates(router)
