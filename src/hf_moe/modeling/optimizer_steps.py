"""When the statistics of routers and objectives count, and when the optimizer step that they describe has ended.

A training forward counts when its backward runs: a forward that nobody learns from says nothing of the step. What has
counted is closed when a torch optimizer that holds parameters of the model has stepped. It is then the population of
the next step, and the biases of the routers have moved; n steps close n times, whatever the order of the loop.

- Several forwards, micro-batches or evaluations of a closure before a step are one step.
- Where several optimizers hold parameters of a model, each step of one closes what has counted since the last closing;
  a second one that steps right afterwards finds nothing to close.
- A step that a `GradScaler` skips is none: its batches count for the next step that happens. The weights that routed
  them are those that route the next batch, and loads are shares, so they make the estimate better, not wrong.
- A loop without a torch optimizer tells nothing. There the first training forward that finds all gradients cleared
  (`None`) closes, or the loop calls [`end_step`] itself.
- A forward that is compiled as a whole counts at once: a graph cannot wait for its backward.
"""

import functools
import gc
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


# Models whose steps are followed, and whether a torch optimizer holds their parameters, once that is known.
_FOLLOWED: WeakKeyDictionary[nn.Module, bool | None] = WeakKeyDictionary()

# What counts: a router or the objectives, and the arguments of its `accumulate`.
Statistics = list[tuple[Any, tuple]]


def follow_steps(model: nn.Module) -> None:
    """Have the statistics of a model closed after every step of an optimizer that holds parameters of it."""
    _FOLLOWED.setdefault(model, None)
    _listen()


def end_step(model: nn.Module) -> None:
    """Close what has counted in a model since the last time, if anything has."""
    counted, model.counted_statistics = vars(model).get("counted_statistics", []), []
    for part in counted:
        part.end_step()


def end_cleared_step(model: nn.Module) -> None:
    """Close the last step where no torch optimizer tells of its end: at the first forward with cleared gradients."""
    if torch.compiler.is_compiling():
        return
    follow_steps(model)
    if not vars(model).get("counted_statistics") or _FOLLOWED[model]:
        return
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained or any(parameter.grad is not None for parameter in trained):
        return
    if _FOLLOWED[model] is None:
        # A skipped step, or micro-batches whose gradients are not reduced yet, leave no gradients either.
        _FOLLOWED[model] = is_sharded(model) or _has_optimizer(trained)
    if not _FOLLOWED[model]:
        end_step(model)


def count_in_backward(model: nn.Module, output: Any, statistics: Statistics) -> None:
    """Let a forward pass count once a gradient comes back to what it returned; with none it never counts."""
    if torch.compiler.is_compiling():
        for part, args in statistics:
            part.accumulate(*args)
        model.counted_statistics = [part for part, _ in statistics]
        return

    def count(gradient: torch.Tensor) -> None:
        # Once, although loss and logits both get a gradient; the decisions need not be kept afterwards.
        while statistics:
            part, args = statistics.pop(0)
            part.accumulate(*args)
            counted = vars(model).setdefault("counted_statistics", [])
            if all(part is not other for other in counted):
                counted.append(part)

    for tensor in _tensors(output):
        if tensor.requires_grad:
            tensor.register_hook(count)


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict | list | tuple):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)


@functools.cache
def _listen() -> Any:
    """Listen to all torch optimizers, once."""
    return register_optimizer_step_post_hook(_end_steps)


def _end_steps(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    """Hook after a step of any torch optimizer: close the statistics of the models that it trains."""
    found_inf = getattr(optimizer, "found_inf", None)
    # A fused optimizer is called by a `GradScaler` even where the step is skipped, inside of the kernel.
    skipped = found_inf is not None and bool(found_inf)
    held = _held_by(optimizer)
    for model in list(_FOLLOWED):
        if any(id(parameter) in held for parameter in model.parameters()):
            _FOLLOWED[model] = True
            if not skipped:
                end_step(model)


def _held_by(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _has_optimizer(parameters: list[nn.Parameter]) -> bool:
    """Whether any torch optimizer holds one of these parameters; slow, to be asked once."""
    # An optimizer makes itself known to nobody before its first step, and the first step may be skipped.
    for item in gc.get_objects():
        if issubclass(type(item), Optimizer) and "param_groups" in vars(item):
            held = _held_by(item)
            if any(id(parameter) in held for parameter in parameters):
                return True
    return False


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model: its optimizer holds the shards, which a forward does not see."""
    return any(cls.__name__ == "FSDPModule" for cls in type(model).__mro__)
