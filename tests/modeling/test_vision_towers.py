"""Vision towers: what is derived from them, what is frozen, and how their features reach the decoder."""

import pytest
import torch
from helpers.trainer_loads import assert_trainer_reads_back
from transformers import AutoConfig, LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.modeling.vision import tower_features


IMAGE = 95
VIT = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
LITE0 = {
    "architecture": "efficientnet_lite0",
    "model_args": {"features_only": True, "out_indices": [3]},
    "do_pooling": False,
}
PRUNED_LITE0 = {**LITE0, "model_args": {**LITE0["model_args"], "feature_cls": "getter"}}
TIMM_VIT = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
}

# name -> (vision config, further fields, feature size, prefix tokens, tokens per image)
TOWERS = {
    "clip": (AutoConfig.for_model("clip_vision_model", **VIT), {}, 24, 1, 16),
    "clip_penultimate": (AutoConfig.for_model("clip_vision_model", **VIT), {"vision_feature_layer": -2}, 24, 1, 16),
    "siglip": (AutoConfig.for_model("siglip_vision_model", **VIT), {}, 24, 0, 16),
    "siglip_penultimate": (
        AutoConfig.for_model("siglip_vision_model", **VIT),
        {"vision_feature_layer": -2},
        24,
        0,
        16,
    ),
    "siglip2": (
        AutoConfig.for_model(
            "siglip2_vision_model", **{k: v for k, v in VIT.items() if k != "image_size"}, num_patches=16
        ),
        {},
        24,
        0,
        16,
    ),
    "dinov2": (AutoConfig.for_model("dinov2", **VIT), {}, 24, 1, 16),
    "dinov2_with_registers": (
        AutoConfig.for_model("dinov2_with_registers", **VIT, num_register_tokens=4),
        {},
        24,
        5,
        16,
    ),
    "vit": (AutoConfig.for_model("vit", **VIT), {}, 24, 1, 16),
    "vit_penultimate": (AutoConfig.for_model("vit", **VIT), {"vision_feature_layer": -2}, 24, 1, 16),
    "swin": (
        AutoConfig.for_model(
            "swin", embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4, image_size=32, patch_size=4
        ),
        {},
        24,
        0,
        16,
    ),
    "timm_features": (AutoConfig.for_model("timm_wrapper", **LITE0), {"image_size": 64}, 112, 0, 16),
    "timm_pruned": (AutoConfig.for_model("timm_wrapper", **PRUNED_LITE0), {"image_size": 64}, 112, 0, 16),
    "timm_vit": (AutoConfig.for_model("timm_wrapper", **TIMM_VIT), {"image_size": 32}, 24, 1, 16),
    "timm_vit_penultimate": (
        AutoConfig.for_model("timm_wrapper", **TIMM_VIT),
        {"image_size": 32, "vision_feature_layer": -2},
        24,
        0,
        16,
    ),
}


def model_with(tower, **fields):
    torch.manual_seed(0)
    vision_config, tower_fields, *_ = TOWERS[tower]
    text = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    config = HfMoeConfig(
        text_config=text,
        vision_config=vision_config.to_dict(),
        moe_config={"num_experts": 4, "layers": [1]},
        image_token_id=IMAGE,
        initializer_range=0.1,
        **{**tower_fields, **fields},
    )
    model = HfMoeForConditionalGeneration(config)
    calibrate_batch_norms(model)
    return model.eval()


