"""OneCAT: roles that choose experts, scales that adapt one of them, and a causal mask over blocks."""

import pytest
import torch
from helpers.caches import cache_of
from helpers.near import assert_near
from helpers.router_cases import EAGER, make_spec
from transformers import LlamaConfig, LlamaForCausalLM

from hf_moe import from_system
from hf_moe.construction.conversion import convert_experts
from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.experts.onecat import RoleExperts


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
READ, FIRST, SECOND = slice(2, 6), slice(8, 9), slice(9, 13)
LENGTH = 14
DENSE = LlamaConfig(**SIZES, initializer_range=0.15)


def host():
    torch.manual_seed(0)
    return LlamaForCausalLM(DENSE).eval()


def onecat():
    small = {"num_experts": 4, "experts": {"name": "onecat", "scale_adapter_rank": 4}}
    return from_system("onecat", host=host(), moe_config=small).eval()


@torch.no_grad()
def drifted(model):
    """Move roles and scales apart, as training does."""
    generator = torch.Generator().manual_seed(1)
    for layer in model.moe_layers().values():
        for parameter in layer.experts.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def make_rows(model=None, roles=None):
    """Return two rows of text, an image that is read, and two scales of one that is drawn."""
    ids = torch.randint(3, 64, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    if roles is None:
        roles = torch.zeros_like(ids)
        roles[:, READ], roles[:, FIRST], roles[:, SECOND] = 1, 2, 3
    rows = {"condition_ids": {"role": roles}}
    return (
        {**rows, "inputs_embeds": model.get_input_embeddings()(ids).detach()} if model else {**rows, "input_ids": ids}
    )


@torch.no_grad()
def logits_of(model, rows, **extra):
    return model(**rows, **extra).logits


def test_copies_are_the_dense_model_with_that_mask():
    mask = torch.ones(LENGTH, LENGTH).tril().bool()
    mask[READ, READ] = mask[SECOND, SECOND] = True
    rows = make_rows()
    expected = host()(input_ids=rows["input_ids"], attention_mask=mask.expand(2, 1, -1, -1)).logits
    assert_near(logits_of(onecat(), rows), expected, 1e-5)
    assert (expected - host()(input_ids=rows["input_ids"]).logits).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changed", "first"), [(5, 2), (12, 9), (8, 8), (7, 7)], ids=["read", "scale 1", "scale 0", "text"]
)
def test_tokens_see_their_block_and_what_comes_before(changed, first):
    model = drifted(onecat())
    rows = make_rows(model)
    expected = logits_of(model, rows)
    rows["inputs_embeds"][:, changed] += 1.0
    moved = (logits_of(model, rows) - expected).abs().amax((0, 2))
    assert moved[:first].max() == 0 and (moved[first:] > 1e-4).all()


def test_a_role_learns_from_its_own_tokens():
    model = drifted(onecat()).train()
    roles = make_rows()["condition_ids"]["role"].clamp(max=1)
    rows = make_rows(roles=roles)
    model(**rows, labels=rows["input_ids"]).loss.backward()
    for layer in model.moe_layers().values():
        for parameter in layer.experts.roles.parameters():
            assert [gradient.any().item() for gradient in parameter.grad] == [True, True, False]
        assert not any(parameter.grad.any() for parameter in layer.experts.adapters.values())


def test_scales_differ_by_their_adapters():
    experts = RoleExperts(EAGER, make_spec(num_experts=5), scale_adapter_rank=4)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden = torch.randn(1, 32).expand(5, -1)
    found = experts(hidden, ExpertAssignment(torch.arange(5)[:, None], torch.ones(5, 1), 5))
    assert (found[:, None] - found).abs().amax(-1)[~torch.eye(5).bool()].min() > 1e-2
    for expert, state in enumerate(experts.states()):
        gate, up = (state["gate_up_proj"] @ hidden[0]).chunk(2)
        assert_near(found[expert], state["down_proj"] @ (experts.roles.act_fn(gate) * up), 1e-5)


@torch.no_grad()
def test_an_image_is_drawn_scale_by_scale():
    model, rows = drifted(onecat()), make_rows()
    expected, found, cache = logits_of(model, rows), [], None
    for part in (slice(0, 8), FIRST, SECOND, slice(13, 14)):
        roles = {"role": rows["condition_ids"]["role"][:, part]}
        ids = rows["input_ids"][:, part]
        output = model(input_ids=ids, condition_ids=roles, past_key_values=cache, use_cache=True)
        cache = cache_of(output)
        found.append(output.logits)
    assert_near(torch.cat(found, 1), expected, 1e-5)


def test_what_follows_text_is_text():
    model = drifted(onecat())
    rows = make_rows()
    found = model.generate(**rows, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    roles = torch.cat([rows["condition_ids"]["role"], torch.zeros(2, 4, dtype=torch.long)], 1)
    whole = {"input_ids": found.sequences, "condition_ids": {"role": roles}}
    assert_near(torch.stack(found.logits, 1), logits_of(model, whole)[:, LENGTH - 1 : -1], 1e-5)


def test_experts_turn_into_plain_ones():
    model, rows = drifted(onecat()), make_rows()
    expected = logits_of(model, rows)
    convert_experts(model, "ffn")
    assert_near(logits_of(model, rows), expected, 1e-5)


def test_two_experts_are_refused():
    with pytest.raises(ValueError, match="must be 2 and the number of scales"):
        RoleExperts(EAGER, make_spec(num_experts=2))
