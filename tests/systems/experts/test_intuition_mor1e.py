"""Intuition-MoR1E: pairs of rank-1 vectors, scored by the token and by what its row is close to."""

import torch
from helpers.near import assert_near
from peft import get_peft_model
from torch.nn import functional as F

from hf_moe import MoeLoraConfig
from hf_moe.adapters import find_centroids, intuition
from hf_moe.adapters.layer import tuner_layers


def test_the_two_best_of_four_pairs_add_what_the_formula_says(llama):
    config = MoeLoraConfig.from_system(
        "intuition_mor1e", target_modules=["q_proj"], num_experts=4, num_experts_per_tok=2, layers_to_transform=[0]
    )
    model = get_peft_model(llama(), config).eval()
    (layer,) = tuner_layers(model)
    router = layer.moe_lora_router["default"]
    torch.manual_seed(0)
    w_u, w_d, v = torch.randn(2, 32), torch.randn(2, 32), torch.randn(2, 32)
    m_u, m_d, u = torch.randn(2, 16), 20.0 * torch.randn(2, 16), torch.randn(2, 32)
    layer.moe_lora_A["default"].data, layer.moe_lora_B["default"].data = v[:, None], u[..., None]
    g = torch.randn(1, 16).softmax(-1)
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.extend([args[0][0], output[0]]))
    with torch.no_grad():
        router.weight.copy_(torch.cat([w_u, w_d]))
        router.prior.copy_(torch.cat([m_u, m_d]))
        model(input_ids=torch.tensor([[5, 6, 7]]), intuition_ids=g)
        hidden, found = seen
        up, down = hidden @ w_u.T + g @ m_u.T, hidden @ w_d.T + g @ m_d.T  # (T, 2) both
        for token, h in enumerate(hidden):
            scores = {(i, j): up[token, i] + down[token, j] for i in range(2) for j in range(2)}
            kept = sorted(scores, key=scores.__getitem__, reverse=True)[:2]
            weights = torch.stack([scores[pair] for pair in kept]).softmax(0)
            expected = layer.base_layer(h) + sum(
                w * u[i] * (v[j] @ h) for w, (i, j) in zip(weights, kept, strict=True)
            )
            assert_near(found[token], expected, 1e-4)


def test_intuition_is_the_softmax_of_the_cosines_over_a_tenth():
    near = torch.tensor([[2.0, 0.0], [3.0, 3.0]])
    centroids = torch.tensor([[5.0, 0.0], [0.0, 0.5]])
    half = 0.5**0.5
    expected = torch.tensor([[1.0, 0.0], [half, half]]).div(0.1).softmax(-1)
    torch.testing.assert_close(intuition(near, centroids), expected)


def test_centroids_are_the_directions_of_the_means_of_what_is_nearest_to_them():
    points = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    centroids = find_centroids(points, 4)
    directions = F.normalize(points, dim=-1)
    nearest = (directions @ centroids.T).argmax(1)
    means = torch.stack([directions[nearest == number].sum(0) for number in range(4)])
    torch.testing.assert_close(centroids, F.normalize(means, dim=-1))
