"""Builds the block of a layer, and its parts, as a `MoeConfig` names them."""

from dataclasses import replace
from typing import Any

from torch import nn

from ..configuration.layer_maps import at_layer
from .block import Block, check_latents
from .expert_banks import ExpertBanks
from .layer_spec import MoELayerSpec
from .mechanisms import get_mechanism
from .registry import build
from .routing import Experts, Router, at_least_float32
from .shared_experts import SharedExperts


class ConfiguredParts:
    """Makes the parts that a config names, see [`Parts`].

    Args:
        config: the outer `HfMoeConfig`.
        moe: the `MoeConfig` of the decoder, tower or connector that the parts are for.
    """

    def __init__(self, config, moe):
        self.config = config
        self.moe = moe

    def named(self, kind: str, spec: MoELayerSpec) -> tuple[Any, dict[str, Any]]:
        """Return the class of a kind of mechanism in a layer, and its options."""
        options = dict(at_layer(getattr(self.moe, kind), spec.layer_idx))
        return get_mechanism(kind, options.pop("name")), options

    def router(self, spec: MoELayerSpec) -> Router:
        cls, options = self.named("router", spec)
        router = build("router", cls, options, spec)
        if router.looks_ahead and spec.causal:
            raise ValueError(
                f"The router {router.mechanism_name!r} of layer {spec.layer_idx} mixes all tokens of a row, which "
                "must not see later ones: put it into vision_moe_config, audio_moe_config or connector_moe_config."
            )
        return at_least_float32(router)

    def experts(self, spec: MoELayerSpec) -> Experts:
        cls, options = self.named("experts", spec)
        block = at_layer(self.moe.block, spec.layer_idx)["name"]
        if cls.reads_rows and (block != "moe" or spec.banks or not spec.causal):
            raise ValueError(
                f"The experts {cls.mechanism_name!r} of layer {spec.layer_idx} read the tokens of a row in their "
                f"order: they need the block 'moe' in a decoder, without expert_banks, and the block is {block!r}."
            )
        if not spec.banks:
            return build("experts", cls, options, self.config, spec)
        banks = {}
        for bank, num_experts, width in spec.banks:
            own = replace(spec, num_experts=num_experts, expert_intermediate_size=width, banks=())
            banks[bank] = build("experts", cls, options, self.config, own)
        return ExpertBanks(banks, [num_experts for _, num_experts, _ in spec.banks])

    def shared_expert(self, spec: MoELayerSpec, experts: Experts) -> SharedExperts | None:
        num_shared = at_layer(self.moe.num_shared_experts, spec.layer_idx)
        if num_shared == 0:
            return None
        width = at_layer(self.moe.shared_intermediate_size, spec.layer_idx)
        gated = at_layer(self.moe.shared_expert_gate, spec.layer_idx)
        return SharedExperts(spec, width or num_shared * spec.expert_intermediate_size, gated, experts.shared_unit)

    def residual_mix(self, spec: MoELayerSpec) -> nn.Linear | None:
        if not at_layer(self.moe.residual_mix, spec.layer_idx):
            return None
        if at_layer(self.moe.num_shared_experts, spec.layer_idx) == 0:
            raise ValueError(
                f"Layer {spec.layer_idx}: moe_config.residual_mix weighs the routed experts against the shared "
                "branch, and there is none: set num_shared_experts."
            )
        return nn.Linear(spec.hidden_size, 2)


def build_block(config, moe, spec: MoELayerSpec) -> Block:
    """Return the block of a layer, see [`ConfiguredParts`]."""
    parts = ConfiguredParts(config, moe)
    block: Any = build("block", *parts.named("block", spec), spec, parts)
    for number, router in enumerate(block.routers):
        check_latents(router, block.experts_of(number))
    return block
