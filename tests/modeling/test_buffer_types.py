"""Buffers that count or accumulate keep their type, whatever the model is cast to, in every mechanism with some."""

import pytest
import torch
from helpers.router_cases import make_router, make_spec
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_moe import HfMoeForConditionalGeneration, MoeLoraConfig, list_mechanisms, register_router
from hf_moe.modeling import registry
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.registry import build


OPTIONS = {
    "modality": {"modalities": ["text", "image", "video", "audio"]},
    "sequence": {"centred": True},
}
CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to": lambda module: module.to(torch.bfloat16),
    "double": lambda module: module.double(),
    "there and back": lambda module: module.half().float(),
    "in a model": lambda module: torch.nn.ModuleList([module]).half()[0],
}


def router(name: str) -> torch.nn.Module:
    slots = 1 if name == "llama4" else 2
    spec = make_spec(num_experts=4, num_experts_per_tok=slots)
    return make_router(name, OPTIONS.get(name, {}), spec)


def objective(name: str) -> torch.nn.Module:
    spec = make_spec(num_experts_per_tok=1)
    return build("objective", get_mechanism("objective", name), {}, [spec], 0.1)


MECHANISMS = [
    *[pytest.param(router, name, id=f"router {name}") for name in list_mechanisms("router")],
    *[pytest.param(objective, name, id=f"objective {name}") for name in list_mechanisms("objective")],
]


@pytest.mark.parametrize(("make", "name"), MECHANISMS)
def test_a_cast_leaves_buffers_what_they_are(make, name):
    for cast in CASTS.values():
        module = make(name)
        # Exact in float32 and in int64, and in nothing shorter.
        expected = {key: buffer.fill_(70_001).clone() for key, buffer in module.named_buffers()}
        after = dict(cast(module).named_buffers())
        assert after.keys() == expected.keys()
        for key, buffer in expected.items():
            assert after[key].dtype is buffer.dtype and torch.equal(after[key], buffer), key


@pytest.mark.parametrize(("make", "name"), MECHANISMS)
def test_the_default_dtype_has_no_say(make, name):
    expected = {name: buffer.dtype for name, buffer in make(name).named_buffers()}
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = {name: buffer.dtype for name, buffer in make(name).named_buffers()}
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == expected


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
    model = CASTS[cast](tiny_model(tower=False, moe_config=moe)).train()
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
