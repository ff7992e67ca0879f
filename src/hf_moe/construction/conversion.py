"""Conversion: another router, experts of another kind, or other objectives, for a model that exists.

Where the new router can compute what the old gate does, the model is the same at step 0: `gate_forms.py` has the
table. To AnyExperts the gate's weights and its bias are taken over, the importance module's last layer is zero (every
token is of mean importance and gets K slots), alpha is 0 (no fusion), and the virtual experts start far below the
margin. Weights are renormalised over the slots where the gate did so.

Source of the AnyExperts start: this library's reading of arXiv:2511.18314.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch

from ..analysis.experts import layer_inputs
from ..configuration.layer_maps import at_layer
from ..configuration.names import without_alias
from ..modeling.auxiliary import AuxiliaryLosses
from ..modeling.block import check_latents
from ..modeling.configured_parts import ConfiguredParts
from ..modeling.context import routers_of, shared_parts
from ..modeling.initialisation import initialize_mechanisms, initializer_std
from ..modeling.mechanisms import get_mechanism
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.registry import build
from .gate_forms import starting_options


@torch.no_grad()
def convert_router(model: HfMoeForConditionalGeneration, name: str, *, seed: int = 0, **options: Any) -> None:
    """Give every MoE layer of a model another router, in place.

    The new router starts from the gate of the old one, see [`Router.start_from`]; what it has more is fresh. Options
    that are absent are chosen such that the outputs stay as they are, where the table says that they can; for
    `"anyexperts"` K_target = K, K_min 2 (1 where K = 2), K_max 1.5 K.

    Args:
        model: of any routers; its `config` is changed with it.
        name, options: of the new router; `seed` of its fresh parameters.

    Raises:
        ValueError: if the router cannot be built, or cannot start as the routers that are there, with the reason.
    """
    routers, chosen, options = {}, {}, deepcopy(options)
    defaults = without_alias("router", {"name": name})
    name = defaults.pop("name")
    for index, layer in model.moe_layers().items():
        own = {**defaults, **starting_options(name, layer.router, layer.router.spec), **options}
        chosen[str(index)] = {"name": name, **own}
        cls = get_mechanism("router", name)
        routers[index] = [build("router", cls, dict(at_layer(own, index)), old.spec) for old in layer.routers]
        for number, router in enumerate(routers[index]):
            check_latents(router, layer.experts_of(number))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        std = initializer_std(model.config)
        for layer, fresh in zip(model.moe_layers().values(), routers.values(), strict=True):
            for router, old in zip(fresh, layer.routers, strict=True):
                initialize_mechanisms(router, std)
                router.start_from(old)
                router.to(next(layer.parameters()).device).float().train(old.training)
            layer.put_routers(fresh)
        put_shared_parts(model, std)
    first = next(iter(chosen.values()), {"name": name, **options})
    config: Any = model.config
    config.moe_config.router = first if all(item == first for item in chosen.values()) else chosen
    config.system = None


def put_shared_parts(model: HfMoeForConditionalGeneration, std: float) -> None:
    """Give a model what its routers share: the parts that it has, where they fit, and fresh ones."""
    old, shared = model.base_model.shared_routing, shared_parts(model)
    for name, part in shared.items():
        initialize_mechanisms(part, std)
        if name in old and _shapes(old[name]) == _shapes(part):
            part.load_state_dict(old[name].state_dict())
    model.base_model.shared_routing = shared.to(model.device).train(model.training)


def _shapes(part: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in part.state_dict().items()}


@torch.no_grad()
def convert_experts(
    model: HfMoeForConditionalGeneration,
    name: str,
    *,
    batch: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Give every MoE layer of a model experts of another kind, in place; they start from those that are there.

    Args:
        model: its `config` is changed with it.
        name, options: of the new kind.
        batch (`Mapping[str, Any]`, *optional*): keyword arguments of a forward pass; kinds that approximate the old
            experts do so for the tokens that then reach the layers.

    Raises:
        ValueError: if the kind cannot be built, cannot start as feed-forwards, or the old experts are none.
    """
    config: Any = model.config
    inputs = {} if batch is None else layer_inputs(model, batch)
    previous, config.moe_config.experts = config.moe_config.experts, {"name": name, **options}
    try:
        parts = ConfiguredParts(config, config.moe_config)
        fresh = {index: parts.experts(layer.expert_spec) for index, layer in model.moe_layers().items()}
        for index, experts in fresh.items():
            old = model.moe_layers()[index].experts
            initialize_mechanisms(experts, initializer_std(config))
            experts.take(old.states(), inputs.get(index))
            weight = next(item for item in old.state_dict().values() if item.is_floating_point())
            fresh[index] = experts.to(weight.device, weight.dtype).train(old.training)
    except ValueError:
        config.moe_config.experts = previous
        raise
    for index, experts in fresh.items():
        model.moe_layers()[index].experts = experts
    config.system = None


def set_objectives(model: HfMoeForConditionalGeneration, objectives: dict[str, Any]) -> None:
    """Replace the objectives of a model; their statistics begin anew.

    Args:
        objectives: as in `moe_config.objectives`; empty for none.

    Raises:
        ValueError: if an objective is unknown or does not fit the model.
    """
    config: Any = model.config
    previous, config.moe_config.objectives = config.moe_config.objectives, deepcopy(objectives)
    try:
        fresh = AuxiliaryLosses(config, [router.spec for router in routers_of(model).values()])
    except ValueError:
        config.moe_config.objectives = previous
        raise
    initialize_mechanisms(fresh, initializer_std(config))
    model.objectives = fresh.to(model.device).train(model.training)
