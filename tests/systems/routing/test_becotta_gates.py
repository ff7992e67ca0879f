"""BECoTTA's gates and adapters by formula."""

import torch
from helpers.near import assert_near
from peft import get_peft_model
from torch.nn import functional as F

from hf_moe import MoeLoraConfig
from hf_moe.adapters.layer import tuner_layers
from hf_moe.adapters.low_rank import SharedAssignment
from hf_moe.modeling.routing_context import RoutingContext


def test_the_gate_of_a_domain_decides_with_noise_while_training_alone():
    config = MoeLoraConfig.from_system("becotta", num_experts=3, num_experts_per_tok=2)
    settings = config.settings("layers.0")
    router = config.build_router(config.spec(0, 3, settings), settings)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 3, 3, generator=generator), torch.randn(4, 6, 3, generator=generator)
    router.weight.data = weight
    domains = [2, 0]
    for training in (False, True):
        context = RoutingContext.all_text(hidden)
        context.condition_ids = {"domain": torch.tensor(domains)}
        torch.manual_seed(1)
        gates = SharedAssignment.of(router.train(training)(hidden.flatten(0, 1), context)).gates.view(2, 3, 3)
        torch.manual_seed(1)
        noise = torch.randn(2, 3, 3)
        for row, domain in enumerate(domains):
            clean, raw = (hidden[row] @ weight[domain].T).chunk(2, dim=-1)
            logits = clean + training * noise[row] * (F.softplus(raw) + 0.01)
            for token in range(3):  # of a decoder, which has read so far
                value, index = logits[: token + 1].sum(0).topk(2)
                expected = torch.zeros(3).scatter(0, index, value.softmax(-1))
                torch.testing.assert_close(gates[row, token], expected)


def test_adapters_read_what_their_target_returns(llama, text, randomise):
    config = MoeLoraConfig.from_system("becotta", target_modules=["mlp"], layers_to_transform=[0])
    model = get_peft_model(llama(), config).eval()
    randomise(model)
    (layer,) = tuner_layers(model)
    seen, gates = [], []
    layer.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    layer.moe_lora_router["default"].register_forward_hook(
        lambda module, args, decision: gates.append(SharedAssignment.of(decision).gates.view(2, 9, -1))
    )
    with torch.no_grad():
        model(input_ids=text["input_ids"], domain_ids=torch.tensor([1, 3]))
        x, found = seen
        plain = layer.base_layer(x)
        added = [
            F.linear(F.gelu(F.linear(plain, down)), up)
            for down, up in zip(layer.moe_lora_A["default"], layer.moe_lora_B["default"], strict=True)
        ]
        expected = plain + (gates[0][..., None] * torch.stack(added, dim=2)).sum(2)
    assert (gates[0] > 0).sum(-1).unique().tolist() == [2]
    assert_near(found, expected, 1e-4)
