"""Test-time overrides are refused where no router would read them as they are meant."""

import pytest
import torch

from hf_moe import RoutingOverrides


NAN = float("nan")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_offset": {1: torch.zeros(3)}}, r"logit_offset\[1\] must have the shape \(4,\).*\(3,\)"),
        ({"logit_offset": {1: torch.zeros(4, 1)}}, r"logit_offset\[1\] must have the shape"),
        ({"logit_offset": {1: [0.0, NAN, 0.0, 0.0]}}, "finite"),
        ({"logit_offset": {1: torch.ones(4, dtype=torch.bool)}}, "finite numbers"),
        ({"logit_offset": {1: "high"}}, "logit_offset"),
        ({"logit_offset": {"1": torch.zeros(4)}}, "logit_offset"),
        ({"logit_offset": torch.zeros(4)}, "logit_offset"),
        ({"logit_offset": {0: torch.zeros(4)}}, r"names the layers \[0\]; the MoE layers are \[1, 2\]"),
        ({"disabled_experts": {7: [0]}}, r"names the layers \[7\]"),
        ({"disabled_experts": {1: [4]}}, r"disabled_experts\[1\]=\[4\] must lie in \[0, 4\)"),
        ({"disabled_experts": {1: [-1]}}, "disabled_experts"),
        ({"disabled_experts": {1: 0}}, "disabled_experts"),
        ({"disabled_experts": {1: [0.5]}}, "disabled_experts"),
        ({"disabled_experts": {1: [0, 1, 2, 3]}}, "leaves none of 4"),
        ({"disabled_experts": [0]}, "disabled_experts"),
        ({"expert_budget": 2}, "no router of this model has a slot budget"),
        ({"expert_budget": NAN}, "expert_budget"),
        ({"expert_budget": True}, "expert_budget"),
    ],
)
def test_an_override_that_fits_no_router_is_refused(tiny_model, text_batch, fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(tower=False)(**text_batch, routing_overrides=RoutingOverrides(**fields))


def test_an_offset_is_taken_in_any_form_and_any_number_type(tiny_model, text_batch):
    model = tiny_model(tower=False)
    forms = (
        [0.0, 0.0, 5.0, 0.0],
        torch.tensor([0, 0, 5, 0]),
        torch.tensor([0.0, 0.0, 5.0, 0.0], dtype=torch.bfloat16),
    )
    with torch.no_grad():
        logits = [model(**text_batch, routing_overrides=RoutingOverrides({1: form})).logits for form in forms]
        assert not torch.equal(logits[0], model(**text_batch).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
