"""Single experts that stay as they are, to the bit, while the rest of their stacks trains.

A slice of a parameter has no `requires_grad` of its own, and with a gradient of zero, weight decay and momentum still
move it. So what is frozen is kept aside, and put back before the model computes and before it is saved.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .layer import MoeLoraLayer


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
    def hold(self, container: str, stack: nn.Parameter) -> None:
        """Put the slices of a stack back, or take them if they are not known yet."""
        if container not in self.kept:
            self.kept[container] = stack[self.numbers].clone()
        kept = self.kept[container].to(stack.device)
        if not torch.equal(stack[self.numbers], kept):
            stack[self.numbers] = kept.to(stack.dtype)
        if stack.requires_grad and not hasattr(stack, "moe_lora_mask"):
            # Not in the norm by which gradients are clipped either; a copy of the parameter loses hook and handle.
            stack.moe_lora_mask = stack.register_hook(self._mask)

    def _mask(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.index_fill(0, torch.tensor(self.numbers, device=gradient.device), 0.0)


def release(stack: nn.Parameter) -> None:
    """Let a stack have its whole gradient again."""
    if hasattr(stack, "moe_lora_mask"):
        stack.moe_lora_mask.remove()
        del stack.moe_lora_mask


def expert_stacks(layer: MoeLoraLayer, adapter_name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield container and stack of the experts that an adapter has on a target."""
    for container in ("moe_lora_A", "moe_lora_B", "moe_lora_vector"):
        stacks = getattr(layer, container)
        if adapter_name in stacks:
            yield container, stacks[adapter_name]


def hold_frozen(model: nn.Module, *_: Any) -> None:
    """Hook before the root computes or is saved: put all frozen experts back."""
    for layer in model.modules():
        if isinstance(layer, MoeLoraLayer):
            for adapter_name, frozen in layer.frozen_experts.items():
                for container, stack in expert_stacks(layer, adapter_name):
                    frozen.hold(container, stack)


def forget_frozen(model: nn.Module, *_: Any) -> None:
    """Hook behind the loading of weights: what is frozen are the loaded ones."""
    for layer in model.modules():
        if isinstance(layer, MoeLoraLayer):
            for frozen in layer.frozen_experts.values():
                frozen.kept.clear()


def install_frozen_hooks(model: nn.Module) -> list[Any]:
    """Hook the frozen experts to the root's forward, saving and loading; return the handles."""
    return [
        model.register_forward_pre_hook(hold_frozen),
        model.register_state_dict_pre_hook(hold_frozen),
        model.register_load_state_dict_post_hook(forget_frozen),
    ]
