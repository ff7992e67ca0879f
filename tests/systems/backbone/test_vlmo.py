"""VLMo: a feed-forward for each modality below, one for all above, without a router that learns."""

import pytest
import torch
from helpers.hosts.catalogue import HOSTS
from helpers.near import assert_near
from transformers import LlamaConfig

from hf_moe import HfMoeConfig, from_system
from hf_moe.modeling.routing_context import RoutingContext
from hf_moe.training.parts import train_only


HOST = HOSTS["llava"]


@pytest.fixture
def model():
    return from_system("vlmo", host=HOST.build(), moe_config={"layers": "except_last_1"})


def text_rows():
    ids = torch.arange(3, 15).view(2, 6)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize(("variant", "shared"), [("base", 2), ("large", 3)])
def test_the_last_layers_are_shared(variant, shared):
    config = HfMoeConfig.from_system("vlmo", variant=variant, text_config=LlamaConfig(num_hidden_layers=24))
    assert config.moe_layers() == list(range(24 - shared))


def test_copies_compute_what_the_dense_model_does(model):
    inputs = HOST.inputs()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert_near(model.eval()(**inputs).logits[real], HOST.build()(**inputs).logits[real], 2e-6)


def test_gradients_of_a_modality_touch_its_expert_alone(model):
    model(**text_rows()).loss.backward()
    block = model.moe_layers()[0]
    assert block.experts.text.gate_up_proj.grad.any() and not block.experts.image.gate_up_proj.grad.any()
    model.zero_grad()
    image = RoutingContext(torch.ones(1, 4).long(), torch.ones(1, 4).bool())
    block.mix(torch.randn(4, block.spec.hidden_size), image).sum().backward()
    assert block.experts.image.gate_up_proj.grad.any() and not block.experts.text.gate_up_proj.grad.any()


def test_training_on_images_leaves_text_as_it_was(model):
    before = model.eval()(**text_rows()).logits
    counts = train_only(model, ["experts/image.*"])
    assert counts.keys() == {"experts"}
    inputs = HOST.inputs()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.1)
    losses = []
    for _ in range(3):
        losses.append(model(**inputs, labels=inputs["input_ids"]).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model(**text_rows()).logits, before) and losses[-1] != losses[0]
