"""Vision towers: patch features out of any tower, and what a tower's type does not tell."""

import inspect

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import AutoModel


def tower_features(tower: PreTrainedModel, config, pixel_values: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
    """Return the patch features (N, P, C) of N images.

    Takes the hidden state that `config.vision_feature_layer` names, or the last one; flattens feature maps (N, C, H, W)
    row by row and drops the prefix tokens (class, registers).

    Args:
        kwargs: further inputs of towers that take packed patches, such as SigLIP2's `spatial_shapes`.
    """
    layer = config.vision_feature_layer
    accepted = inspect.signature(tower.forward).parameters
    kwargs = {name: value for name, value in kwargs.items() if value is not None and name in accepted}
    if layer is None:
        features = tower(pixel_values, **kwargs).last_hidden_state
    else:
        features = tower(pixel_values, output_hidden_states=True, **kwargs).hidden_states[layer]
    if isinstance(features, list | tuple):
        features = features[-1]
    if features.dim() == 4:
        return features.flatten(2).transpose(1, 2)
    return features[:, config.vision_prefix_tokens or 0 :]


def dummy_pixels(config, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return one black image in the form the tower takes.

    Raises:
        ValueError: if neither `image_size` nor the tower's config tells the size of an image.
    """
    vision = config.vision_config
    channels = getattr(vision, "num_channels", None) or 3
    if getattr(vision, "num_patches", None) and not getattr(vision, "image_size", None):
        # Towers that take packed patches (SigLIP2): one square grid of as many patches as they have positions.
        side = int(vision.num_patches**0.5)
        pixels = torch.zeros(1, side * side, channels * vision.patch_size**2, device=device, dtype=dtype)
        return {
            "pixel_values": pixels,
            "pixel_attention_mask": torch.ones(1, side * side, dtype=torch.long, device=device),
            "spatial_shapes": torch.tensor([[side, side]]),
        }
    size = config.image_size
    if size is None:
        raise ValueError(
            f"The size of an image is not in the config of the tower ({vision.model_type}): set image_size, in pixels."
        )
    return {"pixel_values": torch.zeros(1, channels, size, size, device=device, dtype=dtype)}


def derive_vision_fields(config) -> None:
    """Fill `vision_feature_size`, `vision_prefix_tokens` and the patches per image, by one run on the meta device.

    The fields are stored in the config, so that a checkpoint opens without this.
    """
    if None not in (config.vision_feature_size, config.vision_prefix_tokens):
        return
    with torch.device("meta"):
        tower = AutoModel.from_config(config.vision_config).eval()
    inputs = dummy_pixels(config, torch.device("meta"), torch.float32)
    config.vision_prefix_tokens = 0
    features = tower_features(tower, config, **inputs)
    config.vision_feature_size = features.shape[-1]
    timm_model = getattr(tower, "timm_model", None)
    patch_size = getattr(config.vision_config, "patch_size", None)
    if timm_model is not None:
        config.vision_prefix_tokens = getattr(timm_model, "num_prefix_tokens", 0)
    elif patch_size is not None and config.image_size is not None:
        config.vision_prefix_tokens = features.shape[1] - (config.image_size // patch_size) ** 2


def patches_per_image(config) -> int:
    """Return P of one image of `image_size`, by a run on the meta device."""
    with torch.device("meta"):
        tower = AutoModel.from_config(config.vision_config).eval()
    return tower_features(tower, config, **dummy_pixels(config, torch.device("meta"), torch.float32)).shape[1]


def freeze_unreachable(tower: PreTrainedModel, config) -> None:
    """Freeze the tower's parameters that have no part in its features.

    CLIP's `post_layernorm` and SigLIP's pooling head are such: they would never get a gradient, and distributed
    training would fail at its second step.
    """
    with torch.device("meta"):
        probe: nn.Module = AutoModel.from_config(config.vision_config).eval()
    features = tower_features(probe, config, **dummy_pixels(config, torch.device("meta"), torch.float32))
    names, parameters = zip(*probe.named_parameters(), strict=True)
    gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    own = dict(tower.named_parameters())
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is None:
            own[name].requires_grad_(False)
