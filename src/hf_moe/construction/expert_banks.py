"""Banks of experts added to a model that exists, copied from its own, or removed from it.

Sources: DEMix Layers: Disentangling Domains for Modular Language Modeling, arXiv:2108.05036; PaCE: Unified Multi-modal
Dialogue Pre-training with Progressive and Compositional Experts, arXiv:2305.14839.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from ..configuration.layer_maps import is_layer_map
from ..modeling.configured_parts import ConfiguredParts
from ..modeling.initialisation import initialize_mechanisms, initializer_std
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from .conversion import set_objectives


@torch.no_grad()
def edit_banks(model: HfMoeForConditionalGeneration, sources: Mapping[str, str], **options: Any) -> None:
    """Give every MoE layer of the decoder the banks of `sources`, in this order, and no others; in place.

    Ids and modalities count the experts in the order of their banks.

        edit_banks(model, {"news": "news", "legal": "legal", "patents": "legal"})    # adds patents, as legal is now

    Args:
        model: its `config` is changed with it.
        sources: name of a bank -> name of the bank that it starts as a copy of, to the bit.
        options: of the router, where those change with the banks, such as the `rule` of `"condition"`.

    Raises:
        ValueError: if the model has no such banks, or its routers learn, or cannot be built for that many experts.
    """
    config: Any = model.config
    moe = config.moe_config
    banks = moe.expert_banks
    if not banks or is_layer_map(banks) or not sources or not set(sources.values()) <= set(banks):
        raise ValueError(
            f"edit_banks copies banks that all MoE layers have, got sources={dict(sources)!r}, and "
            f"moe_config.expert_banks={banks!r}: name some of these."
        )
    learning = {block.router.mechanism_name for block in model.moe_layers().values() if list(block.gate.parameters())}
    if learning:
        raise ValueError(
            f"The routers {sorted(learning)} learn one row for each expert, which edit_banks does not change: it is "
            "for routers that choose by rule, such as 'condition'."
        )
    before = {name: deepcopy(getattr(moe, name)) for name in ("expert_banks", "num_experts", "router")}
    moe.expert_banks = {name: deepcopy(banks[source]) for name, source in sources.items()}
    moe.num_experts = sum(bank["num_experts"] for bank in moe.expert_banks.values())
    moe.router = {**moe.router, **options}
    try:
        made = {index: _with_banks(model, block, sources) for index, block in model.moe_layers().items()}
    except ValueError:
        for name, value in before.items():
            setattr(moe, name, value)
        raise
    for index, (router, experts) in made.items():
        block = model.moe_layers()[index]
        block.spec = router.spec
        block.put_routers([router])
        block.experts = experts
    set_objectives(model, moe.objectives)
    config.system = None


def _with_banks(model: Any, block: Any, sources: Mapping[str, str]) -> tuple[Any, Any]:
    """Return a layer's router and experts with the banks of `sources`."""
    parts = ConfiguredParts(model.config, model.config.moe_config)
    sizes = {name: (number, width) for name, number, width in block.spec.banks}
    spec = replace(
        block.spec,
        num_experts=model.config.moe_config.num_experts,
        banks=tuple((name, *sizes[source]) for name, source in sources.items()),
    )
    router, experts = parts.router(spec), parts.experts(spec)
    initialize_mechanisms(router, initializer_std(model.config))
    for name, source in sources.items():
        getattr(experts, name).load_state_dict(getattr(block.experts, source).state_dict())
    weight = next(block.experts.parameters())
    return router.train(block.training), experts.to(weight.device, weight.dtype).train(block.training)
