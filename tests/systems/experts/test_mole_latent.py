"""Latent experts: what a conversion keeps of the experts, and how many parameters they have."""

import pytest
import torch
from helpers.hosts.small import small_host
from helpers.router_cases import make_experts, make_spec

from hf_moe.construction.conversion import convert_experts
from hf_moe.construction.in_place import from_host
from hf_moe.modeling.decisions import ExpertAssignment, SlotMixture
from hf_moe.modeling.experts.mole_latent import LatentExperts


SPEC = make_spec(num_experts=4, hidden_size=32, expert_intermediate_size=24)


def outputs(experts, hidden):
    """Return what the experts compute of tokens (T, d), each token with weight 1/2 by two of them."""
    index = torch.stack([torch.arange(len(hidden)) % 4, (torch.arange(len(hidden)) + 1) % 4], dim=1)
    return experts(hidden, ExpertAssignment(index, torch.full(index.shape, 0.5), 4))


def converted(experts, latent, inputs=None, **options):
    fresh = LatentExperts(None, SPEC, latent_dim=latent, **options)
    fresh.take(experts.states(), inputs)
    return fresh


def error(fresh, experts, hidden):
    """Return the squared error of the outputs relative to their size."""
    expected = outputs(experts, hidden)
    return ((outputs(fresh, hidden) - expected).square().sum() / expected.square().sum()).item()


def random_inputs(tokens=256):
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(1))


def test_a_latent_space_as_wide_as_the_model_loses_nothing():
    model = from_host(small_host("llama"), moe_config={"num_experts": 4, "num_experts_per_tok": 2}, noise=0.3)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        convert_experts(model, "mole_latent", latent_dim=32, latent_group_size=2)
        assert isinstance(model.moe_layers()[0].experts, LatentExperts)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("group_size", [4, 2])
def test_conversion_finds_the_space_that_experts_share(group_size):
    experts, generator = make_experts(SPEC), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for group in experts.gate_up_proj.split(group_size):
            for half in group.split(24, dim=1):
                half.copy_(half[..., :6] @ torch.randn(6, 32, generator=generator))
    found = converted(experts, 6, latent_group_size=group_size)
    assert error(found, experts, random_inputs()) < 1e-4
    with torch.no_grad():
        random = torch.linalg.qr(torch.randn(32, 12, generator=generator)).Q.T  # (2m, d)
        own = [half @ basis.T for half, basis in zip(experts.gate_up_proj.chunk(2, 1), random.chunk(2), strict=True)]
        found.latent_proj[:] = random
        found.gate_proj[:], found.up_proj[:] = own
    assert error(found, experts, random_inputs()) > 0.3


def test_the_error_falls_as_the_latent_space_grows():
    experts = make_experts(SPEC)
    errors = [error(converted(experts, latent), experts, random_inputs()) for latent in (2, 4, 8, 16, 24, 32)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.3 and errors[-1] < 1e-8


def test_known_inputs_lower_the_error_of_the_outputs():
    experts, shape = make_experts(SPEC), torch.linspace(0, -2, 32).exp()
    seen, held_out = (torch.randn(1000, 32, generator=torch.Generator().manual_seed(seed)) * shape for seed in (2, 3))
    plain, aware = (error(converted(experts, 8, inputs), experts, held_out) for inputs in (None, seen))
    assert aware < 0.8 * plain


def test_a_dense_model_can_start_with_latent_experts():
    checks = []
    for latent in (32, 16):
        fields = {"num_experts": 4, "num_experts_per_tok": 2, "experts": {"name": "mole_latent", "latent_dim": latent}}
        from_host(small_host("llama"), moe_config=fields, on_check=checks.append)
    assert [check.exact for check in checks] == [True, False]


def test_mixed_slots_run_on_experts_by_rows():
    experts, hidden, eye = converted(make_experts(SPEC), 8, latent_group_size=2), random_inputs(8), torch.eye(8)[None]
    index = (torch.arange(8) // 2)[:, None]
    expected = experts(hidden, ExpertAssignment(index, torch.ones(8, 1), 4))
    torch.testing.assert_close(experts(hidden, SlotMixture(eye, eye, 4)), expected)


@pytest.mark.parametrize("group_size", [4, 2])
def test_parameters_are_as_many_as_the_paper_counts(group_size):
    experts = LatentExperts(None, SPEC, latent_dim=10, latent_group_size=group_size)
    k, n, m, d = group_size, 24, 10, 32
    assert sum(p.numel() for p in experts.parameters()) == 4 // k * (k * 2 * n * m + 2 * m * d + k * n * d)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"gated": False}, {}, "'mole_latent' have a gate and no biases"),
        ({}, {"latent_dim": 33}, "latent_dim=33 must be at most hidden_size=32"),
        ({}, {"latent_group_size": 3}, "latent_group_size=3 must divide num_experts=4"),
    ],
)
def test_what_latent_experts_cannot_be_is_refused(fields, options, message):
    with pytest.raises(ValueError, match=message):
        LatentExperts(None, make_spec(**{**vars(SPEC), **fields}), **options)
