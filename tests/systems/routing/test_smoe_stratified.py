"""Stratified mixture of experts: tokens climb the strata of a layer, some of them in fewer rounds."""

from types import SimpleNamespace

import pytest
import torch
from helpers.layers import fitted, make_layer, run

from hf_moe import MoeConfig
from hf_moe.modeling.auxiliary import AuxiliaryLosses


STRATA = {"name": "smoe_stratified", "strata": [3, 2, 3]}


def stratified(**options):
    return make_layer(block={**STRATA, **options}, num_shared_experts=1)


def rounds_of(context) -> torch.Tensor:
    return context.decisions[1].signals["rounds"]


def test_one_stratum_is_the_plain_layer():
    plain, one = make_layer(num_shared_experts=1), stratified(strata=[8])
    one.load_state_dict({name.replace("gate.", "gate.0."): value for name, value in plain.state_dict().items()})
    hidden = torch.randn(2, 5, 16)
    torch.testing.assert_close(one(hidden), plain(hidden), atol=1e-6, rtol=0)


def test_the_rounds_follow_the_formula():
    layer, hidden = stratified(), torch.randn(1, 64, 16)
    output, context = run(layer, hidden)
    for token, x in enumerate(hidden[0]):
        state, number, rounds = x, 0, 0
        while number < 3:
            z = layer.norms[number - 1](state) if number else x
            first = [0, 3, 5][number]
            probs = (layer.gate[number].weight[first:] @ z).softmax(-1)
            weight, index = probs.topk(2)
            for w, expert in zip(weight / weight.sum(), (index + first).tolist(), strict=True):
                gate, up = (layer.experts.gate_up_proj[expert] @ z).chunk(2)
                state = state + w * (layer.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
            number, rounds = [0, 0, 0, 1, 1, 2, 2, 2][index[0] + first] + 1, rounds + 1
        torch.testing.assert_close(output[0, token], state - x + layer.shared_expert(x))
        assert rounds_of(context)[token] == rounds
    assert set(rounds_of(context).tolist()) == {1.0, 2.0, 3.0}


@pytest.mark.parametrize(("forced", "rounds"), [((5, 5, 5), 1), ((0, 3, 5), 3), ((0, 5, 5), 2)])
def test_a_token_takes_the_rounds_that_its_gates_ask_for(forced, rounds):
    layer = stratified()
    for gate, expert in zip(layer.gate, forced, strict=True):
        gate.weight.data = 0.1 * torch.nn.functional.one_hot(torch.tensor(expert), 8)[:, None].expand(8, 16)
        gate.register_forward_pre_hook(lambda _, arguments: (torch.ones_like(arguments[0]), arguments[1]))
    _, context = run(layer, torch.randn(1, 6, 16))
    slots = sum((item.expert_index < 8).sum() for part in context.contexts() for item in part.decisions.values())
    assert (rounds_of(context) == rounds).all() and slots == 6 * 2 * rounds


def test_the_balance_counts_who_waits_for_a_round():
    layer, hidden = stratified(), torch.randn(2, 32, 16)
    _, context = run(layer, hidden)
    config = SimpleNamespace(moe_config=MoeConfig(objectives={"load_balance": 1.0}))
    losses = AuxiliaryLosses(config, [gate.spec for gate in layer.gate])
    value = losses(context, torch.full((2,), 32)).values["load_balance"]
    parts = [(item, part.token_mask) for part in context.contexts() for item in part.decisions.values()]
    expected = torch.zeros(2)
    for (decision, waiting), first in zip(parts, [0, 3, 5], strict=True):
        for row in range(2):
            probs = decision.router_probs.view(2, 32, 8)[row, waiting[row]]
            index = decision.expert_index.view(2, 32, 2)[row, waiting[row]]
            share = torch.bincount(index.flatten(), minlength=8) / index.numel()
            expected[row] += (share * probs.mean(0)).sum() * (8 - first) / 3
    torch.testing.assert_close(value, expected)


def test_kinds_of_tokens_come_to_take_different_rounds():
    layer = make_layer(slots=1, std=0.1, seed=2, block="smoe_stratified")
    generator = torch.Generator().manual_seed(2)
    first, second = torch.randn(2, 14, 14, generator=generator) * 0.6
    hard = torch.arange(128) % 2

    def batch():
        values = torch.randn(128, 14, generator=generator)
        kind = torch.stack([hard, 1 - hard], 1) * 2.0
        changed = torch.tanh(2 * torch.tanh(values @ first) @ second)
        return torch.cat([values, kind], 1), torch.cat([torch.where(hard[:, None] == 1, changed, values), kind], 1)

    def difference() -> float:
        rounds = rounds_of(run(layer, batch()[0][None])[1])
        return (rounds[hard == 0].mean() - rounds[hard == 1].mean()).item()

    fitted(layer, batch, 400)
    learnt, rows, shuffled = difference(), layer.gate[0].weight.data, []
    for _ in range(8):
        layer.gate[0].weight.data = rows[torch.randperm(8, generator=generator)]
        shuffled.append(difference())
    assert abs(learnt) > 0.5 and abs(sum(shuffled) / 8) < abs(learnt) / 2


def test_strata_must_sum_to_the_experts():
    with pytest.raises(ValueError, match=r"strata=\[3, 2\] of layer 1 must sum to num_experts=8"):
        stratified(strata=[3, 2])


@pytest.mark.parametrize(("router", "message"), [("modality", "hidden states"), ("soft_moe", "mixes")])
def test_routers_that_do_not_choose_are_refused(router, message):
    with pytest.raises(ValueError, match=message):
        make_layer(block="smoe_stratified", experts=2, slots=1, router=router)(torch.randn(1, 4, 16))
