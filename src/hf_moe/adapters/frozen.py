"""Single experts that stay as they are, to the bit, while the rest of their stacks trains.

A slice of a parameter has no `requires_grad` of its own, and with a gradient of zero, weight decay and momentum still
move it. So what is frozen is kept aside, and put back before the model computes and before it is saved.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from .config import MoeLoraConfig
from .experts.base import RANK_DIM
from .layer import MoeLoraLayer
from .routers import HostRouter


class FrozenExperts:
    """The frozen experts of one adapter on one target.

    Args:
        numbers: of the experts.
    """

    def __init__(self, numbers: list[int]):
        self.numbers = numbers
        # container -> the slices; taken when they are first needed, so that an adapter can be loaded before.
        self.kept: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def hold(self, layer: MoeLoraLayer, adapter_name: str) -> None:
        """Put the slices of a target's stacks back, or take them if they are not known yet."""
        for container, stack in expert_stacks(layer, adapter_name):
            dim, index = 0, torch.tensor(self.numbers, device=stack.device)
            if adapter_name in layer.moe_lora_ranks:
                dim, index = RANK_DIM[container], layer.moe_lora_ranks[adapter_name].rows_of(index)
            if container not in self.kept:
                self.kept[container] = stack.index_select(dim, index)
            kept = self.kept[container].to(stack)
            if not torch.equal(stack.index_select(dim, index), kept):
                stack.index_copy_(dim, index, kept)
            if stack.requires_grad and not hasattr(stack, "moe_lora_mask"):
                # Not in the norm by which gradients are clipped either; a copy of the parameter loses hook and handle.
                stack.moe_lora_mask = stack.register_hook(partial(_mask, dim, index))


def _mask(dim: int, index: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.index_fill(dim, index.to(gradient.device), 0.0)


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
    """Return the targets whose experts are those that an adapter's config numbers and names.

    Left out are targets with another number of experts by `target_overrides`, such as a plain LoRA on attention beside
    the experts of the feed-forwards, and those that follow a host's routing where the others do not.
    """
    layers = []
    for layer in model.modules():
        if isinstance(layer, MoeLoraLayer) and adapter_name in layer.experts:
            follows_host = isinstance(layer.deciding_router(adapter_name), HostRouter)
            number = layer.num_experts(adapter_name)
            if number == config.num_experts and follows_host == (config.router["name"] == "host"):  # type: ignore[index]
                layers.append(layer)
    return layers


def hold_frozen(model: nn.Module, *_: Any) -> None:
    """Hook before the root computes or is saved: put all frozen experts back."""
    for layer in model.modules():
        if isinstance(layer, MoeLoraLayer):
            for adapter_name, frozen in layer.frozen_experts.items():
                frozen.hold(layer, adapter_name)


def forget_frozen(model: nn.Module, *_: Any) -> None:
    """Hook behind the loading of weights: what is frozen are the loaded ones."""
    for layer in model.modules():
        if isinstance(layer, MoeLoraLayer):
            for frozen in layer.frozen_experts.values():
                frozen.kept.clear()


def install_frozen_hooks(model: nn.Module) -> list[Any]:
    """Hook the frozen experts to the root's saving and loading; return the handles."""
    return [
        model.register_state_dict_pre_hook(hold_frozen),
        model.register_load_state_dict_post_hook(forget_frozen),
    ]
