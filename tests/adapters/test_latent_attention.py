"""Multi-head latent attention, whose `kv_b_proj` reads the tokens with a dimension of size 1 in place of heads."""

import pytest
import torch
import transformers as tf
from helpers.adapted import logits, with_cache
from helpers.hosts.families import TEXT, words
from helpers.near import assert_near
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from hf_moe import MoeLoraConfig
from hf_moe.adapters.contexts import are_tokens
from hf_moe.adapters.layer import tuner_layers


LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
LATENT |= {**TEXT, "num_key_value_heads": 4}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
GROUPS = {"n_group": 2, "topk_group": 1}
CONFIGS = {
    "DeepseekV2": EXPERTS | GROUPS,
    "DeepseekV3": EXPERTS | GROUPS,
    "Glm4MoeLite": EXPERTS | GROUPS,
    "MiniCPM3": {},
}
TARGETS = ["kv_b_proj", "o_proj"]


def host(name):
    torch.manual_seed(0)
    config = getattr(tf, f"{name}Config")(**LATENT, **CONFIGS[name])
    return getattr(tf, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_one_expert_is_pefts_lora_and_merges_as_it(name, randomise):
    ours = get_peft_model(host(name), MoeLoraConfig(target_modules=TARGETS, num_experts=1, router="constant", r=4))
    randomise(ours)
    alpha = ours.peft_config["default"].lora_alpha
    lora = get_peft_model(host(name), LoraConfig(target_modules=TARGETS, r=4, lora_alpha=alpha))
    sides = zip(tuner_layers(ours), (m for m in lora.modules() if isinstance(m, LoraLayer)), strict=True)
    with torch.no_grad():
        for experts, plain in sides:
            plain.lora_A["default"].weight.copy_(experts.moe_lora_A["default"][0])
            plain.lora_B["default"].weight.copy_(experts.moe_lora_B["default"][0])
    expected = logits(lora, words())
    assert_near(logits(ours, words()), expected, 1e-6)
    assert (expected - logits(host(name), words())).abs().max() > 1e-3
    assert_near(logits(ours.merge_and_unload(), words()), expected, 1e-5)


KINDS = [("top_k", "decoder_layer"), ("top_k", "model"), ("top_k", "target"), ("sequence", "decoder_layer")]


@pytest.mark.parametrize("router, router_input", KINDS)
def test_routed_experts_train_and_decode_from_a_cache(router, router_input, randomise):
    fields = {"router": router, "router_input": router_input}
    model = get_peft_model(host("DeepseekV3"), MoeLoraConfig(target_modules=TARGETS, **fields))
    randomise(model)
    model.train()(**words()).loss.backward()
    assert all(layer.moe_lora_B["default"].grad.any() for layer in tuner_layers(model))
    model.eval()
    for rows in (1, 2):
        row = {key: value[:rows] for key, value in words().items()}
        whole = logits(model, row)
        with torch.no_grad():
            first = model(row["input_ids"][:, :8], attention_mask=row["attention_mask"][:, :8], use_cache=True)
            last = model(row["input_ids"][:, 8:], attention_mask=row["attention_mask"], **with_cache(model, first))
        assert_near(last.logits[:, 0], whole[:, 8], 1e-5)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_what_was_decided_goes_with_the_cache(options, randomise):
    model = get_peft_model(host("DeepseekV3"), MoeLoraConfig(target_modules=TARGETS)).eval()
    randomise(model)
    rows = {key: value for key, value in words().items() if key != "labels"}
    options = {**options, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    plain = {key: value for key, value in options.items() if key != "cache_implementation"}
    expected = model.generate(**rows, use_cache=False, **plain)
    assert torch.equal(model.generate(**rows, **options), expected)


def test_a_cache_that_knows_no_decisions_is_refused(randomise):
    model = get_peft_model(host("DeepseekV3"), MoeLoraConfig(target_modules=TARGETS)).eval()
    ids = words()["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        cache = with_cache(model, model(ids[:, :8], use_cache=True))
    with pytest.raises(ValueError, match="a cache that was filled without this adapter"):
        model(ids[:, 8:], **cache)


def test_a_gate_that_pools_what_is_read_from_a_cache_is_refused():
    fields = {"router": "sequence", "router_input": "target"}
    model = get_peft_model(host("DeepseekV3"), MoeLoraConfig(target_modules=TARGETS, **fields)).eval()
    ids = words()["input_ids"]
    with torch.no_grad():
        cache = with_cache(model, model(ids[:, :8], use_cache=True))
    with pytest.raises(ValueError, match="SequenceRouter pools .* router_input='decoder_layer'"):
        model(ids[:, 8:], **cache)


@pytest.mark.parametrize("found, same", [((2, 1, 6), True), ((12,), True), ((2, 2, 3), False), ((6, 2), False)])
def test_windows_of_as_many_tokens_are_still_refused(found, same):
    assert are_tokens(torch.zeros(*found, 4), torch.Size((2, 6))) is same
