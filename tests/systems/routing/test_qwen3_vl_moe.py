"""Qwen3-VL-MoE: fine-grained top-8, balanced over the batch of a step."""

import pytest
import torch
from helpers.balance import balance
from helpers.near import assert_near
from helpers.router_cases import copy_experts, make_hidden, make_router, make_spec, randomise, text_context
from transformers import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

from hf_moe.configuration.systems import load_system


MODEL = load_system("qwen3_vl_moe").fields("model")
EXPERTS, SLOTS = MODEL["num_experts"], MODEL["num_experts_per_tok"]
SPEC = make_spec(num_experts=EXPERTS, num_experts_per_tok=SLOTS)


def test_the_layer_is_that_of_transformers():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_experts": EXPERTS, "num_experts_per_tok": SLOTS}
    config = Qwen3VLMoeTextConfig(**sizes)
    config._experts_implementation = "eager"
    theirs = randomise(Qwen3VLMoeTextSparseMoeBlock(config))
    router = make_router(MODEL["router"]["name"], spec=SPEC)
    router.load_state_dict(theirs.gate.state_dict())
    context = text_context(2, 5)
    hidden = make_hidden(context)
    output = copy_experts(SPEC, theirs.experts)(hidden, router(hidden, context))
    assert_near(output, theirs(hidden.view(2, 5, -1)).view(-1, 32), 1e-5)


@pytest.mark.parametrize(("scope", "value"), [("batch", 1.0), ("sequence", 2.0)])
def test_modalities_may_specialise_within_a_step_and_not_within_a_row(scope, value):
    """Two rows, each of one modality, whose tokens use half of the experts."""
    options = {**MODEL["objectives"]["load_balance"], "shares": "slots", "scope": scope}
    assert balance(options, torch.arange(EXPERTS).view(2, -1), EXPERTS) == pytest.approx(value)
