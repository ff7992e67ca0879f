"""Losses on the mean routing distribution of each modality: what the population of the last step makes of a row."""

import math

import pytest
import torch
from helpers.router_cases import make_losses, make_spec

from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.objectives import locality
from hf_moe.modeling.objectives.global_entropy import GlobalEntropy
from hf_moe.modeling.registry import build
from hf_moe.modeling.routing_context import RoutingContext


SPEC = make_spec(num_experts_per_tok=1)
OBJECTIVES = {"global_entropy": {"coef": 1.0, "min_experts": {"text": 6, "image": 7}}}


def context_of(text: int, image: int, rows: int = 2) -> RoutingContext:
    modality = torch.tensor([0] * text + [1] * image).expand(rows, -1)
    return RoutingContext(modality, torch.ones_like(modality).bool())


def after_a_step(losses, context: RoutingContext, probs: torch.Tensor):
    index = probs.argmax(-1, keepdim=True)
    context.decisions[SPEC.site] = ExpertAssignment(index, torch.ones(len(probs), 1), 8, router_probs=probs)
    losses.accumulate(context)
    losses.end_step()
    return losses(context, context.token_mask.sum(-1))


def test_the_gradient_is_that_of_the_whole_population():
    context, noise = context_of(5, 11), torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    logits = (noise + 4.0 * (torch.arange(8) < 2)).requires_grad_()
    text = context.modality_ids.flatten() == 0
    loss = after_a_step(make_losses(OBJECTIVES, SPEC), context, logits.softmax(-1))
    means = [logits.softmax(-1)[chosen].mean(0) for chosen in (text, ~text)]
    expected = sum(math.log(k) + (mean * mean.log()).sum() for k, mean in zip((6, 7), means, strict=True))
    torch.testing.assert_close(loss.total(), expected)
    found, wanted = (torch.autograd.grad(value, logits)[0] for value in (loss.total(), expected))
    torch.testing.assert_close(found, wanted)


def test_a_modality_that_is_not_there_has_no_term_and_keeps_its_mean():
    losses, certain = make_losses(OBJECTIVES, SPEC), torch.eye(8)[[0] * 12]
    assert after_a_step(losses, context_of(6, 0), certain).total().item() == pytest.approx(math.log(6))
    assert after_a_step(losses, context_of(0, 6), certain).total().item() == pytest.approx(math.log(6) + math.log(7))


def test_by_default_text_wants_a_quarter_and_images_three_fifths():
    losses = make_losses({"global_entropy": 1.0}, SPEC)
    found = after_a_step(losses, context_of(3, 5), torch.eye(8)[[0] * 16]).total().item()
    assert found == pytest.approx(math.log(2) + math.log(5))


def test_more_experts_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"'text' must lie in \[1, 8\]"):
        GlobalEntropy([SPEC], 1.0, min_experts={"text": 9})
    with pytest.raises(ValueError, match="names no modality"):
        GlobalEntropy([SPEC], 1.0, min_experts={})
    with pytest.raises(ValueError, match="'txt'"):
        GlobalEntropy([SPEC], 1.0, min_experts={"txt": 2})


def test_locality_knows_the_node_of_a_process(monkeypatch):
    objective = build("objective", get_mechanism("objective", "locality"), {"num_nodes": 2}, [SPEC], 1.0)
    decision = ExpertAssignment(torch.zeros(4, 1).long(), torch.ones(4, 1), 8, router_probs=torch.full((4, 8), 1 / 8))
    for process, node in enumerate((0, 0, 1, 1)):
        monkeypatch.setattr(locality, "place_of_process", lambda process=process: (process, 4))
        assert objective.group(decision, context_of(4, 0, rows=1)).tolist() == [node] * 4
    monkeypatch.undo()
    with pytest.raises(ValueError, match="num_nodes=2, and 1 processes train, not as many"):
        objective.accumulate({SPEC.site: decision}, context_of(4, 0, rows=1))
