"""Mixture-of-Transformers: copies of a layer's weights per modality, with one attention."""

import pytest
import torch
from helpers.hosts import recurrent
from helpers.hosts.catalogue import HOSTS, labels_of
from helpers.near import assert_near
from transformers import AutoModelForImageTextToText, MixtralConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration, from_system
from hf_moe.modeling.per_modality import PerModality


HOST = "llava"


def untied(name=HOST, **options) -> HfMoeForConditionalGeneration:
    return from_system("mot_transformers", host=HOSTS[name].build(), **options)


@torch.no_grad()
def drifted(model):
    """Move the copies apart, as training does."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, PerModality):
            for parameter in module.parameters():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def copies_of(model, modality):
    return [p for m in model.modules() if isinstance(m, PerModality) for p in getattr(m, modality).parameters()]


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_5", "gemma3", "smolvlm", "phi3", "gpt2"])
def test_copies_compute_what_the_host_does(name):
    inputs, model = HOSTS[name].inputs(), untied(name)
    real = inputs["attention_mask"].bool()
    expected = logits_of(HOSTS[name].build(), inputs)
    assert_near(logits_of(model, inputs)[real], expected[real], 1e-6)
    assert (logits_of(drifted(model), inputs) - expected)[real].abs().max() > 1e-2


def test_every_weight_of_a_layer_is_untied():
    layer = untied().model.language_model.layers[0]
    copies = [module for module in layer.modules() if isinstance(module, PerModality)]
    own = {id(parameter) for module in copies for parameter in module.parameters()}
    assert own == {id(parameter) for parameter in layer.parameters()} and len(own) == 2 * 9
    ffn = untied(variant="ffn").model.language_model.layers[0]
    assert {path for path, m in ffn.named_modules() if isinstance(m, PerModality)} == {
        f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    }


def test_weights_learn_from_tokens_of_their_modality_alone():
    model, inputs = drifted(untied()).train(), HOSTS[HOST].inputs()
    text = {"input_ids": torch.arange(3, 19)[None]}
    model(**text, labels=text["input_ids"]).loss.backward()
    assert all(not p.grad.any() for p in copies_of(model, "image")), "and every copy has a gradient"
    assert all(p.grad.any() for p in copies_of(model, "text"))
    model.zero_grad()
    image = torch.ones_like(inputs["input_ids"]) * model.config.image_token_id
    embeddings = torch.randn(*image.shape, 32)
    types = torch.ones_like(image)
    model(inputs_embeds=embeddings, mm_token_type_ids=types, labels=inputs["input_ids"]).loss.backward()
    assert all(not p.grad.any() for p in copies_of(model, "text"))


def test_modalities_meet_in_attention_alone():
    model, inputs = drifted(untied()), HOSTS[HOST].inputs()
    expected = logits_of(model, inputs)
    other = {**inputs, "pixel_values": inputs["pixel_values"] + 1.0}
    text = {"input_ids": torch.arange(3, 19)[None]}
    alone = logits_of(model, text)
    assert (logits_of(model, other) - expected)[:, -1].abs().max() > 1e-3, "a later word sees the image"
    with torch.no_grad():
        for parameter in copies_of(model, "image"):
            parameter.normal_()
    assert torch.equal(logits_of(model, text), alone)
    assert (logits_of(model, inputs) - expected)[:, -1].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_decoding_after_an_image_is_exact(name):
    model, inputs = drifted(untied(name)), HOSTS[name].inputs()
    found = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    start = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(mask_rows := inputs["input_ids"]), 5).long()], 1)
    whole = {**inputs, "input_ids": found.sequences, "attention_mask": mask}
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        whole["mm_token_type_ids"] = torch.cat([types, torch.zeros(len(mask_rows), 5, dtype=types.dtype)], 1)
    expected = logits_of(model, whole)[:, start - 1 : -1]
    assert_near(torch.stack(found.logits, 1), expected, 1e-5)


def test_it_is_saved_with_its_code(tmp_path):
    model, inputs = drifted(untied()), HOSTS[HOST].inputs()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))


def test_a_step_of_training_keeps_text_from_images():
    model, inputs = untied().train(), HOSTS[HOST].inputs()
    before = [p.detach().clone() for p in copies_of(model, "text")]
    optimizer = torch.optim.SGD(copies_of(model, "image"), lr=1.0)
    loss = model(**inputs, labels=labels_of(inputs)).loss
    loss.backward()
    optimizer.step()
    assert all(map(torch.equal, before, copies_of(model, "text")))
    assert model(**inputs, labels=labels_of(inputs)).loss < loss


def test_a_host_with_experts_keeps_them_for_all_modalities():
    model, inputs = untied("qwen3_vl_moe"), HOSTS["qwen3_vl_moe"].inputs()
    real = inputs["attention_mask"].bool()
    assert_near(logits_of(model, inputs)[real], logits_of(HOSTS["qwen3_vl_moe"].build(), inputs)[real], 2e-6)
    names = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, PerModality)}
    assert "q_proj" in names and not names & {"gate", "experts"}


def test_experts_that_are_no_moe_layers_are_refused():
    text = MixtralConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=48, num_local_experts=2)
    moe_config = {"layers": [], "layer": "mot_transformers"}
    with pytest.raises(ValueError, match="leave 'ffn' out of untie"), torch.device("meta"):
        HfMoeForConditionalGeneration(HfMoeConfig(text_config=text, moe_config=moe_config, vision_config=None))


def test_mamba_mixers_stay_one_for_all_modalities():
    layer = {"layers": [], "layer": "mot_transformers"}
    model = HfMoeForConditionalGeneration.from_host(recurrent.HOSTS["jamba"].build(), moe_config=layer)
    mixing, attending = model.model.layers
    assert not [module for module in mixing.modules() if isinstance(module, PerModality)]
    assert isinstance(attending.self_attn.q_proj, PerModality)
    with pytest.raises(ValueError, match="has a Mamba mixer.*'mixture_of_mamba'"):
        HfMoeForConditionalGeneration.from_host(recurrent.HOSTS["falcon_h1"].build(), moe_config=layer)
    norms = {"layers": [], "layer": {"name": "mot_transformers", "untie": ["ffn", "norm"]}}
    model = HfMoeForConditionalGeneration.from_host(recurrent.HOSTS["jamba"].build(), moe_config=norms)
    assert isinstance(model.model.layers[0].input_layernorm, PerModality)
