"""Conversion: another router, or other objectives, for a model that exists.

From softmax top-k to AnyExperts the model is the same at step 0: the gate's weights are taken over, the importance
module's last layer is zero (every token is of mean importance and gets K slots), alpha is 0 (no fusion), and the
virtual experts start far below the margin. Weights are renormalised over the slots where the top-k gate did so.

Source of the AnyExperts start: this library's reading of arXiv:2511.18314.
"""

from copy import deepcopy
from typing import Any

import torch

from ..configuration.layer_maps import at_layer
from ..modeling.auxiliary import AuxiliaryLosses
from ..modeling.initialisation import initialize_mechanisms, initializer_std
from ..modeling.mechanisms import get_mechanism
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.registry import build
from ..modeling.routers.top_k import TopKRouter
from ..modeling.routing import MoELayerSpec, Router


@torch.no_grad()
def convert_router(model: HfMoeForConditionalGeneration, name: str, *, seed: int = 0, **options: Any) -> None:
    """Give every MoE layer of a model another router, in place.

    The new router starts from the gate of the old one, see [`Router.start_from`]; what it has more is fresh. To
    `"anyexperts"` from softmax `"top_k"` the model's outputs stay as they are, and `normalise`, `fusion_alpha` and,
    where absent, the slot bounds are chosen for that: K_target = K, K_min 2 (1 where K = 2), K_max 1.5 K.

    Args:
        model: of any routers; its `config` is changed with it.
        name: of the new router.
        seed: of its fresh parameters.
        options: of the new router.

    Raises:
        ValueError: if the router cannot be built, or AnyExperts cannot start as the routers that are there.
    """
    routers, chosen, options = {}, {}, deepcopy(options)
    for index, layer in model.moe_layers().items():
        own = {**_anyexperts_options(layer.router, layer.spec), **options} if name == "anyexperts" else options
        chosen[str(index)] = {"name": name, **own}
        routers[index] = build("router", get_mechanism("router", name), dict(at_layer(own, index)), layer.spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index, router in routers.items():
            old = model.moe_layers()[index].router
            initialize_mechanisms(router, initializer_std(model.config))
            router.start_from(old)
            weight = next(old.parameters())
            model.moe_layers()[index].gate = router.to(weight.device).float().train(old.training)
    first = next(iter(chosen.values()), {"name": name, **options})
    model.config.moe_config.router = first if all(item == first for item in chosen.values()) else chosen
    model.config.system = None


def set_objectives(model: HfMoeForConditionalGeneration, objectives: dict[str, Any]) -> None:
    """Replace the objectives of a model; their statistics begin anew.

    Args:
        objectives: as in `moe_config.objectives`; empty for none.

    Raises:
        ValueError: if an objective is unknown or does not fit the model.
    """
    config = model.config
    previous, config.moe_config.objectives = config.moe_config.objectives, deepcopy(objectives)
    try:
        fresh = AuxiliaryLosses(config, [layer.spec for layer in model.moe_layers().values()])
    except ValueError:
        config.moe_config.objectives = previous
        raise
    initialize_mechanisms(fresh, initializer_std(config))
    model.objectives = fresh.to(model.device).train(model.training)


def _anyexperts_options(router: Router, spec: MoELayerSpec) -> dict[str, Any]:
    """Return the options with which AnyExperts starts as `router`.

    Raises:
        ValueError: if it cannot.
    """
    slots, experts = spec.num_experts_per_tok, spec.num_experts
    plain = isinstance(router, TopKRouter) and router.score_function == "softmax" and router.capacity_factor is None
    if not plain or router.routed_scaling_factor != 1.0:
        raise ValueError(
            f"Layer {spec.layer_idx}: AnyExperts starts as a softmax 'top_k' router without scaling and capacity; "
            f"this is a {type(router).__name__}. Convert to 'top_k' first, which changes the outputs."
        )
    if not 1 < slots < experts:
        raise ValueError(
            f"Layer {spec.layer_idx}: num_experts_per_tok={slots} of {experts} experts leaves no slots to move "
            "between: AnyExperts needs 1 < num_experts_per_tok < num_experts."
        )
    low = min(2, slots - 1)
    return {
        "min_slots": low,
        "max_slots": min(experts, max(slots + 1, slots * 3 // 2)),
        "fusion_alpha": 0.0,
        "normalise": "filled" if router.norm_topk_prob else "none",
        # A lone slot weighs 1 whatever the importance; the probe gives it a gradient.
        "probe_slot": low == 1 and router.norm_topk_prob,
    }
