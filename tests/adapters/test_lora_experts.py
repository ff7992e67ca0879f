"""LoRA experts on hosts of every kind: what they compute, and that nothing of them stays behind."""

import copy
import pickle

import pytest
import torch
from helpers.adapted import logits
from helpers.near import assert_near
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from hf_moe import MoeLoraConfig
from hf_moe.adapters import low_rank
from hf_moe.adapters.contexts import active_call
from hf_moe.adapters.layer import tuner_layers
from hf_moe.modeling.dispatch import Dispatch
from hf_moe.modeling.routing_context import CALL_CONTEXT


TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]


def adapt(model, adapter="default", **fields):
    fields.setdefault("target_modules", TARGETS)
    return get_peft_model(model, MoeLoraConfig(**fields), adapter_name=adapter).eval()


ROUTERS = [
    {"router": "top_k"},
    {"router": "top_k", "num_experts_per_tok": 4},
    {"router": "switch_transformer", "num_experts_per_tok": 1},
    {"router": "adamoe", "num_experts_per_tok": 3},
    {"router": "moiie"},
    {"num_experts": 24, "r": 8},
    {"shared_r": 4, "lora_dropout": 0.1},
]


@pytest.mark.parametrize("router_input", ["decoder_layer", "target"])
@pytest.mark.parametrize("fields", ROUTERS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_trains_all_it_holds(
    llama, text, randomise, fields, router_input
):
    base = logits(llama(), text)
    model = adapt(llama(), router_input=router_input, **fields)
    assert_near(logits(model, text), base, 1e-6)
    randomise(model)
    assert (logits(model, text) - base).abs().max() > 0.1
    model.train()(**text).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "moe_lora_" in name}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == (name in trained), name


def test_the_output_is_that_of_a_loop_over_tokens_and_experts(llama, text, randomise):
    model = adapt(llama(), target_modules=["up_proj"], r=3, lora_alpha=6)
    randomise(model)
    layer = next(tuner_layers(model))
    seen = {}

    def record(module, args, output):
        seen.update(x=args[0].detach(), output=output.detach(), hidden=active_call().hidden_states.detach())

    layer.register_forward_hook(record)
    logits(model, text)
    x, output, hidden = seen["x"], seen["output"], seen["hidden"]
    lora_a, lora_b = layer.moe_lora_A["default"], layer.moe_lora_B["default"]
    for row, position in ((0, 0), (0, 8), (1, 5)):
        probs = (layer.moe_lora_router["default"].weight @ hidden[row, position]).softmax(-1)
        weight, chosen = probs.topk(2)
        expected = layer.base_layer(x[row, position])
        for expert, share in zip(chosen, weight / weight.sum(), strict=True):
            expected = expected + 2.0 * share * lora_b[expert] @ lora_a[expert] @ x[row, position]
        assert_near(output[row, position], expected, 1e-5)
    padded = layer.base_layer(x[1, 0])
    assert_near(output[1, 0], padded, 1e-6)


def test_one_router_a_decoder_layer_is_shared_by_its_targets_and_runs_once(llama, text):
    model = adapt(llama())
    routers = [layer.moe_lora_router["default"] for layer in tuner_layers(model) if layer.moe_lora_router]
    assert len(routers) == 2 and [router.spec.layer_idx for router in routers] == [0, 1]
    calls = []
    for router in routers:
        router.register_forward_hook(lambda module, args, output: calls.append(module))
    logits(model, text)
    assert calls == routers
    own = adapt(llama(), router_input="target")
    widths = [layer.moe_lora_router["default"].spec.hidden_size for layer in tuner_layers(own)]
    assert widths == [32, 32, 32, 48] * 2


