"""Vision towers: patch features out of any tower, and what a tower's type does not tell."""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.models.auto import AutoModel

from .inputs import check_integers, given, readable


def encode_images(
    tower: PreTrainedModel,
    connector: nn.Module,
    config,
    pixel_values: torch.Tensor | None,
    image_features: torch.Tensor | None,
    pixel_attention_mask: torch.Tensor | None,
    spatial_shapes: torch.Tensor | None,
    dtype: torch.dtype,
    **kwargs: Any,
) -> BaseModelOutputWithPooling:
    """Return what `ComposedModel.get_image_features` does, whose arguments these are."""
    if (pixel_values is None) == (image_features is None):
        raise ValueError("Pass either pixel_values or image_features.")
    outputs = BaseModelOutput(last_hidden_state=image_features)
    if image_features is None:
        _check_pixels(config, pixel_values, pixel_attention_mask, spatial_shapes)
        kwargs |= {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        outputs = run_tower(tower, config, pixel_values, **kwargs)
        image_features = outputs.last_hidden_state
    floating = isinstance(image_features, torch.Tensor) and image_features.is_floating_point()
    if not floating or image_features.dim() != 3 or image_features.shape[-1] != config.vision_feature_size:
        raise ValueError(
            f"image_features must be floating point of the shape (images, patches, {config.vision_feature_size}), got "
            f"{given(image_features)}."
        )
    connected = connector(image_features.to(dtype))  # (N, P', d)
    if pixel_attention_mask is None:
        images = list(connected)
    else:
        images = [rows[keep.bool()] for rows, keep in zip(connected, pixel_attention_mask, strict=True)]
    return BaseModelOutputWithPooling(
        last_hidden_state=image_features,
        pooler_output=images,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def _check_pixels(config, pixel_values: Any, pixel_attention_mask: Any, spatial_shapes: Any) -> None:
    """Refuse images of another type or shape than the tower takes."""
    vision = config.vision_config
    packed = takes_packed_patches(vision)
    channels = getattr(vision, "num_channels", None) or 3
    width = channels * vision.patch_size**2 if packed else channels
    form = f"(images, patches, {width})" if packed else f"(images, {width}, height, width)"
    floating = isinstance(pixel_values, torch.Tensor) and pixel_values.is_floating_point()
    if not floating or pixel_values.dim() != (3 if packed else 4) or pixel_values.shape[2 if packed else 1] != width:
        raise ValueError(
            f"pixel_values must be floating point of the shape {form}, as the image processor returns them, got "
            f"{given(pixel_values)}."
        )
    if readable(pixel_values) and not pixel_values.isfinite().all():
        raise ValueError("pixel_values must be finite, got NaN or infinite ones.")
    if packed:
        count, patches = pixel_values.shape[:2]
        check_integers("pixel_attention_mask", pixel_attention_mask, (count, patches), "patches")
        check_integers("spatial_shapes", spatial_shapes, (count, 2), "images")


def run_tower(tower: PreTrainedModel, config, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
    """Run a tower on N images; `last_hidden_state` holds their patch features (N, P, C).

    Takes the hidden state that `config.vision_feature_layer` names, or the last one; flattens feature maps
    (N, C, H, W) row by row and drops the prefix tokens (class, registers).

    Args:
        kwargs: further inputs of towers that take packed patches, such as SigLIP2's `spatial_shapes`, and
            `output_hidden_states` and `output_attentions`.
    """
    layer = config.vision_feature_layer
    accepted = inspect.signature(tower.forward).parameters
    kwargs = {name: value for name, value in kwargs.items() if name in accepted or name.startswith("output_")}
    if layer is not None:
        kwargs["output_hidden_states"] = True
    try:
        outputs = tower(pixel_values, return_dict=True, **kwargs)
    except (RuntimeError, ValueError) as error:
        if takes_packed_patches(config.vision_config) or pixel_values.shape[2:] == (config.image_size,) * 2:
            raise
        raise ValueError(
            f"pixel_values of the shape {tuple(pixel_values.shape)} do not fit the tower "
            f"({config.vision_config.model_type}), whose images are {config.image_size} x {config.image_size}: {error}"
        ) from error
    if layer is not None and not -len(outputs.hidden_states) <= layer < len(outputs.hidden_states):
        raise ValueError(
            f"vision_feature_layer={layer} is none of the {len(outputs.hidden_states)} hidden states of the tower."
        )
    features = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]
    if isinstance(features, list | tuple):
        features = features[-1]
    if features.dim() == 4:
        features = features.flatten(2).transpose(1, 2)
    else:
        features = features[:, config.vision_prefix_tokens or 0 :]
    return BaseModelOutput(
        last_hidden_state=features,
        hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
    )


def tower_features(tower: PreTrainedModel, config, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Return the patch features (N, P, C) of N images, see [`run_tower`]."""
    return run_tower(tower, config, pixel_values, **kwargs).last_hidden_state


def dummy_pixels(config, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
    """Return one black image in the form the tower takes."""
    vision = config.vision_config
    channels = getattr(vision, "num_channels", None) or 3
    if takes_packed_patches(vision):
        side = int(vision.num_patches**0.5)
        pixels = torch.zeros(1, side * side, channels * vision.patch_size**2, device=device, dtype=dtype)
        return {
            "pixel_values": pixels,
            "pixel_attention_mask": None,
            # The tower reads the numbers themselves: the meta device has none.
            "spatial_shapes": torch.tensor([[side, side]], device="cpu"),
        }
    size = config.image_size
    if size is None:
        raise ValueError(
            f"The size of an image is not in the config of the tower ({vision.model_type}): set image_size, in pixels."
        )
    return {"pixel_values": torch.zeros(1, channels, size, size, device=device, dtype=dtype)}


def takes_packed_patches(vision_config) -> bool:
    """Whether the tower takes patches of any grid, as SigLIP2 does: it has a number of positions and no image size."""
    return bool(getattr(vision_config, "num_patches", None)) and not getattr(vision_config, "image_size", None)


@dataclass(frozen=True)
class TowerProbe:
    """What one run of a tower on the meta device tells.

    Attributes:
        num_patches: P, the features of one image of `image_size`.
        unreachable: names of the parameters that have no part in the features, such as CLIP's `post_layernorm` and
            SigLIP's pooling head.
    """

    num_patches: int
    unreachable: tuple[str, ...]


def probe_tower(config) -> TowerProbe:
    """Run a tower of `config.vision_config` once, without memory or data, and fill the config's `vision_feature_size`
    and `vision_prefix_tokens` where they are absent."""
    meta = torch.device("meta")
    with meta:
        # Flex attention refuses the meta device, and all implementations give features of one shape. The networks of
        # timm have their own, and warn of any other.
        attention = "sdpa" if config.vision_config.model_type == "timm_wrapper" else "eager"
        # A copy: the config keeps the implementation that it was built with.
        tower = AutoModel.from_config(copy.deepcopy(config.vision_config), attn_implementation=attention).eval()
    names, parameters = zip(*tower.named_parameters(), strict=True)
    inputs = dummy_pixels(config, meta, parameters[0].dtype)
    with torch.enable_grad():
        features = tower_features(tower, config, **inputs)  # (1, P, C)
        gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    num_patches = features.shape[1]
    width = features.shape[-1]
    if config.vision_feature_size not in (None, width):
        raise ValueError(
            f"vision_feature_size={config.vision_feature_size}, but the features of the tower have the width {width}: "
            "leave it out."
        )
    config.vision_feature_size = width
    if num_patches < 1:
        raise ValueError(
            f"vision_prefix_tokens={config.vision_prefix_tokens} leaves nothing of an image: leave it out."
        )
    if config.vision_prefix_tokens is None:
        config.vision_prefix_tokens = _prefix_tokens(tower, config, num_patches)
        num_patches -= config.vision_prefix_tokens
    unreachable = tuple(name for name, gradient in zip(names, gradients, strict=True) if gradient is None)
    return TowerProbe(num_patches, unreachable)


def _prefix_tokens(tower: PreTrainedModel, config, num_tokens: int) -> int:
    """Return how many of the tower's tokens are no patches; 0 where it returns a map or merges patches."""
    patch_size = getattr(config.vision_config, "patch_size", None)
    timm_model = getattr(tower, "timm_model", None)
    if timm_model is not None:
        # timm's feature maps come without their prefix tokens.
        returns_maps = getattr(tower, "features_only", False) or config.vision_feature_layer is not None
        return 0 if returns_maps else getattr(timm_model, "num_prefix_tokens", 0)
    if isinstance(patch_size, int) and config.image_size is not None:
        return max(0, num_tokens - (config.image_size // patch_size) ** 2)
    return 0


def insert_images(
    inputs_embeds: torch.Tensor, placeholders: torch.Tensor, images: list[torch.Tensor], image_seq_length: int
) -> torch.Tensor:
    """Replace the embeddings (B, S, d) at the placeholders (B, S) by the images, (P', d) each, in order."""
    features = torch.cat(list(images)).to(inputs_embeds.device, inputs_embeds.dtype)  # (sum P', d)
    if not torch.compiler.is_compiling() and int(placeholders.sum()) != features.shape[0]:
        raise ValueError(
            f"Image features and image tokens do not match: {int(placeholders.sum())} placeholder tokens in the text, "
            f"{features.shape[0]} features from {len(images)} images. The processor writes {image_seq_length} "
            "placeholders per image. Truncation may have cut some; or several processes read a stream whose rows have "
            "several images, which Accelerate cuts as if each row had one: set dispatch_batches=False in the "
            "accelerator_config of TrainingArguments."
        )
    return inputs_embeds.masked_scatter(placeholders[..., None], features)


def touch_vision(
    tower: PreTrainedModel, connector: nn.Module, config, num_patches: int, inputs_embeds: torch.Tensor
) -> torch.Tensor:
    """Return `inputs_embeds`, depending on the connector, and on a trainable tower, by a zero.

    A batch of text alone must leave a gradient of zeros on them, or distributed training waits for ever.
    """
    if any(parameter.requires_grad for parameter in tower.parameters()):
        features = tower_features(tower, config, **dummy_pixels(config, inputs_embeds.device, tower.dtype))
    else:
        # A whole image: connectors that pool take no part of one.
        features = inputs_embeds.new_zeros(1, num_patches, config.vision_feature_size)
    return inputs_embeds + 0.0 * connector(features).sum()
