"""EvoMoE's dynamic token-aware router: the factored hypernetwork, and what it separates that linear routers cannot."""

import pytest
import torch

from hf_moe.analysis.routing_statistics import RoutingStatistics, active_parameters
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.routers.evomoe_dtr import EvoMoEDtrRouter
from hf_moe.modeling.routers.ming_multi_router import MingMultiRouter
from hf_moe.modeling.routers.top_k import TopKRouter
from hf_moe.modeling.routing import Router
from hf_moe.modeling.routing_context import RoutingContext


def make_context(modality: torch.Tensor) -> RoutingContext:
    return RoutingContext(modality[None], torch.ones_like(modality[None], dtype=torch.bool))


def materialised_scores(router: EvoMoEDtrRouter, tokens: torch.Tensor, network: torch.Tensor) -> torch.Tensor:
    """The equations word by word: theta of every token as a tensor."""
    scores = []
    for token, net in zip(tokens, network.tolist(), strict=True):
        mixing = router.token_weight[net] @ token + router.token_bias[net]
        hidden = mixing.shape[0]
        down = torch.einsum("h,hrc->rc", mixing, router.down_weight[net].unflatten(0, (hidden, -1)))
        up = torch.einsum("h,chr->cr", mixing, router.up_weight[net].unflatten(1, (hidden, -1)))
        inner = (down + router.down_bias[net]) @ token
        if router.bottleneck_act == "split":
            gate, value = inner.chunk(2)
            inner = torch.nn.functional.silu(gate) * value
        else:
            inner = torch.nn.functional.silu(inner) * inner
        scores.append(router.weight @ ((up + router.up_bias[net]) @ inner))
    return torch.stack(scores)


@pytest.mark.parametrize("act", ["silu_gate_self", "split"])
@pytest.mark.parametrize("modality", [[0, 1, 1, 0, 2, 3], [0] * 6, [1] * 6])
def test_the_factored_form_equals_the_materialised_one(act, modality):
    torch.manual_seed(0)
    router = EvoMoEDtrRouter(MoELayerSpec(0, 24, 4, 1, 16), bottleneck_rank=4, bottleneck_act=act)
    router.initialize(0.1)
    tokens, modality = torch.randn(6, 24), torch.tensor(modality)
    decision = router(tokens, make_context(modality))
    network = ((modality == 1) | (modality == 2)).long()
    torch.testing.assert_close(
        decision.router_logits, materialised_scores(router, tokens, network), atol=1e-5, rtol=1e-5
    )
    chosen = decision.router_probs.gather(1, decision.expert_index)
    torch.testing.assert_close(decision.expert_weight, chosen)


def test_it_starts_from_random_adapters_that_no_token_has_moved():
    torch.manual_seed(0)
    router = EvoMoEDtrRouter(MoELayerSpec(0, 256, 4, 1, 16), bottleneck_rank=4, shared_router=True)
    for parameter in router.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    router.initialize(0.02)
    assert (router.token_bias == 0).all() and (router.shared_scale == 1).all()
    weights = (router.token_weight, router.down_weight, router.up_weight, router.weight, router.shared_weight)
    # b2 alone is an adapter, its rows of length about 1.
    for parameter, std in (*((weight, 0.02) for weight in weights), (router.down_bias, 1 / 16), (router.up_bias, 0.5)):
        assert abs(parameter.mean()) < 0.2 * std and 0.9 < parameter.std() / std < 1.1


@pytest.mark.parametrize("slots", [0, 5])
def test_slots_that_the_experts_do_not_fill_are_refused(slots):
    with pytest.raises(ValueError, match=rf"num_experts_per_tok={slots} must lie in \[1, 4\]"):
        EvoMoEDtrRouter(MoELayerSpec(0, 24, 4, slots, 16))


def test_every_named_modality_has_a_hypernetwork_of_its_own():
    torch.manual_seed(0)
    router = EvoMoEDtrRouter(MoELayerSpec(0, 24, 4, 1, 16), modalities=["text", "image", "video", "audio"])
    router.initialize(0.3)
    tokens = torch.randn(1, 24).expand(4, -1)
    logits = router(tokens, make_context(torch.arange(4))).router_logits
    torch.testing.assert_close(logits, materialised_scores(router, tokens, torch.arange(4)), atol=1e-5, rtol=1e-5)
    assert torch.cdist(logits, logits).fill_diagonal_(1).min() > 1e-3
    fewer = EvoMoEDtrRouter(MoELayerSpec(0, 24, 4, 1, 16), modalities=["text", "audio"])
    fewer.initialize(0.3)
    logits = fewer(tokens, make_context(torch.arange(4))).router_logits
    # Without a network of their own, images and video are read as text.
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2]) and not logits[0].equal(logits[3])


