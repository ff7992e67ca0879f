"""A decoder's generation settings, as they come, never keep a model from being saved."""

from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from hf_moe.construction.generation import generation_settings, savable
from hf_moe.construction.tokenizer import train_word_tokenizer


def config_of(**settings) -> GenerationConfig:
    generation = GenerationConfig()
    for name, value in settings.items():
        setattr(generation, name, value)
    return generation


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"do_sample": False, "temperature": 0.6}, {"do_sample": False}),
        ({"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 5}, {"max_new_tokens": 5}),
        ({"top_k": 20, "typical_p": 0.5, "min_p": 0.1}, {}),
        ({"num_beams": 1, "early_stopping": True, "length_penalty": 0.5}, {"num_beams": 1}),
        ({"num_return_sequences": 3}, {}),
        ({"temperature": 0.6, "do_sample": True}, {"temperature": 0.6, "do_sample": True}),
        ({"length_penalty": 0.5, "num_beams": 4}, {"length_penalty": 0.5, "num_beams": 4}),
        ({"eos_token_id": [2, 7], "suppress_tokens": [5]}, {"eos_token_id": [2, 7], "suppress_tokens": [5]}),
    ],
)
def test_settings_without_effect_are_left_out_and_the_rest_kept(settings, kept, tmp_path, caplog):
    saved = savable(config_of(**settings))
    saved.save_pretrained(tmp_path)
    found = {name: getattr(saved, name) for name in settings if getattr(saved, name) is not None}
    assert found == kept
    assert bool(caplog.text) == (kept != settings)


def test_a_model_takes_over_settings_that_can_be_saved(tmp_path):
    dense = SimpleNamespace(generation_config=config_of(temperature=0.6, top_p=0.9, eos_token_id=7, max_new_tokens=5))
    settings = generation_settings(dense, train_word_tokenizer(["a b"]), image_token_id=9)
    settings.save_pretrained(tmp_path)
    assert settings.temperature in (None, 1.0) and settings.max_new_tokens == 5
    assert 7 in settings.eos_token_id and settings.suppress_tokens == [9]
