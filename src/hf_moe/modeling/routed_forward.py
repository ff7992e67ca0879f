"""What surrounds the forward pass of the model: its routing context before, statistics and objectives behind it.

A trainer may put a forward of its own in place of the model's, as TRL does to get the log-probability of every label
without the logits. Two hooks on the model surround such a forward in the same way.
"""

import inspect
from typing import Any

from torch import nn

from .auxiliary import AuxiliaryLosses, is_learning
from .context import routers_of
from .inputs import check_labels
from .optimizer_steps import Statistics, count_in_backward, end_cleared_step, end_step, follow_steps
from .routing_context import RoutingContext


class RoutedForward:
    """What a model with a loss does around its forward pass; to be inherited before `PreTrainedModel`."""

    config: Any
    objectives: AuxiliaryLosses
    routing_context: Any

    def open_context(self, **inputs: Any) -> RoutingContext:
        """Return the context of a forward pass with these inputs.

        Raises:
            ValueError: if an input does not fit the others or the model.
        """
        context = self.routing_context(**inputs)
        if inputs.get("labels") is not None:
            check_labels(self.config, context.modality_ids, inputs["labels"])
        if is_learning(self):
            end_cleared_step(self)
        labelled = inputs.get("labels") is not None or inputs.get("shift_labels") is not None
        context.keep_outputs = labelled and self.objectives.reads_outputs
        context.keep_gate_overlap = labelled and self.objectives.reads_gate_overlap
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
        super().__setstate__(state)  # type: ignore[misc]
        follow_steps(self)


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
    model.count(context, output)


def install_hooks(model: nn.Module) -> None:
    """Surround every forward that may be put in place of the model's own, and follow the optimizer's steps."""
    follow_steps(model)
    model.register_forward_pre_hook(pass_context, with_kwargs=True)
    model.register_forward_hook(add_objectives, with_kwargs=True)
