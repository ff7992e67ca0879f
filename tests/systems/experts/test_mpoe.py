"""Tensor-train experts: one central core for all, whose gradient is masked, and sizes as in the example."""

from types import SimpleNamespace

import pytest
import torch
from helpers.hosts.small import small_host
from helpers.layers import fitted, make_layer
from helpers.near import assert_near
from helpers.router_cases import make_spec

from hf_moe.construction.conversion import convert_experts
from hf_moe.construction.in_place import from_host
from hf_moe.hub.active_parameters import most_active_parameters
from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.experts.mpoe import TensorTrainExperts
from hf_moe.modeling.initialisation import initialize_mechanisms


def make_experts(backend="eager", **options) -> TensorTrainExperts:
    torch.manual_seed(0)
    spec = make_spec(expert_intermediate_size=24, **options.pop("spec", {}))
    experts = TensorTrainExperts(SimpleNamespace(_experts_implementation=backend), spec, **options)
    initialize_mechanisms(experts, 0.3)
    return experts


def test_sizes_are_those_of_the_example():
    spec = make_spec(num_experts=8, hidden_size=512, expert_intermediate_size=256, gated=False)
    with torch.device("meta"):
        experts = TensorTrainExperts(SimpleNamespace(_experts_implementation="eager"), spec)
    sizes = {name: item.numel() for name, item in experts.state_dict().items() if name.startswith("up_proj")}
    assert sum(sizes.values()) == 196_864 and sizes["up_proj_central"] == 131_072
    assert sum(item.numel() for item in experts.state_dict().values()) == 2 * 196_864


@pytest.mark.parametrize("backend", ["ragged", "batched_mm", "grouped_mm"])
def test_every_backend_computes_the_eager_form(backend):
    index = torch.stack([torch.randperm(9)[:3] for _ in range(40)]) // 2 * 2  # 8 is empty, odd ones idle
    decision = ExpertAssignment(index, torch.rand(40, 3).masked_fill(index == 8, 0.0), 8)
    hidden, given = torch.randn(40, 32), torch.randn(40, 32)
    found = []
    for name in ("eager", backend):
        experts = make_experts(name, init_noise=0.3, central_mask_prob=0.0)
        output = experts(hidden, decision)
        output.backward(given)
        found.append((output.detach(), [parameter.grad for parameter in experts.parameters()]))
    assert_near(found[1], found[0], 1e-5)


@pytest.mark.parametrize("fields", [{}, {"central_mask_prob": 0.6}])
def test_the_mask_zeroes_the_central_gradient_alone(fields):
    spec = {"num_experts": 4, "hidden_size": 8, "gated": False}
    experts = make_experts("batched_mm", spec=spec, num_cores=3, **fields).train()
    share = 1 - fields.get("central_mask_prob", 0.75)
    decision, hidden = ExpertAssignment(torch.tensor([[0, 1]]), torch.ones(1, 2), 4), torch.randn(1, 8)
    counts = dict.fromkeys(dict(experts.named_parameters()), 0)
    for _ in range(1000):
        experts.zero_grad()
        experts(hidden, decision).sum().backward()
        for name, parameter in experts.named_parameters():
            counts[name] += bool(parameter.grad.any())
    central = {count for name, count in counts.items() if name.endswith("_central")}
    assert len(central) == 1 and abs(central.pop() / 1000 - share) < 0.05
    assert {count for name, count in counts.items() if not name.endswith("_central")} == {1000}
    output, state = experts(hidden, decision), torch.get_rng_state()
    assert torch.equal(experts.eval()(hidden, decision), output)
    assert torch.equal(torch.get_rng_state(), state), "evaluation draws nothing"


def test_trained_experts_differ_around_one_central_core():
    layer = make_layer(experts=4, kind="mpoe")
    address = layer.experts.down_proj_central.data_ptr()
    maps = torch.randn(2, 16, 16) / 8

    def batch():
        inputs = torch.randn(64, 16)
        return inputs, inputs + torch.einsum("tij,tj->ti", maps[(inputs[:, 0] > 0).long()], inputs)

    before = layer.experts.down_proj.detach()
    fitted(layer, batch, 100)
    stack = layer.experts.down_proj.detach()
    for name, value, least in (("before", before, 0.0), ("after", stack, 0.05)):
        apart = torch.pdist(value.flatten(1)) / value.flatten(1).norm(dim=1).mean()
        assert apart.min() > least, name
    assert layer.experts.down_proj_central.data_ptr() == address


@pytest.mark.parametrize(("noise", "exact"), [(0.0, True), (0.01, False)])
def test_a_dense_model_keeps_its_logits_without_noise(noise, exact):
    checks, moe = [], {"router": "top_k", "num_experts_per_tok": 2, "experts": {"name": "mpoe", "init_noise": noise}}
    model = from_host(small_host("llama"), system="mpoe", moe_config=moe, on_check=checks.append)
    assert checks[0].exact is exact and (checks[0].logit_difference < 1e-5) is exact
    active = most_active_parameters(model)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        convert_experts(model, "ffn")
        assert_near(model(input_ids=ids).logits, expected, 1e-5)
    assert active == most_active_parameters(model)


def test_different_feed_forwards_leave_their_mean():
    experts = make_experts(init_noise=0.0)
    states = [{"gate_up_proj": torch.randn(48, 32), "down_proj": torch.randn(32, 24)} for _ in range(8)]
    assert experts.take(states) is False
    for name in experts.stack_names:
        mean = torch.stack([state[name] for state in states]).mean(0)
        assert_near(getattr(experts, name), mean.expand(8, *mean.shape), 1e-5)


@pytest.mark.parametrize("number", [1, 4])
def test_a_train_without_a_middle_is_refused(number):
    with pytest.raises(ValueError, match=f"num_cores={number} must be odd"):
        make_experts(num_cores=number)
