"""Models built from local checkpoints: their weights, outputs, processor and generation."""

import pytest
import torch
from helpers.near import assert_near
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM

from hf_moe import HfMoeForConditionalGeneration
from hf_moe.construction.build import build_model
from hf_moe.construction.tokenizer import train_word_tokenizer


QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is there a circle ?"}]}
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}


def build(*args, **kwargs):
    checks = []
    model, processor = build_model(*args, **kwargs, on_check=checks.append)
    return model, processor, checks[0] if checks else None


def inputs_of(processor):
    text = processor.apply_chat_template([QUESTION], add_generation_prompt=True)
    return processor(text=[text], images=[[Image.new("RGB", (30, 20), "red")]], return_tensors="pt")


def test_upcycled_model_keeps_the_logits_and_the_tower(decoder_folder, tower_folder):
    model, processor, check = build(decoder_folder, tower_folder, "moiie")
    assert check.exact and check.logit_difference < 1e-4
    dense = AutoModelForCausalLM.from_pretrained(decoder_folder).eval()
    ids = torch.arange(3, dense.config.vocab_size)[None]
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, dense(input_ids=ids).logits
    assert theirs.std() > 0.1
    assert_near(ours[..., : theirs.shape[-1]], theirs, 1e-5)
    for name, tensor in AutoModel.from_pretrained(tower_folder).state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], tensor)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_parts_read_the_config_of_the_whole(decoder_folder, tower_folder):
    model, _, _ = build(decoder_folder, tower_folder, "moiie")
    assert model.model.language_model.config is model.config.text_config
    assert model.model.language_model.layers[0].self_attn.config is model.config.text_config
    assert model.model.vision_tower.config is model.config.vision_config


def test_placeholder_is_new_to_the_decoder_and_never_generated(decoder_folder, tower_folder):
    model, processor, _ = build(decoder_folder, tower_folder, "moiie")
    embedding = model.get_input_embeddings().weight
    placeholder = processor.image_token_id
    assert placeholder == model.config.image_token_id == len(processor.tokenizer) - 1 == embedding.shape[0] - 1
    torch.testing.assert_close(embedding[placeholder], embedding[:placeholder].mean(0))
    assert model.lm_head.weight is embedding
    with torch.no_grad():
        # Every prediction is the placeholder, unless it is suppressed.
        embedding[placeholder] *= 1e4
    inputs = inputs_of(processor)
    assert int((inputs["input_ids"] == placeholder).sum()) == model.config.image_seq_length == 4
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert placeholder not in answer
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    assert processor.tokenizer.eos_token_id in model.generation_config.eos_token_id


def test_routers_that_do_not_sum_to_one_are_not_exact_by_design(decoder_folder):
    _, _, check = build(decoder_folder, None, "switch_transformer")
    assert not check.exact and check.logit_difference > 1e-3


def test_noise_sets_the_copies_apart(decoder_folder):
    model, _, check = build(decoder_folder, None, "top_k", noise_std=0.1)
    experts = next(iter(model.moe_layers().values())).experts.down_proj
    assert not check.exact and not torch.equal(experts[0], experts[1])
    torch.testing.assert_close(
        (experts[0] - experts[1]).std() / experts.std(), torch.tensor(0.1 * 2**0.5), atol=0.03, rtol=0
    )


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
def test_moe_decoders_are_adopted_with_their_routers(save_decoder, tmp_path, model_type):
    sizes = {"num_local_experts": 4} if model_type == "mixtral" else {"num_experts": 4}
    folder = save_decoder(model_type, num_experts_per_tok=2, moe_intermediate_size=16, num_key_value_heads=2, **sizes)
    model, _, check = build(folder, None)
    assert check.exact and check.logit_difference < 1e-5
    assert model.config.moe_config.router["name"] == "top_k"
    model.save_pretrained(tmp_path)
    again = HfMoeForConditionalGeneration.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_system_brings_its_own_router_to_a_moe_decoder(save_decoder, tower_folder):
    folder = save_decoder("mixtral", num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2)
    model, _, check = build(folder, tower_folder, "moiie")
    theirs = AutoModelForCausalLM.from_pretrained(folder).model.layers[1].mlp.experts
    assert model.config.moe_config.router["name"] == "moiie" and not check.exact
    assert torch.equal(model.moe_layers()[1].experts.down_proj, theirs.down_proj)
    assert len(model.moe_layers()) == 4


def test_fresh_decoder_takes_its_vocabulary_from_the_tokenizer(tower_folder):
    tokenizer = train_word_tokenizer(["is there a circle ? yes"])
    model, processor, check = build({**LLAMA, **HEADS}, tower_folder, "moiie", tokenizer=tokenizer, seed=3)
    assert check is None and model.config.text_config.vocab_size == len(tokenizer)
    experts = model.moe_layers()[1].experts.down_proj
    assert not torch.equal(experts[0], experts[1])
    assert inputs_of(processor)["input_ids"].shape == (1, 12)
    again, _ = build_model({**LLAMA, **HEADS}, tower_folder, "moiie", tokenizer=tokenizer, seed=3)
    for (name, tensor), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_fresh_decoder_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="train_word_tokenizer"):
        build_model({**LLAMA, **HEADS}, None, "top_k")


def test_image_size_that_the_tower_does_not_take_is_refused(decoder_folder, tower_folder):
    with pytest.raises(ValueError, match="images of 16 pixels, not 32"):
        build_model(decoder_folder, tower_folder, "moiie", image_size=32)


def test_low_precision_keeps_float32_routers(decoder_folder, tower_folder):
    model, _, check = build(decoder_folder, tower_folder, "moiie", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".gate." in name else torch.bfloat16), name
    assert check.logit_difference < 0.5


def test_built_model_trains(decoder_folder, tower_folder):
    model, processor, _ = build(decoder_folder, tower_folder, "moiie")
    inputs = inputs_of(processor)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_a_decoder_without_a_tower_becomes_a_moe_in_place(decoder_folder):
    model, _, check = build(decoder_folder, None, "top_k")
    assert model.config.host_type == "llama" and model.config.host_class == "LlamaForCausalLM"
    assert check.exact and check.logit_difference < 1e-4
