"""Routers of adapters against their equations, written out token by token."""

import pytest
import torch
from torch.nn import functional as F

from hf_moe.adapters.host_router import HostRouter
from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.routing import Router
from hf_moe.modeling.routing_context import RoutingContext


ROUTERS = (
    *("becotta", "condition", "constant", "host", "intuition_mor1e"),
    *("modality", "sequence", "smora", "soft_moe"),
)
ROWS, POSITIONS, WIDTH, EXPERTS = 3, 7, 12, 5


def router_class(name: str) -> type[Router]:
    return HostRouter if name == "host" else get_mechanism("router", name)


def make_router(name: str, num_experts: int = EXPERTS, slots: int = 2, **options) -> Router:
    torch.manual_seed(0)
    spec = MoELayerSpec(0, WIDTH, num_experts, slots, 4)
    router = router_class(name)(spec, **options)
    router.initialize(0.5)
    return router.eval()


def make_context() -> RoutingContext:
    modality = torch.tensor([[0, 0, 1, 1, 0, 0, 0], [0, 1, 1, 2, 3, 0, 0], [1, 1, 0, 0, 0, 0, 0]])
    mask = torch.ones(ROWS, POSITIONS, dtype=torch.bool)
    mask[0, :2] = False
    ids = {"task": torch.tensor([1, -1, 4]), "domain": torch.tensor([2, 0, 2])}
    return RoutingContext(modality, mask, condition_ids=ids)


def found(decision: ExpertAssignment) -> list[dict[int, float]]:
    slots = zip(decision.expert_index.tolist(), decision.expert_weight.tolist(), strict=True)
    return [
        {expert: weight for expert, weight in zip(*row, strict=True) if expert < decision.num_experts} for row in slots
    ]


def counted(context: RoutingContext, row: int, position: int, modalities: list[str] | None) -> list[int]:
    """Return the positions that a pooled gate has read where it stands at `position`."""
    numbers = range(4) if modalities is None else [("text", "image", "video", "audio").index(m) for m in modalities]
    real = context.token_mask[row].tolist()
    return [at for at in range(position + 1) if real[at] and int(context.modality_ids[row, at]) in numbers]


@pytest.mark.parametrize("modalities", [None, ["text"], ["image", "video"]])
@pytest.mark.parametrize("pooling", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"norm_topk_prob": False}, {"centred": True}, {"slots": 1}], ids=str)
def test_sequence(modalities, pooling, options):
    router, context = make_router("sequence", modalities=modalities, pooling=pooling, **options), make_context()
    if router.centred:
        router.mean.normal_(std=0.5)
    slots = router.spec.num_experts_per_tok
    hidden = 3 * torch.randn(ROWS * POSITIONS, WIDTH)
    gates = found(router(hidden, context))
    states = hidden.double().view(ROWS, POSITIONS, WIDTH)
    logits = (states / (states.square().mean(-1, keepdim=True) + 1e-7).sqrt()) @ router.weight.double().T
    for row in range(ROWS):
        for position in range(POSITIONS):
            read = counted(context, row, position, modalities)
            if not context.token_mask[row, position]:
                continue
            expected = {}
            if read:
                z = logits[row, read].mean(0) if pooling == "mean" else logits[row, read].sum(0)
                z = z - router.weight.double() @ router.mean.double() if router.centred else z
                p = z.softmax(-1)
                best = p.topk(slots)
                normalised = slots > 1 and options.get("norm_topk_prob", True)
                weights = best.values / best.values.sum() if normalised else best.values
                expected = dict(zip(best.indices.tolist(), weights.tolist(), strict=True))
            assert gates[row * POSITIONS + position] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_becotta(pooling):
    router, context = make_router("becotta", pooling=pooling), make_context()
    hidden = torch.randn(ROWS * POSITIONS, WIDTH)
    gates = found(router(hidden, context))
    for row, domain in enumerate(context.condition_ids["domain"].tolist()):
        clean = router.weight[domain, :EXPERTS].double()
        logits = hidden.double().view(ROWS, POSITIONS, WIDTH)[row] @ clean.T
        for position in range(POSITIONS):
            read = counted(context, row, position, None)
            if read:
                best = (logits[read].mean(0) if pooling == "mean" else logits[read].sum(0)).topk(2)
                expected = dict(zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True))
                assert gates[row * POSITIONS + position] == pytest.approx(expected, rel=1e-4)


