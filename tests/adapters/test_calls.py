"""Adapted models called in other ways than as a whole, with labels and with gradients."""

import pytest
import torch
from helpers.adapted import with_cache
from helpers.near import assert_near
from peft import get_peft_model

from hf_moe import MoeLoraConfig
from hf_moe.adapters import routing_inputs
from hf_moe.adapters.layer import tuner_layers


def adapt(model, **fields):
    return get_peft_model(model, MoeLoraConfig(**{"target_modules": ["q_proj", "down_proj"], **fields}))


FIELDS = [
    {"router": "sequence"},
    {"router_input": "model"},
    {"router": "sequence", "router_input": "model"},
    {"router": "condition", "num_experts": 2},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_the_backbone_called_by_itself_routes_as_the_model_does(llama, text, randomise, fields):
    model = adapt(llama(), **fields).eval()
    randomise(model)
    base = model.get_base_model()
    text.pop("labels")
    real = text["attention_mask"].bool()
    with torch.no_grad(), routing_inputs(task=torch.tensor([1, 0])):
        whole = model(**text).logits
        found = base.lm_head(base.model(**text).last_hidden_state)
        assert_near(found[real], whole[real], 1e-6)
        first = base.model(**{name: value[:, :5] for name, value in text.items()}, use_cache=True)
        cache = with_cache(model, first)
        last = model(text["input_ids"][:, 5:], attention_mask=text["attention_mask"], **cache).logits
    assert_near(last, whole[:, 5:], 1e-5)


def test_statistics_count_a_call_of_the_model_or_of_its_backbone_once(llama, text):
    model = adapt(llama(), objectives={"load_balance": 0.1}).train()
    base = model.get_base_model()
    labels = text.pop("labels")
    counts = [count for name, count in model.named_buffers() if "accumulated_" in name]
    model(**text, labels=labels).loss.backward()
    assert all(count.sum() == 2 * text["attention_mask"].sum() for count in counts)
    base.model(**text).last_hidden_state.sum().backward()
    assert all(count.sum() == 4 * text["attention_mask"].sum() for count in counts)


def test_the_decoder_inside_of_a_multimodal_model_is_not_called_without_its_tokens(own_model, image_rows, randomise):
    fields = {"target_modules": r".*language_model.*q_proj"}
    ids = image_rows["input_ids"]
    for given in ({"router": "sequence"}, {"router_input": "model"}):
        model = adapt(own_model(), **fields, **given)
        with pytest.raises(RuntimeError, match="call the model or the backbone"):
            model.get_base_model().get_decoder()(input_ids=ids)


@pytest.mark.parametrize("router", ["top_k", "sequence"])
def test_reentrant_checkpointing_of_one_router_for_the_model_is_refused(llama, text, router):
    model = adapt(llama(), router=router, router_input="model").train()
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="that all layers share"):
        model(**text).loss.backward()


def test_one_adapter_per_row_is_refused(llama, text):
    model = adapt(llama())
    with pytest.raises(ValueError, match="take no adapter_names"):
        model(**text, adapter_names=["default", "__base__"])
    model(**text)
    assert not any(layer.merged for layer in tuner_layers(model))
