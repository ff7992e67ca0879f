# Written by hf_moe when this checkpoint was saved; the next save replaces or removes this file.
"""What surrounds the forward pass of the model: its routing context before, statistics and objectives behind it.

A trainer may put a forward of its own in place of the model's, as TRL does to get the log-probability of every label
without the logits. Two hooks on the model surround such a forward in the same way.
"""

import inspect
from typing import Any

from torch import nn

from .auxiliary import AuxiliaryLosses, is_learning
from .routing import RoutingContext


CONTEXT_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "mm_token_type_ids",
    "condition_ids",
    "routing_overrides",
)


class RoutedForward:
    """What a model with a loss does around its forward pass; to be inherited before `PreTrainedModel`."""

    model: Any
    objectives: AuxiliaryLosses
    moe_layers: Any

    def open_context(self, **inputs: Any) -> RoutingContext:
        """Return the context of a forward pass with these inputs; the first one of an optimizer step ends the last."""
        if is_learning(self):
            self._end_finished_step()
        context = self.model.routing_context(**{name: inputs.get(name) for name in CONTEXT_INPUTS})
        labelled = inputs.get("labels") is not None or inputs.get("shift_labels") is not None
        context.keep_outputs = labelled and self.objectives.reads_outputs
        return context

    def accumulate(self, context: RoutingContext) -> None:
        """Add a forward pass to the statistics of routers and objectives, if it is one that trains."""
        if is_learning(self):
            self.objectives.accumulate(context)
            for layer_idx, layer in self.moe_layers().items():
                layer.router.accumulate(context.decisions[layer_idx], context)

    def _end_finished_step(self) -> None:
        """Close the statistics of the previous optimizer step if its gradients have been cleared.

        `Trainer` and `optimizer.zero_grad()` set gradients to `None`, so the first micro-batch of a step finds none.
        """
        gates = (parameter for layer in self.moe_layers().values() for parameter in layer.gate.parameters())
        watched = next((parameter for parameter in gates if parameter.requires_grad), None)
        if watched is not None and watched.grad is None:
            self.objectives.end_step()
            for layer in self.moe_layers().values():
                layer.router.end_step()


def pass_context(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Hook before a training forward that is not the model's own: keep its routing context in sight."""
    if not is_learning(model) or "forward" not in vars(model):
        return None
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    inputs = {**dict(zip(names, args, strict=False)), **kwargs}
    return args, {**kwargs, "routing_context": model.open_context(**inputs)}


def add_objectives(model: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Hook behind a forward: add the objectives to log-probabilities, which the model's own forward never returns."""
    context: RoutingContext | None = kwargs.get("routing_context")
    if context is None or getattr(output, "log_probs", None) is None:
        return
    if model.objectives.by_name:
        model.objectives(context, output.label_mask.sum(-1), kwargs.get("num_items_in_batch")).add_to(output)
    model.accumulate(context)


def install_hooks(model: nn.Module) -> None:
    """Surround every forward that may be put in place of the model's own."""
    model.register_forward_pre_hook(pass_context, with_kwargs=True)
    model.register_forward_hook(add_objectives, with_kwargs=True)
