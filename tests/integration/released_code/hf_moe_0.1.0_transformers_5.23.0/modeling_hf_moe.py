# Written by hf_moe when this checkpoint was saved; the next save replaces or removes this file.
# SHA-256 of the model's code: 0c87989b7e063e8ac15fd00febb57079724ffa3127fc85a28cada36c6d45f492
"""The multimodal MoE model: vision tower -> connector -> decoder whose feed-forwards are MoE layers."""

import functools
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto import AutoModel

from .configuration_hf_moe import HfMoeConfig
from .auxiliary import AuxiliaryLosses, count_labels, is_learning, warn_without_labels
from .base import HfMoePreTrainedModel
from .caches import cache_argument, name_cache
from .elastic import ElasticBudget
from .generation import ImageGenerationMixin
from .host import install_moe_layers, scale_logits
from .inputs import (
    check_ids,
    check_mask,
    check_mask_and_positions,
    check_placeholders,
    check_tokens,
    encoded_images,
    learned_positions,
    miss_images,
    modality_ids,
    real_tokens,
)
from .language_loss import token_balanced_loss
from .mechanisms import get_mechanism
from .moe_layer import MoELayer
from .outputs import HfMoeCausalLMOutputWithPast, HfMoeModelOutputWithPast, extend_output, router_logits
from .overrides import RoutingOverrides
from .plans import float32_patterns, plan_moe_layers
from .registry import build
from .routed_forward import RoutedForward, install_hooks
from .routing import RoutingContext
from .vision import encode_images, insert_images, probe_tower, takes_packed_patches, touch_vision


