"""Routers that look across tokens in training: on hosts, and as LoRA experts, they decode token by token."""

import pytest
import torch
from helpers.adapted import logits, with_cache
from helpers.hosts.catalogue import HOSTS, drift_apart, in_place, labels_of
from helpers.near import assert_near
from peft import get_peft_model

from hf_moe import MoeLoraConfig


ROUTERS = {"expert_choice": {"num_experts": 4}}


@pytest.fixture(params=["host", "lora"])
def build(request):
    def of(router):
        if request.param == "host":
            return drift_apart(in_place("llava", {**ROUTERS[router], "router": router, "objectives": {}}))
        fields = {"target_modules": ["q_proj", "down_proj"], "model_part": "language_model"}
        config = MoeLoraConfig(**fields, **ROUTERS[router], router=router, init_lora_weights=False)
        return get_peft_model(HOSTS["llava"].build(), config).eval()

    return of


@pytest.mark.parametrize("router", ROUTERS)
def test_they_learn_and_then_decode_token_by_token(build, router):
    model, inputs = build(router), HOSTS["llava"].inputs()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    before = logits(model, inputs)
    model.train()(**inputs, labels=labels_of(inputs)).loss.backward()
    learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    gates = [gradient for name, gradient in learning.items() if "gate.weight" in name or "router" in name]
    assert gates and all(gradient.isfinite().all() and gradient.any() for gradient in gates)
    optimizer.step()
    after = logits(model.eval(), inputs)
    real = inputs["attention_mask"].bool()
    assert (after - before)[real].abs().max() > 1e-3
    start = {name: value[:, :-1] if value.shape[:2] == real.shape else value for name, value in inputs.items()}
    with torch.no_grad():
        cache = with_cache(model, model(**start, use_cache=True))
        last = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": inputs["attention_mask"]}
        found = model(**last, **cache).logits
    assert_near(found[:, -1], after[:, -1], 1e-4)
