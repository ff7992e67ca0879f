"""The cache of a call is found by its type, under whatever name a host and a version give it."""

import inspect

import pytest
import torch
import transformers as tf
from helpers.adapted import with_cache
from helpers.hosts.families import HOSTS, TEXT, words
from helpers.near import assert_near
from peft import get_peft_model

from hf_moe import MoeLoraConfig
from hf_moe.adapters.tokens import call_context
from hf_moe.modeling.memory import cache_of


ROUTERS = ("top_k", "sequence")
RECURRENT = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "pad_token_id": 0}
JAMBA = {**TEXT, "num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 9}
HYBRIDS = {
    "jamba": lambda: tf.JambaForCausalLM(
        tf.JambaConfig(**JAMBA, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False)
    ),
    "mamba": HOSTS["mamba"].build,
    "falcon_mamba": lambda: tf.FalconMambaForCausalLM(tf.FalconMambaConfig(**RECURRENT, state_size=4)),
}
DECODERS = {
    **{name: HOSTS[name].build for name in ("llama", "gemma3_text", "mixtral", "gpt_oss", "gpt2", "bloom")},
    **HYBRIDS,
}
TARGETS = r".*\.(q_proj|v_proj|c_attn|query_key_value|in_proj)"


def adapted(build, router, randomise):
    torch.manual_seed(0)
    model = get_peft_model(build().eval(), MoeLoraConfig(target_modules=TARGETS, router=router, num_experts=3))
    randomise(model)
    return model


def decode(model, text, named):
    """Return the logits of every token, decoded one by one behind the first four."""
    cache, steps = {}, []
    for start, stop in ((0, 4), *((place, place + 1) for place in range(4, 9))):
        # States of a fixed size know no mask of earlier tokens: generation leaves it out.
        recurrent = hasattr(model.config, "conv_kernel") and start
        mask = None if recurrent else text["attention_mask"][:, :stop]
        output = model(input_ids=text["input_ids"][:, start:stop], attention_mask=mask, use_cache=True, **cache)
        cache = named(model, output)
        steps.append(output.logits)
    return torch.cat(steps, 1)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_decoding_with_a_cache_is_the_whole_forward(name, router, randomise):
    model, text = adapted(DECODERS[name], router, randomise), words()
    if name in HYBRIDS:  # whose states run through padding when they are given it in pieces
        text["attention_mask"][:] = 1
    whole = model(input_ids=text["input_ids"], attention_mask=text["attention_mask"]).logits
    real = text["attention_mask"].bool()
    assert_near(decode(model, text, with_cache)[real], whole[real], 1e-4)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_decoded_tokens_of_padded_rows_get_experts(name, randomise):
    model, text = adapted(DECODERS[name], "top_k", randomise), words()
    made = []
    for router in (module for key, module in model.named_modules() if key.endswith("moe_lora_router.default")):
        router.register_forward_hook(lambda _, args, output: made.append(args[1].token_mask.clone()))
    decode(model, text, with_cache)
    assert [mask.shape[1] for mask in made[-2:]] == [1, 1]
    assert all(bool(mask.all()) for mask in made if mask.shape[1] == 1)


@torch.no_grad()
def test_a_cache_is_found_among_positional_arguments(randomise):
    model, text = adapted(DECODERS["llama"], "sequence", randomise), words()
    whole = model(input_ids=text["input_ids"], attention_mask=text["attention_mask"]).logits
    base = model.get_base_model()
    first = base(text["input_ids"][:, :8], text["attention_mask"][:, :8], use_cache=True)
    assert list(inspect.signature(base.forward).parameters)[2] == "position_ids"
    last = base(text["input_ids"][:, 8:], text["attention_mask"], None, cache_of(first)).logits
    assert_near(last, whole[:, 8:], 1e-4)


@torch.no_grad()
def test_the_memory_stays_with_a_cache_of_a_tuple(randomise):
    model, text = adapted(DECODERS["llama"], "sequence", randomise), words()
    whole = model(input_ids=text["input_ids"], attention_mask=text["attention_mask"]).logits
    half = {name: text[name][:, :8] for name in ("input_ids", "attention_mask")}
    first = model(**half, use_cache=True, return_dict=False)
    cache = with_cache(model, first)
    last = model(input_ids=text["input_ids"][:, 8:], attention_mask=text["attention_mask"], **cache)[0]
    assert_near(last, whole[:, 8:], 1e-4)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("columns", [7, 12])
def test_a_mask_of_other_tokens_without_a_cache_is_refused(columns, router, randomise):
    model, text = adapted(DECODERS["llama"], router, randomise), words()
    mask = torch.ones(2, columns, dtype=torch.long)
    with pytest.raises(ValueError, match=f"attention_mask has {columns} columns and the call 9 tokens"):
        model(input_ids=text["input_ids"], attention_mask=mask)


def test_states_that_are_no_cache_take_tokens_one_by_one_only(randomise):
    model, text = adapted(DECODERS["llama"], "top_k", randomise), words()
    pooled, mask = adapted(DECODERS["llama"], "sequence", randomise), text["attention_mask"]

    class xLSTMCache:
        pass

    call = {"input_ids": text["input_ids"][:, 8:], "attention_mask": mask}
    base = model.get_base_model()
    context = call_context(base, {**call, "cache_params": xLSTMCache()})
    assert context.token_mask.tolist() == [[True], [True]]
    context = call_context(pooled.get_base_model(), {**call, "state": [torch.zeros(1)]})
    pooling = next(module for key, module in pooled.named_modules() if key.endswith("moe_lora_router.default"))
    with pytest.raises(ValueError, match="keeps earlier ones in a list that tells nothing of them"):
        pooling(torch.zeros(2, 32), context.of("default"))
