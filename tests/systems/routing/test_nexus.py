"""Nexus: experts that the router knows by their domains, so that a new one is scored at once."""

import torch
from helpers.near import assert_near
from helpers.router_cases import make_router, make_spec, text_context
from torch.nn import functional as F


def decide(router, hidden):
    return router(hidden, text_context(1, len(hidden)))


@torch.no_grad()
def test_experts_are_their_domains():
    router, hidden = make_router("nexus", {"domain_embedding_dim": 4}), torch.randn(20, 32)
    before, order = decide(router, hidden).router_logits, torch.randperm(8)
    router.domain_embeddings.copy_(router.domain_embeddings[order])
    assert_near(decide(router, hidden).router_logits, before[:, order])
    router.domain_embeddings[7] = router.domain_embeddings[2]
    found = decide(router, hidden)
    assert_near(found.router_logits[:, 7], found.router_logits[:, 2])
    assert_near(found.expert_weight, found.router_logits.softmax(-1).topk(2).values)
    inner = F.silu(router.domain_embeddings @ router.gate_proj.T) * (router.domain_embeddings @ router.up_proj.T)
    assert_near(found.router_logits, hidden @ (inner @ router.down_proj.T).T, 1e-5)


@torch.no_grad()
def test_rows_are_made_anew_where_something_has_changed():
    router = make_router("nexus")
    rows = router.expert_rows()
    assert router.expert_rows() is rows
    router.down_proj.mul_(2)
    assert_near(router.expert_rows(), 2 * rows)
    with torch.enable_grad():
        assert router.expert_rows().requires_grad
    assert not router.expert_rows().requires_grad


def share_of_a_new_expert(name, seed, experts=24):
    """Return how many tokens of a new domain go to its expert, after a few steps on old and new ones."""
    torch.manual_seed(seed)
    domains, mixing = F.normalize(torch.randn(experts + 1, 4), dim=-1), torch.randn(4, 16)

    def sample(domain):
        return domains[domain] @ mixing + 0.1 * torch.randn(len(domain), 16)

    def trained(number, steps, old=None):
        options = {"domain_embedding_dim": 4} if name == "nexus" else {}
        router = make_router(name, options, make_spec(hidden_size=16, num_experts=number))
        router.domain_embeddings = domains[:number]
        rows = {} if old is None else dict(old.named_parameters())
        for key, parameter in router.named_parameters():
            if key in rows:  # a row of the linear gate stays as it was drawn
                parameter.data[: len(rows[key])] = rows[key].data
        optimizer = torch.optim.Adam(router.parameters(), lr=5e-3)
        for _ in range(steps):
            domain = torch.randint(number, (128,))
            optimizer.zero_grad()
            F.cross_entropy(decide(router, sample(domain)).router_logits, domain).backward()
            optimizer.step()
        return router

    router = trained(experts + 1, 40, trained(experts, 300))
    chosen = decide(router, sample(torch.full((500,), experts))).router_logits.argmax(-1)
    return (chosen == experts).float().mean()


def test_a_new_expert_finds_its_tokens_sooner_than_with_a_new_row():
    assert sum(share_of_a_new_expert("nexus", seed) > share_of_a_new_expert("top_k", seed) for seed in range(6)) >= 5