def test_other_ranks_alphas_and_the_rank_stabilised_scaling(llama):
    model = adapt(
        llama(), r=4, lora_alpha=8, use_rslora=True, rank_pattern={"down_proj": 16}, alpha_pattern={"q_proj": 2}
    )
    scaling = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "moe_lora_A"):
            scaling[name.rsplit(".", 1)[1]] = (layer.moe_lora_A["default"].shape[1], layer.scaling["default"])
    assert scaling == {"q_proj": (4, 1.0), "v_proj": (4, 4.0), "gate_proj": (4, 4.0), "down_proj": (16, 2.0)}


def test_a_plain_lora_beside_the_experts_is_pefts_lora(llama, text):
    options = {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 6}
    model = adapt(llama(), shared_r=3, **options)
    plain = get_peft_model(llama(), LoraConfig(r=3, **options)).eval()
    theirs = {name: layer for name, layer in plain.named_modules() if isinstance(layer, LoraLayer)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, layer in theirs.items():
            own = model.get_submodule(name)
            for side in "AB":
                weight = getattr(layer, f"lora_{side}")["default"].weight
                weight.normal_(std=0.3, generator=generator)
                getattr(own, f"moe_lora_shared_{side}")["default"].copy_(weight)
    assert_near(logits(model, text), logits(plain, text), 1e-5)


def test_padding_and_other_rows_do_not_reach_a_token(llama, text, randomise):
    model = adapt(llama())
    randomise(model)
    together = logits(model, text)
    alone = logits(model, {"input_ids": text["input_ids"][1:, 3:]})
    assert_near(together[1:, 3:], alone, 1e-5)


def test_generation_with_a_cache_equals_generation_without(llama, text, randomise):
    model = adapt(llama())
    randomise(model)
    inputs = {name: text[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(**inputs, use_cache=True, **options)
    assert torch.equal(cached, model.generate(**inputs, use_cache=False, **options))


def test_modality_reaches_the_routers_of_our_own_models(own_model, image_rows, randomise):
    base = logits(own_model(), image_rows)
    targets = r".*language_model.*(q_proj|down_proj)"  # the MoE layer has no linear layer
    model = adapt(own_model(), target_modules=targets, router="moiie")
    assert_near(logits(model, image_rows), base, 1e-6)
    randomise(model)
    chosen = []
    layer = next(tuner_layers(model))
    layer.moe_lora_router["default"].register_forward_hook(lambda m, a, output: chosen.append(output.expert_index))
    logits(model, image_rows)
    image = (image_rows["input_ids"] == 60).flatten()
    assert (chosen[0][image] < 3).all() and (chosen[0][~image] >= 1).all()
    restored = model.unload()
    assert_near(logits(restored, image_rows), base, 1e-6)


def test_a_vision_transformer_takes_routers_that_read_hidden_states_alone(vit, randomise):
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
    base = logits(vit(), pixels)
    for router_input in ("target", "decoder_layer"):
        model = adapt(vit(), target_modules="all-linear", router_input=router_input, modules_to_save=["classifier"])
        assert_near(logits(model, pixels), base, 1e-6)
        randomise(model)
        model(**pixels, labels=torch.tensor([0, 2])).loss.backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "moe_lora_" in name)
    with pytest.raises(ValueError, match="reads the modality"):
        adapt(vit(), target_modules="all-linear", router="moiie", router_input="target")


def test_the_context_reaches_the_layers_of_a_decoder_that_drops_keyword_arguments(text, randomise):
    fields = {"target_modules": "all-linear", "router": "moiie", "objectives": {"router_z": 0.1}}
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        host = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)).eval()
        base = logits(host, text)
        model = adapt(host, **fields)
        assert_near(logits(model, text), base, 1e-6)
        randomise(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()(**text).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert_near(found[1][name], gradient, 1e-5)


def test_a_failed_call_leaves_no_context_behind(text):
    host = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)).eval()
    model = adapt(host, target_modules="all-linear", router="condition")
    with pytest.raises(ValueError, match="reads the condition .task."):
        model(**text)
    assert CALL_CONTEXT.get() is None
    assert model(**text, task_ids=torch.tensor([0, 1])).loss.isfinite() and CALL_CONTEXT.get() is None


