"""A multimodal MoE: any host of Transformers, with MoE layers in its decoder.

The model's class is made at run time: `HfMoeForConditionalGeneration` before the host's own class with a language
head. All that the host does (towers, connectors, positions, masks, generation) stays the host's. This file adds the
MoE layers, the routing context and the objectives.
"""

import functools
import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from ..configuration.configuration_hf_moe import PLACE_FIELDS, HfMoeConfig
from ..configuration.layer_maps import at_layer
from ..configuration.saving import PACKAGE
from .auxiliary import AuxiliaryLosses, count_labels, is_learning, warn_without_labels
from .base import HfMoePreTrainedModel
from .block import Block
from .caches import cache_argument, name_cache
from .context import (
    ROUTING_INPUTS,
    Arguments,
    build_context,
    carry_context,
    moe_blocks,
    routers_of,
    shared_parts,
    wants_router_logits,
)
from .host import install_blocks, install_in_connector
from .host_layers import decoder_layers, tower_layers
from .inputs import check_labels, vocabulary
from .language_loss import token_balanced_loss
from .layer_spec import Site
from .mechanisms import get_mechanism
from .optimizer_steps import Statistics, count_in_backward, end_cleared_step, end_step, follow_steps, is_sharded
from .outputs import prepare_outputs, routed_output, router_logits
from .overrides import RoutingOverrides
from .parts import find_part, freeze_towers_in_eval, host_parts, text_decoder
from .plans import float32_patterns, plan_moe_layers
from .routing import Router
from .routing_context import CALL_CONTEXT, RoutingContext
from .towers import carry_place_context


# What a call with a loss may bring besides those.
OWN_INPUTS: dict[str, Any] = {
    **ROUTING_INPUTS,
    "output_routing": bool,
    "num_items_in_batch": torch.Tensor | int | None,
}

# What of a load decides where its config is found.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")

# In the order in which a type's class is looked up: audio models are among the last.
HEADS = (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)


def host_model_class(config: Any) -> Any:
    """Return the host's class with a language head.

    Raises:
        ValueError: if `host_class` is none of Transformers, or of another host, or absent where its type has none.
    """
    if config.host_type is None:
        return get_mechanism("host", "composed")
    known = [names[config.host_type] for names in HEADS if config.host_type in names]
    named = config.host_class or next(iter(known), None)
    found: Any = getattr(transformers, named or "", None)
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not is_model or not found.can_generate():
        raise ValueError(
            f"host_class={named!r} is no class of Transformers with a language head: for host_type="
            f"{config.host_type!r} name one such as '...ForConditionalGeneration' or '...ForCausalLM'."
        )
    # Some types have the class of another, and a config that is none of that.
    other = isinstance(config, PreTrainedConfig) and not isinstance(config, found.config_class)
    if other and named not in known:
        raise ValueError(
            f"host_class={named!r} is built from a config of the type {found.config_class.model_type!r}, and this is "
            f"one of host_type={config.host_type!r}: name a class of that host, or leave host_class out."
        )
    return found


