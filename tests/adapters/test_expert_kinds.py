"""Kinds of experts: what each computes, and that a fresh one changes nothing."""

import copy
from functools import partial

import pytest
import torch
from helpers.adapted import logits
from helpers.near import assert_near
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_moe import MoeLoraConfig
from hf_moe.adapters.layer import MoeLoraLayer, tuner_layers
from hf_moe.adapters.low_rank import SharedAssignment
from hf_moe.modeling.decisions import ExpertAssignment


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
}
MOE_HOSTS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    ),
}
STACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapt(model, **fields):
    return get_peft_model(model, MoeLoraConfig(**fields)).eval()


def moe_host(name):
    torch.manual_seed(0)
    return MOE_HOSTS[name]().eval()


KINDS = [
    {"r": [1, 8, 2, 3], "target_modules": ["q_proj", "gate_proj", "down_proj"]},
    {"r": [8] * 20 + [16] * 4, "num_experts": 24, "target_modules": ["q_proj", "gate_proj", "down_proj"]},
    {"r": 1, "num_experts": 16, "num_experts_per_tok": 4, "target_modules": ["q_proj", "down_proj"]},
    {"experts": "ia3", "target_modules": ["k_proj", "v_proj", "down_proj"]},
    {"experts": "bottleneck", "target_modules": ["q_proj", "down_proj"]},
    {"experts": {"name": "bottleneck", "position": "sequential"}, "target_modules": ["mlp"]},
    {"experts": {"name": "bottleneck", "gated": True, "activation": "silu"}, "target_modules": ["mlp", "self_attn"]},
    {"experts": "bottleneck", "num_experts": 24, "target_modules": ["mlp"]},
    {"experts": "lora", "target_modules": ["mlp"], "shared_r": 2},
    {"experts": "rank1_pairs", "r": 1, "num_experts": 9, "target_modules": ["q_proj", "down_proj"]},
    {"ffn_experts": True, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
]
GATED = {"name": "bottleneck", "gated": True, "activation": "silu"}
# Experts of unequal rank in every form in which they are computed.
UNEQUAL = {
    "dense": {"r": [2, 4, 4, 8], "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": [2, 4, 4, 8], "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "every expert": {"r": [1, 24, 40, 3], "num_experts_per_tok": None, "target_modules": ["q_proj"]},
    "sorted": {"r": [1, 2, 3, 5] + [8] * 20, "num_experts": 24, "target_modules": ["q_proj", "down_proj"]},
    "bottleneck": {"r": [1, 8, 2, 3], "experts": "bottleneck", "target_modules": ["mlp"]},
    "gated": {"r": [1, 8, 2, 3], "experts": GATED, "target_modules": ["mlp"]},
    "sorted, gated": {"r": [1, 80, 2, 3], "experts": GATED, "target_modules": ["mlp"]},
    "feed-forwards": {
        "r": [1, 8, 2, 3],
        "rank_pattern": {"up_proj": [4, 8, 2, 2]},
        "ffn_experts": True,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    },
    "stacked": {"r": [1, 2, 4], "num_experts": 3, "target_parameters": STACKED},
}


@pytest.mark.parametrize("fields", KINDS, ids=lambda fields: "-".join(map(str, fields.values()))[:40])
def test_fresh_experts_change_nothing_and_trained_ones_train_whole_also_under_checkpointing(
    llama, text, randomise, tmp_path, fields
):
    base = logits(llama(), text)
    model = adapt(llama(), **fields)
    assert_near(logits(model, text), base, 1e-6)
    randomise(model)
    assert (logits(model, text) - base).abs().max() > 0.05
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    twin.enable_input_require_grads()
    for item in (model, twin):
        item.train()(**text).loss.backward()
    recomputed = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("moe_lora_" in name)
        if parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0, name
            assert_near(recomputed[name].grad, parameter.grad, 1e-5)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert_near(logits(loaded, text), logits(model, text), 1e-6)
    host = model.unload()
    torch.testing.assert_close(logits(host, text), base, atol=0, rtol=0)
    assert [type(module) for module in host.modules()] == [type(module) for module in llama().modules()]


@pytest.mark.parametrize("fields", KINDS, ids=lambda fields: "-".join(map(str, fields.values()))[:40])
def test_bfloat16_autocast_trains_every_kind_close_to_float32(llama, text, randomise, fields):
    losses = []
    for enabled in (False, True):
        model = adapt(llama(), **fields).train()
        randomise(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = model(**text).loss
        loss.backward()
        losses.append(loss.detach())
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(losses[1], losses[0], atol=0.15, rtol=0.05)
    half = adapt(llama().to(torch.bfloat16), **fields)
    assert {p.dtype for name, p in half.named_parameters() if "moe_lora_" in name} == {torch.float32}
    assert logits(half, text).dtype == torch.bfloat16


@pytest.mark.parametrize("num_experts", [4, 24])
def test_experts_of_unequal_rank_are_exactly_their_own_loras(llama, randomise, num_experts):
    ranks = [1, 2, 3, 5] + [8] * (num_experts - 4)
    model = adapt(llama().double(), r=ranks, lora_alpha=6, num_experts=num_experts, target_modules=["up_proj"])
    randomise(model)
    layer = next(tuner_layers(model))
    lora_a, lora_b = layer.moe_lora_A["default"], layer.moe_lora_B["default"]
    assert lora_a.shape == (sum(ranks), 32) and lora_b.shape == (48, sum(ranks))
    x = torch.randn(7, 32, dtype=torch.double)
    index = torch.randint(0, num_experts, (7, 2))
    index[:4, 0] = torch.arange(4)
    weight = torch.rand(7, 2, dtype=torch.double)
    layer.decision = lambda *args: SharedAssignment(index, weight, num_experts)
    found = layer(x) - layer.base_layer(x)
    for token in range(7):
        expected = 0.0
        for expert, share in zip(index[token].tolist(), weight[token], strict=True):
            own = slice(sum(ranks[:expert]), sum(ranks[: expert + 1]))
            expected = expected + share * 6 / ranks[expert] * lora_b[:, own] @ lora_a[own] @ x[token]
        assert_near(found[token], expected, 1e-6)


@pytest.mark.parametrize("fields", UNEQUAL.values(), ids=UNEQUAL)
def test_unequal_ranks_compute_and_learn_what_padded_experts_would(llama, text, randomise, tmp_path, fields):
    host = partial(moe_host, "mixtral") if "target_parameters" in fields else llama
    model = adapt(host(), lora_alpha=6, **fields)
    randomise(model)
    twin = adapt(host(), **{**fields, "lora_alpha": 6, "r": max(fields["r"]), "rank_pattern": {}})
    unequal = 0
    for own, padded in zip(tuner_layers(model), tuner_layers(twin), strict=True):
        padded.moe_lora_router.load_state_dict(own.moe_lora_router.state_dict())
        target, power = own.experts["default"].target, 0.5 if fields.get("use_rslora") else 1.0
        stacks = [getattr(padded, f"moe_lora_{side}")["default"].detach().zero_().flatten(0, -3) for side in "AB"]
        for expert, (lora_a, lora_b) in enumerate(zip(*parts(own, target), strict=True)):
            rank = lora_b.shape[1]
            stacks[0][expert].unflatten(0, (-1, target.rank))[:, :rank] = lora_a.detach()
            stacks[1][expert][:, :rank] = lora_b.detach() * (target.rank / rank) ** power
            unequal += lora_a.numel() + lora_b.numel()
    assert_near(logits(model, text), logits(twin, text), 1e-5)
    for item in (model, twin):
        item.train()(**text).loss.backward()
    routers = [[p.grad for name, p in item.named_parameters() if "_router" in name] for item in (model, twin)]
    assert_near(*routers, 1e-4)
    for own, padded in zip(tuner_layers(model), tuner_layers(twin), strict=True):
        target = own.experts["default"].target
        found = target.split("A", own.moe_lora_A["default"].grad)
        for part, stack in zip(found, padded.moe_lora_A["default"].grad.flatten(0, -3), strict=True):
            wanted = stack.unflatten(0, (-1, target.rank))[:, : part.shape[-2]]
            assert_near(part, wanted.reshape(part.shape), 1e-4)
    # What trains, and what is saved, are these numbers alone.
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(count for name, count in trained.items() if "_router" not in name) == unequal
    assert model.get_nb_trainable_parameters()[0] == sum(trained.values())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == sum(trained.values())
    loaded = PeftModel.from_pretrained(host(), tmp_path).eval()
    assert_near(logits(loaded, text), logits(model.eval(), text), 1e-6)


def parts(layer, target):
    return [target.split(side, getattr(layer, f"moe_lora_{side}")["default"]) for side in "AB"]


def test_unequal_ranks_keep_their_scaling_on_a_base_of_low_precision(llama):
    model = adapt(llama().to(torch.bfloat16), r=[3, 7], lora_alpha=1, num_experts=2, target_modules=["q_proj"])
    layer = next(tuner_layers(model))
    with torch.no_grad():
        layer.moe_lora_B["default"].fill_(1.0)
    expected = torch.tensor([1 / 3] * 3 + [1 / 7] * 7).expand(32, -1)
    torch.testing.assert_close(layer.scaled_b("default"), expected, atol=0, rtol=1e-6)


def test_ranks_can_differ_by_expert_and_by_target(llama):
    model = adapt(
        llama(), r=[2, 4], num_experts=2, rank_pattern={"v_proj": [3, 3]}, target_modules=["q_proj", "v_proj"]
    )
    q_proj, v_proj = list(tuner_layers(model))[:2]
    assert [q_proj.moe_lora_A["default"].shape, v_proj.moe_lora_A["default"].shape] == [(6, 32), (2, 3, 32)]
    with pytest.raises(ValueError, match="the rank of each of num_experts=3"):
        MoeLoraConfig(r=[2, 4], num_experts=3, target_modules=["q_proj"])


def test_merged_vectors_equal_the_weighted_sum_of_separate_outputs(llama, text, randomise):
    model = adapt(llama(), experts="ia3", num_experts_per_tok=None, target_modules=["k_proj", "down_proj"])
    randomise(model)
    for layer in list(tuner_layers(model))[:2]:
        x = torch.randn(6, layer.in_features)
        share = torch.rand(6, 4).softmax(-1)
        index = torch.arange(4).expand(6, -1)
        layer.decision = lambda *args, s=share, i=index: SharedAssignment(i, s, 4)
        vectors = layer.moe_lora_vector["default"]
        scales_input = layer.in_features == 48
        outputs = [layer.base_layer(x * v) if scales_input else layer.base_layer(x) * v for v in vectors]
        expected = sum(share[:, [i]] * output for i, output in enumerate(outputs))
        assert_near(layer(x), expected, 1e-5)


def test_a_bottleneck_stands_beside_or_behind_a_module(llama, text, randomise):
    for position in ("parallel", "sequential"):
        experts = {"name": "bottleneck", "position": position, "activation": "relu"}
        model = adapt(llama(), experts=experts, num_experts=1, router="constant", target_modules=["mlp"], lora_alpha=4)
        randomise(model)
        layer = next(tuner_layers(model))
        x = torch.randn(1, 5, 32)
        base = layer.base_layer(x)
        read = x if position == "parallel" else base
        inner = F.relu(read @ layer.moe_lora_A["default"][0].T)
        expected = base + 0.5 * inner @ layer.moe_lora_B["default"][0].T
        layer.decision = lambda *args: SharedAssignment.of(
            ExpertAssignment(torch.zeros(5, 1).long(), torch.ones(5, 1), 1)
        )
        assert_near(layer(x), expected, 1e-5)


def test_pairs_of_rank_1_vectors_are_experts_of_their_own(llama, randomise):
    model = adapt(llama(), experts="rank1_pairs", r=1, lora_alpha=3, num_experts=9, target_modules=["up_proj"])
    randomise(model)
    layer = next(tuner_layers(model))
    assert layer.moe_lora_A["default"].shape == (3, 1, 32) and layer.moe_lora_B["default"].shape == (3, 48, 1)
    index, weight = torch.tensor([[5, 6], [0, 9]]), torch.tensor([[0.3, 0.7], [1.0, 0.0]])
    layer.decision = lambda *args: SharedAssignment(index, weight, 9)
    x = torch.randn(2, 32)
    down, up = layer.moe_lora_A["default"][:, 0], layer.moe_lora_B["default"][..., 0]
    first = 0.3 * up[1] * (down[2] @ x[0]) + 0.7 * up[2] * (down[0] @ x[0])
    expected = layer.base_layer(x) + 3.0 * torch.stack([first, up[0] * (down[0] @ x[1])])
    assert_near(layer(x), expected, 1e-5)
    with pytest.raises(ValueError, match="must be a square"):
        adapt(llama(), experts="rank1_pairs", r=1, num_experts=8, target_modules=["up_proj"])


@pytest.mark.parametrize("name", MOE_HOSTS)
def test_stacked_expert_weights_take_a_mixture_per_host_expert(name, text, randomise, tmp_path):
    base = logits(moe_host(name), text)
    model = adapt(moe_host(name), target_modules=["q_proj"], target_parameters=STACKED, num_experts=3, r=2)
    assert_near(logits(model, text), base, 1e-6)
    randomise(model)
    changed = logits(model, text)
    assert (changed - base).abs().max() > 0.05
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    twin.enable_input_require_grads()
    for item in (model, twin):
        item.train()(**text).loss.backward()
    recomputed = dict(twin.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("moe_lora_" in parameter_name), parameter_name
        if parameter.grad is not None:
            assert_near(recomputed[parameter_name].grad, parameter.grad, 1e-5)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(moe_host(name), tmp_path).eval()
    assert_near(logits(loaded, text), changed, 1e-6)
    model.add_adapter("second", MoeLoraConfig(target_parameters=STACKED[1:], num_experts=2))
    model.set_adapter("second")
    assert_near(logits(model, text), base, 1e-6)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert_near(logits(model, text), changed, 1e-6)
    host = model.unload()
    torch.testing.assert_close(logits(host, text), base, atol=0, rtol=0)


def test_a_stacked_weight_computes_what_a_loop_over_both_kinds_of_experts_does(randomise):
    model = adapt(moe_host("mixtral"), target_parameters=STACKED, num_experts=3, r=2, lora_alpha=4)
    randomise(model)
    outer = model.base_model.model.model.layers[0].mlp.experts
    host = outer.get_base_layer()
    gate_up, down = sorted(outer._wrappers(), key=lambda wrapper: wrapper.parameter_name, reverse=True)
    assert (gate_up.parameter_name, down.parameter_name) == ("gate_up_proj", "down_proj")
    x = torch.randn(5, 32)
    index, weight = torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    lora_index, lora_weight = torch.randint(0, 3, (5, 2)), torch.rand(5, 2)
    for wrapper in (gate_up, down):
        wrapper.decision = lambda *args: SharedAssignment(lora_index, lora_weight, 3)

    def delta(wrapper, token, expert):
        total = 0.0
        for chosen, share in zip(lora_index[token], lora_weight[token], strict=True):
            a, b = wrapper.moe_lora_A["default"][chosen, expert], wrapper.moe_lora_B["default"][chosen, expert]
            total = total + 2.0 * share * b @ a
        return total

    rows = []
    for token in range(5):
        row = 0.0
        for expert, share in zip(index[token], weight[token], strict=True):
            inner = (host.gate_up_proj[expert] + delta(gate_up, token, expert)) @ x[token]
            inner = F.silu(inner[:24]) * inner[24:]
            row = row + share * (host.down_proj[expert] + delta(down, token, expert)) @ inner
        rows.append(row)
    assert_near(outer(x, index, weight), torch.stack(rows), 1e-5)


def test_the_experts_of_our_own_models_are_targets(own_model, image_rows, randomise):
    base = logits(own_model(), image_rows)
    model = adapt(
        own_model(), target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], router="moiie", r=2
    )
    assert_near(logits(model, image_rows), base, 1e-6)
    randomise(model)
    model.train()(**image_rows).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "moe_lora_" in n)
    torch.testing.assert_close(logits(model.eval().unload(), image_rows), base, atol=0, rtol=0)


def test_targets_differ_in_what_target_overrides_says(llama, text, randomise):
    model = adapt(
        llama(),
        target_modules=["q_proj", "v_proj", "mlp"],
        target_overrides={
            "v_proj": {"num_experts": 1, "num_experts_per_tok": 1, "router": "constant", "r": 2},
            "mlp": {"experts": "bottleneck", "router_input": "target"},
        },
    )
    q_proj, v_proj, mlp = list(tuner_layers(model))[:3]
    assert [len(item.moe_lora_A["default"]) for item in (q_proj, v_proj, mlp)] == [4, 1, 4]
    assert [bool(item.moe_lora_router) for item in (q_proj, v_proj, mlp)] == [True, True, True]
    randomise(model)
    model.train()(**text).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "moe_lora_" in name)
    with pytest.raises(ValueError, match="num_experts"):
        MoeLoraConfig(target_modules=["q_proj"], target_overrides={"q_proj": {"num_expert": 2}})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"target_modules": ["mlp", "gate_proj"]}, "are both targets"),
        ({"target_modules": r"model\.norm"}, "is a LlamaRMSNorm"),
        ({"target_modules": ["gate_proj", "down_proj"], "ffn_experts": True}, "all of gate_proj, up_proj, down_proj"),
        (
            {"target_modules": ["gate_proj", "up_proj", "down_proj"], "ffn_experts": True, "router_input": "target"},
            "must share one router",
        ),
        ({"target_modules": ["q_proj"], "experts": "ia4"}, "'ia3'"),
        ({"target_modules": ["q_proj"], "experts": {"name": "ia3", "position": "parallel"}}, "Unknown option"),
        ({"target_modules": ["v_proj"], "experts": {"name": "value_gate", "head_dim": 5}}, "must divide"),
        ({"target_modules": ["mlp"], "router": "host"}, "was called with"),
    ],
)
def test_what_cannot_work_is_refused(llama, text, fields, message):
    with pytest.raises(ValueError, match=message):
        logits(adapt(llama(), **fields), text)


def test_a_linear_layer_is_no_stacked_weight(llama):
    with pytest.raises(ValueError, match="no stacked weight"):
        adapt(llama(), target_parameters=["q_proj.weight"])


def test_targets_are_found_in_the_order_of_the_model_also_around_each_other():
    stacked = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapt(moe_host("mixtral"), target_modules=r".*(layers\.\d+|q_proj)", target_parameters=stacked)
    expected = [module for module in model.modules() if isinstance(module, MoeLoraLayer)]
    assert list(tuner_layers(model)) == expected and len(expected) == 8
