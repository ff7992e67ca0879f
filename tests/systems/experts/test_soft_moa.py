"""Soft slots: what a layer computes is the paper's equation."""

import pytest
import torch
from helpers.near import assert_near
from peft import get_peft_model

from hf_moe import MoeLoraConfig
from hf_moe.adapters.layer import MoeLoraLayer


BOTTLENECK = {"name": "bottleneck", "activation": "relu"}


def adapt(model, experts=BOTTLENECK, **fields):
    config = MoeLoraConfig(
        target_modules=r".*\.mlp",
        experts=experts,
        router={"name": "soft_moe", "slots_per_expert": 2},
        num_experts=3,
        num_experts_per_tok=None,
        lora_alpha=4,
        **fields,
    )
    return get_peft_model(model, config)


@pytest.mark.parametrize("experts", [BOTTLENECK, "lora"], ids=["bottleneck", "lora"])
def test_the_output_is_the_equation_of_the_paper(vit, randomise, experts):
    model = adapt(vit(), experts, r=4).eval()
    randomise(model)
    layer = next(module for module in model.modules() if isinstance(module, MoeLoraLayer))
    seen = {}
    layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    router = layer.moe_lora_router["default"]
    router.register_forward_hook(lambda module, args, output: seen.update(mixture=output, read=args[0]))
    with torch.no_grad():
        model(pixel_values=torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
        x = seen["x"]  # (B, S, H)
        read = seen["read"].view(2, -1, 32)
        scores = read @ router.weight.T  # (B, S, N)
        dispatch, combine = scores.softmax(1), scores.softmax(-1)
        slots = (dispatch.transpose(1, 2) @ x).view(2, 3, 2, 32)  # (B, E, p, H)
        act = torch.relu if experts is BOTTLENECK else torch.nn.Identity()
        a, b = layer.moe_lora_A["default"], layer.moe_lora_B["default"]  # (E, r, H), (E, H, r)
        outputs = torch.einsum("ehr,bepr->beph", b, act(torch.einsum("erh,beph->bepr", a, slots)))
        expected = layer.get_base_layer()(x) + combine @ outputs.reshape(2, 6, 32)
    assert_near(seen["y"], expected, 1e-4)


def test_slots_reach_experts_of_their_own_rank(vit, randomise):
    model = adapt(vit(), r=[1, 4, 2])
    randomise(model)
    layer = next(module for module in model.modules() if isinstance(module, MoeLoraLayer))
    seen = {}
    layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    layer.moe_lora_router["default"].register_forward_hook(lambda module, args, output: seen.update(mixture=output))
    model(pixel_values=torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    target, mixture = layer.experts["default"].target, seen["mixture"]
    slots = (mixture.dispatch.transpose(1, 2) @ seen["x"]).view(2, 3, 2, 32)  # (B, E, p, H)
    experts = zip(
        slots.unbind(1),
        target.split("A", layer.moe_lora_A["default"]),
        target.split("B", layer.moe_lora_B["default"]),
        (1, 4, 2),
        strict=True,
    )
    outputs = [4 / rank * (inputs @ a.T).relu() @ b.T for inputs, a, b, rank in experts]  # E of (B, p, H)
    expected = layer.get_base_layer()(seen["x"]) + mixture.combine @ torch.cat(outputs, 1)
    assert_near(seen["y"], expected, 1e-4)
    stacks = [layer.moe_lora_A["default"], layer.moe_lora_B["default"]]
    found = torch.autograd.grad(seen["y"].square().sum(), stacks, retain_graph=True)
    wanted = torch.autograd.grad(expected.square().sum(), stacks)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