@pytest.mark.parametrize("per_modality", [True, False])
def test_linear_gates_are_those_of_the_multi_router(per_modality):
    torch.manual_seed(0)
    spec = MoELayerSpec(0, 24, 4, 1, 16)
    linear = EvoMoEDtrRouter(spec, generator="linear", per_modality=per_modality)
    linear.initialize(0.3)
    multi = MingMultiRouter(spec, modalities=["text", "image"])
    multi.initialize(0.3)
    with torch.no_grad():
        multi.weight.copy_(linear.weight.expand(2, -1, -1))
    tokens, context = torch.randn(6, 24), make_context(torch.tensor([0, 1, 1, 0, 2, 3]))
    ours, theirs = linear(tokens, context), multi(tokens, context)
    assert torch.equal(ours.router_logits, theirs.router_logits)
    # The weight is the probability, which trains the gate of a lone slot.
    torch.testing.assert_close(ours.expert_weight, ours.router_probs.gather(1, ours.expert_index))
    assert {name for name, _ in linear.named_parameters()} == {"weight"}
    assert linear.idle_parameters() == (linear.weight.numel() // 2 if per_modality else 0)


def test_a_modality_without_tokens_leaves_gradients_of_zeros():
    router = EvoMoEDtrRouter(MoELayerSpec(0, 24, 4, 1, 16))
    router.initialize(0.3)
    router(torch.randn(5, 24), make_context(torch.zeros(5, dtype=torch.long))).router_logits.sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert router.token_weight.grad[0].abs().sum() > 0 and router.token_weight.grad[1].abs().sum() == 0


def test_a_token_is_counted_with_the_hypernetwork_of_its_modality_only(tiny_model, batch):
    active, total, idle = [], [], []
    for per_modality in (True, False):
        model = tiny_model(moe_config={"router": {"name": "evomoe_dtr", "per_modality": per_modality}})
        statistics = RoutingStatistics()
        statistics.update(model(**batch, output_routing=True).routing)
        active.append(active_parameters(model, statistics))
        total.append(model.num_parameters())
        idle.append(sum(layer.router.idle_parameters() for layer in model.moe_layers().values()))
    assert active[0] == active[1] and set(active[0]) == {"text", "image"}
    assert idle == [total[0] - total[1], 0] and idle[0] > 0


class SignsWithinModality:
    """The right expert of a token is 2 * modality + [x1 x2 > 0]: an XOR that no linear score separates."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.experts = torch.randn(4, 16, 16, generator=self.generator) / 4

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = torch.randn(size, 16, generator=self.generator)
        modality = torch.randint(0, 2, (size,), generator=self.generator)
        return tokens, modality, 2 * modality + (tokens[:, 0] * tokens[:, 1] > 0).long()


def train(router: Router, steps: int, seed: int) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Train the router alone, by the error through its expert; return accuracy, and its choices by modality."""
    task = SignsWithinModality(seed)
    router.initialize(0.1)
    optimizer = torch.optim.Adam(router.parameters(), lr=3e-3)
    for _ in range(steps):
        tokens, modality, expert = task.batch(256)
        decision = router(tokens, make_context(modality))
        outputs = torch.einsum("tc,ecd->ted", tokens, task.experts)  # (T, E, C)
        index = decision.expert_index[..., None].expand(-1, -1, 16)
        chosen = (outputs.gather(1, index) * decision.expert_weight[..., None]).sum(1)
        loss = (chosen - outputs[torch.arange(256), expert]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens, modality, expert = task.batch(4096)
    with torch.no_grad():
        choice = router(tokens, make_context(modality)).expert_index[:, 0]
        swapped = router(tokens, make_context(1 - modality)).expert_index[:, 0]
    counts = torch.stack([torch.bincount(choice[modality == m], minlength=4).float() for m in (0, 1)])
    return (choice == expert).float().mean().item(), counts / counts.sum(-1, keepdim=True), choice != swapped


def divergence(shares: torch.Tensor) -> float:
    """Jensen-Shannon divergence of two distributions, in bits: 0 to 1."""
    mean = shares.mean(0)
    return 0.5 * sum((row * (row.clamp(min=1e-9) / mean.clamp(min=1e-9)).log2()).sum().item() for row in shares)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_it_separates_signs_within_each_modality_and_linear_routers_do_not(seed):
    spec = MoELayerSpec(0, 16, 4, 1, 16)
    accuracy, shares, moved = train(EvoMoEDtrRouter(spec, hyper_hidden=8), 1500, seed)
    assert accuracy >= 0.80
    assert divergence(shares) > 0.9
    assert moved.float().mean() > 0.5
    assert train(TopKRouter(spec), 1500, seed)[0] < 0.65
    assert train(MingMultiRouter(spec), 1500, seed)[0] < 0.72


def test_the_choice_follows_the_modality_after_a_few_steps():
    accuracy, shares, moved = train(EvoMoEDtrRouter(MoELayerSpec(0, 16, 4, 1, 16), hyper_hidden=8), 200, 0)
    assert accuracy > 0.5 and divergence(shares) > 0.5 and moved.float().mean() > 0.5
