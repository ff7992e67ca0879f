"""T2MIR: two mixtures of half the width, the second of which learns to tell tasks apart."""

import pytest
import torch
from helpers.layers import make_layer, run
from helpers.router_cases import make_router, make_spec, text_context
from torch.nn import functional as F

from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.objectives.mean_importance import MeanImportance
from hf_moe.modeling.routing_context import ACTIVE_CONTEXT, RoutingContext


def make_block(**options):
    block = {"name": "t2mir", "num_task_experts": 6, "num_tasks": 4, **options}
    return make_layer(router="t2mir", block=block, num_shared_experts=1)


def call(layer, hidden: torch.Tensor, tasks: torch.Tensor | None) -> tuple[torch.Tensor, RoutingContext]:
    """Return the output for (B, S, d), and the context of a call that names the rows' tasks."""
    context = RoutingContext.all_text(hidden)
    context.condition_ids = {} if tasks is None else {"task": tasks}
    token = ACTIVE_CONTEXT.set(context)
    try:
        return layer(hidden), context
    finally:
        ACTIVE_CONTEXT.reset(token)


def step(layer, context: RoutingContext) -> None:
    for router in layer.routers:
        router.accumulate(context.decisions[router.spec.site], context)
        router.end_step()


@torch.no_grad()
def test_the_halves_are_two_mixtures_with_gates_of_two_layers():
    layer, hidden = make_block().eval(), torch.randn(1, 40, 16)
    output, context = run(layer, hidden)
    for token, x in enumerate(hidden[0]):
        halves = []
        for gate, experts in zip(layer.routers, layer.experts.banks, strict=True):
            value, index = (gate.gate_out @ torch.tanh(gate.gate_in @ x)).topk(2)
            units = [(experts.gate_up_proj[i] @ x).chunk(2) for i in index]
            mixed = [experts.down_proj[i] @ (F.silu(g) * u) for i, (g, u) in zip(index, units, strict=True)]
            halves.append(value.softmax(-1) @ torch.stack(mixed))
        assert [len(half) for half in halves] == [8, 8]
        torch.testing.assert_close(output[0, token], torch.cat(halves) + layer.shared_expert(x), atol=1e-5, rtol=1e-5)
    assert context.decisions["1.task"].num_experts == 6 and context.decisions["1.task"].router_probs is None


def test_noise_of_training_has_the_learnt_deviation():
    router = make_router("t2mir", spec=make_spec(num_experts_per_tok=8)).train()
    router.noise.data.normal_()
    hidden = torch.randn(1, 32).expand(20_000, 32)
    with torch.no_grad():
        logits = router(hidden, text_context(1, 20_000)).router_logits
    clean = router.gate_out @ torch.tanh(router.gate_in @ hidden[0])
    torch.testing.assert_close(logits.mean(0), clean, atol=0.15, rtol=0)
    torch.testing.assert_close(logits.std(0), F.softplus(router.noise @ hidden[0]) + 0.01, atol=0, rtol=0.03)
    assert torch.equal(router.eval()(hidden[:1], text_context(1, 1)).router_logits, router.gate(hidden[:1]))


@torch.no_grad()
def test_importance_is_that_of_the_weights():
    router, hidden = make_router("t2mir"), torch.randn(60, 32)
    context = text_context(2, 30)
    decision = router(hidden, context)
    table = torch.zeros(60, 9).scatter_add(1, decision.expert_index, decision.expert_weight)[:, :8]
    assert torch.equal(decision.router_probs, table)
    objective = MeanImportance([router.spec], 0.1)
    objective.initialize(0.02)
    objective.accumulate({1: decision}, context)
    objective.end_step()
    importance = table.sum(0)
    expected = 1 + importance.var(unbiased=False) / importance.mean() ** 2
    torch.testing.assert_close(objective({1: decision}, context), expected.expand(2))