def test_becotta_is_noisy_in_training_alone_by_a_softplus_of_the_second_half():
    router, context = make_router("becotta"), make_context()
    hidden = torch.randn(ROWS * POSITIONS, WIDTH)
    clean = router(hidden, context).router_logits
    assert torch.equal(router(hidden, context).router_logits, clean)
    torch.manual_seed(1)
    noisy = router.train()(hidden, context).router_logits
    torch.manual_seed(1)
    noise = torch.randn(ROWS * POSITIONS, EXPERTS).view(ROWS, POSITIONS, EXPERTS)
    states = hidden.view(ROWS, POSITIONS, WIDTH)
    scale = torch.stack(
        [F.softplus(states[row] @ router.weight[domain, EXPERTS:].T) + 0.01 for row, domain in enumerate((2, 0, 2))]
    )
    added = (noise * scale * context.token_mask[..., None]).cumsum(1).flatten(0, 1)
    torch.testing.assert_close(noisy - clean, added, atol=1e-4, rtol=1e-4)


def test_becotta_tells_tokens_apart_as_it_does_rows():
    router, context = make_router("becotta"), make_context()
    hidden = torch.randn(ROWS * POSITIONS, WIDTH)
    context.condition_ids["domain"] = torch.tensor([2, 0, -1])
    by_row = router(hidden, context)
    context.condition_ids["domain"] = torch.tensor([2, 0, -1])[:, None].expand(ROWS, POSITIONS)
    by_token = router(hidden, context)
    torch.testing.assert_close(by_row.router_logits, by_token.router_logits)
    assert torch.equal(by_row.expert_index, by_token.expert_index)
    # A row without a domain gets no expert, nor does padding before the first token.
    assert [len(row) for row in found(by_row)] == [0] * 2 + [2] * (2 * POSITIONS - 2) + [0] * POSITIONS


def test_condition():
    gates = found(make_router("condition")(torch.randn(ROWS * POSITIONS, WIDTH), make_context()))
    assert gates == [{1: 1.0}] * POSITIONS + [{}] * POSITIONS + [{4: 1.0}] * POSITIONS
    context = make_context()
    context.condition_ids["task"] = torch.tensor([5, 0, 6])  # no experts 5 and 6
    gates = found(make_router("condition")(torch.randn(ROWS * POSITIONS, WIDTH), context))
    assert gates == [{}] * POSITIONS + [{0: 1.0}] * POSITIONS + [{}] * POSITIONS


def test_constant():
    router = make_router("constant")
    gates = found(router(torch.randn(ROWS * POSITIONS, WIDTH), make_context()))
    assert gates == [dict.fromkeys(range(EXPERTS), 1.0)] * (ROWS * POSITIONS)


def test_modality():
    router = make_router("modality", num_experts=3, modalities=["image", "text", "audio"])
    gates = found(router(torch.randn(ROWS * POSITIONS, WIDTH), make_context()))
    expert = {0: {1: 1.0}, 1: {0: 1.0}, 2: {}, 3: {2: 1.0}}
    assert gates == [expert[modality] for modality in make_context().modality_ids.flatten().tolist()]
    for modalities in (["text", "text"], ["text"], ["text", "smell"]):
        with pytest.raises(ValueError, match="modalit"):
            make_router("modality", num_experts=2, modalities=modalities)


def test_host():
    router = make_router("host")
    index, weight = torch.tensor([[1, 4], [0, 2]]), torch.tensor([[0.7, 0.3], [0.9, 0.4]])
    expected = [{1: 0.7, 4: 0.3}, {0: 0.9, 2: 0.4}]
    for call in ((index, weight), (ExpertAssignment(index, weight, EXPERTS),)):
        assert found(router.from_call(*call)) == [pytest.approx(row) for row in expected]
    for call in ((), (index,), (index, weight, weight), (index[0], weight[0]), (index, None)):
        with pytest.raises(ValueError, match="router 'host' works on the experts module"):
            router.from_call(*call)
    with pytest.raises(ValueError, match="from the call of its target"):
        router(torch.randn(2, WIDTH), make_context())


@pytest.mark.parametrize("bias_in_weights", [True, False])
def test_smora(bias_in_weights):
    router, context = make_router("smora", bias_in_weights=bias_in_weights), make_context()
    router.e_score_correction_bias.copy_(torch.tensor([0.0, 0.9, -1.5, 0.2, -1.5]))
    hidden = torch.randn(ROWS * POSITIONS, WIDTH)
    for token, gate in zip(hidden.double(), found(router(hidden, context)), strict=True):
        s = (router.weight.double() @ token).sigmoid()
        choice = s + router.e_score_correction_bias
        best = (choice.clamp(min=0.0) if bias_in_weights else choice).topk(2).indices.tolist()
        weight = {expert: max((choice if bias_in_weights else s)[expert].item(), 0.0) for expert in best}
        total = sum(weight.values())
        assert gate == pytest.approx({expert: value / total for expert, value in weight.items()}, rel=1e-4)