def calibrate_batch_norms(model):
    """Let batch norms see data: fresh statistics shrink the features of a deep untrained network to nothing."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            model.model.vision_tower.train()(images_for(model, 4)[0]["pixel_values"])


def images_for(model, count):
    """Return `count` random images, of different grids where the tower takes them, and their token counts."""
    generator = torch.Generator().manual_seed(1)
    if model.config.vision_config.model_type == "siglip2_vision_model":
        shapes = torch.tensor([[4, 4], [2, 3], [3, 5]])[:count]
        sizes = shapes.prod(-1).tolist()
        mask = torch.zeros(count, 16, dtype=torch.long)
        for row, size in enumerate(sizes):
            mask[row, :size] = 1
        pixels = torch.randn(count, 16, 3 * 8 * 8, generator=generator) * mask[..., None]
        return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}, sizes
    side = model.config.image_size
    return {"pixel_values": torch.randn(count, 3, side, side, generator=generator)}, [
        model.config.image_seq_length
    ] * count


def ids_for(sizes):
    return torch.tensor([[1, 5] + [token for size in sizes for token in [IMAGE] * size + [7]] + [9, 11]])


@pytest.mark.parametrize("tower", TOWERS)
def test_tower_fields_are_derived_and_images_reach_the_logits(tower):
    *_, feature_size, prefix_tokens, tokens = TOWERS[tower]
    model = model_with(tower)
    config = model.config
    assert (config.vision_feature_size, config.vision_prefix_tokens) == (feature_size, prefix_tokens)
    assert config.image_seq_length == tokens
    images, sizes = images_for(model, 2)
    with torch.no_grad():
        outputs = model(input_ids=ids_for(sizes), **images)
        assert [tuple(image.shape) for image in outputs.image_hidden_states] == [(size, 32) for size in sizes]
        images["pixel_values"] = images["pixel_values"].flip(0) if tower != "siglip2" else images["pixel_values"] * 2
        other = model(input_ids=ids_for(sizes), **images).logits
    assert torch.isfinite(outputs.logits).all()
    assert (outputs.logits[:, -1] - other[:, -1]).abs().max() > 1e-4
    assert torch.allclose(outputs.logits[:, :2], other[:, :2], atol=1e-6), "text before the images cannot see them"


@pytest.mark.parametrize("tower", TOWERS)
def test_trainer_reads_back_every_tensor_of_a_tower(tmp_path, tower):
    assert_trainer_reads_back(model_with(tower), tmp_path)


@pytest.mark.parametrize("tower", TOWERS)
def test_every_trainable_tower_parameter_gets_a_gradient(tower):
    model = model_with(tower).train()
    trainable = {name for name, p in model.model.vision_tower.named_parameters() if p.requires_grad}
    assert trainable
    images, sizes = images_for(model, 1)
    ids = ids_for(sizes)
    model(input_ids=ids, labels=ids, **images).loss.backward()
    reached = {name for name, p in model.model.vision_tower.named_parameters() if p.grad is not None}
    assert reached == trainable


@pytest.mark.parametrize(
    ("tower", "frozen"),
    [
        ("clip", "post_layernorm"),
        ("clip_penultimate", "layers.1."),
        ("siglip", "head.probe"),
        ("siglip_penultimate", "post_layernorm"),
        ("vit", "pooler"),
    ],
)
def test_parameters_that_take_no_part_in_the_features_are_frozen(tower, frozen):
    parameters = dict(model_with(tower).model.vision_tower.named_parameters())
    matching = [parameter.requires_grad for name, parameter in parameters.items() if frozen in name]
    assert matching and not any(matching)


@pytest.mark.parametrize("tower", ["clip", "siglip2", "dinov2_with_registers", "timm_features"])
def test_features_computed_before_give_equal_logits(tower):
    model = model_with(tower)
    images, sizes = images_for(model, 2)
    with torch.no_grad():
        features = tower_features(model.model.vision_tower, model.config, **images)
        expected = model(input_ids=ids_for(sizes), **images).logits
        mask = images.get("pixel_attention_mask")
        actual = model(input_ids=ids_for(sizes), image_features=features, pixel_attention_mask=mask).logits
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("tower", ["clip", "timm_features"])
def test_a_frozen_tower_stays_in_eval_mode(tower):
    model = model_with(tower)
    model.train()
    assert model.model.vision_tower.training, "a trainable tower trains"
    model.model.vision_tower.requires_grad_(False)
    model.train()
    assert model.model.language_model.training
    assert not any(module.training for module in model.model.vision_tower.modules())
    buffers = {name: buffer.clone() for name, buffer in model.model.vision_tower.named_buffers()}
    images, sizes = images_for(model, 1)
    ids = ids_for(sizes)
    model(input_ids=ids, labels=ids, **images).loss.backward()
    for name, buffer in model.model.vision_tower.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_a_tower_is_built_twice_at_most(monkeypatch):
    from transformers import CLIPVisionModel

    built = []
    original = CLIPVisionModel.__init__
    monkeypatch.setattr(CLIPVisionModel, "__init__", lambda self, config: (built.append(1), original(self, config))[1])
    model_with("clip")
    assert len(built) == 2, "the tower itself, and one probe without memory"


def test_a_tower_of_timm_is_built_without_warnings(monkeypatch):
    from transformers.models.timm_wrapper import modeling_timm_wrapper

    monkeypatch.setattr(modeling_timm_wrapper.logger, "warning_once", pytest.fail)
    assert model_with("timm_features")


def test_derived_fields_are_saved(tmp_path):
    model = model_with("dinov2_with_registers")
    model.config.save_pretrained(tmp_path)
    config = HfMoeConfig.from_pretrained(tmp_path)
    assert (config.vision_feature_size, config.vision_prefix_tokens, config.image_seq_length) == (24, 5, 16)


def test_a_tower_without_a_size_asks_for_one():
    with pytest.raises(ValueError, match=r"not in the config of the tower \(timm_wrapper\): set image_size"):
        model_with("timm_features", image_size=None)


def test_packed_patches_need_a_connector_that_keeps_them():
    with pytest.raises(ValueError, match="choose a connector that keeps every patch"):
        model_with("siglip2", connector={"name": "mlp", "pool": 2})


def test_pooling_connector_shortens_the_image():
    model = model_with("clip", connector={"name": "mlp", "pool": 2})
    assert model.config.image_seq_length == 4
    images, sizes = images_for(model, 2)
    with torch.no_grad():
        assert [len(image) for image in model(input_ids=ids_for(sizes), **images).image_hidden_states] == [4, 4]


def test_features_of_the_wrong_width_are_refused():
    model = model_with("clip")
    with pytest.raises(
        ValueError,
        match=r"image_features must be floating point of the shape \(images, patches, 24\), got .*\(1, 16, 8\)",
    ):
        model(input_ids=ids_for([16]), image_features=torch.zeros(1, 16, 8))
