"""The tuner: puts LoRA experts on a model, and takes them off again."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..modeling.context import closing_class
from ..modeling.initialisation import initialize_mechanisms
from ..modeling.inputs import vocabulary
from ..modeling.layer_spec import MoELayerSpec
from ..modeling.routing import Router
from ..modeling.subclasses import is_made_by
from . import hosts
from .aliases import check_all_found, is_fused_target, is_other_norm, stacked_targets
from .checkpoints import check_complete
from .config import MoeLoraConfig, TargetSettings
from .constant_routing import RoutingVaries, constant_gates
from .deciding import check_decision_of
from .feed_forward import adapt_feed_forwards, whole_ffn_class
from .frozen import FrozenExperts, numbered_layers
from .host_router import HostRouter
from .index import drop_indices
from .layer import Linear, MoeLoraLayer, tuner_layers
from .objectives import install_hooks
from .routing import OUTPUT_EXPERTS, adapted_layer_class
from .targets import LayerOutput, ParamWrapper, WholeModule


# As Transformers' models start their linear layers.
INIT_STD = 0.02


class TargetRefused(ValueError):
    """A target that cannot be adapted as configured, where others can."""


class MoeLoraModel(BaseTuner):
    """Puts LoRA experts on the targeted layers of a model; `unload` or `delete_adapter` undo it."""

    prefix = "moe_lora_"
    tuner_layer_cls = MoeLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    _handles: list[Any] = []  # of the hooks on the root

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # Not in `_post_injection_hook`, which a second adapter does not reach.
        self._specs: list[MoELayerSpec] = []
        self._refused: dict[str, list[str]] = {}  # why targets cannot be adapted, and which
        self._parts = hosts.parts_of(model)
        config = self.peft_config[adapter_name]
        # Before PEFT makes a list of names of "all-linear".
        self._named = config.target_modules if isinstance(config.target_modules, set) else set()
        stacked = [key for key in stacked_targets(model, config) if self._is_in_part(config, key)]
        if stacked:
            config.target_parameters = sorted({*(config.target_parameters or ()), *stacked})
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if self._refused:
                raise ValueError(_refusal(self._refused))
            self._complete(model, adapter_name, self.peft_config[adapter_name])
        except ValueError:  # no target is left adapted
            self.delete_adapter(adapter_name)
            if not self.peft_config:
                self.unload()
            raise

    def _complete(self, model: nn.Module, adapter_name: str, config: MoeLoraConfig) -> None:
        """Add what an adapter has besides its targets."""
        # PEFT records the class of the base only where there is no task type.
        config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
        _warn_of_unmatched(model, adapter_name, config)
        if config.objectives:
            first = next(layer for layer in tuner_layers(model) if adapter_name in layer.experts)
            losses = config.build_objectives(self._specs)
            initialize_mechanisms(losses, INIT_STD)
            first.moe_lora_objectives[adapter_name] = losses
        if config.ffn_experts:
            adapt_feed_forwards(model, adapter_name)
        check_all_found(model, adapter_name, config, self._named)
        if config.frozen_experts:
            for layer in numbered_layers(model, adapter_name, config):
                layer.frozen_experts[adapter_name] = FrozenExperts(layer, adapter_name, config.frozen_experts)
        drop_indices(model)
        self._handles = install_hooks(model) or self._handles

    def _prepare_adapter_config(self, peft_config: MoeLoraConfig, model_config: dict) -> MoeLoraConfig:
        if peft_config.target_parameters and peft_config.target_modules is None:
            peft_config.target_modules = []  # not those that PEFT would guess
        return super()._prepare_adapter_config(peft_config, model_config)

    def _check_target_module_exists(self, peft_config: MoeLoraConfig, key: str) -> Any:
        found = check_target_module_exists(peft_config, key)
        if peft_config.system is not None and isinstance(peft_config.target_modules, set):
            if found and is_other_norm(self.model, key):
                return False
            found = found or is_fused_target(self.model, peft_config, key)
        return found and self._is_in_part(peft_config, key)

    def _is_in_part(self, peft_config: MoeLoraConfig, key: str) -> bool:
        """Whether `key` lies in the part of a multimodal model that is adapted."""
        return peft_config.model_part is None or hosts.part_of(self._parts, key) in (None, peft_config.model_part)

    def _check_target_module_compatiblity(self, config: MoeLoraConfig, model: nn.Module, target_name: str) -> None:
        # PEFT knows modules whose weights kernels take, and asks it of its own methods alone.
        super()._check_target_module_compatiblity(SimpleNamespace(peft_type="LORA"), model, target_name)

    def _create_and_replace(
        self, peft_config: MoeLoraConfig, *place: Any, current_key: str, parameter_name: str | None = None
    ) -> None:
        if parameter_name is not None and not self._is_in_part(peft_config, current_key):
            return
        try:
            self._adapt_target(peft_config, *place, current_key=current_key, parameter_name=parameter_name)  # type: ignore[misc]
        except TargetRefused as error:
            self._refused.setdefault(str(error), []).append(current_key)

    def _adapt_target(
        self,
        peft_config: MoeLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None,
    ) -> None:
        plain = not (isinstance(target, MoeLoraLayer) or hosts.is_linear(target))
        if parameter_name is None and plain and hosts.is_layer(self.model, current_key):
            layer_name: str | None = current_key
            parent, target_name = target, OUTPUT_EXPERTS
            target = target._modules.get(OUTPUT_EXPERTS) or LayerOutput(target)
        else:
            layer_name = hosts.enclosing_layer(self.model, current_key)
        base = target.get_base_layer() if isinstance(target, MoeLoraLayer) else target
        layer = None if layer_name is None else self.model.get_submodule(layer_name)
        linear = hosts.is_linear(base)
        if isinstance(parent, nn.MultiheadAttention):
            raise TargetRefused("nn.MultiheadAttention reads its weight and never calls it: experts would not act.")
        if hasattr(base, "_hf_hook") and any(parameter.is_meta for parameter in base.parameters()):
            raise TargetRefused("Experts are put where the weights are, and these are offloaded: offload afterwards.")
        if not linear:
            self._check_module(peft_config, base, layer, current_key, parameter_name)
        settings = peft_config.settings(current_key, getattr(base, "num_experts", None))
        if layer is None:  # there is nothing to share, nor a hidden state that enters
            settings = replace(settings, router_input="target")
        tokens_known = hosts.known_tokens(self.model, layer_name)
        owner = self._owner(settings, adapter_name, layer_name)
        router = None
        if owner is None:
            width = base.weight.shape[0] if isinstance(base, Conv1D) else getattr(base, "in_features", None)
            if settings.router_input != "target" or not linear:
                width = hosts.layer_width(self.model, layer_name)  # type: ignore[arg-type]
            router = self._new_router(peft_config, settings, width, layer, tokens_known)  # type: ignore[arg-type]
        options: dict[str, Any] = {
            "config": peft_config,
            "settings": settings,
            "key": current_key,
            "layer_name": layer_name,
            "router": router,
            "owner": owner,
            "head_dim": getattr(parent, "head_dim", None),
        }
        if isinstance(target, MoeLoraLayer) and parameter_name == getattr(target, "parameter_name", None):
            target.update_layer(adapter_name, **options)
        else:
            new_module: MoeLoraLayer
            if parameter_name is not None:
                new_module = ParamWrapper(target, adapter_name, parameter_name, **options)
            elif linear:
                new_module = Linear(target, adapter_name, **options)
            else:
                width = hosts.layer_width(self.model, layer_name)  # type: ignore[arg-type]
                new_module = WholeModule(target, adapter_name, width, **options)
            if adapter_name not in self.active_adapters:
                new_module.requires_grad_(False)
            self._replace_module(parent, target_name, new_module, target)
            target = new_module
        deciding = (owner or target).moe_lora_router[adapter_name]
        try:
            check_decision_of(deciding, target.takes_mixed_slots(adapter_name), tokens_known)
        except ValueError as error:
            raise TargetRefused(str(error)) from error
        if router is not None and settings.router_input != "target" and "call" not in router.reads:
            target.router_owner[adapter_name] = target
        if layer is not None and not is_made_by(layer, adapted_layer_class):
            hosts.swap_class(layer, adapted_layer_class(type(layer), tokens_known is not None))

    def _check_module(
        self, config: MoeLoraConfig, base: nn.Module, layer: nn.Module | None, key: str, parameter_name: str | None
    ) -> None:
        """Refuse a target that is no linear layer and no module between hidden states either."""
        if layer is None:
            raise TargetRefused(
                "LoRA experts go on linear layers, on modules inside of a decoder layer or encoder block and on these "
                f"as a whole, and this is a {type(base).__name__}."
            )
        if parameter_name is not None:
            return
        for name, _ in base.named_modules():
            if name and self._check_target_module_exists(config, f"{key}.{name}"):
                raise ValueError(f"{key!r} and {name!r} inside of it are both targets: leave one of them out.")

    def _owner(self, settings: TargetSettings, adapter_name: str, layer_name: str | None) -> MoeLoraLayer | None:
        """Return the target that holds the router this one shares already, if there is one."""
        if settings.router_input == "target" or settings.router["name"] == HostRouter.mechanism_name:
            return None
        shared = settings.router_input == "model"
        if shared and hosts.known_tokens(self.model, layer_name) is None:
            raise TargetRefused(
                "One router cannot be shared with all layers where the model passes nothing from layer to layer: set "
                "router_input='decoder_layer'."
            )
        scope = self.model if shared else self.model.get_submodule(layer_name)
        sharing = (target for target in tuner_layers(scope) if adapter_name in target.moe_lora_router)
        return next((item for item in sharing if item.router_group[adapter_name] == settings.router_group), None)

    def _new_router(
        self,
        config: MoeLoraConfig,
        settings: TargetSettings,
        width: int,
        layer: nn.Module | None,
        tokens_known: str | None,
    ) -> Router:
        """Return an initialised router that is known to work where it stands."""
        if config.objectives and tokens_known is None:
            raise TargetRefused(
                f"objectives={list(config.objectives)} cannot reach where the model tells nothing of its tokens, for "
                "padding must not count: leave the objectives out."
            )
        bidirectional = hosts.is_bidirectional(layer)
        vocab_size = vocabulary(self.model.config) if tokens_known == "text" else None
        spec = config.spec(len(self._specs), width, settings, causal=not bidirectional, vocab_size=vocab_size)
        self._specs.append(spec)
        router = config.build_router(spec, settings)
        initialize_mechanisms(router, INIT_STD)
        if router.looks_ahead and (spec.causal or config.ffn_experts):
            raise TargetRefused(
                f"The router {settings.router['name']!r} mixes all tokens of a sequence, which is not for whole "
                "feed-forwards, nor for layers whose attention hides later tokens from earlier ones: adapt a vision "
                "tower or an encoder, with ffn_experts=False."
            )
        if type(router).shared_part([router]) is not None:
            raise TargetRefused(
                f"The router {settings.router['name']!r} is in part a module of the whole model, where LoRA experts "
                "have no place: choose one whose layers stand for themselves, such as 'top_k', with "
                "router_input='model' for one decision in all of them."
            )
        unknown = hosts.reads_text(self.model, layer) or (layer is not None and not bidirectional)
        if "sequence" in router.reads and tokens_known is None and unknown:
            raise TargetRefused(
                f"The router {settings.router['name']!r} pools the tokens of a sequence, and the model does not "
                "tell which of them are padding, or cached: choose a router that decides token by token."
            )
        return router

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, (WholeModule, ParamWrapper)) and not isinstance(new_module, MoeLoraLayer):
            setattr(parent, child_name, new_module)  # PEFT would look for the weight of a linear layer
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._release()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        self._release()
        return model

    def _release(self) -> None:
        """Give every decoder layer without an adapter its own class back, and the root its own forward."""
        for module in self.model.modules():
            swapped = is_made_by(module, adapted_layer_class) or is_made_by(module, whole_ffn_class)
            if swapped and not any(item.experts for item in tuner_layers(module)):
                hosts.swap_class(module, module.host_class)
                module._modules.pop(OUTPUT_EXPERTS, None)
        if not any(item.experts for item in tuner_layers(self.model)):
            for handle in self._handles:
                handle.remove()
            if self._handles:
                for module in {self.model, getattr(self.model, "base_model", self.model)}:
                    if is_made_by(module, closing_class):
                        module.__class__ = module.host_class
            self._handles = []
        drop_indices(self.model)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Refuse a merge that would change the model, before any weight is touched."""
        for layer in tuner_layers(self.model):
            for adapter_name in layer.active_adapters if adapter_names is None else adapter_names:
                if adapter_name not in layer.experts or adapter_name in layer.merged_adapters:
                    continue
                try:
                    merged = layer.merged_weight(adapter_name, constant_gates(layer.deciding_router(adapter_name)))
                except RoutingVaries as error:
                    raise ValueError(
                        f"Adapter {adapter_name!r} cannot be merged into the base weights: {error}. "
                        "hf_moe.adapters.merging has merge_for, for one task or modality, and merge_by_mean_routing, "
                        "an approximation whose error it measures."
                    ) from error
                if safe_merge and not merged.isfinite().all():
                    raise ValueError(f"Merging adapter {adapter_name!r} gives weights that are not finite.")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "LoRA experts take no adapter_names, one adapter per row: set_adapter() chooses for a call, and the "
                "router 'condition' chooses experts by row."
            )
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoeLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if config.hf_moe_version is not None:  # a saved adapter; into a new one, parts of another may be loaded
            own = re.compile(rf"\.{cls.prefix}(?!objectives)[^.]+\.{re.escape(adapter_name)}(\.|$)")
            # What the model does not have keeps the name that it was saved under, without the adapter's.
            others = re.compile(rf"\.{cls.prefix}(?!objectives)")
            expected = {key for key in model.state_dict() if own.search(key)}
            check_complete(expected, {key for key in remapped if others.search(key)}, config)
        return remapped

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # The name follows the container, also where a router or an objective has parts of its own.
        return re.sub(rf"(\.{cls.prefix}[^.]+)\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key)


def _refusal(refused: dict[str, list[str]]) -> str:
    """Return the message about all targets that cannot be adapted, with `*` for the numbers of layers."""
    lines = []
    for reason, keys in refused.items():
        names = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", key) for key in keys)
        lines.append(f"{', '.join(names)}: {reason}")
    return "\n".join([*lines, "Or leave these targets out, by target_modules or exclude_modules."])


def _warn_of_unmatched(model: nn.Module, adapter_name: str, config: MoeLoraConfig) -> None:
    """Warn of overrides and layers for what the model does not have, as PEFT does of its patterns."""
    targets = [layer.key[adapter_name] for layer in tuner_layers(model) if adapter_name in layer.key]
    names = [name for name, _ in model.named_modules()] + targets  # stacked weights are no modules
    layers = config.layers_to_transform
    layers = [layers] if isinstance(layers, int) else layers or []
    unmatched = {
        "target_overrides keys": [
            key for key in config.target_overrides if not any(re.match(rf"(.*\.)?({key})$", name) for name in names)
        ],
        "layers_to_transform": [item for item in layers if not any(f".{item}." in key for key in targets)],
    }
    for what, values in unmatched.items():
        if values:
            warnings.warn(
                f"The following {what} match no module of the model and were ignored: {values}.",
                RuntimeWarning,
                stacklevel=3,
            )
