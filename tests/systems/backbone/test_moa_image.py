"""MoA for images: a frozen prior and a new branch of attention, which leaves to the prior what it can."""

import copy

import pytest
import torch
from helpers.near import assert_near
from transformers import LlamaConfig, LlamaForCausalLM

from hf_moe import RoutingOverrides, from_system
from hf_moe.training.parts import train_only


ASK, ROWS, LENGTH = 1, 16, 12
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_NEW_BRANCH = RoutingOverrides(disabled_experts={"0.attention": [1], "1.attention": [1]})
ANSWERS = slice(LENGTH - 4, LENGTH - 1)  # the places that foretell the labels of a row with an image


def text_rows(generator, rows=ROWS):
    """Return walks through 20 words by steps of 7, with a question in each, whose answer is word 4."""
    walk = torch.randint(20, (rows, 1), generator=generator) + 7 * torch.arange(LENGTH)
    asked = torch.randint(3, LENGTH - 1, (rows, 1), generator=generator)
    ids = torch.where(torch.arange(LENGTH) > asked, walk - walk.gather(1, asked + 1), walk) % 20 + 4
    ids.scatter_(1, asked, ASK)
    return {"input_ids": ids, "labels": ids, "mm_token_type_ids": torch.zeros_like(ids)}


def image_rows(generator, rows=ROWS):
    """Return the same with an image of one of six kinds before, and two answers after that depend on its kind."""
    ids = text_rows(generator, rows)["input_ids"]
    kind = torch.randint(6, (rows,), generator=generator)
    ids[:, :3] = 24 + kind[:, None]
    ids[:, -4:] = torch.stack([torch.full_like(kind, ASK), 10 + kind, torch.full_like(kind, ASK), 14 + kind], 1)
    labels = ids.masked_fill(torch.arange(LENGTH) < LENGTH - 3, -100)
    types = (torch.arange(LENGTH) < 3).long().expand(rows, -1)
    return {"input_ids": ids, "labels": labels, "mm_token_type_ids": types}


def train(model, make_rows, steps):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**make_rows(generator)).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def host():
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=32, initializer_range=0.1, pad_token_id=0)
    return train(LlamaForCausalLM(config), text_rows, 120)


@pytest.fixture(scope="module")
def model(host):
    moe_config = {"router": {"gate_hidden_size": 64}, "objectives": {"moa_image": 3.0}}
    model = from_system("moa_image", host=host, moe_config=moe_config)
    assert train_only(model, ["routers", "experts/1.*"]) == {"experts": 2 * 3072, "routers": 2 * 2242}
    return train(model, image_rows, 200)


@torch.no_grad()
def share_of_the_prior(model, rows):
    """Return the weight of the prior at every token, the mean over layers, (B, S)."""
    decisions = model(**rows, output_routing=True).routing.decisions.values()
    return torch.stack([decision.weight_table()[:, 0] for decision in decisions]).mean(0).view(-1, LENGTH)


@torch.no_grad()
def test_copies_compute_what_the_host_does(host):
    model, rows = from_system("moa_image", host=host), image_rows(torch.Generator().manual_seed(1))
    assert_near(model(**rows).logits, host(**rows).logits, 1e-6)
    for layer in model.model.layers:
        layer.self_attn.q_proj.gate.outer_weight.normal_()
    assert_near(model(**rows).logits, host(**rows).logits, 1e-6)
    model.model.layers[0].self_attn.o_proj.copies[1].weight.normal_()
    assert (model(**rows).logits - host(**rows).logits).abs().max() > 0.1


@torch.no_grad()
def test_without_the_new_branch_a_trained_model_is_the_host(host, model):
    rows = text_rows(torch.Generator().manual_seed(1))
    assert torch.equal(model(**rows, routing_overrides=NO_NEW_BRANCH).logits, host(**rows).logits)
    assert (model(**rows).logits - host(**rows).logits).abs().max() > 0.1


def test_the_prior_keeps_text(host, model):
    """Answers come from the new branch, other places from the prior; plain training of attention forgets the text."""
    plain = copy.deepcopy(host).requires_grad_(False)
    for layer in plain.model.layers:
        layer.self_attn.requires_grad_(True)
    train(plain, image_rows, 200)
    generator = torch.Generator().manual_seed(5)
    text, images = text_rows(generator, 64), image_rows(generator, 64)
    with torch.no_grad():
        before, after, forgot = (item(**text).loss for item in (host, model, plain))
        assert host(**images).loss > 1.0 and max(item(**images).loss for item in (model, plain)) < 0.1
        shares = share_of_the_prior(model, images)
    assert after - before < 0.5 * (forgot - before), (before, after, forgot)
    found = [float(part.mean()) for part in (shares[:, 3:-4], share_of_the_prior(model, text), shares[:, ANSWERS])]
    assert min(found[:2]) > 0.85 and found[2] < 0.65, found


@torch.no_grad()
def test_the_objective_counts_what_an_image_is_not_for(host):
    model = from_system("moa_image", host=host, moe_config={"objectives": {"moa_image": 1.0}})
    for layer, bias in zip(model.model.layers, (0.0, 1.0), strict=True):
        layer.self_attn.q_proj.gate.outer_bias.copy_(torch.tensor([0.0, bias]))
    new = (0.5 + torch.tensor(1.0).sigmoid()) / 2  # the mean over layers of the new branch's share
    text, images = text_rows(torch.Generator().manual_seed(5)), image_rows(torch.Generator().manual_seed(5))
    rows = {name: torch.cat([text[name], images[name]]) for name in text}
    counted = torch.tensor([1.0] * ROWS + [(LENGTH - 6) / LENGTH] * ROWS)
    labels = torch.tensor([LENGTH - 1.0] * ROWS + [3.0] * ROWS)
    expected = (new**2 * counted * labels).sum() / labels.sum()
    assert_near(model(**rows).objective_values["moa_image"], expected, 1e-5)
