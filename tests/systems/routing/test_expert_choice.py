"""Expert choice: even loads, groups that do not see each other, and thresholds at inference."""

import pytest
import torch
from helpers.near import assert_near
from helpers.router_cases import (
    EXPERTS,
    HIDDEN,
    fit,
    make_context,
    make_experts,
    make_router,
    make_spec,
    text_context,
    weight_table,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def train_router(**options):
    return make_router("expert_choice", options).train()


def test_the_chosen_tokens_are_the_best_and_move_with_them():
    router, hidden, context = train_router(group="sequence"), torch.randn(16, HIDDEN), text_context(1, 16)
    decision, order = router(hidden, context), torch.randperm(16)
    weight = decision.router_probs.T.topk(4).values.amin(-1)  # 16 * 2 / 8 tokens
    assert torch.equal(weight_table(decision) > 0, decision.router_probs >= weight)
    assert_near(weight_table(router(hidden[order], context)), weight_table(decision)[order])


@pytest.mark.parametrize(
    ("causal", "training", "leaks"), [(True, False, False), (True, True, True), (False, False, True)]
)
def test_later_tokens_matter_to_the_choice_and_not_to_thresholds(causal, training, leaks):
    router = make_router("expert_choice", {"group": "sequence"}, make_spec(causal=causal)).train(training)
    hidden = torch.randn(16, HIDDEN)
    before = router(hidden, text_context(1, 16)).expert_weight[:8]
    hidden[8:] = 5 * torch.randn(8, HIDDEN)
    assert torch.equal(router(hidden, text_context(1, 16)).expert_weight[:8], before) != leaks


def test_trained_thresholds_give_a_token_as_many_experts_on_average():
    context, centres, goal = make_context(4, 20), torch.randn(6, HIDDEN), torch.randn(HIDDEN, HIDDEN) / 6
    router, experts = train_router(), make_experts(make_spec())
    image = context.modality_ids.flatten() == 1
    router.threshold.fill_(0.5)

    def batch():
        tokens = centres[torch.randint(0, 6, (80,))] + 0.5 * torch.randn(80, HIDDEN) + image[:, None]
        return tokens, tokens.relu() @ goal

    def step(hidden):
        decision = router(hidden, context)
        router.accumulate(decision, context)
        router.end_step()
        return experts(hidden, decision)

    fit(step, [*router.parameters(), *experts.parameters()], batch, steps=150)
    found = torch.cat([router.eval()(batch()[0], context).expert_index for _ in range(10)]) < EXPERTS
    for tokens in (image, ~image):
        assert 1.7 < found[tokens.repeat(10)].sum(-1).float().mean() < 2.3  # two in training
    assert (router.threshold[2] == 0.5).all()  # no token was of a video
