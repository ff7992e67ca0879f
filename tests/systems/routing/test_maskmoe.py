"""MaskMoE: a rare word always has the same expert, a frequent one chooses among its own."""

import pytest
import torch
from helpers.router_cases import make_experts, make_router, make_spec
from torch.nn import functional as F

from hf_moe import RoutingOverrides
from hf_moe.modeling.routing_context import RoutingContext


WORDS, RARE, FREQUENT = 50, 40, 2
SPEC = make_spec(vocab_size=WORDS, num_experts_per_tok=1)


def fitted(spec=SPEC, **options):
    router = make_router("maskmoe", {"visible_experts_frequent": 4, **options}, spec)
    counts = (1000 / torch.arange(1, router.num_rows + 1) ** 1.5).floor()
    router.fit(counts)
    return router


def of(word, tokens=1000, modality=0, **inputs):
    ids = torch.full((1, tokens), word)
    return RoutingContext(torch.full_like(ids, modality), torch.ones_like(ids).bool(), ids, **inputs)


def test_a_rare_word_has_one_expert_and_a_frequent_one_chooses():
    torch.manual_seed(0)
    router, hidden = fitted(), torch.randn(1000, 32)
    rare, frequent = router(hidden, of(RARE)), router(hidden, of(FREQUENT))
    assert len(rare.expert_index.unique()) == 1 and (rare.expert_weight == 1).all()
    chosen = set(frequent.expert_index.unique().tolist())
    assert 2 <= len(chosen) <= 4 and chosen <= set(router.visible[FREQUENT].nonzero().flatten().tolist())
    probs = (hidden @ router.weight.T)[:, router.visible[FREQUENT]].softmax(-1)
    torch.testing.assert_close(frequent.expert_weight[:, 0], probs.max(-1).values)


def test_masked_experts_and_their_gate_rows_learn_nothing():
    router, experts, context = fitted(), make_experts(SPEC), of(FREQUENT, 64)
    hidden = torch.randn(64, 32)
    experts(hidden, router(hidden, context)).square().sum().backward()
    hidden_rows = ~router.visible[FREQUENT]
    assert not router.weight.grad[hidden_rows].any() and router.weight.grad[~hidden_rows].any()
    assert not experts.gate_up_proj.grad[hidden_rows].any()


def test_words_that_make_up_the_mass_are_frequent():
    router = make_router("maskmoe", {"visible_experts_frequent": 4, "frequent_mass": 0.7}, SPEC)
    router.fit(torch.tensor([10.0, 40, 30, 0, 20] + [0.0] * 45 + [9e9, 0, 0]))
    # 40 and 30 make up 0.7 of the text, in which images do not count; what is no word sees all.
    assert router.visible.sum(-1).tolist() == [1, 4, 4, 1, 1] + [1] * 45 + [8, 8, 8]
    assert not torch.equal(router.visible[5:30], fitted(make_spec(vocab_size=WORDS, layer_idx=2)).visible[5:30])


def test_slots_beyond_the_visible_experts_are_empty():
    decision = fitted(make_spec(vocab_size=WORDS))(torch.randn(1000, 32), of(RARE))
    assert (decision.expert_index[:, 1] == 8).all() and (decision.expert_weight[:, 1] == 0).all()


def test_images_see_the_experts_that_are_named():
    router, hidden = fitted(image_experts=[1, 6]), torch.randn(1000, 32)
    assert router(hidden, of(RARE, modality=1)).expert_index.unique().tolist() == [1, 6]
    assert len(router(hidden, of(RARE, modality=3)).expert_index.unique()) == 8
    for experts in ([8], []):
        with pytest.raises(ValueError, match=r"image_experts=\[8?\] must name at least one expert, each in \[0, "):
            fitted(image_experts=experts)


def test_a_word_whose_experts_are_disabled_sees_the_others():
    router = fitted()
    only = int(router.visible[RARE].nonzero())
    context = of(RARE, overrides=RoutingOverrides(disabled_experts={1: [only]}))
    decision = router(torch.randn(1000, 32), context)
    assert decision.expert_weight.isfinite().all() and len(decision.expert_index.unique()) == 7


def loss_of_rare_words(name, options, steps=300):
    """Return the loss on the rarest fifth of words, which name a class each, after training on Zipf's law."""
    torch.manual_seed(0)
    words, spec = 1000, make_spec(vocab_size=1000, num_experts_per_tok=1)
    share, classes = 1 / torch.arange(1, words + 1), torch.randint(64, (words,))
    router, experts = make_router(name, options, spec).train(), make_experts(spec)
    if name == "maskmoe":
        router.fit(torch.cat([share * 1e6, torch.zeros(3)]))
    embedding, head = torch.nn.Embedding(words, 32), torch.nn.Linear(32, 64)
    parts = torch.nn.ModuleList([router, experts, embedding, head])
    optimizer = torch.optim.Adam(parts.parameters(), lr=3e-3)

    def loss(ids):
        hidden = F.rms_norm(embedding(ids), (32,)) + 0.7 * torch.randn(len(ids), 32)
        context = RoutingContext(torch.zeros_like(ids)[None], torch.ones_like(ids).bool()[None], ids[None])
        return F.cross_entropy(head(experts(hidden, router(hidden, context))), classes[ids])

    for _ in range(steps):
        loss(torch.multinomial(share, 256, True)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss(torch.arange(800, words).repeat(5)).item()


def test_rare_words_learn_more_than_by_a_learned_gate_alone():
    masked = loss_of_rare_words("maskmoe", {"visible_experts_frequent": 8})
    assert masked < loss_of_rare_words("top_k", {}) - 0.5
