"""How the objectives of an adapter enter the loss that the base model returns.

    loss = base loss + sum_r (n_r / N) * sum_o coef_o * A_o[r]

with n_r the labels of row r and N those of the optimizer step, exactly as in our own models (`modeling/auxiliary.py`),
and as there through the gradient of the log-probabilities where a trainer makes its loss of those. Labels that are not
one per token, as in classification, count one a row. With gradients off the loss stays the base model's.
"""

import re
import warnings
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..modeling.auxiliary import count_labels, is_learning, warn_without_labels
from ..modeling.context import closing_class
from ..modeling.decisions import ExpertAssignment
from ..modeling.optimizer_steps import Statistics, count_in_backward, follow_steps
from ..modeling.routing import Router
from ..modeling.routing_context import RoutingContext
from .frozen import install_frozen_hooks
from .index import index_of
from .routing import before_call, root_inputs


def install_hooks(model: nn.Module) -> list[Any]:
    """Hook context and objectives to the forward of the root and of its backbone, once; return the new handles."""
    if any(hook is before_call for hook in model._forward_pre_hooks.values()):
        return []
    backbone = getattr(model, "base_model", model)
    handles = [*install_frozen_hooks(model), model.register_forward_hook(warn_of_idle_targets)]
    for module in [model] if backbone is model else [model, backbone]:
        follow_steps(module)
        # Before those of our own backbones, which would open a context without the conditions of adapters.
        handles.append(module.register_forward_pre_hook(before_call, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(after_call, with_kwargs=True))
        if isinstance(module, PreTrainedModel):
            module.__class__ = closing_class(type(module))
    return handles


def warn_of_idle_targets(model: nn.Module, *_: Any) -> None:
    """Hook after the root's forward: warn, after the first one that is trained, of targets that were not called."""
    index = index_of(model)
    if not is_learning(model) or index.asked_for_idle:
        return
    index.asked_for_idle = True
    idle = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", key) for layer in index.idle() for key in layer.key.values()})
    if idle:
        warnings.warn(
            f"LoRA experts on {', '.join(idle)} did nothing in the first training step: either the batch did not reach"
            " this part of the model, or the model reads the weight there and never calls the layer. Experts on such "
            "a layer never learn: leave it out by exclude_modules.",
            stacklevel=2,
        )


def after_call(model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Hook after the forward of the root, or of its backbone: add the objectives of the active adapters to the loss,
    and leave what the routers have remembered with the key-value cache.
    """
    context: RoutingContext | None = kwargs.get("moe_lora_context")
    if context is None or context.opened_by is not model:  # it is of a model around this one
        return
    context.memory.keep(output, kwargs, args)
    inputs = root_inputs(model, args, kwargs)
    row_labels = _row_labels(inputs.get("labels"), output, context)
    learns = is_learning(model)
    if row_labels is None and not learns:
        return
    routers = [
        (adapter_name, router)
        for layer in index_of(model).targets
        for adapter_name, router in layer.moe_lora_router.items()
        if router.spec.layer_idx in context.of(adapter_name).decisions
    ]
    objectives = {
        name: losses
        for layer in index_of(model).active()
        for name, losses in layer.moe_lora_objectives.items()
        if name in layer.active_adapters
    }
    if row_labels is not None:
        for adapter_name, losses in objectives.items():
            _check(model, adapter_name, context, routers, output)
            routing = context.of(adapter_name)
            routing.carry["auxiliary_loss"] = loss = losses(routing, row_labels, inputs.get("num_items_in_batch"))
            loss.add_to(output)
    elif objectives:
        warn_without_labels([name for losses in objectives.values() for name in losses.by_name])
    if not learns:
        return
    statistics: Statistics = [
        (losses, (context.of(adapter_name),))
        for adapter_name, losses in objectives.items()
        if context.of(adapter_name).decisions
    ]
    contexts = ((router, context.of(adapter_name)) for adapter_name, router in routers)
    statistics += [(router, (routing.decisions[router.spec.layer_idx], routing)) for router, routing in contexts]
    count_in_backward(model, output, statistics)


def _row_labels(labels: torch.Tensor | None, output: Any, context: RoutingContext) -> torch.Tensor | None:
    """Return how many labels every row has, (B,); `None` where there are none."""
    label_mask = getattr(output, "label_mask", None)
    if label_mask is not None:
        return label_mask.sum(-1)
    if labels is None:
        return None
    token_mask = context.token_mask
    return count_labels(labels) if labels.shape == token_mask.shape else labels.new_ones(len(token_mask))


def _check(
    model: nn.Module, adapter_name: str, context: RoutingContext, routers: list[tuple[str, Router]], output: Any
) -> None:
    """Refuse objectives that could not be computed, or whose gradient would not arrive."""
    if not context.of(adapter_name).decisions:
        raise ValueError(
            f"The objectives of adapter {adapter_name!r} found no routing decision: {type(model).__name__} "
            "does not pass keyword arguments, such as the routing context, on to its layers. Leave them out."
        )
    if not isinstance(output, ModelOutput) or output.get("loss") is None:
        raise ValueError(
            f"The objectives of adapter {adapter_name!r} are added to the loss that {type(model).__name__} "
            "returns, and it returned none: call it with return_dict=True."
        )
    for name, router in routers if torch.is_grad_enabled() else ():
        if name == adapter_name and any(parameter.requires_grad for parameter in router.parameters()):
            decision = context.of(name).decisions[router.spec.layer_idx]
            probs = decision.router_probs if isinstance(decision, ExpertAssignment) else None
            if probs is not None and not probs.requires_grad:
                raise ValueError(
                    "Reentrant gradient checkpointing cuts the gradient of the objectives: pass "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}, or leave the objectives out."
                )