@pytest.mark.parametrize("num_clusters", [0, 3])
def test_intuition(num_clusters):
    router = make_router("intuition_mor1e", num_experts=4, num_clusters=num_clusters)
    context, prior = make_context(), torch.rand(ROWS, 3)
    context.condition_ids["intuition"] = prior
    hidden = torch.randn(ROWS * POSITIONS, WIDTH)
    for at, gate in enumerate(found(router(hidden, context))):
        scores = router.weight.double() @ hidden[at].double()
        if num_clusters:
            scores = scores + router.prior.double() @ prior[at // POSITIONS].double()
        pairs = torch.tensor([scores[up] + scores[2 + down] for up in range(2) for down in range(2)])
        best = pairs.topk(2)
        expected = dict(zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True))
        assert gate == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
def test_soft_moe(normalize):
    router, context = make_router("soft_moe", slots_per_expert=2, normalize=normalize), make_context()
    if normalize:
        assert router.scale == 1.0
        router.scale.data.fill_(3.0)
    hidden = 2 * torch.randn(ROWS * POSITIONS, WIDTH)
    mixture = router(hidden, context)
    assert mixture.dispatch.shape == mixture.combine.shape == (ROWS, POSITIONS, 2 * EXPERTS)
    slots = router.weight
    if normalize:
        hidden, slots = hidden / hidden.norm(dim=-1, keepdim=True), 3.0 * slots / slots.norm(dim=-1, keepdim=True)
    scores = (hidden @ slots.T).view(ROWS, POSITIONS, -1)
    for row, mask in enumerate(context.token_mask):
        torch.testing.assert_close(mixture.dispatch[row, mask], scores[row, mask].softmax(0))
        torch.testing.assert_close(mixture.combine[row, mask], scores[row, mask].softmax(1))
        assert not mixture.dispatch[row, ~mask].any() and not mixture.combine[row, ~mask].any()


@pytest.mark.parametrize("name", ROUTERS)
def test_fresh_parameters_are_drawn_around_zero_and_statistics_are_empty(name):
    options = {"sequence": {"centred": True}, "soft_moe": {"normalize": True}}.get(name, {})
    experts = {"modality": 2, "intuition_mor1e": 4}.get(name, EXPERTS)
    spec = MoELayerSpec(0, 256, experts, 2, 4)
    router = router_class(name)(spec, **options)
    for tensor in [*router.parameters(), *router.buffers()]:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 10**9)
    torch.manual_seed(0)
    router.initialize(0.02)
    for parameter_name, parameter in router.named_parameters():
        if parameter.numel() == 1:
            assert parameter == 1.0
        else:
            assert 0.005 < parameter.std() < 0.12 and parameter.mean().abs() < 0.5 * parameter.std(), parameter_name
    assert all((buffer == 0).all() for buffer in router.buffers())


@pytest.mark.parametrize("name", ["becotta", "intuition_mor1e", "sequence", "smora"])
@pytest.mark.parametrize("slots", [0, 5])
def test_slots_that_the_experts_do_not_fill_are_refused(name, slots):
    with pytest.raises(ValueError, match=rf"num_experts_per_tok={slots} must lie in \[1, 4\]"):
        make_router(name, num_experts=4, slots=slots)


@pytest.mark.parametrize("name", ["becotta", "intuition_mor1e", "sequence", "smora"])
def test_objectives_get_logits_and_probabilities(name):
    context = make_context()
    context.condition_ids["intuition"] = torch.rand(ROWS, 16)
    decision = make_router(name, num_experts=4)(torch.randn(ROWS * POSITIONS, WIDTH), context)
    scores = decision.router_logits.sigmoid() if name == "smora" else decision.router_logits.softmax(-1)
    torch.testing.assert_close(decision.router_probs, scores / scores.sum(-1, keepdim=True))


def test_the_centre_is_the_mean_of_the_first_steps_and_follows_slowly_later():
    router = make_router("sequence", centred=True)
    for step, value in enumerate((1.0, 3.0, 5.0), start=1):
        router.accumulated.copy_(torch.tensor([4 * value] * WIDTH + [4.0]))  # the sum over four samples
        router.end_step()
        assert int(router.steps) == step and not router.accumulated.any()
    torch.testing.assert_close(router.mean, torch.full((WIDTH,), 3.0))
    router.end_step()  # a step without samples
    assert int(router.steps) == 3
    router.steps.fill_(1000)
    router.accumulated.fill_(1.0)
    router.end_step()
    torch.testing.assert_close(router.mean, torch.full((WIDTH,), 3.0 + 0.02 * (1.0 - 3.0)))
