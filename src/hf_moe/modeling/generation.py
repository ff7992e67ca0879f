"""Generation over images: features in place of pixels, and the modalities of drafted tokens."""

import functools
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from .inputs import miss_images, modality_ids


# By each of them images come to the placeholders of a prompt.
IMAGE_INPUTS = ("pixel_values", "mm_encoder_outputs", "inputs_embeds")


class ImageGenerationMixin(GenerationMixin):
    """Generation for models of text and images; to be inherited in place of `GenerationMixin`."""

    config: Any
    get_image_features: Any

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, image_features: torch.Tensor | None = None, **kwargs: Any):
        """Generate as every Transformers model does; `image_features` may stand in for `pixel_values`."""
        if image_features is not None:
            mask = kwargs.pop("pixel_attention_mask", None)
            images = self.get_image_features(None, image_features, mask, return_dict=True)
            kwargs["mm_encoder_outputs"] = {"image": images}
        # What a model drafts for another comes without the images, which the other has seen.
        drafts = getattr(kwargs.get("generation_config"), "is_assistant", None)
        text_alone = all(kwargs.get(name) is None for name in IMAGE_INPUTS)
        if self.config.vision_config is not None and not drafts and text_alone:
            cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
            miss_images(self.config, kwargs.get("input_ids", inputs), cache, refuse=True)
        return super().generate(inputs, **kwargs)

    # Transformers reads the signature to tell which arguments `generate` may get.
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        kwargs = _complete_modalities(self.config, input_ids, kwargs)
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)


def _complete_modalities(config: Any, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Derive the modality ids of drafted tokens: Transformers appends none for those."""
    given = kwargs.get("mm_token_type_ids")
    if given is None or given.shape[-1] >= input_ids.shape[-1]:
        return kwargs
    drafted = input_ids[:, given.shape[-1] :]
    derived = modality_ids(config, lambda token_id: drafted == token_id, drafted)
    return {**kwargs, "mm_token_type_ids": torch.cat([given, derived.to(given)], dim=-1)}
