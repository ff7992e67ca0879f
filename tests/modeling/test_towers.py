"""Experts in the tower and the connector of a model that is put together."""

import pytest
import torch
from helpers.near import assert_near
from transformers import AutoConfig, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, Siglip2VisionConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.construction.build import build_model
from hf_moe.construction.evolution import assemble
from hf_moe.construction.tokenizer import train_word_tokenizer
from hf_moe.modeling.routing_context import ACTIVE_CONTEXT, CALL_CONTEXT
from hf_moe.training.parts import train_only


EXPERTS = {"num_experts": 3}
BOTH = {"vision_moe_config": EXPERTS, "connector_moe_config": EXPERTS}
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
DECODER = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_statistics_count_the_real_patches_of_every_place(tiny_model, training_batch):
    model = tiny_model(**BOTH, moe_config={"objectives": {"load_balance": 0.1}}).train()
    model(**training_batch).loss.backward()
    counts = {name: int(value.sum()) for name, value in model.objectives.state_dict().items() if "accumulated" in name}
    words, images = int(training_batch["attention_mask"].sum()), len(training_batch["pixel_values"])
    assert {name.rpartition("accumulated_")[2]: count // 2 for name, count in counts.items()} == {
        **{"1": words, "2": words, "connector_0": 4 * images},
        **{f"vision_{layer}": 5 * images for layer in range(2)},
    }


def test_a_batch_of_text_leaves_gradients_of_zeros(tiny_model, text_batch):
    model = tiny_model(**BOTH).train()
    output = model(**text_batch, output_routing=True)
    output.loss.backward()
    assert output.routing.parts == {}
    for site, block in model.moe_blocks().items():
        gradients = [parameter.grad for parameter in block.parameters()]
        assert all(gradient is not None for gradient in gradients)
        assert any(gradient.any() for gradient in gradients) == isinstance(site, int)


def test_padding_patches_use_no_expert(tiny_config):
    fields = {name: value for name, value in TOWER.items() if name != "image_size"}
    config = tiny_config(**BOTH, moe_config={"objectives": {"load_balance": 0.1, "router_z": 0.1}})
    fields = {**config.to_dict(), "vision_config": Siglip2VisionConfig(**fields, num_patches=4)}
    fields |= {"image_size": None, "vision_feature_size": None, "vision_prefix_tokens": None}
    torch.manual_seed(0)
    model = HfMoeForConditionalGeneration(HfMoeConfig.from_dict(fields)).eval()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    ids = torch.tensor([[95, 95, 95, 95, 5, 6], [95, 95, 7, 8, 9, 10]])
    inputs = {"input_ids": ids, "labels": ids.masked_fill(ids == 95, -100), "pixel_attention_mask": mask}
    inputs["spatial_shapes"] = torch.tensor([[2, 2], [1, 2]])
    pixels, found = torch.randn(2, 4, 3 * 64), []
    for filler in (0.0, 5.0):
        pixels = pixels.masked_fill(mask[..., None] == 0, filler)
        with torch.no_grad():
            found.append(model(**inputs, pixel_values=pixels, output_routing=True))
    assert_near((found[1].logits, found[1].aux_loss), (found[0].logits, found[0].aux_loss), 1e-6)
    for place in ("vision", "connector"):
        part = found[0].routing.parts[f"{place}.0"]
        assert torch.equal(part.token_mask, mask.bool()) and part.row_index.tolist() == [0, 1]
        for decision in part.decisions.values():
            assert torch.equal((decision.expert_index < 3).any(-1), mask.flatten().bool())


@pytest.mark.parametrize("connector", [{"name": "mlp"}, {"name": "pixel_shuffle", "num_layers": 2}])
def test_a_connector_of_two_layers_takes_experts(tiny_model, training_batch, connector):
    if connector["name"] == "pixel_shuffle":
        training_batch["input_ids"] = only_first(training_batch["input_ids"])
        training_batch["labels"] = training_batch["input_ids"].masked_fill(training_batch["input_ids"] == 95, -100)
    model = tiny_model(connector=connector, connector_moe_config=EXPERTS)
    block = model.moe_blocks()["connector.0"]
    assert block.experts.down_proj.shape[:2] == (3, 32)
    for name in ("eager", "grouped_mm"):
        model.set_experts_implementation(name)
        assert model(**training_batch).logits.isfinite().all()


def only_first(ids):
    """Keep the first of every four placeholders."""
    seen = (ids == 95).cumsum(-1)
    return ids.masked_fill((ids == 95) & (seen % 4 != 1), 7)


@pytest.mark.parametrize("options", [{"num_layers": 1}, {"num_layers": 3}])
def test_a_connector_of_other_depth_is_refused(tiny_model, options):
    with pytest.raises(ValueError, match="none of its parts is two linear layers"):
        tiny_model(connector={"name": "mlp", **options}, connector_moe_config=EXPERTS)


def test_layers_behind_the_features_stay_out_of_training(tiny_model):
    model = tiny_model(vision_moe_config=EXPERTS, vision_feature_layer=-2)
    counts = train_only(model, ["experts", "routers", "tower"])
    assert counts["experts"] > 0
    blocks = model.moe_blocks()
    assert all(parameter.requires_grad for parameter in blocks["vision.0"].parameters())
    assert not any(parameter.requires_grad for parameter in blocks["vision.1"].parameters())


def test_a_tower_of_a_folder_is_upcycled(tmp_path):
    torch.manual_seed(0)
    tower = CLIPVisionModel(CLIPVisionConfig(**TOWER)).eval()
    tower.save_pretrained(tmp_path)
    CLIPImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False).save_pretrained(tmp_path)
    tokenizer = train_word_tokenizer(["what colour is this"])
    model, _ = build_model(DECODER, str(tmp_path), tokenizer=tokenizer, moe_config={"layers": []}, **BOTH)
    assert sorted(model.moe_blocks()) == ["connector.0", "vision.0", "vision.1"]
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found, expected = (part(pixels).last_hidden_state for part in (model.model.vision_tower, tower))
    assert_near(found, expected, 1e-6)


def test_layers_that_a_tower_does_not_have_are_named(tiny_model):
    with pytest.raises(ValueError, match=r"names the layers \['7'\]|\[7\]"):
        tiny_model(vision_moe_config={"layers": [7]})


def test_towers_of_timm_take_experts(tiny_config):
    pytest.importorskip("timm")
    size = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
    tower = AutoConfig.for_model("timm_wrapper", architecture="vit_tiny_patch16_224", model_args=size)
    fields = {**tiny_config().to_dict(), "vision_config": tower, "vision_feature_size": None, "image_size": 16}
    fields |= {"vision_prefix_tokens": None, "moe_config": {"layers": []}}
    torch.manual_seed(0)
    dense = HfMoeForConditionalGeneration(HfMoeConfig.from_dict(fields)).eval()
    model = assemble(dense, HfMoeConfig.from_dict({**fields, "vision_moe_config": EXPERTS}))
    assert list(model.moe_blocks()) == ["vision.0", "vision.1"]
    inputs = {"input_ids": torch.tensor([[95, 95, 95, 95, 5, 6]]), "pixel_values": torch.randn(1, 3, 16, 16)}
    with torch.no_grad():
        assert_near(model(**inputs).logits, dense(**inputs).logits, 2e-6)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_in_a_tower_leaves_no_context_behind(tiny_model, batch, error):
    model = tiny_model(**BOTH)

    def interrupt(*_):
        raise error

    model.moe_blocks()["vision.1"].register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        model(**batch)
    assert ACTIVE_CONTEXT.get() is None and CALL_CONTEXT.get() is None
