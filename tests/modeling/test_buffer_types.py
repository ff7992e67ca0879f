"""Buffers that count or accumulate keep their type through saving, loading and training in low precision."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_moe import HfMoeForConditionalGeneration, MoeLoraConfig, register_router
from hf_moe.modeling import registry
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.mechanisms import get_mechanism


def filled(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    buffers = {
        n: b for n, b in module.named_buffers() if "objectives." in n or ".gate." in n or "moe_lora_router" in n
    }
    assert buffers
    return {name: buffer.fill_(70_001).clone() for name, buffer in buffers.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "objectives"),
    [
        ("anyexperts", {"slot_budget": 0.1, "load_balance": 0.1}),
        ("deepseek_v3", {"null_load": 0.1, "condition_information": 0.1}),
    ],
)
def test_a_reloaded_model_keeps_its_statistics(tiny_model, tmp_path, name, objectives, dtype):
    options = {"min_slots": 1, "max_slots": 4} if name == "anyexperts" else {}
    model = tiny_model(tower=False, moe_config={"router": {"name": name, **options}, "objectives": objectives})
    expected = filled(model)
    model.save_pretrained(tmp_path)
    loaded = HfMoeForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    for key, buffer in expected.items():
        found = loaded.get_buffer(key)
        assert found.dtype is buffer.dtype and torch.equal(found, buffer), key


@pytest.mark.parametrize("name", ["deepseek_v3", "sequence", "smora"])
def test_a_reloaded_adapter_keeps_its_statistics(tmp_path, name):
    def base() -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32, pad_token_id=0)).bfloat16()

    options = {"centred": True} if name == "sequence" else {}
    config = MoeLoraConfig(
        target_modules=["q_proj"], router={"name": name, **options}, objectives={"load_balance": 0.1}
    )
    model = get_peft_model(base(), config)
    expected = filled(model)
    model.save_pretrained(tmp_path)
    for loaded in (model.half(), PeftModel.from_pretrained(base(), tmp_path).bfloat16()):
        for key, buffer in expected.items():
            found = loaded.get_buffer(key)
            assert found.dtype is buffer.dtype and torch.equal(found, buffer), key


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_the_slot_budget_counts_in_low_precision(tiny_model, text_batch, cast):
    moe = {"router": {"name": "anyexperts", "min_slots": 1, "max_slots": 4}, "objectives": {"slot_budget": 0.1}}
    model = getattr(tiny_model(tower=False, moe_config=moe), cast)().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tokens = 64 * int(text_batch["attention_mask"].sum())
    batch = {name: value.repeat(64, 1) for name, value in text_batch.items()}
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert model.objectives.by_name["slot_budget"].population_1[1] == tokens


def test_a_router_of_the_user_keeps_its_counts(tiny_model, monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {kind: dict(known) for kind, known in registry._REGISTERED.items()})

    @register_router("counting")
    class CountingRouter(get_mechanism("router", "top_k")):
        def __init__(self, spec: MoELayerSpec):
            super().__init__(spec)
            self.register_buffer("seen", torch.zeros(3, dtype=torch.long))
            self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))

    model = tiny_model(tower=False, moe_config={"router": {"name": "counting"}})
    state = {name: buffer.fill_(70_001) for name, buffer in model.named_buffers() if ".gate." in name}
    loaded = HfMoeForConditionalGeneration.from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), dtype=torch.bfloat16
    )
    for key, buffer in state.items():
        assert loaded.get_buffer(key).dtype is buffer.dtype and torch.equal(loaded.get_buffer(key), buffer), key
