"""Orthogonal experts: what a token's experts return is made orthogonal, and so they learn different things."""

import pytest
import torch
from helpers.layers import make_layer, run

from hf_moe.modeling.blocks.moore import orthogonalised
from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.expert_banks import run_assignment, slot_outputs
from hf_moe.modeling.routing_context import ACTIVE_CONTEXT, RoutingContext


BACKENDS = ["eager", "ragged", "batched_mm", "grouped_mm"]


def gram_schmidt(u: torch.Tensor) -> torch.Tensor:
    """Return the rows (K, d) of one token made orthogonal, vector by vector, from the original ones."""
    basis = []
    for vector in u:
        basis.append(vector - sum((v @ vector) / (v @ v) * v for v in basis))
    return torch.stack(basis)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_vectors_are_orthogonal_whatever_their_length(scale):
    torch.manual_seed(0)
    u = scale * torch.randn(50, 5, 16)
    v = orthogonalised(u, 1e-6)
    units = torch.nn.functional.normalize(v, dim=-1)
    assert (units @ units.mT - torch.eye(5)).abs().max() < 1e-4
    torch.testing.assert_close(v, torch.stack([gram_schmidt(token) for token in u]), rtol=1e-3, atol=1e-4 * scale)
    assert torch.equal(orthogonalised(u[:, :1], 1e-6), u[:, :1])


def test_a_repeated_vector_vanishes_with_finite_gradients():
    u = torch.randn(3, 3, 16)
    u[:, 1], u[0] = u[:, 0], 0.0
    u.requires_grad_()
    v = orthogonalised(u, 1e-6)
    assert v[:, 1].norm(dim=-1).max() < 1e-4 and v[1:, 2].norm(dim=-1).min() > 1.0
    v.square().sum().backward()
    assert u.grad.isfinite().all() and u.grad[1:, 0].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("banks", [{}, {"expert_banks": {"a": {"num_experts": 3}, "b": {"num_experts": 5}}}])
def test_a_layer_follows_the_formula_on_every_backend(backend, banks):
    layer, hidden = make_layer(slots=3, block="moore", num_shared_experts=1, **banks), torch.randn(1, 9, 16)
    runs = []
    layer.experts.register_forward_pre_hook(lambda *_: runs.append(1))
    for bank in getattr(layer.experts, "banks", [layer.experts]):
        bank.config = type("Config", (), {"_experts_implementation": backend})
    output, context = run(layer, hidden)
    assert len(runs) == 1
    decision, expected = context.decisions[1], layer.shared_expert(hidden[0])
    assert (decision.expert_index.diff() < 0).any()  # the router's order is another
    for token, row in enumerate(decision.expert_index):
        index = row.sort().values
        single = [ExpertAssignment(expert.view(1, 1), torch.ones(1, 1), 8) for expert in index]
        u = torch.cat([run_assignment(layer.experts, hidden[0, token : token + 1], one) for one in single])
        weight = decision.expert_weight[token][row.argsort()]
        expected[token] += weight @ gram_schmidt(u)
    torch.testing.assert_close(output[0], expected, atol=1e-5, rtol=1e-5)


def test_the_penalty_leaves_the_plain_mixture_and_counts_overlap():
    layer, plain = make_layer(block={"name": "moore", "mode": "penalty"}), make_layer()
    hidden = torch.randn(1, 9, 16)
    output, context = run(layer, hidden)
    torch.testing.assert_close(output, plain(hidden), atol=1e-6, rtol=0)
    overlap = context.decisions[1].signals["output_overlap"]
    u = slot_outputs(layer.experts, hidden[0], context.decisions[1].expert_index, 8)
    torch.testing.assert_close(overlap, torch.cosine_similarity(u[:, 0], u[:, 1], dim=-1).square())
    overlap.sum().backward()
    assert layer.experts.down_proj.grad.any()


def test_merged_experts_are_refused():
    with pytest.raises(ValueError, match="needs a router that assigns experts; ParameterMixture"):
        run(make_layer(block="moore", router={"name": "meo", "block_size": 3}), torch.randn(1, 4, 16))


def effective_rank(block: str) -> float:
    """Return the mean effective rank of what the experts add for a token, learnt from four tasks and equal starts."""
    router = {"name": "moore", "num_conditions": 4}
    layer, generator = make_layer(experts=4, block=block, router=router), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.copy_(weight[:1] + 1e-3 * torch.randn(weight.shape, generator=generator))
    maps, task = torch.randn(4, 16, 16, generator=generator) / 2, torch.arange(64) % 4
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    for _ in range(300):
        x = torch.randn(64, 4, 16, generator=generator)
        context = RoutingContext(*torch.ones(2, 64, 4).long().bool(), condition_ids={"task": task})
        token = ACTIVE_CONTEXT.set(context)
        loss = (layer(x) - torch.tanh(torch.einsum("bij,bsj->bsi", maps[task], x))).square().mean()
        ACTIVE_CONTEXT.reset(token)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    outputs = slot_outputs(layer.experts, x.flatten(0, 1), context.decisions[1].expert_index, 4).detach()
    values = torch.linalg.svdvals(orthogonalised(outputs, 1e-6) if block == "moore" else outputs)
    shares = values / values.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp().mean().item()


def test_equal_experts_part_where_their_outputs_are_orthogonal():
    assert effective_rank("moore") > 3 and effective_rank("moe") < 2
