"""DEMix: an expert for each domain, mixed by the posterior where the domain is unknown."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.construction.expert_banks import edit_banks
from hf_moe.inference.domain_mixture import DomainMixture


WORDS, DOMAINS = 24, ("first", "second", "third")


def chains(rows, length, seed):
    """Rows of three Markov chains, whose transitions have nothing in common, and the chain of each."""
    generator = torch.Generator().manual_seed(seed)
    domain, ids = torch.arange(rows) % 3, torch.randint(WORDS, (rows, length), generator=generator)
    kept = torch.rand(rows, length, generator=generator) < 0.8
    for place in range(1, length):
        ids[:, place] = torch.where(kept[:, place], (ids[:, place - 1] * 5 + 7 * domain + 1) % WORDS, ids[:, place])
    return {"input_ids": ids}, domain


def build(dense=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaConfig(**sizes, vocab_size=WORDS, pad_token_id=0)
    moe = {"layers": [], "router": "top_k", "expert_banks": None} if dense else {}
    model = HfMoeForConditionalGeneration(HfMoeConfig.from_system("demix", text_config=text, moe_config=moe))
    if not dense:
        edit_banks(model, dict.fromkeys(DOMAINS, "news"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(80):
        rows, domain = chains(24, 24, step)
        model(**rows, labels=rows["input_ids"], condition_ids={"domain": domain}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return build()


def logits(model, rows, domain):
    with torch.no_grad():
        return model(**rows, condition_ids={"domain": torch.full((len(rows["input_ids"]),), domain)}).logits


def loss(log_probs, rows):
    return F.nll_loss(log_probs[:, :-1].log_softmax(-1).flatten(0, 1), rows["input_ids"][:, 1:].flatten()).item()


def test_the_posterior_finds_the_domain_and_the_mixture_beats_each(model):
    rows, domain = chains(30, 41, 999)
    mixed, posterior = DomainMixture(model)(**rows)
    assert (posterior[:, -1].gather(1, domain[:, None]) > 0.95).all() and posterior[:, 0].allclose(torch.tensor(1 / 3))
    assert all(loss(mixed, rows) < loss(logits(model, rows, wrong), rows) - 0.1 for wrong in range(3))


@pytest.mark.slow
def test_the_mixture_beats_a_dense_model_of_its_active_size(model):
    rows, dense = chains(60, 41, 999)[0], build(dense=True)
    with torch.no_grad():
        found, expected = loss(DomainMixture(model)(**rows)[0], rows), loss(dense(**rows).logits, rows)
    assert found < expected


def test_domains_come_and_go_without_a_change_to_the_others(model):
    rows, _ = chains(6, 20, 11)
    before = [logits(model, rows, domain) for domain in range(3)]
    larger = copy.deepcopy(model)
    edit_banks(larger, {**{name: name for name in DOMAINS}, "fourth": "second"})
    assert all(torch.equal(logits(larger, rows, domain), before[domain]) for domain in range(3))
    assert torch.equal(logits(larger, rows, 3), before[1])
    edit_banks(larger, {"first": "first", "third": "third"})
    assert torch.equal(logits(larger, rows, 1), before[2]) and larger.config.moe_config.num_experts == 2
    with pytest.raises(ValueError, match="ids of the condition 'domain' must be less|condition_ids"):
        logits(larger, rows, 2)
    with pytest.raises(ValueError, match="name some of these"):
        edit_banks(larger, {"second": "second"})
