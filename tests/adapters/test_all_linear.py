"""Targets outside of any layer, and targets that cannot be adapted."""

import pytest
import torch
from helpers.near import assert_near
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from hf_moe import MoeLoraConfig
from hf_moe.adapters.layer import tuner_layers


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=64, pad_token_id=0, num_labels=3)).eval()


def adapt(model, **fields):
    return get_peft_model(model, MoeLoraConfig(**{"target_modules": "all-linear", **fields})).eval()


@pytest.mark.parametrize("router_input", ["decoder_layer", "model"])
def test_a_linear_layer_outside_of_any_layer_has_a_router_of_its_own(text, randomise, router_input, tmp_path):
    text["labels"] = torch.tensor([0, 2])
    base = bert()
    plain = base(**text).logits
    model = adapt(base, router_input=router_input)
    assert_near(model(**text).logits, plain, 1e-6)
    randomise(model)
    outside = [layer for layer in tuner_layers(model) if layer.layer_name["default"] is None]
    assert {layer.key["default"] for layer in outside} == {"bert.pooler.dense", "classifier"}
    output = model.train()(**text)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert all(layer.moe_lora_router["default"].weight.grad.any() for layer in outside)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path)
    torch.testing.assert_close(loaded(**text).logits, model(**text).logits)


def test_all_targets_that_cannot_be_adapted_are_named_at_once_and_the_model_stays_as_it_was(own_model):
    base = own_model()
    names = [name for name, _ in base.named_modules()]
    types = [type(module) for module in base.modules()]
    hooks = len(base._forward_pre_hooks)
    with pytest.raises(ValueError) as caught:
        adapt(base, target_modules=["q_proj", "v_proj"], objectives={"load_balance": 0.1})
    found = str(caught.value)
    assert "cannot reach" in found and "exclude_modules" in found
    tower = {name for name in names if "vision" in name and name.endswith(("q_proj", "v_proj"))}
    assert (
        len(tower) == 4 and found.count("layers.*.self_attn.q_proj") == found.count("layers.*.self_attn.v_proj") == 1
    )
    assert [name for name, _ in base.named_modules()] == names and [type(module) for module in base.modules()] == types
    assert len(base._forward_pre_hooks) == hooks
    adapt(base, target_modules=["q_proj", "v_proj"], exclude_modules=r".*vision.*", objectives={"load_balance": 0.1})


def test_a_refused_second_adapter_leaves_the_first_one(own_model, image_rows, randomise):
    model = adapt(own_model(), target_modules=["q_proj"])
    randomise(model)
    before = model(**image_rows).logits
    wrong = MoeLoraConfig(target_modules=["v_proj", "q_proj"], router={"name": "modality"}, num_experts=2)
    with pytest.raises(ValueError, match="reads the modality"):
        model.add_adapter("second", wrong)
    torch.testing.assert_close(model(**image_rows).logits, before, atol=0, rtol=0)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"], "ffn_experts": True},  # known behind the last target
        {"target_modules": ["q_proj"], "target_parameters": ["q_proj.weight"]},
    ],
)
def test_what_is_refused_behind_the_first_target_leaves_the_model_as_it_was(llama, text, fields):
    base = llama()
    expected = base(**text).logits
    types = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match="ffn_experts=True|nn.Parameter"):
        adapt(base, **fields)
    assert [type(module) for module in base.modules()] == types and not base._forward_pre_hooks
    torch.testing.assert_close(base(**text).logits, expected, atol=0, rtol=0)
