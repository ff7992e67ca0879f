"""The decoder parameters that work on a token: those that it is multiplied with, once for every time.

    FLOPs of a token's products, attention scores apart = 2 (active parameters - vectors - embedding table)

A part that a token passes twice counts twice, and one that holds for other tokens, such as the projections of another
modality, not at all. Towers and connectors work on an image, a video or a sound, not on a token, and are left out.
"""

from collections import Counter
from typing import Any, Protocol

from torch import nn

from ..configuration.configuration_hf_moe import MODALITIES
from ..modeling.block import Block
from ..modeling.context import routers_of
from ..modeling.expert_banks import ExpertBanks
from ..modeling.layer_spec import Site
from ..modeling.parts import host_parts, part_of
from ..modeling.replacement import Replacement
from ..modeling.routing import Experts, SharedPart
from .host_facts import modalities


class Use(Protocol):
    """How much a token of one modality uses of what routers choose from."""

    # Of `MODALITIES`.
    modality: int

    def experts(self, site: Site) -> float:
        """Return how many experts of a site run."""

    def routed(self, block: Block, number: int) -> float:
        """Return how many parameters of the experts work that the router of this number in a block chooses from."""


class AtMost:
    """The use of a token that fills all of its slots, with the largest experts that it may use."""

    def __init__(self, model: nn.Module, modality: int):
        self.modality = modality
        self.routers = routers_of(model)

    def experts(self, site: Site) -> float:
        return self.routers[site].most_experts_per_tok()

    def routed(self, block: Block, number: int) -> float:
        router, experts = block.routers[number], unwrapped_experts(block, number)
        if router.bank_sizes is not None and isinstance(experts, ExpertBanks):
            # Of two isolated banks the second is for what is seen.
            experts = experts.banks[-1 if MODALITIES[self.modality] in ("image", "video") else 0]
        runs = [experts.parameters_per_run(), *(part.parameters_per_run() for part in experts.beside().values())]
        slots = router.most_experts_per_tok()
        return experts.parameters_per_token() + sum(sum(sorted(sizes, reverse=True)[:slots]) for sizes in runs)


def most_active_parameters(model: Any) -> dict[str, int]:
    """Return the decoder parameters at most at work on a token of each modality that a model takes."""
    taken = modalities(model.config)
    return {name: count_active(model, AtMost(model, MODALITIES.index(name))) for name in taken}


def count_active(model: Any, use: Use) -> int:
    """Return the decoder parameters that work on a token."""
    return round(_Count(model, use).of(model))


class _Count:
    """Adds up a model, module by module; a parameter that two modules share counts in the first."""

    def __init__(self, model: nn.Module, use: Use):
        self.parts = host_parts(model)
        self.use = use
        self.readers = Counter(router.shared_name for router in routers_of(model).values())
        self.seen: set[int] = set()

    def of(self, module: nn.Module, path: str = "") -> float:
        """Return how many parameters of a module work on a token, each time that the module runs."""
        if path == "objectives" or self.parts.holder(path) is not None or isinstance(module, Experts):
            return 0.0
        total = 0.0
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in self.seen and part_of(_join(path, name), self.parts) != "connector":
                self.seen.add(id(parameter))
                total += parameter.numel() * self._share(module, name, parameter)
        for name, child in module.named_children():
            total += self.of(child, _join(path, name)) * self._share(module, name, child)
        if isinstance(module, Block):
            for number, router in enumerate(module.routers):
                pieces = module.spec.hidden_size // router.spec.hidden_size
                total += self.use.routed(module, number) * pieces * module.runs_per_decision
                total -= router.idle_parameters()
        return total

    def _share(self, module: nn.Module, name: str, part: nn.Module | nn.Parameter) -> float:
        """Return how often a parameter or child runs when its module does."""
        for other in module.children():
            if isinstance(other, Replacement) and other.is_added and other is not part:
                return other.layer_share(self.use.modality, self.use.experts)
        if isinstance(module, Replacement):
            return module.active_share(name, self.use.modality, self.use.experts)
        if isinstance(module, Block) and name == "shared_expert":
            return module.shared_runs
        # Every router of a shared part runs it, or the first one for all.
        return self.readers[name] if isinstance(part, SharedPart) and not part.runs_once else 1


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def unwrapped_experts(block: Block, number: int) -> Experts:
    """Return the experts that the router of this number chooses from, without what PEFT has wrapped around them."""
    experts: Any = block.experts_of(number)
    return experts.get_base_layer() if hasattr(experts, "get_base_layer") else experts
