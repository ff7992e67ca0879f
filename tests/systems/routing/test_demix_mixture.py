"""The mixture over domains: by hand, in generation, with padding, and its priors."""

import pytest
import torch
from helpers.mechanisms import build
from helpers.near import assert_near
from torch.nn import functional as F

from hf_moe.inference.domain_mixture import DomainMixture


@pytest.fixture(scope="module")
def model():
    """A model whose router reads the condition `task`, of four ids."""
    return build("router", "condition")


@pytest.fixture
def ids():
    return torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(1))


def mixing(model, **options):
    return DomainMixture(model, condition="task", **options)


def logits(model, ids, domain):
    with torch.no_grad():
        return model(input_ids=ids, condition_ids={"task": torch.full((len(ids),), domain)}).logits


def test_the_mixture_is_the_sum_over_domains_by_hand(model, ids):
    prior = torch.tensor([0.4, 0.3, 0.2, 0.1])
    probs = torch.stack([logits(model, ids[:, :4], domain).softmax(-1) for domain in range(4)])  # (J, B, S, V)
    said = probs[:, :, :3].gather(-1, ids[None, :, 1:4, None].expand(4, -1, -1, -1)).squeeze(-1)
    weight = said.prod(-1) * prior[:, None]
    mixture = mixing(model)
    mixture.prior = prior
    mixed, posterior = mixture(ids[:, :4])
    assert_near(posterior[:, -1].T, weight / weight.sum(0), 1e-5)
    assert_near(mixed[:, -1].exp(), ((weight / weight.sum(0))[..., None] * probs[:, :, -1]).sum(0), 1e-5)
    assert_near(posterior[:, 0], prior.expand(3, -1), 1e-6)


def test_generation_goes_on_with_the_mixture(model, ids):
    found = mixing(model).generate(ids, max_new_tokens=5)
    expected = ids
    for _ in range(5):
        expected = torch.cat([expected, mixing(model)(expected)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(found, expected)
    alone = mixing(model).generate(ids[1:2], max_new_tokens=5)
    assert torch.equal(alone, found[1:2])


def test_padding_says_nothing_of_the_domain(model, ids):
    padded, mask = F.pad(ids, (3, 0), value=7), F.pad(torch.ones_like(ids), (3, 0))
    expected, found = mixing(model)(ids), mixing(model)(padded, attention_mask=mask)
    assert_near(found[0][:, 3:], expected[0], 1e-5)
    assert_near(found[1][:, 3:], expected[1], 1e-5)


def test_samples_are_those_of_the_mixture(model, ids):
    torch.manual_seed(0)
    many = ids[:1].expand(2000, -1)
    found = mixing(model, top_k=2).generate(many, do_sample=True, max_new_tokens=1)[:, -1]
    share = torch.bincount(found, minlength=64) / len(found)
    assert (share - mixing(model, top_k=2)(ids[:1])[0][0, -1].exp()).abs().max() < 0.04 and share.max() < 0.5


def test_few_domains_run_where_few_are_likely(model, ids):
    mixture = mixing(model, top_k=2)
    mixture.prior = torch.tensor([0.1, 0.4, 0.1, 0.4])
    rows = []
    with model.register_forward_pre_hook(
        lambda _, __, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    ):
        _, posterior = mixture(ids)
    assert rows == [6] and not posterior[..., [0, 2]].any() and posterior.sum(-1).allclose(torch.tensor(1.0))


def test_priors_follow_the_data(model, ids):
    fixed, moving = mixing(model), mixing(model, prior_decay=0.3)
    end = fixed(ids)[1][:, -1].mean(0)
    fixed.fit_prior([{"input_ids": ids[:2]}, {"input_ids": ids[2:]}])
    assert_near(fixed.prior, end, 1e-6)
    moving(ids)
    assert_near(moving.prior, 0.7 / 4 + 0.3 * end, 1e-6)
    assert (end - 0.25).abs().max() > 1e-3


def test_what_cannot_be_mixed_is_refused(model):
    with pytest.raises(ValueError, match="ids of the condition 'domain'; they read .'task'."):
        DomainMixture(model)
    with pytest.raises(ValueError, match=r"top_k=5 must lie in \[1, 4\]"):
        mixing(model, top_k=5)
