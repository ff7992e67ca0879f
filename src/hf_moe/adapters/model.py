"""The tuner: puts LoRA experts on a model, and takes them off again."""

import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..modeling.routing import MoELayerSpec, Router, RoutingContext
from .config import MoeLoraConfig
from .constant_routing import RoutingVaries, constant_gates
from .layer import Linear, MoeLoraLayer, check_decision
from .objectives import install_hooks, tuner_layers
from .routing import TokenlessContext, adapted_layer_class, enclosing_layer, knows_tokens, layer_width


# As Transformers' models start their linear layers.
INIT_STD = 0.02

MERGE_REFUSED = (
    "cannot be merged into the base weights: {reason}. hf_moe.adapters.merging has merge_for, for one task or "
    "modality, and merge_by_mean_routing, an approximation whose error it measures."
)


class MoeLoraModel(BaseTuner):
    """Puts a mixture of LoRA experts on the targeted linear layers of a model.

    Args:
        model: the model to adapt; it alone is changed, and `unload` or `delete_adapter` undo it.
        config: the configuration.
        adapter_name: name of the adapter, `"default"` unless said.
    """

    prefix = "moe_lora_"
    tuner_layer_cls = MoeLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    # Of the hooks on the root.
    _handles: list[Any] = []

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # Not in `_post_injection_hook`, which a second adapter does not reach.
        self._specs: list[MoELayerSpec] = []
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        if config.objectives:
            first = next(layer for layer in tuner_layers(model) if adapter_name in layer.moe_lora_A)
            losses = config.build_objectives(self._specs)
            for objective in losses.by_name.values():
                objective.initialize(INIT_STD)
            first.moe_lora_objectives[adapter_name] = losses
        self._handles = install_hooks(model) or self._handles

    def _prepare_adapter_config(self, peft_config: MoeLoraConfig, model_config: dict) -> MoeLoraConfig:
        if peft_config.revision is None:
            # The commit of a base that came from the Hub.
            peft_config.revision = getattr(getattr(self.model, "config", None), "_commit_hash", None)
        return super()._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(
        self,
        peft_config: MoeLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, MoeLoraLayer) else target
        if not isinstance(base, (nn.Linear, Conv1D)):
            raise ValueError(
                f"LoRA experts go on linear layers, and {current_key!r} is a {type(base).__name__}: narrow "
                "target_modules, or name it in exclude_modules."
            )
        rank_key = get_pattern_key(peft_config.rank_pattern.keys(), current_key)
        alpha_key = get_pattern_key(peft_config.alpha_pattern.keys(), current_key)
        layer_name = enclosing_layer(self.model, current_key)
        layer = None if layer_name is None else self.model.get_submodule(layer_name)
        tokens_known = knows_tokens(self.model, layer)
        owner = self._owner(peft_config, adapter_name, layer, current_key)
        router = None
        if owner is None:
            width = base.weight.shape[0] if isinstance(base, Conv1D) else base.in_features
            if peft_config.router_input == "decoder_layer":
                width = layer_width(self.model, layer_name)  # type: ignore[arg-type]
            router = self._new_router(peft_config, width, tokens_known, current_key)
        options: dict[str, Any] = {
            "config": peft_config,
            "rank": peft_config.rank_pattern.get(rank_key, peft_config.r),
            "alpha": peft_config.alpha_pattern.get(alpha_key, peft_config.lora_alpha),
            "router": router,
            "owner": owner,
        }
        if isinstance(target, MoeLoraLayer):
            target.update_layer(adapter_name, **options)
        else:
            new_module = Linear(target, adapter_name, **options)
            if adapter_name not in self.active_adapters:
                new_module.requires_grad_(False)
            self._replace_module(parent, target_name, new_module, target)
            target = new_module
        if owner is None and peft_config.router_input == "decoder_layer":
            target.router_owner[adapter_name] = target
        if layer is not None and not hasattr(layer, "moe_lora_host_class"):
            layer.__class__ = adapted_layer_class(type(layer), tokens_known)  # type: ignore[arg-type]

    def _owner(
        self, config: MoeLoraConfig, adapter_name: str, layer: nn.Module | None, key: str
    ) -> MoeLoraLayer | None:
        """Return the target of the same decoder layer that holds the shared router already, if there is one."""
        if config.router_input == "target":
            return None
        if layer is None:
            raise ValueError(
                f"{key!r} lies in no decoder layer, whose input its router could read: name it in exclude_modules, or "
                "set router_input='target', where every target has its own router."
            )
        return next((target for target in tuner_layers(layer) if adapter_name in target.moe_lora_router), None)

    def _new_router(self, config: MoeLoraConfig, width: int, tokens_known: bool, key: str) -> Router:
        """Return an initialised router that is known to work where it stands."""
        if config.objectives and not tokens_known:
            raise ValueError(
                f"objectives={list(config.objectives)} cannot reach {key!r}: padding must not count, and this model "
                "tells its layers nothing of its tokens. Leave the objectives out, or name it in exclude_modules."
            )
        spec = config.spec(len(self._specs), width)
        self._specs.append(spec)
        router = config.build_router(spec)
        router.initialize(INIT_STD)
        if not any(parameter.is_meta for parameter in router.parameters()):
            probe = torch.zeros(1, 1, width)
            context = RoutingContext.all_text(probe) if tokens_known else TokenlessContext(probe)
            with torch.no_grad():
                check_decision(router(probe[0], context))
        return router

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._release()

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        self._release()
        return model

    def _release(self) -> None:
        """Give every decoder layer without an adapter its own class back, and the root its own forward."""
        for module in self.model.modules():
            if hasattr(module, "moe_lora_host_class") and not any(item.moe_lora_A for item in tuner_layers(module)):
                module.__class__ = module.moe_lora_host_class
        if not any(item.moe_lora_A for item in tuner_layers(self.model)):
            for handle in self._handles:
                handle.remove()

    def _check_merge_allowed(self) -> None:
        """Refuse a merge that would change the model, before any weight is touched."""
        super()._check_merge_allowed()
        for layer in tuner_layers(self.model):
            for adapter_name in layer.active_adapters:
                if adapter_name in layer.moe_lora_router and adapter_name not in layer.merged_adapters:
                    try:
                        constant_gates(layer.moe_lora_router[adapter_name])
                    except RoutingVaries as error:
                        raise ValueError(f"Adapter {adapter_name!r} {MERGE_REFUSED.format(reason=error)}") from error

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # The name stands right behind the container, also where a router or an objective has parts of its own.
        return re.sub(rf"(\.{cls.prefix}[^.]+)\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key)
