"""Uni-Perceiver-MoE: gates by condition, whose experts are merged into one."""

import pytest
import torch
from helpers.router_cases import (
    HIDDEN,
    fit,
    make_context,
    make_experts,
    make_hidden,
    make_router,
    make_spec,
    moe,
    text_context,
)

from hf_moe.modeling.decisions import ParameterMixture


LINEAR = make_spec(hidden_act="linear", gated=False, expert_intermediate_size=HIDDEN)
BITS = torch.tensor([[1.0, 0, 1, 0, 1, 0], [1.0, 0, 1, 0, 1, 0], [0, 1.0, 1, 0, 0, 1]])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def described():
    context = make_context()
    context.condition_ids = {"attribute": BITS}
    return context


def test_tokens_of_equal_attributes_have_equal_weights():
    router, context = make_router("uniperceiver_moe"), described()
    decision = router(make_hidden(context), context)
    gates = decision.expert_weight[decision.group_index].view(3, 10, -1)
    assert torch.equal(gates[0], gates[1]) and len(decision.expert_weight) == 4  # two rows are of one condition
    for row in range(3):
        for kind in (0, 1):
            assert len(gates[row][context.modality_ids[row] == kind].unique(dim=0)) == 1
    bits = torch.cat([BITS[2], torch.tensor([1.0, 0.0])])  # of an image token in the third row
    logits = router.gate @ router.norm(router.projection(bits))
    expected = logits.softmax(-1) * (logits >= logits.topk(2).values[-1])
    torch.testing.assert_close(gates[2, 4], expected / expected.sum())


def test_noise_moves_gates_in_training_alone():
    router, context = make_router("uniperceiver_moe"), described()
    hidden = make_hidden(context)
    quiet = [router(hidden, context).router_logits.detach()[:1] for _ in range(2)]
    assert torch.equal(*quiet)
    noisy = torch.cat([router.train()(hidden, context).router_logits.detach()[:1] for _ in range(400)])
    assert (noisy - quiet[0]).std().item() == pytest.approx(1 / 8, rel=0.1)


@pytest.mark.parametrize("level", ["attribute", "task", "modality"])
def test_merged_matrices_compute_the_mixture_of_outputs(level):
    context, hidden = described(), make_hidden(described())
    context.condition_ids["task"] = torch.tensor([1, 0, -1])
    experts = make_experts(LINEAR)
    experts.down_proj.data[:] = torch.eye(HIDDEN)  # one linear map
    merging, mixing = (make_router("uniperceiver_moe", {"level": level, "merge": merge}) for merge in (True, False))
    mixing.load_state_dict(merging.state_dict())
    assert isinstance(merging(hidden, context), ParameterMixture)
    merged, mixed = (moe(router, experts, context)(hidden) for router in (merging, mixing))
    torch.testing.assert_close(merged, mixed, atol=1e-5, rtol=1e-5)
    assert merged.any() and (not merged.view(3, 10, -1)[2].any() if level == "task" else merged.any(-1).all())


def trained(name: str, bits: torch.Tensor, experts: int) -> float:
    """Return the loss on two tasks whose targets for the same inputs are opposite."""
    torch.manual_seed(0)
    sizes = {"num_experts": experts, "num_experts_per_tok": min(2, experts), "expert_intermediate_size": 64}
    spec = make_spec(hidden_size=16, **sizes)
    context, target = text_context(2, 64), torch.randn(16, 16) / 4
    context.condition_ids = {"attribute": bits}
    router, kind = make_router(name, spec=spec).train(), make_experts(spec)

    def batch():
        hidden = torch.randn(64, 16)
        return hidden.repeat(2, 1), torch.cat([hidden @ target, -hidden @ target])

    return fit(moe(router, kind, context), [*router.parameters(), *kind.parameters()], batch, 200)


def test_attributes_end_the_interference_of_two_tasks():
    bits = torch.eye(2, 6)
    dense = trained("constant", torch.zeros(2, 6), experts=1)
    told, untold = (trained("uniperceiver_moe", given, experts=4) for given in (bits, torch.zeros(2, 6)))
    assert told < 0.5 * dense and untold > 0.8 * dense
