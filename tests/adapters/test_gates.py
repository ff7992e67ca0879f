"""Gates of a variable or noisy choice, as LoRA experts and on a host of Transformers."""

import pytest
from helpers.adapted import logits
from helpers.hosts.catalogue import HOSTS
from helpers.hosts.small import small_host
from helpers.near import assert_near
from peft import get_peft_model

from hf_moe import HfMoeForConditionalGeneration, MoeLoraConfig


ROUTERS = {
    "dselect_k": {"conditioning": "token"},
    "dynmoe": {"init_experts": 3},
    "grin": {"jitter_eps": 0.5},
    "moec": {"num_clusters": 2},
}
each = pytest.mark.parametrize("router", [{"name": name, **options} for name, options in ROUTERS.items()], ids=ROUTERS)


def without_gradient(model, inputs):
    """Return the routers' parameters that a training step does not move."""
    model.train()(**inputs).loss.backward()
    gates = {name: p for name, p in model.named_parameters() if ".moe_lora_router." in name or ".gate." in name}
    assert gates
    return [name for name, p in gates.items() if p.requires_grad and (p.grad is None or not p.grad.any())]


@each
def test_it_routes_lora_experts(llama, text, randomise, router):
    config = MoeLoraConfig(target_modules=["down_proj"], num_experts=4, router=router)
    model = get_peft_model(llama(), config).eval()
    randomise(model)
    together, alone = logits(model, text), logits(model, {"input_ids": text["input_ids"][1:, 3:]})
    assert_near(together[1:, 3:], alone, 1e-5)
    with model.disable_adapter():
        assert (logits(model, text) - together).abs().max() > 1e-3
    assert without_gradient(model, text) == []


@each
def test_it_routes_a_host(router):
    host = HOSTS["llava"]
    moe_config = {"layers": "from_1", "num_experts": 4, "router": router}
    model = HfMoeForConditionalGeneration.from_host(small_host("llava"), moe_config=moe_config, noise=0.5)
    inputs = host.inputs()
    assert without_gradient(model, {**inputs, "labels": inputs["input_ids"]}) == []
