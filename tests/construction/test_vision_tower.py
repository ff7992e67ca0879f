"""The packaged convolutional tower holds what its features need, and no more."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, LlamaConfig

from hf_moe import HfMoeConfig
from hf_moe.construction.pretrained import load_vision_tower
from hf_moe.modeling.vision import probe_tower


def unpruned(tower, stage):
    """The tower as earlier checkpoints have it: with the layers behind the stage, which no feature depends on."""
    model_args = {"features_only": True, "out_indices": [stage]}
    config = AutoConfig.for_model("timm_wrapper", architecture="efficientnet_lite0", model_args=model_args)
    other = AutoModel.from_config(config).eval()
    report = other.timm_model.load_state_dict(tower.timm_model.model.state_dict(), strict=False)
    assert not report.unexpected_keys
    return other


@pytest.mark.parametrize(("stage", "share"), [(2, 0.1), (3, 0.25)])
def test_layers_behind_the_feature_stage_are_not_created(stage, share):
    tower, _ = load_vision_tower("efficientnet-lite0", image_size=64, feature_stage=stage)
    config = HfMoeConfig(text_config=LlamaConfig(), vision_config=tower.config, image_size=64, image_token_id=1)
    assert not probe_tower(config).unreachable
    old = unpruned(tower, stage)
    assert tower.num_parameters() < share * old.num_parameters()
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (model(pixels).last_hidden_state[0] for model in (tower, old))
    assert torch.equal(found, expected) and found.std() > 0


def test_a_pruned_tower_is_saved_and_opened(tmp_path):
    tower, _ = load_vision_tower("efficientnet-lite0", image_size=64, feature_stage=3)
    tower.save_pretrained(tmp_path)
    opened, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(value, tower.state_dict()[name]) for name, value in opened.state_dict().items())
