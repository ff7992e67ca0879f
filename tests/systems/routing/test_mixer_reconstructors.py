"""MixER: a gate that is fitted to clusters of samples in closed form."""

from itertools import permutations

import pytest
import torch
from helpers.layers import make_layer, run
from helpers.router_cases import make_router, make_spec, text_context
from torch.nn import functional as F

from hf_moe.modeling.clustering import nearest_centroid


CENTRES = 3 * torch.eye(3, 6)


def rows_of(cluster):
    """Return samples (B, 5, 6) around the centres of their clusters."""
    return CENTRES[cluster][:, None] + 0.3 * torch.randn(len(cluster), 5, 6)


def decide(router, rows):
    """Return the expert of every sample, by its last token."""
    context = text_context(*rows.shape[:2])
    decision = router(rows.flatten(0, 1), context)
    if router.training:
        router.accumulate(decision, context)
        router.end_step()
    return decision.expert_index.view(rows.shape[:2])[:, -1]


def test_one_fit_agrees_with_the_clusters_and_a_second_changes_nothing():
    torch.manual_seed(0)
    spec = make_spec(hidden_size=6, num_experts=3, num_experts_per_tok=1)
    router, cluster = make_router("mixer_reconstructors", {"refit_every": 2}, spec).train(), torch.randint(3, (60,))
    rows, drawn = rows_of(cluster), router.weight.clone()
    decide(router, rows[:30])
    assert torch.equal(router.weight, drawn)
    decide(router, rows[30:])
    found, chosen = nearest_centroid(router.samples[:60], router.centroids), decide(router.eval(), rows)
    assert (chosen == found).float().mean() >= 0.95 and router.silhouette > 0.6
    assert len({*zip(found.tolist(), cluster.tolist(), strict=True)}) == 3, "clusters are not those of the data"
    router.refit()
    assert torch.equal(nearest_centroid(router.samples[:60], router.centroids), found)
    assert torch.equal(decide(router, rows), chosen)
    assert [*router.parameters()] == []


def test_the_fit_is_the_ridge_regression():
    spec = make_spec(hidden_size=6, num_experts=3, num_experts_per_tok=1)
    router = make_router("mixer_reconstructors", {"refit_every": 1, "ridge": 0.5}, spec).train()
    rows = rows_of(torch.arange(20) % 3)
    decide(router, rows)
    inputs = router.samples[:20].double()
    targets = F.one_hot(nearest_centroid(router.samples[:20], router.centroids), 3).double()
    augmented = torch.cat([inputs, torch.ones(20, 1)], 1)
    penalty = torch.tensor([0.5] * 6 + [0.0]).diag()
    expected = torch.linalg.solve(augmented.T @ augmented + penalty, augmented.T @ targets)
    found = torch.cat([router.weight, router.bias[:, None]], 1).double()
    torch.testing.assert_close(found, expected.T, atol=1e-5, rtol=0)
    logits = router(rows.flatten(0, 1), text_context(20, 5)).router_logits.view(20, 5, 3)[:, -1]
    torch.testing.assert_close(logits.double(), augmented @ expected, atol=1e-5, rtol=0)


def accuracy(seed, **router):
    """Return how many samples have the expert of their cluster after a short training of layer and gate."""
    layer = make_layer(6, 12, experts=3, slots=1, router=router, seed=seed).train()
    maps, optimizer = torch.randn(3, 6, 6), torch.optim.Adam(layer.parameters(), lr=3e-3)
    for _ in range(60):
        cluster = torch.randint(3, (24,))
        rows = rows_of(cluster)
        output, context = run(layer, rows)
        F.mse_loss(output, rows @ maps[cluster]).backward()
        optimizer.step()
        optimizer.zero_grad()
        layer.router.accumulate(context.decisions[1], context)
        layer.router.end_step()
    cluster = torch.arange(90) % 3
    chosen = decide(layer.eval().router, rows_of(cluster))
    return max((torch.tensor(order)[cluster] == chosen).float().mean().item() for order in permutations(range(3)))


def test_a_fitted_gate_finds_the_clusters_sooner_than_a_trained_one():
    fitted = sum(accuracy(seed, name="mixer_reconstructors", refit_every=20) for seed in range(3)) / 3
    trained = sum(accuracy(seed, name="sequence") for seed in range(3)) / 3
    assert fitted >= 0.95 and trained < fitted - 0.05


@pytest.mark.parametrize("facts", [{"num_experts_per_tok": 2}, {"num_experts": 9, "num_experts_per_tok": 1}])
def test_several_slots_and_more_experts_than_samples_are_refused(facts):
    with pytest.raises(ValueError, match="set num_experts_per_tok=1, .* and no more than that many experts"):
        make_router("mixer_reconstructors", {"reservoir_size": 8}, make_spec(**facts))
