"""BAM: attentions and feed-forwards of models that were trained apart become experts side by side."""

import copy

import pytest
import torch
from helpers.hosts.catalogue import HOSTS
from helpers.near import assert_near
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_moe import HfMoeForConditionalGeneration, RoutingOverrides
from hf_moe.configuration.systems import load_system
from hf_moe.construction.parents import from_parents
from hf_moe.modeling.attention.attention_experts import ExpertCopies
from hf_moe.modeling.parts import text_decoder


SIZES = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15, "pad_token_id": 0}
AS_HOST = load_system("bam").variants["block_of_the_host"]
VARIANTS = {"shared": {}, "separate": {"attention": {"share_kv": False}}}
IDS = torch.arange(2, 24).view(2, 11)


def llama(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_equal_parents_make_that_parent(variant):
    parent = llama()
    alone = HfMoeForConditionalGeneration.from_host(parent, moe_config={"layers": [], "layer": "parallel_block"})
    model = from_parents([parent] * 3, **VARIANTS[variant])
    expected = alone(input_ids=IDS).logits
    for _ in range(2):
        assert_near(model(input_ids=IDS).logits, expected, 1e-5)
        for name, parameter in model.named_parameters():
            if ".gate." in name:
                parameter.normal_()
    assert (expected - parent(IDS).logits).abs().max() > 0.1
    as_host = from_parents([parent] * 3, **VARIANTS[variant], **AS_HOST)
    assert_near(as_host(input_ids=IDS).logits, parent(IDS).logits, 1e-5)


@pytest.mark.parametrize(
    "name, parts",
    [("llama", ("self_attn", "mlp")), ("gemma3", ("post_attention_layernorm", "post_feedforward_layernorm"))],
)
@torch.no_grad()
def test_a_parallel_block_reads_one_norm(name, parts):
    moe_config = {"layers": [], "layer": "parallel_block"}
    model = HfMoeForConditionalGeneration.from_host(HOSTS[name].build(), moe_config=moe_config)
    layer, found = text_decoder(model).layers[1], {}
    for path in ("", "input_layernorm", "mlp", *parts):
        keep = lambda module, given, output, path=path: found.update({path: (given, output)})  # noqa: E731
        layer.get_submodule(path).register_forward_hook(keep)
    model(input_ids=IDS)
    inputs, normed = found["input_layernorm"][0][0], found["input_layernorm"][1]
    assert torch.equal(found["mlp"][0][0], normed)
    outputs = [found[part][1] for part in parts]
    added = sum(output[0] if isinstance(output, tuple) else output for output in outputs)
    assert_near(found[""][1], inputs + added, 1e-6)


def test_the_parents_are_told_apart_and_the_rest_is_their_mean():
    parents = [llama(seed) for seed in range(3)]
    model = from_parents(parents, attention={"share_kv": False})
    for path, part in ((path, part) for path, part in model.named_modules() if isinstance(part, ExpertCopies)):
        for own, parent in zip(part.copies, parents, strict=True):
            assert torch.equal(own.weight, parent.get_submodule(path).weight)
    stack = model.model.layers[1].mlp.experts.down_proj
    assert all(torch.equal(stack[i], parent.model.layers[1].mlp.down_proj.weight) for i, parent in enumerate(parents))
    mean = torch.stack([parent.lm_head.weight for parent in parents]).mean(0)
    assert_near(model.lm_head.weight, mean, 1e-6)
    keys = from_parents(parents).model.layers[0].self_attn.k_proj.weight
    mean = torch.stack([parent.model.layers[0].self_attn.k_proj.weight for parent in parents]).mean(0)
    assert_near(keys, mean, 1e-6)


@pytest.mark.parametrize("variant, heads", [("shared", 2), ("separate", 6)])
@torch.no_grad()
def test_the_cache_holds_the_keys_of_one_or_of_all(variant, heads):
    model = from_parents([llama(seed) for seed in range(3)], **VARIANTS[variant])
    exact = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(IDS, **exact)
    assert {layer.keys.shape[1] for layer in found.past_key_values.layers} == {heads}
    assert_near(torch.stack(found.logits, 1), model(input_ids=found.sequences).logits[:, 10:-1], 1e-5)


def repeats(period, generator, rows=16):
    """Return rows that repeat their first words, which attention alone can tell."""
    ids = torch.randint(4, 24, (rows, period), generator=generator).repeat(1, 4)[:, :12]
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(12) < period, -100)}


def train(model, steps, domains, seed=0):
    optimizer, generator = torch.optim.Adam(model.parameters(), lr=5e-3), torch.Generator().manual_seed(seed)
    for number in range(steps):
        optimizer.zero_grad()
        model.train()(**repeats(domains[number % len(domains)], generator)).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def parents():
    """Two copies of a seed, each trained on a domain; their blocks are parallel to begin with."""
    torch.manual_seed(0)
    seed = train(CohereForCausalLM(CohereConfig(**SIZES, **HEADS, logit_scale=1.0)), 100, [3, 5])
    return [train(copy.deepcopy(seed), 100, [period]) for period in (3, 5)]


@torch.no_grad()
def averaged(model):
    """Make all attentions of a model alike, their mean."""
    model = copy.deepcopy(model)
    for part in (part for part in model.modules() if isinstance(part, ExpertCopies)):
        mean = torch.stack([own.weight for own in part.copies]).mean(0)
        for own in part.copies:
            own.weight.copy_(mean)
    return model


@torch.no_grad()
def oracle_loss(model):
    """Return the loss where every row uses the experts of its own domain, the mean over both domains."""
    losses = []
    for other, period in ((1, 3), (0, 5)):
        sites = [0, 1, "0.attention", "1.attention"]
        overrides = RoutingOverrides(disabled_experts=dict.fromkeys(sites, [other]))
        rows = repeats(period, torch.Generator().manual_seed(5), 64)
        losses.append(model(**rows, routing_overrides=overrides).loss)
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_experts_keep_what_averages_lose(parents, variant):
    model = from_parents(parents, **AS_HOST, **VARIANTS[variant])
    kept, lost = oracle_loss(model), oracle_loss(averaged(model))
    assert kept < 0.3 * lost, (kept, lost)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_they_stay_ahead_with_routers_that_learn(parents, variant):
    model = from_parents(parents, **AS_HOST, **VARIANTS[variant])
    losses = []
    for start in (copy.deepcopy(model), averaged(model)):
        trained = train(start, 200, [3, 5])
        rows = [repeats(period, torch.Generator().manual_seed(5), 64) for period in (3, 5)]
        with torch.no_grad():
            losses.append(float(sum(trained(**part).loss for part in rows)))
    assert losses[0] < losses[1], losses


@pytest.mark.parametrize("given, message", [([llama()], "1 parents"), ([llama(), None], "another architecture")])
def test_parents_that_do_not_fit_are_refused(given, message):
    given = [LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 9}, **HEADS)) if p is None else p for p in given]
    with pytest.raises(ValueError, match=message):
        from_parents(given)
