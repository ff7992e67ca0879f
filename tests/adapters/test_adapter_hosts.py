"""LoRA experts on models of many families: each works, or is refused with the reason."""

import pytest
import torch
from helpers.hosts.families import HOSTS, IMAGE, pixels, seq2seq
from helpers.near import assert_near
from peft import PeftModel, get_peft_model
from transformers import BartConfig, BartForConditionalGeneration, SwinConfig, SwinForImageClassification

from hf_moe import MoeLoraConfig
from hf_moe.adapters import routing_inputs


TASKS = torch.tensor([0, 1])
# Behind every layer that does not lie in another one.
LAYERS = r"(?!.*\.\d+\.).*\.(layers|layer|blocks|block|h)\.\d+"


def build(name):
    torch.manual_seed(0)
    return HOSTS[name].build().eval()


def adapt(name, **fields):
    return get_peft_model(build(name), MoeLoraConfig(**{"target_modules": HOSTS[name].targets, **fields})).eval()


def outputs(model, inputs, **extra):
    with torch.no_grad():
        found = model(**inputs, **extra)
    return found.logits if "logits" in found else found.logits_per_image


@pytest.mark.parametrize("name", HOSTS)
def test_experts_start_from_the_model_train_are_saved_and_loaded_and_generate(name, randomise, tmp_path):
    inputs = HOSTS[name].inputs()
    base = outputs(build(name), inputs)
    model = adapt(name)
    assert_near(outputs(model, inputs), base, 1e-6)
    randomise(model)
    trained = outputs(model, inputs)
    assert (trained - base).abs().max() > 1e-3
    model.train()(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert_near(outputs(loaded, inputs), trained, 1e-6)
    if HOSTS[name].decodes:
        prompt = {key: value for key, value in inputs.items() if key != "labels"}
        options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "suppress_tokens": [IMAGE]}
        cached = loaded.generate(**prompt, **options)
        assert torch.equal(cached, loaded.generate(**prompt, use_cache=False, **options))


FIELDS = {
    "sequence": {"router": "sequence"},
    "condition": {"router": "condition"},
    "objectives": {"objectives": {"load_balance": 0.1}},
}
REASONS = {"sequence": "which of them are padding", "condition": "a condition of the rows", "objectives": "no|cannot"}


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("name", HOSTS)
def test_what_a_router_reads_of_the_rows_reaches_it_or_is_refused(name, kind, randomise):
    inputs = HOSTS[name].inputs()
    if kind in HOSTS[name].refuses:
        with pytest.raises(ValueError, match=REASONS[kind]):
            adapt(name, **FIELDS[kind])
        return
    model = adapt(name, **FIELDS[kind])
    randomise(model)
    if kind == "condition":
        found = outputs(model, inputs, task_ids=TASKS)
        with routing_inputs(task=TASKS.flip(0)):
            swapped = outputs(model, inputs)
        both = outputs(model, {**inputs, "task_ids": TASKS[[0, 0]]})
        assert_near(both[0], found[0], 1e-5)
        assert_near(both[1], swapped[1], 1e-5)
        assert (found - swapped).abs().amax(tuple(range(1, found.dim()))).min() > 1e-4
    if kind == "objectives":
        balanced = model(**inputs).loss
        assert balanced > adapt_like(name, model)(**inputs).loss + 0.05
    if kind == "sequence" and HOSTS[name].decodes:
        prompt = {key: value for key, value in inputs.items() if key != "labels"}
        options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "suppress_tokens": [IMAGE]}
        assert torch.equal(model.generate(**prompt, **options), model.generate(**prompt, use_cache=False, **options))


def adapt_like(name, model):
    """Return the same adapter without objectives."""
    plain = adapt(name)
    state = {key: value for key, value in model.state_dict().items() if "moe_lora_objectives" not in key}
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("name", [name for name in HOSTS if name not in ("swin", "siglip", "clip")])
def test_experts_stand_behind_whole_layers(name, randomise, tmp_path):
    inputs = HOSTS[name].inputs()
    base = outputs(build(name), inputs)
    fields = {"target_modules": LAYERS, "experts": "bottleneck", "router_input": "target"}
    model = adapt(name, **fields)
    assert_near(outputs(model, inputs), base, 1e-6)
    randomise(model)
    trained = outputs(model, inputs)
    assert (trained - base).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert_near(outputs(loaded, inputs), trained, 1e-6)


def test_a_router_does_not_decide_for_the_tokens_that_cross_attention_reads():
    """Encoder and decoder have as many tokens here, which a count would not tell apart."""
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = BartConfig(d_model=32, vocab_size=64, encoder_attention_heads=4, decoder_attention_heads=4, **sizes)
    host = BartForConditionalGeneration(config).eval()
    rows = seq2seq()
    rows["labels"] = rows["input_ids"]
    model = get_peft_model(host, MoeLoraConfig(target_modules=["encoder_attn.v_proj"]))
    with pytest.raises(ValueError, match="cross-attention"):
        model(**rows)
    model = get_peft_model(model.unload(), MoeLoraConfig(target_modules=["encoder_attn.q_proj"]))
    assert model(**rows).loss.isfinite()


def test_a_router_does_not_decide_for_windows_that_hold_the_tokens_in_another_order():
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    host = SwinForImageClassification(config).eval()
    model = get_peft_model(host, MoeLoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="windows"):
        model(pixel_values=pixels())
    model = get_peft_model(model.unload(), MoeLoraConfig(target_modules=["q_proj"], router_input="target"))
    assert model(pixel_values=pixels()).logits.isfinite().all()
