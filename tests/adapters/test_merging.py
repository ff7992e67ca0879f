"""LoRA experts go into the base weights exactly where every token has the same gates, and nowhere else by accident."""

import pytest
import torch
from helpers.near import assert_near
from peft import get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_moe import MoeLoraConfig, Router, register_router
from hf_moe.adapters.layer import tuner_layers
from hf_moe.adapters.merging import merge_by_mean_routing, merge_for
from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.layer_spec import MoELayerSpec


TARGETS = ["q_proj", "v_proj", "down_proj"]


class FixedMixtureRouter(Router):
    """The same learned mixture for every token."""

    reads = frozenset()

    def __init__(self, spec: MoELayerSpec):
        super().__init__(spec)
        self.logits = nn.Parameter(torch.zeros(spec.num_experts))

    def forward(self, hidden_states, context):
        weight = self.logits.softmax(-1).expand(len(hidden_states), -1)
        index = torch.arange(self.spec.num_experts, device=weight.device).expand(len(hidden_states), -1)
        return ExpertAssignment(index, weight, self.spec.num_experts)


class ByWordRouter(Router):
    """Expert of a word, by its number."""

    reads = frozenset({"input_ids"})

    def forward(self, hidden_states, context):
        words = context.modality_ids if context.input_ids is None else context.input_ids
        index = words.reshape(-1, 1) % self.spec.num_experts
        return ExpertAssignment(index, torch.ones_like(index, dtype=torch.float32), self.spec.num_experts)


@pytest.fixture(autouse=True)
def own_routers():
    """Registered for each test alone: what a registry holds is bundled, and a test file cannot be."""
    register_router("test_fixed_mixture")(FixedMixtureRouter)
    register_router("test_by_word")(ByWordRouter)


def adapt(model, **fields):
    return get_peft_model(model, MoeLoraConfig(**{"target_modules": TARGETS, **fields})).eval()


def logits(model, inputs):
    with torch.no_grad():
        found = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return found[inputs["attention_mask"].bool()]


def weights(model):
    return [layer.get_base_layer().weight.clone() for layer in tuner_layers(model)]


CONSTANT = [
    {"router": "test_fixed_mixture"},
    {"router": "constant", "r": [2, 4, 4, 8]},
    {"router": "test_fixed_mixture", "shared_r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    {"router": "test_fixed_mixture", "router_input": "target"},
    {"num_experts": 1, "num_experts_per_tok": 1},
]


@pytest.mark.parametrize("fields", CONSTANT, ids=lambda fields: "-".join(map(str, fields.values())))
def test_a_constant_router_merges_exactly_and_comes_out_again(llama, text, randomise, fields):
    model = adapt(llama(), **fields)
    before = weights(model)
    base = logits(llama(), text)
    randomise(model)
    expected = logits(model, text)
    assert (expected - base).abs().max() > 0.1
    model.merge_adapter(safe_merge=True)
    assert_near(logits(model, text), expected, 1e-5)
    assert not any(torch.equal(*pair) for pair in zip(before, weights(model), strict=True))
    model.unmerge_adapter()
    assert_near(weights(model), before, 1e-6)
    assert_near(logits(model, text), expected, 1e-5)
    merged = model.merge_and_unload()
    assert type(merged) is type(llama()) and not list(tuner_layers(merged))
    assert_near(logits(merged, text), expected, 1e-5)


def test_a_merged_adapter_can_be_disabled_and_trains_no_objective(llama, text, randomise):
    base = logits(llama(), text)
    model = adapt(llama(), num_experts=1, num_experts_per_tok=1, objectives={"router_z": 0.1})
    randomise(model)
    plain = llama()(**text).loss
    model.merge_adapter()
    assert not torch.isclose(model(**text).loss, plain)
    with model.disable_adapter():
        assert_near(logits(model, text), base, 1e-5)


def test_two_adapters_merge_together(llama, text, randomise):
    model = adapt(llama(), router="test_fixed_mixture")
    other = MoeLoraConfig(target_modules=["v_proj", "up_proj"], num_experts=3, router="test_fixed_mixture")
    model.add_adapter("other", other)
    randomise(model)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model, text)
    model.merge_adapter()
    assert_near(logits(model, text), expected, 1e-5)
    model.unmerge_adapter()
    assert_near(logits(model, text), expected, 1e-5)


