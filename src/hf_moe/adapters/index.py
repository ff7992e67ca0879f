"""Where the targets of a model are, so that its forward need not walk through all modules to find them."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..modeling.inputs import conditions_read
from ..modeling.routing import Router
from .layer import MoeLoraLayer


Step = tuple[dict[str, nn.Module | None], str, nn.Module]


class TargetIndex:
    """The targets below one root, found once: the model, or the backbone below its head.

    Which adapters they hold and which of these are active is asked of them at every call. An index is good as long as
    every target is where it was, which following the way to each target again finds out.
    """

    def __init__(self, root: nn.Module):
        self.root = root
        self.targets: list[MoeLoraLayer] = []
        self.knows_tokens = False
        self.asked_for_idle = False  # whether a training step has shown which targets act
        # On the way from the root to the targets: the children of each parent, by name, the name and the child.
        self._parents: list[dict[str, nn.Module | None]] = []
        self._names: list[str] = []
        self._children: list[nn.Module] = []
        self._others: list[Router] = []  # the model's own
        self._walk(root, set(), [])
        self.conditions = conditions_read(self.routers())

    def _walk(self, module: nn.Module, seen: set[nn.Module], way: list[Step]) -> None:
        seen.add(module)
        self.knows_tokens = self.knows_tokens or getattr(module, "moe_lora_knows_tokens", False)
        if isinstance(module, Router):
            self._others.append(module)
        if isinstance(module, MoeLoraLayer):
            self.targets.append(module)
            for parent, name, child in way:
                self._parents.append(parent)
                self._names.append(name)
                self._children.append(child)
            way.clear()  # which the targets that follow below share
        children: Any = {"base_layer": module.base_layer} if isinstance(module, MoeLoraLayer) else module._modules
        for name, child in children.items():
            if child is not None and child not in seen:
                below = [*way, (module._modules, name, child)]
                found = len(self.targets)
                self._walk(child, seen, below)
                if len(self.targets) > found:
                    way.clear()

    def is_current(self, root: nn.Module) -> bool:
        """Whether this is the index of `root`, and every target is where it was."""
        # Not in a loop of Python's: every call of the model pays for it.
        return self.root is root and list(map(dict.get, self._parents, self._names)) == self._children

    def active(self) -> Iterator[MoeLoraLayer]:
        """Yield the targets that compute with their adapters."""
        return (layer for layer in self.targets if not (layer._disable_adapters or layer.merged_adapters))

    def hold_frozen(self) -> None:
        """Put all frozen experts back."""
        for layer in self.targets:
            if layer.frozen_experts:
                for frozen in layer.frozen_experts.values():
                    frozen.hold(layer)

    def idle(self) -> Iterator[MoeLoraLayer]:
        """Yield the active targets that have not been called yet; of stacked weights the outer one is."""
        for layer in self.active():
            names = [name for name in layer.active_adapters if name in layer.experts]
            # Whole feed-forwards are mixed around their targets, and the outer of two wrappers calls the inner one.
            others = any(layer.ffn_experts[name] for name in names) or isinstance(layer.base_layer, MoeLoraLayer)
            if names and not others and not layer.has_acted:
                yield layer

    def routers(self) -> Iterator[Router]:
        """Yield all routers, those of the model itself included."""
        yield from self._others
        for layer in self.targets:
            yield from layer.moe_lora_router.values()


def index_of(root: nn.Module) -> TargetIndex:
    """Return the index of a root, made anew where the model has changed."""
    index: TargetIndex | None = root.__dict__.get("moe_lora_index")
    if index is None or not index.is_current(root):
        index = TargetIndex(root)
        root.__dict__["moe_lora_index"] = index
    return index


def drop_indices(model: nn.Module) -> None:
    """Forget where targets are: some have come or gone."""
    for module in model.modules():
        module.__dict__.pop("moe_lora_index", None)
