"""The host that is put together: vision tower -> connector -> decoder, dense as any model of Transformers."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto import AutoModel

from ...configuration.composed_config import ComposedConfig
from ..auxiliary import is_learning
from ..caches import cache_argument, name_cache
from ..generation import ImageGenerationMixin
from ..initialisation import MechanismInitialisation
from ..inputs import check_placeholders, encoded_images, find_placeholder, miss_images
from ..mechanisms import get_mechanism
from ..outputs import ComposedCausalLMOutput, ComposedModelOutput, extend_output
from ..registry import build, register
from ..vision import encode_images, insert_images, probe_tower, takes_packed_patches, touch_vision


class ComposedPreTrainedModel(MechanismInitialisation, PreTrainedModel):
    """What Transformers may do with models that are put together."""

    config: ComposedConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class ComposedModel(ComposedPreTrainedModel):
    """Tower, connector and decoder, without a head.

    Args:
        config: the model's configuration. What the tower's type does not tell is derived and stored in it.
    """

    def __init__(self, config: ComposedConfig):
        super().__init__(config)
        check_placeholders(config)
        self.vision_tower = None
        self.connector = None
        if config.vision_config is not None:
            probe = probe_tower(config)
            self.vision_tower = AutoModel.from_config(config.vision_config)
            # They would never get a gradient, and distributed training would fail at its second step.
            self.unreachable_parameters = [f"vision_tower.{name}" for name in probe.unreachable]
            for name in self.unreachable_parameters:
                self.get_parameter(name).requires_grad_(False)
            options = dict(config.connector)  # type: ignore[arg-type]
            connector = get_mechanism("connector", options.pop("name"))
            sizes = (config.vision_feature_size, config.text_config.hidden_size)
            self.connector = build("connector", connector, options, *sizes)
            self.num_patches = probe.num_patches
            num_tokens = self.connector.num_tokens(self.num_patches)
            if takes_packed_patches(config.vision_config) and num_tokens != self.num_patches:
                raise ValueError(
                    f"The tower {config.vision_config.model_type} takes images of any grid, and the connector "
                    f"{config.connector} merges patches of a square one: choose a connector that keeps every patch."
                )
            if config.image_seq_length is None:
                config.image_seq_length = num_tokens
            elif config.image_seq_length != num_tokens and not takes_packed_patches(config.vision_config):
                raise ValueError(
                    f"image_seq_length={config.image_seq_length}, but an image takes {num_tokens} tokens: leave it out"
                )
        self.language_model = AutoModel.from_config(config.text_config)
        self.cache_argument = cache_argument(type(self.language_model))
        self.post_init()

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Return the images as the decoder sees them, in `pooler_output`: a list of (P', d).

        Args:
            pixel_values (`torch.Tensor` of shape `(N, C, H, W)`, *optional*): N images, or packed patches with
                `pixel_attention_mask` and `spatial_shapes` where the tower takes those.
            image_features (`torch.Tensor` of shape `(N, P, C)`, *optional*): the tower's features, computed before.
            kwargs: `output_hidden_states` and `output_attentions` of the tower.
        """
        if self.vision_tower is None:
            raise ValueError("This model has no vision tower (vision_config is None): pass text only.")
        inputs = (pixel_values, image_features, pixel_attention_mask, spatial_shapes)
        result = encode_images(self.vision_tower, self.connector, self.config, *inputs, dtype=self.dtype, **kwargs)
        return result if self._wants_dict(return_dict) else result.to_tuple()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        *args: Any,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ComposedModelOutput | tuple:
        r"""
        Args:
            pixel_values, image_features, pixel_attention_mask, spatial_shapes: see
                [`~ComposedModel.get_image_features`].
            mm_encoder_outputs (`dict[str, BaseModelOutputWithPooling]`, *optional*): connected features, as
                `get_image_features` returns them, under the key `"image"`.
            mm_token_type_ids (`torch.Tensor` of shape `(B, S)`, *optional*): what processors return; without use here.
            args, kwargs: the decoder's further inputs. Its cache may have any name, or the place after `position_ids`.
        """
        kwargs = name_cache(self.cache_argument, args, kwargs)
        cache = kwargs.get(self.cache_argument)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        images = encoded_images(mm_encoder_outputs)
        empty = isinstance(pixel_values, torch.Tensor) and pixel_values.shape[:1] == (0,)
        has_pixels = pixel_values is not None and not empty
        if has_pixels or image_features is not None:
            if images is not None:
                raise ValueError("You cannot specify both images and mm_encoder_outputs at the same time")
            inputs = (pixel_values, image_features, pixel_attention_mask, spatial_shapes)
            images = self.get_image_features(*inputs, return_dict=True)
        if images is not None:
            mask = find_placeholder(self, input_ids, inputs_embeds, self.config.image_token_id)
            inputs_embeds = insert_images(inputs_embeds, mask, images.pooler_output, self.config.image_seq_length)
        elif self.connector is not None:
            miss_images(self.config, input_ids, cache, refuse=empty or is_learning(self))
            if self.training and cache is None:
                parts = (self.vision_tower, self.connector, self.config, self.num_patches)
                inputs_embeds = touch_vision(*parts, inputs_embeds)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        result = extend_output(
            ComposedModelOutput,
            outputs,
            image_outputs=images,
            image_hidden_states=images.pooler_output if images is not None else None,
        )
        return result if self._wants_dict(return_dict) else result.to_tuple()

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return self.config.return_dict if return_dict is None else return_dict


@register("host", "composed")
class ComposedForConditionalGeneration(ComposedPreTrainedModel, ImageGenerationMixin):
    """The composed model with a language head; its logits are those of the decoder's own `*ForCausalLM`."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ComposedConfig):
        super().__init__(config)
        self.model = ComposedModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling | tuple:
        return self.model.get_image_features(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ComposedCausalLMOutput | tuple:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `(B, S)`, *optional*): the tokens to predict, -100 where masked;
                shifted inside.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): how many of the last positions get logits; 0 for
                all.

            The rest as in [`ComposedModel`].
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_features=image_features,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            mm_encoder_outputs=mm_encoder_outputs,
            mm_token_type_ids=mm_token_type_ids,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = _scale_logits(self.lm_head(outputs.last_hidden_state[:, kept]), self.config.text_config)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size)
        result = extend_output(ComposedCausalLMOutput, outputs, loss=loss, logits=logits)
        return result if self.model._wants_dict(return_dict) else result.to_tuple()


def _scale_logits(logits: torch.Tensor, text_config: Any) -> torch.Tensor:
    """Apply what the decoder's own `ForCausalLM` does: scaling (Cohere, Granite), soft-capping (Gemma)."""
    scale = getattr(text_config, "logit_scale", None)
    if scale is not None:
        logits = logits * scale
    divisor = getattr(text_config, "logits_scaling", None)
    if divisor is not None:
        logits = logits / divisor
    cap = getattr(text_config, "final_logit_softcapping", None)
    if cap is not None:
        logits = cap * (logits / cap).tanh()
    return logits
