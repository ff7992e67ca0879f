"""EVE: a feed-forward for each modality below, and experts for both at the top, whose gate is told the modality."""

import pytest
import torch
from helpers.router_cases import fit, make_context, make_experts, make_hidden, make_router, make_spec, moe

from hf_moe import HfMoeConfig
from hf_moe.configuration.layer_maps import at_layer
from hf_moe.modeling.routing_context import RoutingContext


SOFT = make_spec(num_experts_per_tok=1)


def test_soft_layers_are_at_the_top_of_any_host():
    for layers in (1, 5):
        host = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": layers}
        config = HfMoeConfig.from_system("eve", text_config=host).moe_config
        names = [at_layer(config.router, layer)["name"] for layer in range(layers)]
        assert names == ["modality"] * (layers - 2) + ["top_k"] * min(layers, 2)
        assert at_layer(config.num_experts, layers - 1) == 32


def test_the_gate_is_told_the_modality_and_the_experts_are_not():
    router = make_router("top_k", {"modality_bias": "input"}, SOFT)
    hidden = torch.randn(1, 32).expand(2, -1)
    context = RoutingContext(torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool))
    text, image = router(hidden, context).router_logits
    bias = router.modality_bias
    torch.testing.assert_close(image - text, router.weight @ (bias[1] - bias[0]))
    torch.testing.assert_close(text, router.weight @ (hidden[0] + bias[0]))
    text, image = make_router("top_k", spec=SOFT)(hidden, context).router_logits
    assert torch.equal(text, image)


def test_no_image_token_reaches_the_feed_forward_of_text():
    context = make_context(32, 16)
    decision = make_router("modality", spec=make_spec(num_experts=2, num_experts_per_tok=1))(
        make_hidden(context), context
    )
    assert (
        torch.equal(decision.expert_index[:, 0], context.modality_ids.flatten())
        and (decision.expert_weight == 1).all()
    )


def trained(routers: list, seed: int) -> float:
    """Return the loss of two layers on a target that is another linear map for each modality."""
    torch.manual_seed(seed)
    target, context = torch.randn(2, 16, 16) / 4, make_context(16, 16)
    layers = []
    for name, options, experts in routers:
        spec = make_spec(hidden_size=16, num_experts=experts, num_experts_per_tok=1, expert_intermediate_size=64)
        layers.append((make_router(name, options, spec), make_experts(spec)))
    first, second = (moe(router, experts, context) for router, experts in layers)

    def forward(hidden):
        hidden = hidden + first(hidden)
        return hidden + second(hidden)

    def batch():
        hidden = make_hidden(context, 16)
        return hidden, torch.einsum("td,tde->te", hidden, target[context.modality_ids.flatten()])

    parameters = [parameter for layer in layers for part in layer for parameter in part.parameters()]
    return fit(forward, parameters, batch, 200)


@pytest.mark.parametrize("seed", [0, 1])
def test_both_kinds_of_layers_learn_what_a_shared_one_does_not(seed):
    hard, shared = ("modality", {}, 2), ("constant", {}, 1)
    soft, blind = (("top_k", {"modality_bias": bias}, 8) for bias in ("input", None))
    assert trained([hard, soft], seed) < 0.8 * trained([shared, shared], seed)  # 0.38 to 0.63 of it in three seeds
    assert trained([shared, soft], seed) < 0.8 * trained([shared, blind], seed)  # 0.55 to 0.64