class HfMoeModel(HfMoePreTrainedModel):
    """Tower, connector and decoder, without a head.

    Args:
        config: the model's configuration. What the tower's type does not tell is derived and stored in it.
    """

    # How far training is, 0 to 1; the trainer moves it, schedules in routers read it from the context.
    training_progress = 0.0

    def __init__(self, config: HfMoeConfig):
        super().__init__(config)
        check_placeholders(config)
        self.vision_tower = None
        self.connector = None
        for part in filter(None, (config.text_config, config.vision_config)):
            # A requested experts backend reaches these too, and a class without experts refuses it.
            part._experts_implementation = None
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
            num_tokens = self.connector.num_tokens(probe.num_patches)
            if takes_packed_patches(config.vision_config) and num_tokens != probe.num_patches:
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
        self.max_positions = learned_positions(self.language_model)
        install_moe_layers(self.language_model, config)
        plan_moe_layers(self.language_model)
        self._keep_in_fp32_modules_strict = float32_patterns(self.language_model)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def moe_layers(self) -> dict[int, MoELayer]:
        """Return the MoE layers by layer index."""
        layers = [module for module in self.language_model.modules() if isinstance(module, MoELayer)]
        return {layer.layer_idx: layer for layer in layers}

    def train(self, mode: bool = True) -> "HfMoeModel":
        # A frozen tower keeps its batch statistics and drops nothing.
        super().train(mode)
        if self.vision_tower is not None and not any(p.requires_grad for p in self.vision_tower.parameters()):
            self.vision_tower.eval()
        return self

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

    def routing_context(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        condition_ids: dict[str, torch.Tensor] | None = None,
        routing_overrides: RoutingOverrides | None = None,
    ) -> RoutingContext:
        """Build what the routers may know of this forward pass; the arguments are those of `forward`.

        Raises:
            ValueError: if an argument does not fit the others or the model.
        """
        tokens = check_tokens(self.config, input_ids, inputs_embeds)
        check_mask(attention_mask, tokens)
        check_ids(tokens, mm_token_type_ids, condition_ids)
        if mm_token_type_ids is None:
            placeholders = functools.partial(self._placeholders, input_ids, inputs_embeds)
            mm_token_type_ids = modality_ids(self.config, placeholders, tokens)
        if routing_overrides is not None:
            if not isinstance(routing_overrides, RoutingOverrides):
                raise ValueError(
                    f"routing_overrides must be RoutingOverrides(...), got {type(routing_overrides).__name__}."
                )
            routing_overrides.check_layers({index: layer.router for index, layer in self.moe_layers().items()})
        return RoutingContext(
            modality_ids=mm_token_type_ids.long(),
            token_mask=real_tokens(attention_mask, tokens),
            input_ids=input_ids,
            condition_ids=condition_ids,
            progress=self.training_progress if self.training else 1.0,
            overrides=routing_overrides,
        )

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
        condition_ids: dict[str, torch.Tensor] | None = None,
        routing_overrides: RoutingOverrides | None = None,
        routing_context: RoutingContext | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> HfMoeModelOutputWithPast | tuple:
        r"""
        Args:
            pixel_values, image_features, pixel_attention_mask, spatial_shapes: see [`~HfMoeModel.get_image_features`].
            mm_encoder_outputs (`dict[str, BaseModelOutputWithPooling]`, *optional*): connected features, as
                `get_image_features` returns them, under the key `"image"`.
            mm_token_type_ids (`torch.Tensor` of shape `(B, S)`, *optional*): 0 text, 1 image, 2 video, 3 audio.
                Derived from the placeholders when absent, in `inputs_embeds` by their embeddings.
            condition_ids (`dict[str, torch.Tensor]`, *optional*): task, domain or language ids of shape `(B,)`.
            routing_overrides (`RoutingOverrides`, *optional*): test-time control of the routing.
            routing_context (`RoutingContext`, *optional*): a context built before; its `decisions` are filled.
            args, kwargs: the decoder's further inputs. Its cache may have any name, or the place after `position_ids`.
        """
        kwargs = name_cache(self.cache_argument, args, kwargs)
        if routing_context is None:
            routing_context = self.routing_context(
                input_ids, inputs_embeds, attention_mask, mm_token_type_ids, condition_ids, routing_overrides
            )
        tokens = inputs_embeds if input_ids is None else input_ids
        cache = kwargs.get(self.cache_argument)
        check_mask_and_positions(tokens, attention_mask, position_ids, cache, self.max_positions)
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
            mask = self._placeholders(input_ids, inputs_embeds, self.config.image_token_id)
            inputs_embeds = insert_images(inputs_embeds, mask, images.pooler_output, self.config.image_seq_length)
        elif self.connector is not None:
            miss_images(self.config, input_ids, cache, refuse=empty or is_learning(self))
            if self.training and cache is None:
                inputs_embeds = touch_vision(self.vision_tower, self.connector, self.config, inputs_embeds)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            routing_context=routing_context,
            return_dict=True,
            **kwargs,
        )
        if output_router_logits is None:
            # Tools set it on the decoder's config.
            text_config = self.config.text_config
            output_router_logits = self.config.output_router_logits or text_config.output_router_logits
        result = extend_output(
            HfMoeModelOutputWithPast,
            outputs,
            router_logits=router_logits(routing_context) if output_router_logits else None,
            image_outputs=images,
            image_hidden_states=images.pooler_output if images is not None else None,
        )
        return result if self._wants_dict(return_dict) else result.to_tuple()

    def _placeholders(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, token_id: int
    ) -> torch.Tensor:
        """Return where the placeholder of this id is, (B, S) bool."""
        if input_ids is not None:
            return input_ids == token_id
        placeholder = torch.tensor(token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return self.config.return_dict if return_dict is None else return_dict


class HfMoeForConditionalGeneration(RoutedForward, ElasticBudget, HfMoePreTrainedModel, ImageGenerationMixin):
    """The model with its language head, loss and generation.

    The language loss is the host's; objectives are added as `auxiliary.py` says. Population statistics (loads, biases)
    move on when a torch optimizer that holds parameters of the model has stepped, see `optimizer_steps.py`: plain
    `Trainer` and any other loop are right without a callback.
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HfMoeConfig):
        super().__init__(config)
        self.model = HfMoeModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.objectives = AuxiliaryLosses(config, [layer.spec for layer in self.model.moe_layers().values()])
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        install_hooks(self)
        self.post_init()

    @property
    def base_model(self) -> HfMoeModel:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling | tuple:
        return self.model.get_image_features(*args, **kwargs)

    def moe_layers(self) -> dict[int, MoELayer]:
        """Return the MoE layers by layer index."""
        return self.model.moe_layers()

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
        condition_ids: dict[str, torch.Tensor] | None = None,
        routing_overrides: RoutingOverrides | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_router_logits: bool | None = None,
        output_routing: bool = False,
        routing_context: RoutingContext | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> HfMoeCausalLMOutputWithPast | tuple:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `(B, S)`, *optional*): the tokens to predict, -100 where masked;
                shifted inside.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): how many of the last positions get logits; 0 for
                all.
            num_items_in_batch (`int`, *optional*): labels of the whole optimizer step, as `Trainer` passes it.
            output_routing (`bool`, defaults to `False`): return the routing context, with every MoE layer's decision.

            The rest as in [`HfMoeModel`].
        """
        kwargs = name_cache(self.model.cache_argument, args, kwargs)
        if routing_context is None:
            routing_context = self.open_context(
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                mm_token_type_ids=mm_token_type_ids,
                condition_ids=condition_ids,
                routing_overrides=routing_overrides,
                labels=labels,
            )
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
            routing_context=routing_context,
            output_router_logits=output_router_logits,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        logits = scale_logits(logits, self.config.text_config)

        loss, aux_loss, values = None, None, None
        if labels is not None:
            # What is only measured is the usual loss, which compares between models.
            if self.config.moe_config.token_balanced_loss and torch.is_grad_enabled():
                loss = token_balanced_loss(logits, labels, routing_context.token_mask, num_items_in_batch)
            else:
                loss = self.loss_function(
                    logits=logits,
                    labels=labels,
                    vocab_size=self.config.text_config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                    **kwargs,
                )
            auxiliary = self.objectives(routing_context, count_labels(labels), num_items_in_batch)
            aux_loss, values = auxiliary.total(), auxiliary.totals()
            loss = auxiliary.added_to(loss)
        elif is_learning(self) and self.objectives.by_name:
            warn_without_labels(list(self.objectives.by_name))

        result = extend_output(
            HfMoeCausalLMOutputWithPast,
            outputs,
            loss=loss,
            logits=logits,
            aux_loss=aux_loss,
            objective_values=values or None,
            routing=routing_context if output_routing else None,
        )
        self.count(routing_context, result)
        return result if self.model._wants_dict(return_dict) else result.to_tuple()


__all__ = ["HfMoeForConditionalGeneration", "HfMoeModel", "HfMoePreTrainedModel"]


HfMoeForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
