"""LIMoE: entropies of the routing of each modality, and a capacity that is filled by score."""

import math

import pytest
import torch
from helpers.router_cases import HIDDEN, make_losses, make_router, make_spec, train_on

from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.routing_context import RoutingContext


SPEC = make_spec(num_experts_per_tok=1)
TERMS = {
    "local_entropy": {"coef": 1.0, "modalities": ["text"]},
    "global_entropy": {"coef": 1.0, "min_experts": {"text": 6, "image": 7}},
}


def context_of(text: int, image: int, rows: int = 2) -> RoutingContext:
    modality = torch.tensor([0] * text + [1] * image).expand(rows, -1)
    return RoutingContext(modality, torch.ones_like(modality).bool())


def after_a_step(losses, context: RoutingContext, probs: torch.Tensor):
    index = probs.argmax(-1, keepdim=True)
    context.decisions[SPEC.site] = ExpertAssignment(index, torch.ones(len(probs), 1), 8, router_probs=probs)
    losses.accumulate(context)
    losses.end_step()
    return losses(context, context.token_mask.sum(-1))


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize(("text", "image"), [(1, 8), (4, 4), (6, 7), (8, 1)])
def test_both_terms_are_those_of_the_paper(text, image, certain):
    uses = torch.tensor([text] * 168 + [image] * 168).repeat(2)  # 168 is 3 * 7 * 8
    probs = (torch.arange(8) < uses[:, None]).float() / uses[:, None]
    if certain:  # tokens that take turns
        probs = torch.eye(8)[torch.arange(len(uses)) % uses]
    found = after_a_step(make_losses(TERMS, SPEC), context_of(168, 168), probs).totals()
    assert found["local_entropy"].item() == pytest.approx(0.0 if certain else math.log(text), abs=1e-6)
    expected = max(0.0, math.log(6 / text)) + max(0.0, math.log(7 / image))
    assert found["global_entropy"].item() == pytest.approx(expected, abs=1e-5)


def trained(objectives: dict, seed: int) -> tuple[float, float]:
    """Return the share of text tokens that are dropped, and exp of the entropy of their mean distribution."""
    torch.manual_seed(seed)
    context, text = context_of(8, 72, rows=4), torch.arange(320) % 80 < 8
    router = make_router("top_k", {"capacity_factor": 1.0, "capacity_order": "score"}, SPEC).train()
    router.weight.data[:, :2] = 0
    router.weight.data[0, :2] = torch.tensor([2.2, 0.7])  # text starts on one expert, which images want as well

    def batch():
        return context, torch.randn(320, HIDDEN) + 3 * torch.stack([text, ~text], 1).float() @ torch.eye(2, HIDDEN)

    train_on(make_losses(objectives, SPEC), router, batch, 150)
    decision = router(*reversed(batch()))
    mean = decision.router_probs[text].mean(0)
    return decision.signals["dropped"][text].mean().item(), (-(mean * mean.log()).sum()).exp().item()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_minority_of_text_is_dropped_less_and_spreads(seed):
    dropped, used = trained(TERMS, seed)
    dropped_without, used_without = trained({"router_z": 0.0}, seed)
    assert dropped < dropped_without - 0.05  # 0.16 to 0.22 against 0.28 to 0.38 over three seeds
    assert used_without < 2 and used > 5  # 1.3 to 1.6, and 5.9 to 6.2
