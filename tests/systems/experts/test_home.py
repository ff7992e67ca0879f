"""The experts of HoME: outputs of one scale, and a view of the features for each."""

import pytest
import torch
from helpers.hosts.small import small_host
from helpers.router_cases import EAGER, make_spec

from hf_moe.construction.in_place import from_host
from hf_moe.modeling.decisions import ExpertAssignment, SlotMixture
from hf_moe.modeling.experts.home import HomeExperts
from hf_moe.modeling.initialisation import initialize_mechanisms


def make_experts(**options) -> HomeExperts:
    torch.manual_seed(0)
    experts = HomeExperts(EAGER, make_spec(), **options)
    initialize_mechanisms(experts, 0.3)
    return experts


def chosen(tokens: int = 200, slots: int = 2) -> ExpertAssignment:
    index = torch.stack([torch.randperm(9)[:slots] for _ in range(tokens)])  # 8 is empty
    return ExpertAssignment(index, torch.rand(tokens, slots).masked_fill(index == 8, 0.0), 8)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["rms", "none"])
@pytest.mark.parametrize("rank", [0, 3])
def test_experts_follow_their_formula(norm, rank):
    experts, decision, hidden = make_experts(expert_norm=norm, feature_gate_rank=rank), chosen(), torch.randn(200, 32)
    for parameter in experts.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    expected = torch.zeros(200, 32)
    for token, x in enumerate(hidden):
        index, weight = decision.expert_index[token], decision.expert_weight[token]
        for e, w in zip(index[index < 8], weight[index < 8], strict=True):
            read = x if rank == 0 else x * 2 * (experts.feature_gate_B[e] @ (experts.feature_gate_A[e] @ x)).sigmoid()
            gate, up = (experts.ffn.gate_up_proj[e] @ read).chunk(2)
            u = experts.ffn.down_proj[e] @ (torch.nn.functional.silu(gate) * up)
            u = u if norm == "none" else experts.norm_weight[e] * u / (u.square().mean() + 1e-6).sqrt()
            expected[token] += w * u
    torch.testing.assert_close(experts(hidden, decision), expected, atol=1e-5, rtol=1e-5)
    once = ExpertAssignment(torch.arange(8)[:, None], torch.ones(8, 1), 8)
    mixture = SlotMixture(torch.eye(8)[None], torch.eye(8)[None], 8)
    torch.testing.assert_close(experts(hidden[:8], mixture), experts(hidden[:8], once), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("norm", "least", "most"), [("none", 5.0, 100.1), ("rms", 0.9, 1.1)])
def test_a_loud_expert_outweighs_the_others_without_a_norm(norm, least, most):
    experts, hidden, shares = make_experts(expert_norm=norm), torch.randn(64, 32), []
    for scale in (1.0, 10.0):
        experts.ffn.down_proj[3] *= scale
        index = torch.arange(8).repeat_interleave(64)[:, None]
        output = experts(hidden.repeat(8, 1), ExpertAssignment(index, torch.ones(512, 1), 8))
        energy = output.view(8, -1).square().sum(-1)
        shares.append(energy[3] / energy.sum())
    assert least < shares[1] / shares[0] < most


@torch.no_grad()
def test_a_hosted_model_starts_as_its_host_with_feature_gates():
    host, ids = small_host("qwen3"), torch.arange(5, 25)[None]
    expected = host(input_ids=ids).logits
    experts = {"name": "home", "expert_norm": "none", "feature_gate_rank": 4}
    router = {"name": "home", "experts_of": [[0, 1, 2], [0, 1, 3]]}
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "router": router, "experts": experts}
    model = from_host(host, moe_config=moe)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    normed = from_host(small_host("qwen3"), moe_config={**moe, "experts": "home"})(input_ids=ids).logits
    assert normed.isfinite().all() and (normed - expected).abs().max() > 1e-3
