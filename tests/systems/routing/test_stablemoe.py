"""StableMoE: after the switch the experts of a token never change, whatever the gate or an optimizer does."""

from functools import cache

import torch
from helpers.router_cases import make_experts, make_router, make_spec
from torch.nn import functional as F

from hf_moe.modeling.routing_context import RoutingContext


WORDS, WIDTH, STEPS, SWITCH = 32, 16, 240, 160
SPEC = make_spec(hidden_size=WIDTH, num_experts_per_tok=1, vocab_size=WORDS)


def of_ids(ids, progress=1.0):
    return RoutingContext(
        torch.zeros(1, len(ids)).long(), torch.ones(1, len(ids)).bool(), ids[None], progress=progress
    )


@cache
def trained(name: str):
    """Train on words, each with an expert that suits it; return the router, its choices by step, and the agreement."""
    torch.manual_seed(0)
    router = make_router(name, {"switch_fraction": SWITCH / STEPS} if name == "stablemoe" else {}, SPEC)
    experts, words, targets = make_experts(SPEC), torch.randn(WORDS, WIDTH), torch.randn(WORDS, WIDTH)
    ids = torch.arange(256) % WORDS
    near, far = (words[ids] + noise * torch.randn(256, WIDTH) for noise in (0.1, 1.0))
    optimizer = torch.optim.AdamW([*router.parameters(), *experts.parameters()], lr=5e-3, weight_decay=0.1)
    choices, agreement, shares = [], 0.0, []
    for step in range(STEPS):
        drawn = torch.randint(WORDS, (128,))
        hidden, context = words[drawn] + 0.1 * torch.randn(128, WIDTH), of_ids(drawn, step / STEPS)
        decision = router.train()(hidden, context)
        loss = F.mse_loss(experts(hidden, decision), targets[drawn])
        for signal, coef in (("overload", 0.3), ("distillation", 1.0)):
            loss = loss + coef * decision.signals[signal].mean() if name == "stablemoe" else loss
        optimizer.zero_grad()
        loss.backward()
        if name == "stablemoe":
            router.accumulate(decision, context)
            shares.append(torch.bincount(decision.expert_index[:, 0], minlength=8).max().item() / 128)
        optimizer.step()
        router.end_step()
        choices.append(router.eval()(far, of_ids(ids)).expert_index[:, 0])
        if step == SWITCH - 1:
            found = router(near, of_ids(ids))
            agreement = (found.expert_index[:, 0] == found.router_logits.argmax(-1)).float().mean().item()
    changes = [float((now != before).float().mean()) for before, now in zip(choices, choices[1:], strict=False)]
    return router, changes, agreement, shares


def test_no_expert_changes_after_the_switch_and_those_of_top_1_do():
    changes, others = trained("stablemoe")[1], trained("top_k")[1]
    assert max(changes[:SWITCH]) > 0 and max(changes[SWITCH:]) == 0
    assert max(others[SWITCH:]) > 0


def test_before_the_switch_the_light_router_has_learnt_the_gate():
    assert trained("stablemoe")[2] > 0.8


def test_the_balance_spreads_the_tokens():
    assert max(trained("stablemoe")[3][SWITCH - 20 : SWITCH]) < 0.5


def test_in_stage_2_the_gate_learns_and_the_light_router_does_not():
    router, ids = trained("stablemoe")[0].train(), torch.arange(WORDS)
    router.zero_grad()
    decision = router(torch.randn(WORDS, WIDTH), of_ids(ids, 0.9))
    assert not any(signal.any() for signal in decision.signals.values())
    (decision.expert_weight.sum() + sum(signal.sum() for signal in decision.signals.values())).backward()
    assert router.weight.grad.any()
    assert not router.light_weight.grad.any() and not router.token_features.grad.any()
    moved = router(torch.randn(WORDS, WIDTH), of_ids(ids, 0.9))
    assert torch.equal(moved.expert_index, decision.expert_index)
    assert len(decision.expert_index.unique()) > 2


def test_without_a_trainer_that_tells_its_progress_stage_1_lasts():
    router, ids = make_router("stablemoe", spec=SPEC).train(), torch.arange(WORDS)
    hidden, context = torch.randn(WORDS, WIDTH), of_ids(ids)
    router.accumulate(router(hidden, context), context)
    router.end_step()
    assert not router.switched
    assert torch.equal(router(hidden, context).expert_index[:, 0], (hidden @ router.weight.T).argmax(-1))