def test_a_vision_language_model_of_transformers_tells_its_routers_the_modality(image_rows, randomise):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    sizes = {"hidden_size": 32, "intermediate_size": 48}
    text_config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    vision_config = {"depth": 2, "num_heads": 4, "patch_size": 4, "out_hidden_size": 32, "num_position_embeddings": 16}
    config = Qwen3VLConfig(
        text_config={**sizes, **text_config, "head_dim": 8, "rope_parameters": rope},
        vision_config={**sizes, **vision_config, "deepstack_visual_indexes": [0]},
        image_token_id=60,
    )
    host = Qwen3VLForConditionalGeneration(config).eval()
    image = image_rows["input_ids"] == 60
    inputs = {
        "input_ids": image_rows["input_ids"],
        "mm_token_type_ids": image.int(),
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }
    base = logits(host, inputs)
    model = adapt(host, target_modules=r".*language_model.*(q_proj|down_proj)", router="moiie")
    assert_near(logits(model, inputs), base, 1e-6)
    randomise(model)
    chosen = []
    router = next(tuner_layers(model)).moe_lora_router["default"]
    router.register_forward_hook(lambda module, args, output: chosen.append(output.expert_index))
    logits(model, inputs)
    assert (chosen[0][image.flatten()] < 3).all() and (chosen[0][~image.flatten()] >= 1).all()
    tower = adapt(model.unload(), target_modules=r".*visual.*(qkv|linear_fc1)", router_input="target")
    assert_near(logits(tower, inputs), base, 1e-6)


def test_transposed_linear_layers_are_targets_too(text, randomise):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
    host = GPT2LMHeadModel(config).eval()
    base = logits(host, text)
    model = adapt(host, target_modules=["c_attn", "c_fc", "c_proj"])
    assert_near(logits(model, text), base, 1e-6)
    randomise(model)
    assert (logits(model, text) - base).abs().max() > 0.01


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"target_modules": ["embed_tokens"]}, "is a Embedding"),
    ],
)
def test_targets_that_cannot_work_are_refused(llama, fields, message):
    with pytest.raises(ValueError, match=message):
        adapt(llama(), **fields)


def test_two_adapters_with_other_targets_and_numbers_of_experts_live_side_by_side(llama, text, randomise):
    base = logits(llama(), text)
    model = adapt(llama(), adapter="first", target_modules=["q_proj", "down_proj"])
    model.add_adapter("second", MoeLoraConfig(num_experts=24, target_modules=["v_proj", "down_proj"], router="adamoe"))
    randomise(model)
    first = logits(model, text)
    model.set_adapter("second")
    second = logits(model, text)
    assert (first - second).abs().max() > 0.1
    with model.disable_adapter():
        assert_near(logits(model, text), base, 1e-6)
    model.base_model.set_adapter(["first", "second"])
    assert (logits(model, text) - first).abs().max() > 0.1
    model.set_adapter("first")
    torch.testing.assert_close(logits(model, text), first)
    model.delete_adapter("first")
    model.set_adapter("second")
    torch.testing.assert_close(logits(model, text), second)


def test_nothing_stays_behind(llama, own_model, text):
    for build in (llama, own_model):
        untouched = build()
        classes = [type(module) for module in untouched.modules()]
        for leave in ("unload", "delete_adapter"):
            model = adapt(build(), target_modules=["q_proj", "v_proj"])
            assert [type(module) for module in model.base_model.model.modules()] != classes
            if leave == "delete_adapter":
                model.delete_adapter("default")
            host = model.unload()
            assert [type(module) for module in host.modules()] == classes
            for hooks in ("_forward_pre_hooks", "_forward_hooks"):
                assert list(getattr(host, hooks).values()) == list(getattr(untouched, hooks).values())
            torch.testing.assert_close(logits(host, text), logits(untouched, text), atol=0, rtol=0)