def test_the_named_adapters_are_checked_and_merged_whatever_is_active(llama, text, randomise):
    constant = MoeLoraConfig(target_modules=TARGETS, router="constant")
    override = {"router": "constant", "num_experts_per_tok": None}
    mixed = MoeLoraConfig(target_modules=TARGETS, router_input="target", target_overrides={"q_proj": override})
    model = adapt(llama())
    model.add_adapter("constant", constant)
    model.add_adapter("mixed", mixed)
    randomise(model)
    before = weights(model)
    model.set_adapter("constant")
    expected = logits(model, text)
    for names in (["mixed"], ["constant", "mixed"], None):
        model.set_adapter("default" if names is None else "constant")
        with pytest.raises(ValueError, match="cannot be merged"):
            model.merge_adapter(adapter_names=names)
        assert all(torch.equal(*pair) for pair in zip(before, weights(model), strict=True))
    model.merge_adapter(adapter_names=["constant"])
    assert_near(logits(model, text), expected, 1e-5)


def test_transposed_layers_merge_too(text, randomise):
    torch.manual_seed(0)
    host = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32))
    model = adapt(host, target_modules=["c_attn", "c_fc", "c_proj"], router="test_fixed_mixture")
    randomise(model)
    expected = logits(model, text)
    assert_near(logits(model.merge_and_unload(), text), expected, 1e-4)


REFUSED = [
    ({"router": "top_k"}, "TopKRouter decides by the hidden state"),
    ({"router": "top_k", "num_experts_per_tok": 4}, "TopKRouter decides by the hidden state"),
    ({"router": "switch_transformer", "num_experts_per_tok": 1}, "decides by the hidden state"),
    ({"router": "moiie"}, "decides by the hidden state"),
    ({"router": "modality", "num_experts": 2}, "by the modality of a token: say which one"),
    ({"router": "condition"}, "by the condition 'task' of a row: say which one"),
    ({"router": "sequence"}, "SequenceRouter decides by the hidden state"),
    ({"router": "test_by_word"}, "by the word or the position"),
]


@pytest.mark.parametrize("fields, message", REFUSED, ids=lambda item: item if isinstance(item, str) else "")
def test_a_router_that_varies_is_refused_with_the_reason_and_nothing_changes(llama, randomise, fields, message):
    model = adapt(llama(), **fields)
    randomise(model)
    before = weights(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=message) as caught:
            merge()
        assert "merge_by_mean_routing" in str(caught.value)
    torch.testing.assert_close(weights(model), before, atol=0, rtol=0)


def test_one_modality_is_merged_exactly_for_its_tokens(llama, text, randomise):
    model = adapt(llama(), router="modality", num_experts=2)
    randomise(model)
    expected = logits(model, text)  # all text
    merge_for(model, modality="text")
    assert_near(logits(model, text), expected, 1e-5)
    model.unmerge_adapter()
    merge_for(model, modality="image")
    assert (logits(model, text) - expected).abs().max() > 0.1
    with pytest.raises(ValueError, match="modality='picture'"):
        merge_for(model, modality="picture")
    with pytest.raises(ValueError, match="needs a modality or condition_ids"):
        merge_for(model)


def test_one_task_is_merged_exactly_for_its_rows(llama, text, randomise):
    model = adapt(llama(), router="condition", shared_r=2)
    randomise(model)
    inputs = {name: text[name] for name in ("input_ids", "attention_mask")}
    expected = {task: logits(model, {**inputs, "task_ids": torch.tensor([task, task])}) for task in (1, 2)}
    assert (expected[1] - expected[2]).abs().max() > 0.1
    for task, wanted in expected.items():
        merge_for(model, condition_ids={"task": task})
        assert_near(logits(model, inputs), wanted, 1e-5)
        model.unmerge_adapter()


def test_stacked_experts_of_a_host_merge_too(own_model, image_rows, randomise):
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = MoeLoraConfig(target_parameters=names, router="constant", num_experts=2, r=[2, 4])
    model = get_peft_model(own_model(), config).eval()
    inputs = {name: value for name, value in image_rows.items() if name != "labels"}
    base = logits(model, inputs)
    randomise(model)
    expected = logits(model, inputs)
    assert (expected - base).abs().max() > 0.1
    model.merge_adapter()
    assert_near(logits(model, inputs), expected, 1e-4)
    with model.disable_adapter():
        assert_near(logits(model, inputs), base, 1e-4)
    merged = model.merge_and_unload()
    assert type(merged.model.language_model.layers[1].mlp.experts).__name__ == "FfnExperts"
    assert_near(logits(merged, inputs), expected, 1e-4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"experts": "ia3"}, "are Ia3Experts"),
        ({"experts": "bottleneck", "target_modules": ["mlp"]}, "merge into the plain weight.*LlamaMLP"),
        ({"ffn_experts": True, "target_modules": ["gate_proj", "up_proj", "down_proj"]}, "are whole feed-forwards"),
    ],
)
def test_experts_that_are_no_change_of_a_weight_are_refused(llama, randomise, fields, message):
    model = adapt(llama(), router="constant", **fields)
    randomise(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=message):
            merge()


