"""Rows that hold several documents: a pooled router reads each for itself."""

import pytest
import torch
from helpers.near import assert_near
from peft import get_peft_model
from transformers import DataCollatorWithFlattening, ModernBertConfig, ModernBertModel

from hf_moe import MoeLoraConfig
from hf_moe.adapters.layer import tuner_layers


END = 61
DOCUMENTS = [[5, 9, END, 12], [7], [8, 30, 41, END, 3, 2]]
POOLED = [
    {},
    {"pooling": "sum"},
    {"end_token_id": END},
]


def adapt(model, randomise, **fields):
    model = get_peft_model(model, MoeLoraConfig(**{"target_modules": ["q_proj", "down_proj"], **fields}))
    randomise(model)
    return model.train()


def watch_first(model):
    """Collect the probabilities (T, E) of the router in the first layer, which attention has not reached."""
    probs = []
    router = next(layer for layer in tuner_layers(model)).moe_lora_router["default"]
    router.register_forward_hook(lambda router, args, decision: probs.append(decision.router_probs.detach()))
    return probs


@pytest.mark.parametrize("options", POOLED, ids=str)
@pytest.mark.parametrize("router_input", ["decoder_layer", "model"])
def test_a_packed_document_is_routed_as_on_its_own(llama, randomise, options, router_input):
    model = adapt(llama(), randomise, router={"name": "sequence", **options}, router_input=router_input)
    packed = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": ids} for ids in DOCUMENTS])
    packed.pop("labels")
    together = model(**packed, use_cache=False).logits[0]
    alone = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in DOCUMENTS]
    assert_near(together, torch.cat(alone), 1e-5)


@pytest.mark.parametrize("by", [{"return_seq_idx": True}, {"return_flash_attn_kwargs": True}, {}], ids=str)
def test_documents_are_known_from_all_that_collators_say(llama, randomise, by):
    model = adapt(llama(), randomise, router="sequence", router_input="target", target_modules=["q_proj"])
    collator = DataCollatorWithFlattening(return_tensors="pt", return_position_ids=not by, **by)
    packed = collator([{"input_ids": ids} for ids in DOCUMENTS])
    gates = watch_first(model)
    model(**{name: value for name, value in packed.items() if name != "labels"}, use_cache=False)
    for ids in DOCUMENTS:
        model(input_ids=torch.tensor([ids]), use_cache=False)
    assert_near(gates[0], torch.cat(gates[1:]), 1e-6)


def test_an_encoder_pools_the_whole_of_each_document(randomise):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = ModernBertModel(ModernBertConfig(**sizes, vocab_size=64, pad_token_id=0, initializer_range=0.15))
    model = adapt(encoder, randomise, router="sequence", target_modules=["Wqkv"])
    gates = watch_first(model)
    positions = torch.cat([torch.arange(len(ids)) for ids in DOCUMENTS])[None]
    model(input_ids=torch.tensor([sum(DOCUMENTS, [])]), position_ids=positions)
    for ids in DOCUMENTS:
        model(input_ids=torch.tensor([ids]))
        assert (gates[-1] == gates[-1][0]).all()
    assert_near(gates[0], torch.cat(gates[1:]), 1e-6)


def test_the_positions_of_padding_and_of_cached_tokens_split_no_row(llama, text, randomise):
    model = adapt(llama(), randomise, router="sequence").eval()
    mask = text["attention_mask"]
    given = {"input_ids": text["input_ids"], "attention_mask": mask}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        plain = model(**given).logits[mask.bool()]
        torch.testing.assert_close(model(**given, position_ids=positions).logits[mask.bool()], plain)