def test_experts_behind_a_layer_leave_it_in_its_place(llama, text, randomise):
    fields = {"target_modules": r".*layers\.\d+", "experts": "bottleneck", "router_input": "target"}
    plain = llama()
    model = adapt(llama(), **fields)
    layers = model.base_model.model.model.layers
    assert [type(layer).__name__ for layer in layers] == ["LlamaDecoderLayer"] * 2
    randomise(model)
    seen = []
    first = layers[0].output_experts
    first.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    expected = logits(model, text)
    kind, (block, output) = first.experts["default"], seen[0]
    assert_near(block, first_output(plain, text), 1e-5)
    probs = (block @ first.moe_lora_router["default"].weight.T).softmax(-1)
    weight, chosen = probs.topk(2)
    pairs = zip(first.moe_lora_A["default"], first.scaled_b("default"), strict=True)
    by_expert = torch.stack([kind.act_fn(block @ a.T) @ b.T for a, b in pairs], -2)
    picked = by_expert.gather(-2, chosen[..., None].expand(*chosen.shape, 32))
    mixed = block + ((weight / weight.sum(-1, keepdim=True))[..., None] * picked).sum(-2)
    real = text["attention_mask"].bool()
    assert_near(output[real], mixed[real], 1e-5)

    model.add_adapter("second", MoeLoraConfig(target_modules=["q_proj", "layers.1"], router="condition"))
    for name, parameter in model.named_parameters():
        if name.endswith("moe_lora_B.second"):
            parameter.data.normal_()
    model.set_adapter("second")
    assert not torch.equal(logits(model, text, task_ids=torch.tensor([0, 1])), expected)
    model.delete_adapter("second")
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, text), expected)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(logits(twin, text), logits(model, text))
    host = model.unload()
    assert [name for name, _ in host.named_modules()] == [name for name, _ in plain.named_modules()]
    torch.testing.assert_close(logits(host, text), logits(plain, text), atol=0, rtol=0)


@pytest.mark.parametrize("build", ["llama", "own_model"])
def test_experts_behind_layers_come_back_in_a_recomputation(build, request, text, randomise):
    found = []
    for checkpointing in (False, True):
        model = request.getfixturevalue(build)()
        options = {"router_input": "target", "objectives": {"condition_information": {"coef": 1.0}}}
        router = {"name": "becotta", "num_domains": 2}
        model = adapt(model, target_modules=r"model\.(language_model\.)?layers\.\d+", router=router, **options)
        randomise(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        model.train()(**text, domain_ids=torch.tensor([0, 1])).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert any("output_experts" in name for name in found[0])
    for name, gradient in found[0].items():
        assert_near(found[1][name], gradient, 1e-5)


def first_output(model, inputs):
    """Return what the first layer of a model returns."""
    outputs = []
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    logits(model, inputs)
    handle.remove()
    return outputs[0]


def test_deleting_the_last_adapter_gives_the_layers_their_class_back(llama):
    model = adapt(llama())
    layer = model.base_model.model.model.layers[0]
    adapted = type(layer)
    assert adapted.__name__ == "LlamaDecoderLayer"
    model.delete_adapter("default")
    assert type(layer) is adapted.__mro__[1]
    assert not model.base_model.model._forward_pre_hooks


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_independent_and_routes_with_its_own_router(llama, own_model, text, randomise, duplicate):
    for build in (llama, own_model):
        model = adapt(build(), target_modules=["q_proj", "v_proj"])
        randomise(model)
        expected = logits(model, text)
        twin = duplicate(model)
        randomise(model, seed=1)
        torch.testing.assert_close(logits(twin, text), expected)
        assert (logits(model, text) - expected).abs().max() > 0.01


def test_every_target_of_a_layer_uses_one_sort(llama, text, monkeypatch):
    made = []
    monkeypatch.setattr(low_rank, "Dispatch", lambda *args: made.append(args) or Dispatch(*args))
    logits(adapt(llama(), num_experts=24), text)
    assert len(made) == 2