def test_a_modality_does_not_make_every_router_constant(llama, randomise):
    model = adapt(llama(), router="moiie")
    randomise(model)
    before = weights(model)
    with pytest.raises(ValueError, match="modality='text'.*by the hidden state"):
        merge_for(model, modality="text")
    torch.testing.assert_close(weights(model), before, atol=0, rtol=0)


def test_mean_routing_merges_what_the_tokens_used_on_average_and_measures_the_error(llama, text, randomise):
    inputs = {name: text[name] for name in ("input_ids", "attention_mask")}
    model = adapt(llama())
    randomise(model)
    base, expected = logits(llama(), text), logits(model, text)
    seen = []
    router = next(tuner_layers(model)).deciding_router("default")
    handle = router.register_forward_hook(lambda module, args, output: seen.append(output))
    logits(model, text)
    handle.remove()
    gates = torch.zeros(18, 4).scatter_add(1, seen[0].expert_index.clamp(max=3), seen[0].expert_weight)
    report = merge_by_mean_routing(model, [inputs])
    assert report.mean_gates["default"][0] == pytest.approx(
        gates[text["attention_mask"].flatten().bool()].mean(0).tolist(), abs=1e-6
    )
    merged = logits(model, text)
    assert report.tokens == 15
    assert report.max_logit_difference == pytest.approx((merged - expected).abs().max().item(), rel=1e-4)
    log_p, log_q = expected.log_softmax(-1), merged.log_softmax(-1)
    assert report.kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-3)
    log_q = base.log_softmax(-1)
    assert report.kl_without_adapter == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-3)
    assert 0 < report.kl and 0 <= report.same_prediction <= 1
    with pytest.raises(ValueError, match="merged already"):
        merge_by_mean_routing(model, [inputs])
    model.unmerge_adapter()
    assert_near(logits(model, text), expected, 1e-5)


def test_mean_routing_of_a_constant_router_is_exact_and_other_data_can_measure_it(llama, text, randomise):
    inputs = {name: text[name] for name in ("input_ids", "attention_mask")}
    model = adapt(llama(), router="test_fixed_mixture")
    randomise(model)
    other = {"input_ids": inputs["input_ids"].flip(1), "attention_mask": inputs["attention_mask"].flip(1)}
    report = merge_by_mean_routing(model, [inputs], measure_on=[other, {"input_ids": inputs["input_ids"][:1]}])
    assert report.tokens == 15 + 9 and report.same_prediction == 1.0
    assert report.kl == pytest.approx(0.0, abs=1e-6) and report.kl_without_adapter > 0.01
    with pytest.raises(ValueError, match="at least one batch"):
        merge_by_mean_routing(adapt(llama()), [])


def test_where_one_target_cannot_be_merged_none_is(llama, text, randomise):
    overrides = {"down_proj": {"experts": "ia3"}}
    model = adapt(llama(), target_overrides=overrides)
    randomise(model)
    before = weights(model)
    with pytest.raises(ValueError, match="are Ia3Experts"):
        merge_by_mean_routing(model, [{"input_ids": text["input_ids"]}])
    assert_near(weights(model), before, 1e-6)
    assert not any(layer.merged for layer in tuner_layers(model))


def test_a_classifier_is_measured_by_its_rows(vit, randomise):
    model = get_peft_model(vit(), MoeLoraConfig(target_modules="all-linear", router_input="target"))
    randomise(model)
    report = merge_by_mean_routing(model, [{"pixel_values": torch.randn(5, 3, 16, 16)}])
    assert report.tokens == 5 and report.kl > 0 and report.kl_without_adapter > 0


def test_a_merge_by_mean_routing_leaves_every_part_in_the_mode_it_was_in(llama, text, randomise):
    model = adapt(llama(), router_input="target").train()
    randomise(model)
    model.get_base_model().model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="saw no token"):
        merge_by_mean_routing(model, [{**text, "attention_mask": torch.zeros_like(text["attention_mask"])}])
    assert [module.training for module in model.modules()] == modes
    merge_by_mean_routing(model, [text])
    assert [module.training for module in model.modules()] == modes
