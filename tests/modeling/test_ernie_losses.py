"""The two losses that ERNIE 4.5 VL adds: rows of a gate apart, and samples weighed by all of their tokens."""

import pytest
import torch
from helpers.image_rows import collate, labels_of
from torch.nn import functional as F

from hf_moe.modeling.gating import row_overlap
from hf_moe.modeling.language_loss import token_balanced_loss


def test_overlap_is_the_mean_squared_cosine_of_the_pairs():
    assert row_overlap(torch.eye(4) * torch.tensor([1.0, 5.0, 0.1, 2.0])).item() == pytest.approx(0)
    assert row_overlap(torch.ones(3, 5)).item() == pytest.approx(1)
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    pairs = [F.cosine_similarity(rows[i], rows[j], dim=0).square() for i in range(4) for j in range(4) if i != j]
    assert row_overlap(rows).item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-5)


ERNIE = {"num_experts": 4, "num_experts_per_tok": 1, "router": "ernie45_vl"}


def test_orthogonality_is_the_mean_over_the_gates_of_both_banks(tiny_model, text_batch):
    model = tiny_model(moe_config={**ERNIE, "objectives": {"router_orthogonality": 0.5}}).train()
    output = model(**text_batch)
    weights = [layer.router.weight for layer in model.moe_layers().values()]
    expected = torch.stack([row_overlap(half) for weight in weights for half in weight.split(2)]).mean()
    torch.testing.assert_close(output.objective_values["router_orthogonality"], expected)
    torch.testing.assert_close(output.aux_loss, 0.5 * expected)
    # A step against it turns the rows apart, in both banks.
    gradients = torch.autograd.grad(output.aux_loss, weights)
    for weight, gradient in zip(weights, gradients, strict=True):
        for half, step in zip(weight.split(2), gradient.split(2), strict=True):
            assert row_overlap(half - 0.01 * step) < row_overlap(half)


def test_orthogonality_of_other_routers_is_refused(tiny_model, text_batch):
    model = tiny_model(moe_config={"objectives": {"router_orthogonality": 0.5}}).train()
    with pytest.raises(ValueError, match="router_orthogonality needs a router .* 'ernie45_vl'"):
        model(**text_batch)


def test_token_balance_divides_a_row_by_all_of_its_tokens():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 6, 9), torch.randint(9, (2, 6))
    labels[0, :4] = -100
    mask = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    labels[1, :2] = -100
    rows = [F.cross_entropy(logits[r, :-1], labels[r, 1:], ignore_index=-100, reduction="sum") for r in (0, 1)]
    expected = (2 / 6) * rows[0] / 6 + (4 / 6) * rows[1] / 4
    torch.testing.assert_close(token_balanced_loss(logits, labels, mask), expected)


def test_token_balance_adds_up_over_micro_batches(tiny_model, training_batch, rows):
    model = tiny_model(moe_config={"token_balanced_loss": True}).train()
    total = (training_batch["labels"][:, 1:] != -100).sum()
    whole = model(**training_batch, num_items_in_batch=total).loss
    parts = []
    for item in rows:
        one = collate([item])
        parts.append(model(**one, labels=labels_of(one), num_items_in_batch=total).loss)
    torch.testing.assert_close(torch.stack(parts).sum(), whole)
    assert tiny_model().train()(**training_batch).loss > 1.5 * whole


def test_what_is_measured_is_the_usual_loss(tiny_model, text_batch):
    balanced = tiny_model(moe_config={"token_balanced_loss": True})
    plain = tiny_model()
    with torch.no_grad():
        losses = [model(**text_batch).loss for model in (balanced, plain)]
    assert torch.equal(*losses)
