"""The cache reaches the decoder, whatever the caller and the installed Transformers call it."""

import inspect
from dataclasses import fields

import pytest
import torch
from helpers.caches import cache_of
from helpers.near import assert_near
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, modeling_outputs

from hf_moe.modeling.outputs import ComposedCausalLMOutput, ComposedModelOutput


HOSTS = {"llama": {}, "gpt2": {}, "gemma3_text": {"head_dim": 8}, "mixtral": {"num_local_experts": 4}}
WAYS = ["past_key_values", "cache", "any_name", "by position"]


def decode(model, batch, way):
    """Return the last token's output, decoded from a cache of the tokens before it that is given in this `way`."""
    prefix = {"input_ids": batch["input_ids"][:, :-1], "attention_mask": batch["attention_mask"][:, :-1]}
    cache = cache_of(model(**prefix, use_cache=True))
    last, mask = batch["input_ids"][:, -1:], batch["attention_mask"]
    if way == "by position":
        return model(last, mask, None, cache)
    return model(last, mask, **{way: cache})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("headless", [False, True], ids=["with head", "headless"])
def test_a_cache_is_used_however_it_is_given(tiny_model, make_batch, host, way, headless):
    model, batch = tiny_model(host, HOSTS[host], tower=False), make_batch([(0, 9, 0), (0, 5, 1)])
    model = model.model if headless else model
    with torch.no_grad():
        expected, output = model(**batch)[0][:, -1:], decode(model, batch, way)
    assert_near(output[0], expected, 1e-5)
    assert cache_of(output).get_seq_length() == batch["input_ids"].shape[1]


@pytest.mark.parametrize("names", [("past_key_values", "cache"), ("cache", "other")], ids=str)
def test_two_caches_are_refused(tiny_model, text_batch, names):
    caches = {name: DynamicCache() for name in names}
    with pytest.raises(ValueError, match=f"2 caches were given \\({names[0]}, {names[1]}\\)"):
        tiny_model()(**text_batch, **caches)


def test_no_other_argument_is_taken_by_position(tiny_model, text_batch):
    model, embeddings = tiny_model(), torch.zeros(2, 13, 32)
    with pytest.raises(TypeError, match=r"only the cache may be given by position, and got \['NoneType', 'Tensor'\]"):
        model(None, None, None, None, embeddings)


@pytest.mark.parametrize("way", ["past_key_values", "cache"])
def test_towers_are_not_touched_while_decoding(tiny_model, text_batch, way):
    model, calls = tiny_model().train(), []
    del text_batch["labels"]
    model.model.connector.register_forward_hook(lambda *_: calls.append(1))
    model(**text_batch, use_cache=True)
    assert len(calls) == 1
    model(**text_batch, **{way: DynamicCache()})
    assert len(calls) == 1


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (ComposedModelOutput, modeling_outputs.MoeModelOutputWithPast),
        (ComposedCausalLMOutput, modeling_outputs.MoeCausalLMOutputWithPast),
    ],
)
def test_outputs_hold_the_fields_of_transformers(ours, theirs):
    assert [field.name for field in fields(ours)][: len(fields(theirs))] == [field.name for field in fields(theirs)]


def test_predictions_leave_out_every_field_but_logits(tiny_config):
    names = {field.name for field in fields(ComposedCausalLMOutput)}
    assert names - set(tiny_config().keys_to_ignore_at_inference) == {"loss", "logits"}


@pytest.mark.parametrize("headless", [False, True], ids=["with head", "headless"])
def test_outputs_hold_the_images_as_transformers_has_it(tiny_model, batch, headless):
    model = tiny_model()
    model = model.model if headless else model
    output = model(**batch, return_dict=True)
    images = model.get_image_features(batch["pixel_values"], return_dict=True)
    assert all(map(torch.equal, output.image_hidden_states, images.pooler_output))
    if hasattr(modeling_outputs, "MultimodalMoeCausalLMOutputWithPast"):
        assert torch.equal(output.image_outputs.last_hidden_state, images.last_hidden_state)
        assert all(map(torch.equal, output.image_outputs.pooler_output, images.pooler_output))
    assert len(model(**batch, return_dict=False)) == len(output)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_what_the_decoder_returns_is_returned(tiny_model, make_batch, auto):
    model, batch = tiny_model(tower=False), make_batch([(0, 9, 0)])
    options = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}
    model.set_attn_implementation("eager")
    decoder = auto.from_config(model.config.text_config, attn_implementation="eager").eval()
    returned = (model.model if auto is AutoModel else model)(**batch, **options)
    expected = decoder(**batch, output_hidden_states=True, output_attentions=True, use_cache=True)
    assert set(expected.keys()) <= set(returned.keys())
    assert len(returned.hidden_states) == len(expected.hidden_states)


def test_devices_are_placed_as_for_the_decoder(tiny_model):
    model = tiny_model()
    decoder = model.model.language_model
    assert set(decoder._skip_keys_device_placement) <= set(model._skip_keys_device_placement)
    assert set(model._skip_keys_device_placement) & set(inspect.signature(type(decoder).forward).parameters)
