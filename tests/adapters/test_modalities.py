"""A router that reads the modality of the tokens knows it, or refuses the call: no image is taken for text."""

import pytest
import torch
import transformers as tf
from helpers.hosts.families import HOSTS, IMAGE, TEXT, VISION, words
from peft import get_peft_model

from hf_moe import MoeLoraConfig
from hf_moe.adapters.tokens import call_context
from hf_moe.modeling.inputs import ModalityUnknown, placeholder_ids


READERS = {
    "modality": {"router": "modality", "num_experts": 2, "num_experts_per_tok": 1},
    "sequence": {"router": {"name": "sequence", "modalities": ["text"]}},
    "ming_multi_router": {"router": "ming_multi_router"},
    "moiie": {"router": "moiie"},
}
SEEING = ("llava", "qwen2_vl", "gemma3", "idefics3")
TARGETS = r".*(language_model|text_model|model\.layers).*q_proj"


def adapted(name, fields, targets=TARGETS):
    torch.manual_seed(0)
    return get_peft_model(HOSTS[name].build().eval(), MoeLoraConfig(target_modules=targets, **fields))


def merged(model, inputs):
    """Return the inputs of a call whose images the caller has put among the embeddings."""
    embeds = model.get_base_model().get_input_embeddings()(inputs["input_ids"])
    return {"inputs_embeds": embeds.detach(), "attention_mask": inputs["attention_mask"]}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["llama", *SEEING])
def test_embeddings_alone_do_not_tell_the_modality(name, reader):
    model = adapted(name, READERS[reader])
    inputs = merged(model, HOSTS[name].inputs())
    with pytest.raises(ValueError, match="inputs_embeds do not tell .* pass mm_token_type_ids"):
        model(**inputs)
    model(**inputs, mm_token_type_ids=(HOSTS[name].inputs()["input_ids"] == IMAGE).long())


@pytest.mark.parametrize("name", ["llama", *SEEING])
def test_routers_of_hidden_states_take_embeddings(name):
    model = adapted(name, {"router": "top_k", "objectives": {"load_balance": 0.1}})
    assert model(**merged(model, HOSTS[name].inputs())).logits.isfinite().all()


def context(config, **inputs):
    """Return what a Llava with another config tells of its tokens."""
    model = HOSTS["llava"].build()
    model.config = config
    inputs.setdefault("input_ids", torch.tensor([[5, 60, 61, 62, 7]]))
    return call_context(model, inputs)


def seeing_config(**ids):
    config = tf.PreTrainedConfig()
    config.text_config, config.vision_config = tf.LlamaConfig(**TEXT), tf.CLIPVisionConfig(**VISION)
    for name, value in ids.items():
        *parts, name = name.split("__")
        place = config
        for part in parts:
            place = getattr(place, part)
        setattr(place, name, value)
    return config


NESTED = [
    {"image_token_id": 60, "audio_token_id": 61, "video_token_id": 62},
    {"vision_config__image_token_id": 60, "text_config__audio_token_id": 61, "vision_config__video_token_id": 62},
]


def test_placeholders_are_found_under_the_older_name():
    assert placeholder_ids(tf.Qwen2AudioConfig(audio_token_index=61)) == {3: {61}}


@pytest.mark.parametrize("ids", NESTED, ids=str)
def test_placeholders_are_found_in_the_configs_of_parts(ids):
    assert placeholder_ids(seeing_config(**ids)) == {1: {60}, 2: {62}, 3: {61}}
    assert context(seeing_config(**ids)).modality_ids.tolist() == [[0, 1, 3, 2, 0]]


def test_a_config_without_placeholders_does_not_tell():
    with pytest.raises(ModalityUnknown, match="names no image_token_id"):
        _ = context(seeing_config()).modality_ids


SAME = [{"image_token_id": 60, "video_token_id": 60}, {"image_token_id": 60, "vision_config__audio_token_id": 60}]


@pytest.mark.parametrize("ids", SAME, ids=str)
def test_one_placeholder_for_two_modalities_does_not_tell(ids):
    with pytest.raises(ValueError, match="one placeholder for several modalities"):
        _ = context(seeing_config(**ids)).modality_ids
    # Where the call has none of them, all of it is text.
    assert not context(seeing_config(**ids), input_ids=torch.tensor([[5, 6]])).modality_ids.any()


WRONG = {
    "columns": (torch.zeros(2, 4), r"must have the shape \(2, 9\)"),
    "rows": (torch.zeros(3, 9), r"must have the shape \(2, 9\)"),
    "one row": (torch.zeros(9), r"must have the shape \(2, 9\)"),
    "above": (torch.full((2, 9), 4), "got 4"),
    "below": (torch.full((2, 9), -1), "got -1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_modality_ids_of_other_tokens_are_refused(case):
    ids, message = WRONG[case]
    text = words()
    with pytest.raises(ValueError, match=message):
        call_context(HOSTS["llama"].build(), {**text, "mm_token_type_ids": ids.long()})
