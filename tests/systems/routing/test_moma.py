"""MoMa: even loads within a modality, and auxiliary routers that foretell them."""

import pytest
import torch
from helpers.near import assert_near
from helpers.router_cases import HIDDEN, make_context, make_experts, make_router, make_spec, weight_table
from torch.nn import functional as F

from hf_moe.modeling.routing_context import RoutingContext


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("factor", "banks"), [(1.0, ()), (1.5, ()), (1.0, (("text", 2, 16), ("vision", 6, 16)))])
def test_an_expert_takes_its_share_of_its_own_modality(factor, banks):
    router = make_router("moma", {"capacity_factor": factor}, make_spec(banks=banks)).train()
    context, (text, image) = make_context(rows=3, positions=16), (2, 6) if banks else (4, 4)
    decision = router(torch.randn(48, HIDDEN), context)
    chosen, vision = weight_table(decision) > 0, context.modality_ids.flatten() == 1
    assert chosen[~vision].sum(0).tolist() == [-int(-factor * 34 // text)] * text + [0] * image  # 36 without padding
    assert chosen[vision].sum(0).tolist() == [0] * text + [-int(-factor * 12 // image)] * image
    assert_near(weight_table(decision), decision.router_logits.sigmoid() * chosen)
    for expert, column in enumerate(chosen.T):
        own = (vision == (expert >= text)) & context.token_mask.flatten()
        assert decision.router_logits[own & column, expert].min() > decision.router_logits[own & ~column, expert].max()


@pytest.fixture(scope="module")
def frozen():
    """Return a router whose auxiliary routers have learnt, tokens of clusters, and their context."""
    torch.manual_seed(0)
    router, clusters = make_router("moma", {}), torch.randn(8, HIDDEN)
    modality = (torch.arange(256) % 2).view(32, 8)
    context = RoutingContext(modality, torch.ones_like(modality, dtype=torch.bool))

    def batch():
        return clusters[torch.randint(0, 8, (256,))] + 0.3 * torch.randn(256, HIDDEN)

    before, optimizer = router.weight.clone(), torch.optim.Adam(router.parameters(), 0.01)
    for _ in range(200):
        optimizer.zero_grad()
        router.train()(batch(), context).signals["choice_loss"].mean().backward()
        optimizer.step()
    assert torch.equal(router.weight, before), "the loss reaches the auxiliary routers alone"
    return router, batch(), context


def test_auxiliary_routers_foretell_the_choice_of_a_frozen_model(frozen):
    router, hidden, context = frozen
    true, foretold = (router.train(training)(hidden, context) for training in (True, False))
    own = foretold.router_logits > float("-inf")
    agree = (weight_table(true) > 0) == (weight_table(foretold) > 0)
    assert agree[own].float().mean() > 0.88  # 0.75 for the guess that nobody takes a token
    experts = make_experts(make_spec())
    gap = (experts(hidden, true) - experts(hidden, foretold)).square().mean()
    assert gap < 0.25 * experts(hidden, true).square().mean()


def test_inference_routes_every_token_by_itself_within_its_modality(frozen):
    router, hidden, context = frozen
    whole, vision = weight_table(router.eval()(hidden, context)), context.modality_ids.flatten() == 1
    assert not whole[vision, :4].any() and not whole[~vision, 4:].any() and whole.any()
    inner = F.silu(torch.einsum("td,tfd->tf", hidden, router.choice_in[vision.long()]))
    own = vision[:, None] == (torch.arange(8) >= 4)
    assert torch.equal(whole > 0.0, own & ((inner @ router.choice_out.T).sigmoid() > 0.5))
    for row in range(3):
        part = RoutingContext(context.modality_ids[row : row + 1], context.token_mask[row : row + 1])
        assert_near(weight_table(router(hidden.view(32, 8, -1)[row], part)), whole.view(32, 8, -1)[row])


def test_noise_is_of_training_alone():
    router, hidden, context = make_router("moma", {"gumbel_noise": True}), torch.randn(30, HIDDEN), make_context()
    clean, closed = hidden @ router.weight.T, float("-inf")
    logits = [router.train(training)(hidden, context).router_logits for training in (False, True)]
    assert_near(*(item.masked_fill(logits[0] == closed, 0.0) for item in (logits[0], clean)))
    noise = (logits[1] - clean)[logits[0] > closed]
    assert abs(noise.mean()) < 0.5 and 1.4 < noise.std() < 2.2  # a logistic variable: 0 and pi / sqrt(3)