def test_the_contrast_is_info_nce_with_the_tasks_of_the_last_step():
    layer, hidden, tasks = make_block().train(), torch.randn(4, 5, 16), torch.tensor([0, 2, 2, 1])
    gate = layer.gate["task"]
    gate.bilinear.data.normal_()
    context = call(layer, hidden, tasks)[1]
    assert not context.decisions["1.task"].signals["task_contrast"].any(), "no task has been seen"
    query = gate.gate(hidden).softmax(-1).mean(1)  # of the slow copy too, which is equal to it
    step(layer, context)
    expected = torch.stack([query[0], query[3], query[1:3].mean(0), torch.zeros(6)])
    torch.testing.assert_close(gate.keys, expected)
    gate.gate_in.data += 0.1
    now, seen = torch.tensor([1, 2, 3, 0]), gate.keys[:3]
    decision = call(layer, hidden, now)[1].decisions["1.task"]
    found = decision.signals["task_contrast"].view(4, 5)
    query = gate.gate(hidden).softmax(-1).mean(1)
    value = F.cross_entropy(query @ gate.bilinear @ seen.T, now.clamp(max=2), reduction="none")
    value[2] = 0.0  # no row of task 3 has been seen
    torch.testing.assert_close(found, value[:, None].expand(4, 5))
    gradients = torch.autograd.grad(found.sum(), [gate.gate_in, gate.gate_out, gate.bilinear])
    assert all(gradient.any() for gradient in gradients)
    for other in (call(layer, hidden, None), call(layer.eval(), hidden, now)):
        assert not other[1].decisions["1.task"].signals["task_contrast"].any()


def test_a_row_of_padding_is_no_example_of_its_task():
    layer = make_block().train()
    gate, context = layer.gate["task"], RoutingContext.all_text(torch.empty(3, 5, 16))
    context.condition_ids, context.token_mask[1] = {"task": torch.tensor([0, 1, 0])}, False
    context.token_mask[2, 3:] = False
    hidden = torch.randn(3, 5, 16)
    context.decisions["1.task"] = gate(hidden.flatten(0, 1), context)
    gate.accumulate(context.decisions["1.task"], context)
    gate.end_step()
    probs = gate.gate(hidden).softmax(-1)
    torch.testing.assert_close(gate.keys[0], (probs[0].mean(0) + probs[2, :3].mean(0)) / 2)
    assert not gate.keys[1].any()


def test_the_slow_copy_follows_without_a_gradient():
    layer, tasks = make_block(tau=0.25).train(), torch.tensor([0, 1])
    gate = layer.gate["task"]
    start = gate.slow_in.clone()
    assert torch.equal(start, gate.gate_in) and not gate.slow_in.requires_grad
    gate.gate_in.data += 1.0
    step(layer, call(layer, torch.randn(2, 5, 16), tasks)[1])
    torch.testing.assert_close(gate.slow_in, start + 0.25)
    hidden = torch.randn(2, 5, 16)
    step(layer, call(layer, hidden, tasks)[1])
    slow = (torch.tanh(hidden @ (start + 0.25).T) @ gate.slow_out.T).softmax(-1).mean(1)
    torch.testing.assert_close(gate.keys[:2], slow)


def probe(coef: float, steps: int = 400) -> float:
    """Train on 4 tasks with conflicting targets; return how often the nearest mean distribution names the task."""
    layer = make_layer(experts=6, router="t2mir", block={"name": "t2mir", "num_tasks": 4, "tau": 0.05}).train()
    codes, maps = 0.3 * torch.randn(4, 16), torch.randn(4, 16, 16) / 4
    optimizer = torch.optim.Adam(layer.parameters(), 3e-3)

    def rows(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        tasks = torch.randint(4, (number,))
        return torch.randn(number, 8, 16) + codes[tasks][:, None], tasks

    for _ in range(steps):
        hidden, tasks = rows(32)
        output, context = call(layer, hidden, tasks)
        target = torch.einsum("bsd,bde->bse", hidden, maps[tasks])
        loss = F.mse_loss(output, target) + coef * context.decisions["1.task"].signals["task_contrast"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step(layer, context)
    with torch.no_grad():
        hidden, tasks = rows(1000)
        query = layer.gate["task"].gate(hidden.flatten(0, 1)).softmax(-1).view(1000, 8, -1).mean(1)
    means = torch.stack([query[:500][tasks[:500] == task].mean(0) for task in range(4)])
    return (torch.cdist(query[500:], means).argmin(-1) == tasks[500:]).float().mean().item()


def test_the_contrast_teaches_the_gate_the_tasks():
    """0.83 against 0.65; a coefficient of 0.1 gives 0.70, and that of the paper, 0.01, changes nothing so soon."""
    assert probe(1.0) > probe(0.0) + 0.12


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="set num_experts_per_tok to 2 or more"):
        make_router("t2mir", spec=make_spec(num_experts_per_tok=1))
    with pytest.raises(ValueError, match="half of the output's width 15"):
        make_layer(hidden_size=15, block="t2mir")
    with pytest.raises(ValueError, match="names one for every token"):
        call(make_block().train(), torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.long))
    assert isinstance(make_router("t2mir")(torch.randn(3, 32), text_context(1, 3)), ExpertAssignment)
