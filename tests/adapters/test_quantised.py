"""LoRA experts train on a base in 8 or 4 bit, and what is not possible says so."""

import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch
from helpers.near import assert_near
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_moe import MoeLoraConfig
from hf_moe.adapters.layer import tuner_layers
from hf_moe.training.quantised import check_quantised, prepare_quantised, quantization_config


HELD = [("bitsandbytes", 8), ("bitsandbytes", 4), ("torchao", 8)]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}


def require(backend):
    if importlib.util.find_spec(backend) is None:
        message = f"no {backend}: pip install 'hf-moe[quantised]'"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("backend, bits", HELD)
def test_experts_train_on_a_quantised_base(folder, text, tmp_path, backend, bits):
    require(backend)
    inputs = {name: text[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        full = AutoModelForCausalLM.from_pretrained(folder)(**inputs).logits

    def load():
        config = quantization_config(bits, backend, compute_dtype=torch.float32)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()

    base = load()
    assert check_quantised(base) == 1.0
    base = prepare_quantised(base)
    with torch.no_grad():
        expected = base(**inputs).logits
    error = (expected - full).abs().max()
    assert 0 < error < 0.5 * full.abs().max()
    probe = torch.randn(3, 64)
    with torch.no_grad():
        before = base.model.layers[0].self_attn.q_proj(probe)
    model = get_peft_model(base, MoeLoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=True))
    with torch.no_grad():  # an evaluation before training must not end it
        assert_near(model.eval()(**inputs).logits, expected, 1e-5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model.train()(**text).loss
        loss.backward()
        losses.append(loss.item())
        assert all(layer.moe_lora_B["default"].grad.abs().sum() > 0 for layer in tuner_layers(model))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    layer = next(tuner_layers(model.eval()))
    with torch.no_grad():
        torch.testing.assert_close(layer.get_base_layer()(probe), before, atol=0, rtol=0)
    assert layer.moe_lora_A["default"].dtype == torch.float32
    with pytest.raises(ValueError, match="merge into the plain weight"):
        get_peft_model(
            load(), MoeLoraConfig(target_modules=["q_proj"], num_experts=1, num_experts_per_tok=1)
        ).merge_adapter()
    model.save_pretrained(tmp_path / "adapter")
    opened = PeftModel.from_pretrained(prepare_quantised(load()), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert_near(opened(**inputs).logits, model.eval()(**inputs).logits, 1e-5)


def test_a_base_in_4_bit_is_kept_from_being_packed_for_evaluation(folder, text):
    require("bitsandbytes")
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization_config(4))
    layers = [module for module in base.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert len(layers) == 2 * 7
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as bitsandbytes sets it on CPUs that have it
    base = prepare_quantised(base).eval()
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    with torch.no_grad():
        base(input_ids=text["input_ids"])
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)


def test_a_base_that_is_packed_for_evaluation_is_refused():
    class Packed(torch.nn.Linear):  # what bitsandbytes makes of a 4-bit layer on a CPU with AVX512-BF16
        support_avx512bf16_for_cpu = True

    layer = Packed(8, 8)
    layer.weight = torch.nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    layer.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(ValueError, match="has packed '0' for evaluation"):
        prepare_quantised(torch.nn.Sequential(layer))


@pytest.mark.parametrize("backend, bits", HELD)
def test_without_the_library_it_says_what_to_install(monkeypatch, backend, bits):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == backend else found(name, *args)
    )
    with pytest.raises(ImportError, match=f"needs {backend}, which is not installed: pip install {backend}"):
        quantization_config(bits, backend)


def test_what_no_backend_can_do_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="bits=3"):
        quantization_config(3)
    with pytest.raises(ValueError, match="backend='gptq'"):
        quantization_config(4, "gptq")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torchao holds 4 bit on a GPU only"):
        quantization_config(4, "torchao")


def test_a_base_that_stayed_full_is_noticed():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="Only 0% of the model's matrix weights are quantised"):
        check_quantised(model)


def test_stacked_experts_that_a_quantiser_passed_over_are_named():
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):  # as a quantiser leaves them
            module.weight = torch.nn.Parameter(module.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"Only \d+% .*mlp.experts.gate_up_proj"):
        check_quantised(model)
    assert 0 < check_quantised(model, least_share=0.05) < 0.5
