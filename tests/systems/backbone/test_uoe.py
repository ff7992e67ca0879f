"""Union of experts: parts of a feed-forward and of an attention, chosen by token in decoders and by data in towers."""

import pytest
import torch
from helpers.hosts.catalogue import HOSTS
from helpers.near import assert_near
from helpers.router_cases import make_context, make_router, make_spec
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hf_moe import from_system


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
DENSE = LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.15)
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def host(config=DENSE, cls=LlamaForCausalLM):
    torch.manual_seed(0)
    model = cls(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@torch.no_grad()
def uniform(model):
    """Let all gates be uniform."""
    for name, parameter in model.named_parameters():
        if ".gate." in name:
            parameter.zero_()
    return model.eval()


@torch.no_grad()
def logits_of(model, **inputs):
    return model(**(inputs or {"input_ids": IDS})).logits


@pytest.mark.parametrize("variant", ["token", "sequence"])
def test_all_parts_of_a_feed_forward_are_it(variant):
    whole = uniform(from_system("uoe", host=host(), variant=variant, moe_config={"num_experts_per_tok": 4}))
    assert_near(logits_of(whole), logits_of(host()), 1e-5)
    some = from_system("uoe", host=host(), variant=variant).eval()
    assert (logits_of(some) - logits_of(host())).abs().max() > 1e-2
    assert some.moe_layers()[0].experts.widths == [12] * 4


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_all_heads_of_an_attention_are_it(kind):
    qwen = (Qwen2Config(**SIZES, num_key_value_heads=2, initializer_range=0.15), Qwen2ForCausalLM)
    dense = host(*(qwen if kind == "qwen2" else ()))
    expected = logits_of(dense)
    changes = {"layers": [], "attention": {"name": "uoe", "num_heads_per_tok": 4}}
    model = uniform(from_system("uoe", host=dense, variant="heads", moe_config=changes))
    assert_near(logits_of(model), expected, 1e-5)


@torch.no_grad()
def test_a_head_that_is_not_chosen_adds_nothing():
    model = from_system("uoe", host=host(), variant="heads", moe_config={"layers": []}).eval()
    output = model.model.layers[0].self_attn.o_proj
    routing = model(input_ids=IDS, output_routing=True).routing.decisions["0.attention"]
    assert (routing.expert_index < 4).sum() == IDS.numel() * 2
    seen, calls = [], []
    output.register_forward_hook(lambda module, given, found: calls.append((given[0], found)))
    model(input_ids=IDS)
    states, found = calls[0]
    states, weight = states.view(-1, 4, 8), output.weight
    for token, heads in enumerate(routing.expert_index.tolist()):
        parts = zip(heads, routing.expert_weight[token], strict=True)
        seen.append(sum(4 * share * (weight[head] @ states[token, head]) for head, share in parts))
    assert_near(found.flatten(0, 1), torch.stack(seen), 1e-5)


def test_half_of_the_heads_cost_half_of_their_projections():
    counts = []
    for heads in (2, 4):
        changes = {"layers": [], "attention": {"name": "uoe", "num_heads_per_tok": heads}}
        model = from_system("uoe", host=host(), variant="heads", moe_config=changes).eval()
        with FlopCounterMode(display=False) as counter:
            logits_of(model)
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == 2 * 2 * IDS.numel() * 2 * (2 * 8 * 32)  # layers, FLOPs, tokens, heads, both maps


def test_data_is_selected_in_towers_alone():
    with pytest.raises(ValueError, match="must not see later ones"):
        from_system("uoe", host=host(), moe_config={"router": {"selection": "data"}})


@pytest.mark.parametrize("fraction", [0.5, 0.3, 1.0])
def test_an_expert_takes_its_share_of_every_row(fraction):
    spec, context = make_spec(causal=False), make_context()
    router = make_router("uoe", {"selection": "data", "expert_capacity_fraction": fraction}, spec)
    decision = router(torch.randn(context.token_mask.numel(), spec.hidden_size), context)
    chosen = (decision.expert_index < spec.num_experts).view(*context.token_mask.shape, -1)
    real = context.token_mask.sum(-1)
    assert (chosen.sum(1) == (fraction * real - 1e-4).ceil()[:, None]).all()
    assert not chosen[~context.token_mask].any() and len(real.unique()) > 1
    probs = decision.router_probs.view_as(chosen)
    best = probs.topk(spec.num_experts_per_tok, dim=-1).indices
    wants = torch.zeros_like(chosen).scatter(2, best, True) & context.token_mask[..., None]
    left = wants & ~chosen
    for row, expert in left.any(1).nonzero().tolist():
        assert not (chosen & ~wants)[row, :, expert].any(), "who wants an expert goes first"
        assert probs[row, left[row, :, expert], expert].max() <= probs[row, chosen[row, :, expert], expert].min()


def test_all_parts_of_a_tower_are_it_and_its_gate_learns():
    dense, inputs = HOSTS["llava"].build().eval(), HOSTS["llava"].inputs()
    expected = logits_of(dense, **inputs)
    parts = {"num_experts": 4, "num_experts_per_tok": 4, "granularity": 4}
    router = {"name": "uoe", "selection": "data", "expert_capacity_fraction": 1.0}
    changes = {"moe_config": {"layers": []}, "vision_moe_config": {**parts, "router": router}}
    model = uniform(from_system("uoe", host=dense, **changes))
    assert_near(logits_of(model, **inputs), expected, 1e-5)
    model.train()(**inputs, labels=inputs["input_ids"].clamp(max=60)).loss.backward()
    gates = [block.gate.weight.grad for block in model.moe_blocks().values()]
    assert gates and gates[0].abs().max() > 1e-6
