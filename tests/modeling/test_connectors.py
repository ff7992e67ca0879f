import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, Idefics3Config, LlamaConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.registry import build


FEATURES, HIDDEN = 12, 32

CASES = {
    "mlp": ("mlp", {}, 16, 16),
    "mlp-one_layer": ("mlp", {"num_layers": 1}, 7, 7),
    "mlp-norm-pool": ("mlp", {"norm": True, "pool": 2, "num_layers": 3}, 16, 4),
    "pixel_shuffle": ("pixel_shuffle", {}, 16, 4),
    "pixel_shuffle-layers": ("pixel_shuffle", {"scale_factor": 3, "num_layers": 2, "bias": True}, 36, 4),
}


def make_connector(name: str, options: dict | None = None):
    connector = build("connector", get_mechanism("connector", name), options or {}, FEATURES, HIDDEN)
    connector.initialize(0.02)
    return connector


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("case", CASES)
def test_output_has_the_announced_number_of_tokens(case):
    name, options, patches, tokens = CASES[case]
    connector = make_connector(name, options)
    assert connector.num_tokens(patches) == tokens
    assert connector(torch.randn(3, patches, FEATURES)).shape == (3, tokens, HIDDEN)


def test_pool_averages_neighbouring_patches():
    connector = make_connector("mlp", {"num_layers": 1, "pool": 2})
    features = torch.randn(1, 16, FEATURES)
    pooled = features[:, [2, 3, 6, 7]].mean(1)  # the upper right block of the 4 x 4 grid
    torch.testing.assert_close(connector(features)[:, 1], connector.layers[0](pooled))


@pytest.mark.parametrize("connector", [{"name": "mlp", "pool": 2}, "pixel_shuffle"])
def test_text_alone_reaches_a_pooling_connector(connector):
    config = HfMoeConfig(
        text_config=LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32),
        vision_config=CLIPVisionConfig(hidden_size=16, num_attention_heads=2, image_size=16, patch_size=4),
        connector=connector,
        image_token_id=31,
    )
    model = HfMoeForConditionalGeneration(config).train()
    model.model.vision_tower.requires_grad_(False)
    ids = torch.arange(3, 9)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [parameter.grad for parameter in model.model.connector.parameters()]
    assert gradients and all(gradient is not None and not gradient.any() for gradient in gradients)


def test_norm_makes_the_output_independent_of_the_scale_of_the_features():
    features = torch.randn(2, 4, FEATURES)
    connector = make_connector("mlp", {"norm": True})
    torch.testing.assert_close(connector(features), connector(100 * features), atol=1e-4, rtol=1e-3)
    plain = make_connector("mlp")
    assert (plain(features) - plain(100 * features)).abs().max() > 0.1


@pytest.mark.parametrize("factor", [2, 3])
def test_pixel_shuffle_equals_the_idefics3_connector(factor):
    config = Idefics3Config(
        scale_factor=factor, vision_config={"hidden_size": FEATURES}, text_config={"hidden_size": HIDDEN}
    )
    reference = Idefics3Connector(config)
    connector = make_connector("pixel_shuffle", {"scale_factor": factor})
    connector.layers[0].weight.data = reference.modality_projection.proj.weight.data
    features = torch.randn(2, 36, FEATURES)
    torch.testing.assert_close(connector(features), reference(features))


@pytest.mark.parametrize("name, options", [("mlp", {}), ("pixel_shuffle", {"bias": True}), ("pixel_shuffle", {})])
def test_layers_follow_each_other_with_the_activation_between(name, options):
    connector = make_connector(name, {"num_layers": 3, "act": "silu", **options})
    layers = [module for module in connector.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 3 and all(layer.bias is None or not layer.bias.any() for layer in layers)
    connector.initialize(0.5)
    features = torch.randn(2, 4, FEATURES)
    expected = features if name == "mlp" else features.reshape(2, 1, 4 * FEATURES)
    for number, layer in enumerate(layers):
        expected = layer(nn.functional.silu(expected) if number else expected)
    torch.testing.assert_close(connector(features), expected)


@pytest.mark.parametrize("name", ["mlp", "pixel_shuffle"])
def test_an_unknown_activation_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match="act='swoosh': allowed are .*'gelu'"):
        make_connector(name, {"act": "swoosh"})


@pytest.mark.parametrize("patches", [15, 9])
@pytest.mark.parametrize("name, options", [("mlp", {"pool": 2}), ("pixel_shuffle", {})])
def test_patches_that_form_no_fitting_square_are_refused(name, options, patches):
    connector = make_connector(name, options)
    with pytest.raises(ValueError, match=f"got {patches} patches"):
        connector.num_tokens(patches)
    with pytest.raises(ValueError, match=f"got {patches} patches"):
        connector(torch.randn(1, patches, FEATURES))


@pytest.mark.parametrize(
    "name, options", [("mlp", {"num_layers": 0}), ("mlp", {"pool": 0}), ("pixel_shuffle", {"scale_factor": 0})]
)
def test_options_below_one_are_refused(name, options):
    with pytest.raises(ValueError, match="=0"):
        make_connector(name, options)


def test_unknown_option_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'scale_factor'"):
        make_connector("pixel_shuffle", {"scale_facter": 2})