class HfMoeForConditionalGeneration(HfMoePreTrainedModel, GenerationMixin):
    """A host with MoE layers, their objectives in its loss, and routing statistics.

    The language loss is the host's; objectives are added as `auxiliary.py` says. Population statistics (loads, biases)
    move on when a torch optimizer that holds parameters of the model has stepped, see `optimizer_steps.py`: plain
    `Trainer` and any other loop are right without a callback.

    Args:
        config: its host decides of which class the model is, see [`hosted_class`].
    """

    # The loss is divided by `num_items_in_batch`, whatever the host says of its own.
    accepts_loss_kwargs = True
    # How far training is, 0 to 1; the trainer moves it, schedules in routers read it from the context.
    training_progress = 0.0

    def __new__(cls, config: Any, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(hosted_class(cls, host_model_class(config)))

    def __init__(self, config: HfMoeConfig):
        # A requested experts backend would reach the host's own classes too, and those without experts refuse it.
        requested, config._experts_implementation = config._experts_implementation, None
        super().__init__(config)
        if requested is not None:
            self.set_experts_implementation(requested)
        if config.host_type is not None:
            config.host_class = type(self).hf_moe_host.__name__
        decoder = text_decoder(self)
        self.cache_argument = cache_argument(type(decoder))
        text = config.get_text_config(decoder=True)
        install_blocks(decoder_layers(decoder), config, config.moe_config, text, vocab_size=vocabulary(config))
        for place in PLACE_FIELDS:
            self.install_place(place)
        if config.host_type is None:
            # Experts may have taken the place of a feed-forward that no feature depends on.
            unreachable = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
            self.model.unreachable_parameters = unreachable
        self.base_model.shared_routing = shared_parts(self)
        self.objectives = AuxiliaryLosses(config, [router.spec for router in routers_of(self).values()])
        kept = getattr(self, "_keep_in_fp32_modules_strict", None) or ()
        self._keep_in_fp32_modules_strict = {*kept, *float32_patterns(self)}
        carry_context(self.base_model, decoder, config.moe_config.attention_blocks)
        follow_steps(self)
        self.register_forward_pre_hook(pass_context, with_kwargs=True)
        self.register_forward_hook(add_objectives, with_kwargs=True)
        self.post_init()
        for model in (decoder, self.base_model, self):
            plan_moe_layers(model)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(cls, "hf_moe_host"):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        # The class has to be the host's from the start: Transformers reads what a class may do from it.
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):
            source = config or pretrained_model_name_or_path
            hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            config = cls.config_class.from_pretrained(source, **hub)
        hosted = hosted_class(cls, host_model_class(config))
        return hosted.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_host(cls, host: Any, **kwargs: Any) -> Any:
        """Return a model of Transformers as a MoE, see `hf_moe.construction.in_place.from_host`.

        Raises:
            ImportError: without the package, for what builds models does not travel with a checkpoint.
        """
        if PACKAGE.from_host is None:
            raise ImportError("Building a MoE needs the package: pip install hf-moe, and import hf_moe first.")
        return PACKAGE.from_host(host, **kwargs)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        freeze_towers_in_eval(self)
        return self

    def install_place(self, place: str) -> None:
        """Make the feed-forwards of a tower or connector MoE layers, where the config has those of the place."""
        moe = getattr(self.config, PLACE_FIELDS[place])
        if moe is None:
            return
        parts = host_parts(self)
        path, modalities = find_part(self, parts, place)
        if place == "connector":
            moe.check_layers(1)
            block = install_in_connector(self, path, self.config, moe)
            carry_place_context(block, block, place, modalities)
        else:
            tower = self.get_submodule(path)
            layers = tower_layers(tower, [self.get_submodule(item) for item in parts.connectors])
            moe.check_layers(len(layers))
            carry_place_context(tower, layers[0], place, modalities)
            install_blocks(layers, self.config, moe, tower.config, place=place, causal=False)

    def moe_layers(self) -> dict[int, Block]:
        """Return the MoE layers of the decoder by layer index."""
        return {block.layer_idx: block for block in self.moe_blocks().values() if not block.spec.place}

    def moe_blocks(self) -> dict[Site, Block]:
        """Return all MoE layers by site: an index in the decoder, `"vision.3"` or `"connector.0"` elsewhere."""
        return moe_blocks(self)

    def routing_context(self, **inputs: Any) -> RoutingContext:
        """Build what the routers may know of a forward pass with these inputs, see [`build_context`]."""
        return build_context(self, inputs, self.training_progress if self.training else 1.0)

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        """Repeat the conditions of the rows as well, which the beams and samples of a row share."""
        if kwargs.get("condition_ids"):
            conditions = kwargs["condition_ids"].items()
            kwargs["condition_ids"] = {name: ids.repeat_interleave(expand_size, 0) for name, ids in conditions}
        return super()._expand_inputs_for_generation(expand_size, *args, **kwargs)

    def routed_forward(self, host_forward: Any, arguments: Arguments, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the host's forward, which takes `arguments`, in a routing context, and add what the routing brings."""
        names, positional = arguments
        given = {**dict(zip(positional, args, strict=False)), **kwargs}
        given = name_cache(self.cache_argument, args[len(positional) :], given)
        own = {name: given.get(name) for name in OWN_INPUTS}
        context = own["routing_context"]
        if context is None:
            context = self.open_context(**given)
        labels, return_dict = given.get("labels"), given.get("return_dict")
        dropped = {"labels", "return_dict", *(set(OWN_INPUTS) - set(names))}
        inputs = {name: value for name, value in given.items() if name not in dropped}
        if "output_router_logits" in names:
            inputs["output_router_logits"] = False
        token = CALL_CONTEXT.set(context)
        try:
            output = host_forward(self, **inputs, return_dict=True)
        finally:
            CALL_CONTEXT.reset(token)
        context.memory.keep(output, given)
        ours: dict[str, Any] = {}
        if labels is not None:
            ours = self._losses(context, output.logits, labels, own["num_items_in_batch"], given.get("shift_labels"))
        elif is_learning(self) and self.objectives.by_name:
            warn_without_labels(list(self.objectives.by_name))
        if wants_router_logits(self.config, own["output_router_logits"]):
            ours["router_logits"] = router_logits(context)
        if own["output_routing"]:
            ours["routing"] = context
        result = routed_output(output, **ours)
        self.count(context, result)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return result if wants_dict else result.to_tuple()

    def _losses(
        self,
        context: RoutingContext,
        logits: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
        shift_labels: torch.Tensor | None,
    ) -> dict[str, Any]:
        """Return the loss, and the auxiliary part of it. What is only measured is the usual loss, which compares
        between models."""
        if self.config.moe_config.token_balanced_loss and torch.is_grad_enabled():
            loss = token_balanced_loss(logits, labels, context.token_mask, num_items_in_batch)
        else:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
        auxiliary = self.objectives(context, count_labels(labels), num_items_in_batch)
        return {
            "loss": auxiliary.added_to(loss),
            "aux_loss": auxiliary.total(),
            "objective_values": auxiliary.totals() or None,
        }

    def open_context(self, **inputs: Any) -> RoutingContext:
        """Return the context of a forward pass with these inputs."""
        context = self.routing_context(**inputs)
        if inputs.get("labels") is not None:
            check_labels(self.config, context.token_mask, inputs["labels"])
        if is_learning(self):
            end_cleared_step(self)
        labelled = inputs.get("labels") is not None or inputs.get("shift_labels") is not None
        context.wanted = self.objectives.reads if labelled else frozenset()
        return context

    def count(self, context: RoutingContext, output: Any) -> None:
        """Let a forward pass enter the statistics of routers and objectives once its backward runs, if it trains.

        Under PEFT a router that is not trained keeps its bias: no adapter would save what it has become, and the model
        with the adapter disabled has to stay the one that it was.
        """
        if not is_learning(self):
            return
        adapted = hasattr(self, "peft_config")
        statistics: Statistics = [(self.objectives, (context,))]
        decisions = [(site, item, part) for part in context.contexts() for site, item in part.decisions.items()]
        routers = routers_of(self)
        for site, decision, part in decisions:
            if not adapted or any(parameter.requires_grad for parameter in routers[site].parameters()):
                statistics.append((routers[site], (decision, part)))
        count_in_backward(self, output, statistics)

    def end_step(self) -> None:
        """Close the statistics of an optimizer step; only for loops without a torch optimizer, which tells itself."""
        end_step(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        follow_steps(self)

    def set_expert_budget(self, budget: float | None) -> None:
        """Move the number of experts per token that the routers aim at, without training; the config keeps it.

        Args:
            budget: within the routers' [min_slots, max_slots]; `None` for every layer's `num_experts_per_tok`.

        Raises:
            ValueError: if no router has a slot budget, or the budget is out of range.
        """
        routers = self._budgeted_routers(budget)
        moe_config = self.config.moe_config
        options = {str(layer): dict(at_layer(moe_config.router, layer)) for layer in self.moe_layers()}
        for layer, router in routers.items():
            target = float(router.spec.num_experts_per_tok if budget is None else budget)
            # PEFT puts a copy of a gate that it trains beside the original, and a wrapper around both.
            for module in self.moe_layers()[layer].gate.modules():
                if isinstance(module, Router):
                    module.target_slots = target
            # The router derives its least number of slots from its target where the config does not tell.
            options[str(layer)] |= {"target_slots": budget, "min_slots": router.min_slots}
        first = next(iter(options.values()))
        moe_config.router = first if all(item == first for item in options.values()) else options

    @torch.no_grad()
    def generate(self, *args: Any, expert_budget: float | None = None, **kwargs: Any) -> Any:
        """Generate with `expert_budget` experts per token in place of the model's own target."""
        if expert_budget is not None:
            self._budgeted_routers(expert_budget)
            given = kwargs.get("routing_overrides") or RoutingOverrides()
            kwargs["routing_overrides"] = RoutingOverrides(given.logit_offset, given.disabled_experts, expert_budget)
        return super().generate(*args, **kwargs)

    def _budgeted_routers(self, budget: float | None) -> dict[int, Any]:
        """Return the routers with a slot budget by layer, after `budget` was checked against their range."""
        layers = self.moe_layers().items()
        routers = {index: layer.router for index, layer in layers if layer.router.target_slots is not None}
        if not routers:
            raise ValueError("No router of this model has a slot budget: choose one such as 'anyexperts'.")
        for router in routers.values():
            router.check_budget(budget)
        return routers


def pass_context(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Hook before a training forward that a trainer has put in place of the model's own: keep its context in sight.

    TRL does so, to get the log-probability of every label without the logits.
    """
    if not is_learning(model) or "forward" not in vars(model) or kwargs.get("routing_context") is not None:
        return None
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    inputs = {**dict(zip(names, args, strict=False)), **kwargs}
    return args, {**kwargs, "routing_context": model.open_context(**inputs)}


def add_objectives(model: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Hook after a forward: add the objectives to log-probabilities, which the model's own forward never returns."""
    context: RoutingContext | None = kwargs.get("routing_context")
    if context is None or getattr(output, "log_probs", None) is None:
        return
    if model.objectives.by_name:
        model.objectives(context, output.label_mask.sum(-1), kwargs.get("num_items_in_batch")).add_to(output)
    model.count(context, output)


def hosted_class(base: Any, host: Any) -> Any:
    """Return the class of a host's models with MoE layers: `base` before the host's own class.

    It has the name of `base`, and a `forward` with the arguments of the host's and those of the routing.
    """
    return base if hasattr(base, "hf_moe_host") else _make_hosted_class(base, host)


@functools.cache
def _make_hosted_class(base: Any, host: Any) -> Any:
    signature = inspect.signature(host.forward)
    given = list(signature.parameters.values())
    arguments = Arguments.of(host.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.routed_forward(host.forward, arguments, args, kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        if is_sharded(self):
            return object.__reduce_ex__(self, protocol)
        return _new_hosted, (base, host), self.__dict__

    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in OWN_INPUTS.items()
        if name not in arguments.names
    ]
    rest = [item for item in given if item.kind is item.VAR_KEYWORD]
    parameters = [*(item for item in given if item not in rest), *added, *rest]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    forward.__doc__ = host.forward.__doc__
    prepare_outputs(host.forward)
    body = {"__module__": base.__module__, "__doc__": base.__doc__, "forward": forward}
    body["__reduce_ex__"] = __reduce_ex__
    body |= {"hf_moe_base": base, "hf_moe_host": host}
    for name in ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"):
        body[name] = [*(getattr(base, name) or ()), *(getattr(host, name) or ())]
    return type(base.__name__, (base, host), body)


def _new_hosted(base: type, host: type) -> nn.Module:
    return object.__new__(hosted_class(base, host))


__all__ = ["HfMoeForConditionalGeneration", "HfMoePreTrainedModel"]
