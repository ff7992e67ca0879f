"""Chain of experts: the experts of a layer run several times, each time newly routed."""

import pytest
import torch
from helpers.layers import fitted, make_layer, run


def chain(slots: int = 4, **options):
    return make_layer(slots=slots, block={"name": "chain_of_experts", **options}, num_shared_experts=1)


def test_one_iteration_is_the_plain_layer():
    plain, one = make_layer(slots=4, num_shared_experts=1), chain(num_iterations=1)
    one.load_state_dict({name.replace("gate.", "gate.0."): value for name, value in plain.state_dict().items()})
    hidden = torch.randn(2, 5, 16)
    torch.testing.assert_close(one(hidden), plain(hidden))


def test_every_iteration_routes_its_share_anew():
    layer, hidden = chain(), torch.randn(2, 5, 16)
    output, context = run(layer, hidden)
    output.square().sum().backward()
    assert list(context.decisions) == [1, "1.step1"]
    assert [decision.expert_index.shape[1] for decision in context.decisions.values()] == [2, 2]
    assert all(gate.weight.grad.any() for gate in layer.gate)


def test_the_iterations_follow_the_formula():
    layer, hidden = chain(), torch.randn(1, 5, 16)
    output, context = run(layer, hidden)
    state = hidden[0]
    for decision in context.decisions.values():
        state = state + layer.experts(state, decision) + layer.shared_expert(state)
    torch.testing.assert_close(output[0], state - hidden[0])


def test_without_independent_routers_one_decision_serves_all():
    layer, hidden = chain(independent_routers=False), torch.randn(1, 5, 16)
    output, context = run(layer, hidden)
    assert list(context.decisions) == [1] and len(layer.gate) == 1
    decision, state = context.decisions[1], hidden[0]
    for _ in range(2):
        state = state + layer.experts(state, decision) + layer.shared_expert(state)
    torch.testing.assert_close(output[0], state - hidden[0])


def test_iterations_that_do_not_divide_the_slots_are_refused():
    with pytest.raises(ValueError, match="num_iterations=3 must divide num_experts_per_tok=4 of layer 1"):
        chain(num_iterations=3)


def composition_loss(seed: int, **options) -> float:
    """Return the loss on y = f_a(g_b(v)), four random maps f and four g, where v, a and b are given."""
    generator = torch.Generator().manual_seed(seed)
    f, g = torch.randn(2, 4, 8, 8, generator=generator) * 0.6

    def batch():
        v = torch.randn(256, 8, generator=generator)
        a, b = torch.randint(4, (2, 256), generator=generator)
        inner = torch.tanh(torch.einsum("tij,tj->ti", g[b], v))
        bits = [torch.nn.functional.one_hot(item, 4).float() for item in (a, b)]
        return torch.cat([v, *bits], -1), torch.tanh(torch.einsum("tij,tj->ti", f[a], inner))

    layer = make_layer(32, 16, slots=4, std=0.1, seed=seed, block={"name": "chain_of_experts", **options})
    return fitted(layer, batch, 800, ends=(torch.nn.Linear(16, 32), torch.nn.Linear(32, 8)))


@pytest.mark.slow
def test_two_iterations_compose_what_one_cannot():
    arms = {"one": {"num_iterations": 1}, "two": {}, "no residual": {"inner_residual": False}}
    loss = {name: sum(composition_loss(seed, **arm) for seed in range(3)) / 3 for name, arm in arms.items()}
    assert loss["two"] < 0.95 * loss["one"] and loss["one"] < loss["no residual"]
