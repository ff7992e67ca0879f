"""Expert choice: what an expert chooses from, and how much."""

import math

import pytest
import torch
from helpers.router_cases import EXPERTS, HIDDEN, make_context, make_router, weight_table


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def train_router(**options):
    return make_router("expert_choice", options).train()


def loads(decision, tokens):
    return (decision.expert_index[tokens][..., None] == torch.arange(EXPERTS)).flatten(0, 1).sum(0).tolist()


@pytest.mark.parametrize("std", [0.0, 1.0, 30.0])
@pytest.mark.parametrize(("factor", "cap"), [(1.0, None), (1.0, 3), (1.5, None)])
def test_every_expert_takes_its_share_of_each_group(std, factor, cap):
    router, context = train_router(capacity_factor=factor, max_experts_per_tok=cap), make_context(3, 12)
    torch.nn.init.normal_(router.weight, std=std)
    context.modality_ids[2, 9:11] = 1  # a second image of two patches
    decision = router(torch.randn(36, HIDDEN), context)
    row, text = torch.arange(36) // 12, context.modality_ids.flatten() == 0
    second = torch.arange(36) > 32
    groups = [~text & (row == 1), ~text & (row == 2) & ~second, ~text & second, *(text & (row == r) for r in range(3))]
    for group, size in zip(groups, (4, 4, 2, 6, 8, 6), strict=True):  # two of the first row are padding
        assert loads(decision, group) == [math.ceil(factor * size * 2 / EXPERTS)] * EXPERTS
    weight = weight_table(decision)
    assert torch.equal(weight, decision.router_probs.where(weight > 0, 0.0))


@pytest.mark.parametrize("group", ["image", "batch"])
def test_another_image_matters_to_a_group_of_the_batch_alone(group):
    router, context = train_router(group=group), make_context(rows=1, positions=12)
    context.modality_ids[0, 8:12] = 1
    hidden = torch.randn(12, HIDDEN)
    hidden[8:] *= 0.1
    before = router(hidden, context).expert_weight[3:7]
    hidden[8:] = 3 * torch.randn(4, HIDDEN)
    assert torch.equal(router(hidden, context).expert_weight[3:7], before) == (group == "image")


def test_packed_documents_do_not_share_a_group():
    context = make_context(1, 12, inputs={"position_ids": torch.arange(12)[None] % 6})
    context.token_mask[:], context.modality_ids[0, 3:9] = True, 1  # an image ends a document, another begins the next
    decision = train_router()(torch.randn(12, HIDDEN), context)
    assert all(loads(decision, group) == [1] * EXPERTS for group in torch.arange(12).split(3))


@pytest.mark.parametrize("group", ["image", "sequence", "batch"])
def test_modalities_matter_to_images_alone(group):
    router, contexts = train_router(group=group), [make_context(), make_context()]
    contexts[1].modality_ids[:] = 0
    hidden = torch.randn(30, HIDDEN)
    same = torch.equal(*(weight_table(router(hidden, context)) for context in contexts))
    assert same == ("modality" not in router.reads) == (group != "image")
