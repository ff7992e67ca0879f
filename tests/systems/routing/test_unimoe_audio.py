"""UniMoE-Audio: how many experts a token takes, what they weigh, and what learns beside them."""

import pytest
import torch
from helpers.near import assert_near
from helpers.router_cases import EXPERTS, make_router, make_spec, text_context, weight_table
from transformers import LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration


ROUTED = 8


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def routed_by(logits, **options):
    """Return the decision for tokens with these logits (T, 8 routed + 2 shared + null ones)."""
    spec = make_spec(num_experts=ROUTED + 2, hidden_size=logits.shape[1])
    router = make_router("unimoe_audio", {"num_null_experts": logits.shape[1] - ROUTED - 2, **options}, spec)
    weight = torch.eye(logits.shape[1])
    router.weight.data, router.null_weight.data = weight[: ROUTED + 2], weight[ROUTED + 2 :]
    return router(logits, text_context(1, len(logits)))


def test_a_flat_gate_takes_seven_of_nine_and_a_sure_one_a_single_one():
    flat, sure = torch.zeros(1, 11), torch.zeros(1, 11)
    sure[0, 3] = 20.0
    assert [(routed_by(logits).router_probs > 0).sum().item() for logits in (flat, sure)] == [7, 1]
    assert (routed_by(flat, top_p_threshold=0.0).router_probs > 0).sum() == 1


@pytest.mark.parametrize("weights", ["probability", "uniform"])
def test_weights_are_those_of_the_equations(weights):
    logits = 2 * torch.randn(64, 12)
    found = weight_table(routed_by(logits, dynamic_weights=weights))
    for token, row in enumerate(logits.double()):
        dynamic = torch.cat([row[:ROUTED], row[10:]])
        p = dynamic.softmax(-1)
        order = p.argsort(descending=True)
        active = order[: 1 + int((p[order].cumsum(0) < 0.7).sum())]
        q = torch.cat([dynamic[active], row[8:10]]).softmax(-1)
        w = p[active] if weights == "probability" else torch.ones_like(p[active])
        w = q[:-2].sum() * w / w.sum()
        assert w.sum() + q[-2:].sum() == pytest.approx(1.0, abs=1e-5)
        expected = torch.zeros(12, dtype=torch.double)
        expected[torch.where(active < ROUTED, active, active + 2)], expected[8:10] = w, q[-2:]
        assert_near(found[token].double(), expected[:10], 1e-5)


def test_a_sure_null_choice_leaves_the_shared_experts_alone():
    logits = torch.randn(4, 11)
    logits[:, 10] = 20.0
    shared = logits[:, 8:].softmax(-1)[:, :2]
    assert_near(weight_table(routed_by(logits)), torch.cat([torch.zeros(4, ROUTED), shared], 1))


def test_unsure_tokens_take_more_experts():
    decision = routed_by(torch.randn(400, 11) * torch.linspace(0.1, 6, 400)[:, None])
    p = decision.router_logits.softmax(-1)
    counts, entropy = (decision.router_probs > 0).sum(-1).float(), torch.special.entr(p).sum(-1)
    assert torch.corrcoef(torch.stack([counts, entropy]))[0, 1] > 0.85


def test_gate_and_shared_experts_learn_beside_frozen_routed_ones():
    banks = {"routed": {"num_experts": 3}, "shared": {"num_experts": 2, "intermediate_size": 8}}
    moe_config = {"expert_banks": banks, "router": "unimoe_audio", "objectives": {"active_balance": 0.1}}
    text = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    model = HfMoeForConditionalGeneration(HfMoeConfig(text_config=text, moe_config=moe_config)).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".gate." in name or ".experts.shared." in name)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer, ids = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01), torch.arange(4, 20)
    for _ in range(20):
        optimizer.zero_grad()
        model(input_ids=ids[None], labels=ids[None]).loss.backward()
        optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("shared", "banks"), [(8, ()), (2, (("a", 4, 8), ("b", 4, 8)))])
def test_experts_that_do_not_fit_are_refused(shared, banks):
    with pytest.raises(ValueError, match=f"num_experts={EXPERTS} the last num_shared_experts={shared}"):
        make_router("unimoe_audio", {"num_shared_experts": shared}, make_spec(banks=banks))
