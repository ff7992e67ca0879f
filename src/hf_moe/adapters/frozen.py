"""Single experts that stay as they are, to the bit, while the rest of their stacks trains.

Weight decay and momentum move a slice of a parameter with a gradient of zero, too. So what is frozen is kept aside
when the experts are frozen and when weights are loaded: after `load_state_dict`, or when a stack is another parameter
than before, which is how Transformers loads. It is put back before the model computes, is merged or is saved.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from .config import MoeLoraConfig
from .index import index_of
from .layer import MoeLoraLayer, tuner_layers
from .stacks import RANK_DIM


class FrozenExperts:
    """The frozen experts of one adapter on one target, by number, as its stacks hold them now."""

    def __init__(self, layer: MoeLoraLayer, adapter_name: str, numbers: list[int]):
        self.adapter_name = adapter_name
        self.numbers = numbers
        self.kept: dict[str, tuple[nn.Parameter, torch.Tensor]] = {}  # container -> the stack and its slices
        self.take(layer)

    def take(self, layer: MoeLoraLayer) -> None:
        """Keep the slices of the target's stacks as they are."""
        self.kept.clear()
        for container, stack in expert_stacks(layer, self.adapter_name):
            if not stack.is_meta:
                self._take(layer, container, stack)

    @torch.no_grad()
    def hold(self, layer: MoeLoraLayer) -> None:
        """Put the slices of the target's stacks back."""
        for container, stack in expert_stacks(layer, self.adapter_name):
            if stack.is_meta:
                continue
            # What stands in for a parameter during a functional call is none, and is held too.
            if container not in self.kept or isinstance(stack, nn.Parameter) and stack is not self.kept[container][0]:
                self._take(layer, container, stack)
            dim, index = self._place(layer, container, stack)
            kept = self.kept[container][1].to(stack)
            if not torch.equal(stack.index_select(dim, index), kept):
                stack.index_copy_(dim, index, kept)
            if stack.requires_grad and not _is_masked(stack):
                # Not in the norm by which gradients are clipped either.
                stack.moe_lora_mask = stack.register_hook(partial(_mask, dim, index))

    def _take(self, layer: MoeLoraLayer, container: str, stack: nn.Parameter) -> None:
        self.kept[container] = stack, stack.detach().index_select(*self._place(layer, container, stack))

    def _place(self, layer: MoeLoraLayer, container: str, stack: nn.Parameter) -> tuple[int, torch.Tensor]:
        """Return the dimension and the indices of the slices in a stack."""
        index = torch.tensor(self.numbers, device=stack.device)
        if self.adapter_name not in layer.moe_lora_ranks:
            return 0, index
        return RANK_DIM[container], layer.moe_lora_ranks[self.adapter_name].rows_of(index)


def _mask(dim: int, index: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.index_fill(dim, index.to(gradient.device), 0.0)


def _is_masked(stack: nn.Parameter) -> bool:
    """Whether the hook is there: a copy of the parameter has neither handle nor hook, an unpickled one no hook."""
    return hasattr(stack, "moe_lora_mask") and stack.moe_lora_mask.id in (stack._backward_hooks or {})


def release(stack: nn.Parameter) -> None:
    """Let a stack have its whole gradient again."""
    if hasattr(stack, "moe_lora_mask"):
        stack.moe_lora_mask.remove()
        del stack.moe_lora_mask


def expert_stacks(layer: MoeLoraLayer, adapter_name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield container and stack of the experts that an adapter has on a target."""
    for container in ("A", "B", "vector"):
        stacks = getattr(layer, f"moe_lora_{container}")
        if adapter_name in stacks:
            yield container, stacks[adapter_name]


def numbered_layers(model: nn.Module, adapter_name: str, config: MoeLoraConfig) -> list[MoeLoraLayer]:
    """Return the targets whose experts an adapter's config numbers and names.

    Targets with another number by `target_overrides`, or that alone follow a host's routing, are left out.
    """
    host = config.router["name"] == "host"  # type: ignore[index]
    return [
        layer
        for layer in tuner_layers(model)
        if adapter_name in layer.experts
        and layer.num_experts(adapter_name) == config.num_experts
        and ("call" in layer.deciding_router(adapter_name).reads) == host
    ]


def hold_frozen(model: nn.Module, *_: Any) -> None:
    """Hook before the root is saved: put all frozen experts back."""
    index_of(model).hold_frozen()


def take_frozen(model: nn.Module, *_: Any) -> None:
    """Hook behind the loading of weights: what is frozen are the loaded ones."""
    for layer in index_of(model).targets:
        for frozen in layer.frozen_experts.values():
            frozen.take(layer)


def install_frozen_hooks(model: nn.Module) -> list[Any]:
    """Hook the frozen experts to the root's saving and loading; return the handles."""
    return [
        model.register_state_dict_pre_hook(hold_frozen),
        model.register_load_state_dict_pre_hook(hold_frozen),  # for what is not among the loaded weights
        model.register_load_state_dict_post_hook(take_frozen),
    ]
