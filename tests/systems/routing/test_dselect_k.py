"""DSelect-k: a gate without jumps, whose training ends with at most K experts per token."""

import pytest
import torch
from helpers.router_cases import make_router, make_spec, text_context
from torch.nn import functional as F


def q_of(router, hidden):
    """Return the weight of every expert in training, (T, E)."""
    decision = router.train()(hidden, text_context(1, len(hidden)))
    weights = torch.zeros(len(hidden), router.spec.num_experts + 1)
    return weights.scatter(1, decision.expert_index, decision.expert_weight)[:, :-1], decision


def decided(seed: int, num_experts: int = 4, entropy: float = 0.1, unused: float = 0.0):
    """Train experts of one value each on four clusters; return the router and tokens of the clusters."""
    torch.manual_seed(seed)
    router = make_router("dselect_k", spec=make_spec(hidden_size=8, num_experts=num_experts))
    centres, targets = 3 * torch.eye(8)[:4], torch.randn(4, 4)
    values = torch.randn(num_experts, 4, requires_grad=True)
    optimizer = torch.optim.Adam([*router.parameters(), values], lr=1e-2)
    for _ in range(600):
        cluster = torch.randint(4, (64,))
        hidden = centres[cluster] + 0.2 * torch.randn(64, 8)
        q, decision = q_of(router, hidden)
        signals = decision.signals
        loss = F.mse_loss(q @ values, targets[cluster]) + entropy * signals["selector_entropy"].mean()
        loss = loss + unused * signals["unused_codes"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return router, centres[torch.randint(4, (512,))] + 0.2 * torch.randn(512, 8)


def test_weights_sum_to_one_with_a_power_of_two():
    q, decision = q_of(make_router("dselect_k"), torch.randn(256, 32))
    torch.testing.assert_close(q.sum(-1), torch.ones(256), atol=1e-6, rtol=0)
    assert (decision.expert_index < 8).all(), "all experts run at first"


def test_its_largest_jump_halves_with_the_grid_and_that_of_top_k_stays():
    torch.manual_seed(0)
    start, along, jumps = torch.randn(32), torch.randn(32), {}
    for name in ("dselect_k", "top_k"):
        router = make_router(name)
        if name == "dselect_k":
            torch.nn.init.normal_(router.codes, std=0.1)
        for points in (1000, 2000):
            line = start + along * torch.linspace(-3, 3, points)[:, None]
            jumps[name, points] = q_of(router, line)[0].detach().diff(dim=0).abs().max().item()
    assert jumps["dselect_k", 2000] == pytest.approx(0.5 * jumps["dselect_k", 1000], rel=0.1)
    assert jumps["top_k", 2000] > 0.9 * jumps["top_k", 1000] > 0.1


def test_entropy_leaves_two_experts_to_a_token_and_nothing_to_renormalise():
    free = (q_of(*decided(0, entropy=0.0))[0] > 1e-6).sum(-1) <= 2
    router, hidden = decided(0)
    q = q_of(router, hidden)[0]
    two = (q > 1e-6).sum(-1) <= 2
    assert two.float().mean() > 0.99 and free.float().mean() < 0.9
    found = router.eval()(hidden, text_context(1, 512))
    torch.testing.assert_close(found.expert_weight[two], q[two].topk(2).values, atol=1e-5, rtol=0)


def test_the_second_loss_keeps_selectors_off_codes_without_expert():
    kept = {}
    for unused in (0.0, 1.0):
        router, hidden = decided(0, num_experts=6, unused=unused)
        # A selector whose mass on the six experts is p adds 1 / p.
        kept[unused] = (q_of(router, hidden)[1].signals["unused_codes"] < 2 + 1e-3).float().mean()
    assert kept[1.0] > 0.99 and kept[0.0] < 0.9
