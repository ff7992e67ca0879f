"""PEFT's own LoRA reaches every part of our models that was asked for, and says so before and after training."""

import pytest
import torch
from helpers.near import assert_near
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.training.plain_lora import check_lora_covers, check_lora_trained, get_lora_model, lora_targets


LAYER = "model.language_model.layers.1"


@pytest.fixture
def moe():
    def build(**moe_config):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = HfMoeConfig(
            text_config=LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, pad_token_id=0),
            vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
            moe_config={"layers": [1], "num_experts": 4, "num_shared_experts": 1, **moe_config},
            image_token_id=60,
            initializer_range=0.15,
        )
        return HfMoeForConditionalGeneration(config).eval()

    return build


def test_the_targets_of_every_part_are_those_of_the_model(moe):
    attention = [f"model.language_model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"]
    assert lora_targets(moe(), ["attention"]) == {"target_modules": attention, "target_parameters": []}
    shared = [f"{LAYER}.mlp.shared_expert.{p}_proj" for p in ("gate", "up", "down")]
    stacks = [f"{LAYER}.mlp.experts.{p}_proj" for p in ("gate_up", "down")]
    assert lora_targets(moe(), ["experts"]) == {"target_modules": shared, "target_parameters": stacks}
    assert lora_targets(moe(), ["router"])["target_parameters"] == [f"{LAYER}.mlp.gate.weight"]
    dense = [f"model.language_model.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert lora_targets(moe(), ["feed_forward"])["target_modules"] == dense
    assert all("connector" in name for name in lora_targets(moe(), ["connector"])["target_modules"])
    tower = lora_targets(moe(), ["vision_tower"])["target_modules"]
    assert len(tower) == 2 * 6 and all("vision_tower" in name for name in tower)


@pytest.mark.parametrize(
    "moe_config",
    [
        {},
        {"router": "moiie"},
        {"router": {"name": "anyexperts", "target_slots": 3}},
        {"expert_banks": {name: {"num_experts": 2, "intermediate_size": f} for name, f in (("a", 16), ("b", 24))}},
    ],
    ids=["top_k", "moiie", "anyexperts", "banks"],
)
def test_everything_that_was_asked_for_is_adapted_trained_and_merged(moe, image_rows, moe_config):
    base = moe(**moe_config)
    parts = ["attention", "feed_forward", "experts", "router", "connector"]
    untouched = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    with torch.no_grad():
        expected = base(**image_rows).logits
    model = get_lora_model(base, parts, r=4)
    with torch.no_grad():
        assert_near(model(**image_rows).logits, expected, 1e-5)
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    targets = lora_targets(moe(**moe_config), parts)
    assert len(adapted) == sum(len(names) for names in targets.values())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with pytest.raises(ValueError, match="Training has not changed the LoRA"):
        check_lora_trained(model)
    for _ in range(2):
        model.train()(**image_rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert check_lora_trained(model) == len(adapted)
    with torch.no_grad():
        trained = model.eval()(**image_rows).logits
    assert (trained - expected).abs().max() > 1e-3
    merged = model.merge_and_unload()
    with torch.no_grad():
        assert_near(merged(**image_rows).logits, trained, 1e-4)
    changed = {name for name, parameter in merged.named_parameters() if not torch.equal(parameter, untouched[name])}
    asked = {f"{name}.weight" for name in targets["target_modules"]} | set(targets["target_parameters"])
    assert changed == asked


def test_all_linear_would_have_missed_the_experts(moe):
    wanted = [f"{LAYER}.mlp.experts.gate_up_proj", f"{LAYER}.self_attn.q_proj.weight"]
    model = get_peft_model(moe(), LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="1 of 2 parameters got no LoRA, among them .*gate_up_proj"):
        check_lora_covers(model, wanted)
    assert check_lora_covers(model, wanted[1:]) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lora_dropout": 0.05}, "lora_dropout=0.05 does not work"),
        ({"use_dora": True}, "use_dora=True does not work"),
        ({"lora_bias": True}, "lora_bias=True does not work"),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, r"alora_invocation_tokens=\[1\] does not work"),
        ({"monteclora_config": {}}, "monteclora_config=.* does not work"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' starts from a linear layer"),
        ({"target_modules": ["q_proj"]}, r"\['target_modules'\] follow from parts"),
        ({"exclude_modules": ["q_proj"]}, r"\['exclude_modules'\] follow from parts"),
        ({"layers_to_transform": [0]}, r"\['layers_to_transform'\] follow from parts"),
    ],
)
def test_what_peft_cannot_do_on_stacked_parameters_is_refused_before_anything_is_wrapped(moe, options, message):
    model = moe()
    with pytest.raises(ValueError, match=message):
        get_lora_model(model, ["attention", "experts"], **options)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


def test_linear_layers_alone_take_dropout_and_dora(moe, image_rows):
    model = get_lora_model(moe(), ["attention", "connector"], lora_dropout=0.1, use_dora=True)
    model.train()(**image_rows).loss.backward()


@pytest.mark.parametrize(
    "parts, init",
    [(["attention", "experts"], False), (["attention", "experts"], "gaussian"), (["attention"], "pissa")],
)
def test_an_adapter_is_untrained_until_it_leaves_its_start(moe, image_rows, parts, init):
    model = get_lora_model(moe(), parts, r=2, init_lora_weights=init)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert all(bool(layer.lora_B["default"].weight.any()) == (init != "gaussian") for layer in layers)
    with pytest.raises(ValueError, match=f"has not changed the LoRA of {len(layers)} of {len(layers)} parameters"):
        check_lora_trained(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**image_rows).loss.backward()
    optimizer.step()
    assert check_lora_trained(model) == len(layers)


def test_training_from_an_unknown_start_cannot_be_checked(moe):
    model = get_peft_model(moe(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match="init_lora_weights=False starts with B other than zero"):
        check_lora_trained(model)


def test_single_experts_that_no_token_reached_are_named(moe):
    model = get_lora_model(moe(), ["experts"], r=2)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            torch.nn.init.normal_(module.lora_B["default"].weight)
    assert check_lora_trained(model) == 5
    wrapper = model.get_submodule(f"base_model.model.{LAYER}.mlp.experts")
    with torch.no_grad():
        wrapper.lora_B["default"].weight.view(-1, 2, 4)[:, :, 2] = 0.0
    assert not wrapper.get_delta_weight("default")[2].any() and wrapper.get_delta_weight("default")[1].any()
    with pytest.warns(UserWarning, match=rf"the LoRA of 1 experts.*{wrapper.parameter_name}\[2\]"):
        check_lora_trained(model)
    with pytest.raises(ValueError, match="no LoRA of the name 'other'"):
        check_lora_trained(model, "other")


def test_a_model_with_the_code_it_carries_is_known_too(moe, tmp_path):
    moe().save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    assert lora_targets(model, ["experts", "router"]) == lora_targets(moe(), ["experts", "router"])


def test_what_cannot_be_named_is_refused(moe, llama):
    with pytest.raises(ValueError, match="parts='heads'"):
        lora_targets(moe(), ["heads"])
    with pytest.raises(ValueError, match="no model of this library"):
        lora_targets(llama())
    with pytest.raises(ValueError, match="has no feed_forward"):
        lora_targets(moe(layers="all"), ["feed_forward"])
