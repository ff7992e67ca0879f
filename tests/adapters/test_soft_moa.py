"""Soft slots: what a layer computes is the paper's equation."""

import torch
from peft import get_peft_model

from hf_moe import MoeLoraConfig
from hf_moe.adapters.layer import MoeLoraLayer


def test_the_output_is_the_equation_of_the_paper(vit, randomise):
    model = get_peft_model(
        vit(),
        MoeLoraConfig(
            target_modules=r".*\.mlp",
            experts={"name": "bottleneck", "activation": "relu"},
            router={"name": "soft_moa", "slots_per_expert": 2},
            num_experts=3,
            num_experts_per_tok=None,
            r=4,
            lora_alpha=4,
        ),
    ).eval()
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
        a, b = layer.moe_lora_A["default"], layer.moe_lora_B["default"]  # (E, r, H), (E, H, r)
        outputs = torch.einsum("ehr,bepr->beph", b, torch.einsum("erh,beph->bepr", a, slots).relu())
        expected = layer.get_base_layer()(x) + combine @ outputs.reshape(2, 6, 32)
    torch.testing.assert_close(seen["y"], expected, atol=1e-4, rtol=1e-4)
