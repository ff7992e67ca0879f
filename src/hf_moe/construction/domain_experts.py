"""Nexus: a MoE of models that were trained apart, each on a domain of its own, and a further expert for it later.

A seed is trained on for every domain, one copy each. Expert i is the feed-forward of copy i, the branch that every
token uses is that of the seed, and all other weights are the mean over the copies. The router knows an expert by the
vector of its domain, see `modeling/routers/nexus.py`; its projection is trained with the whole afterwards.

Source: Nexus: Specialization meets Adaptability for Efficiently Training Mixture of Experts, arXiv:2408.15901.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..configuration.layer_maps import map_layers
from ..modeling.block import Block
from ..modeling.configured_parts import build_block
from ..modeling.initialisation import initialize_mechanisms, initializer_std
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.routers.nexus import NexusRouter
from .conversion import set_objectives
from .expert_sources import ExpertSource, State, feed_forward_state, fill_layer, take_neurons
from .in_place import from_host, paths_of, put_modules
from .parents import average_in


class OneEach(ExpertSource):
    """Expert i is the feed-forward of model i + 1; the shared branch is that of the first."""

    beside = 1.0

    def expert(self, parents: Sequence[State], expert: int, width: int) -> State:
        return take_neurons(parents[expert + 1], width)


@torch.no_grad()
def from_dense_experts(
    seed: PreTrainedModel,
    experts: Sequence[PreTrainedModel],
    domain_embeddings: torch.Tensor,
    **moe_config: Any,
) -> HfMoeForConditionalGeneration:
    """Return the MoE of a seed and of its copies, one expert each.

    Args:
        seed (`PreTrainedModel`): of the same architecture as its copies.
        experts (`Sequence[PreTrainedModel]`): the copies, trained on.
        domain_embeddings (`torch.Tensor` of shape `(E, l)`): what the data of each copy is like.
        moe_config: fields that override those of the system `"nexus"`.

    Raises:
        ValueError: if there is not one vector for every copy, or the seed cannot become a MoE.
    """
    if len(domain_embeddings) != len(experts):
        raise ValueError(
            f"{len(experts)} experts and {len(domain_embeddings)} domain embeddings: give one vector for each expert."
        )
    router = {"domain_embedding_dim": domain_embeddings.shape[1], **moe_config.pop("router", {})}
    fields = {"num_experts": len(experts), "router": router, **moe_config}
    model = from_host(seed, system="nexus", moe_config=fields)
    for path, block in paths_of(model, Block).items():
        parents = [feed_forward_state(dense.get_submodule(path)) for dense in (seed, *experts)]
        fill_layer(block, parents, OneEach())
        block.router.domain_embeddings.copy_(domain_embeddings)
    for number, dense in enumerate(experts):
        average_in(model, dense, 1 / (number + 1))
    return model


@torch.no_grad()
def add_expert(model: HfMoeForConditionalGeneration, expert: PreTrainedModel, domain_embedding: torch.Tensor) -> None:
    """Give every MoE layer of a decoder one more expert, in place; the router gets no parameter.

    What is no feed-forward moves by 1 / (E + 1) towards the new model's. Train on a mixture of old and new data
    afterwards; optimizers and objectives begin anew.

    Args:
        model (`HfMoeForConditionalGeneration`): with the router `nexus` in every MoE layer of its decoder.
        expert (`PreTrainedModel`): a copy of the seed that was trained on a new domain.
        domain_embedding (`torch.Tensor` of shape `(l,)`): what its data is like.

    Raises:
        ValueError: if a layer has another router, or the vector another length.
    """
    config: Any = model.config
    fresh = {}
    for path, block in paths_of(model, Block).items():
        if block.spec.place:  # towers and connectors keep their experts
            continue
        router = block.router
        if not isinstance(router, NexusRouter):
            raise ValueError(
                f"Layer {block.spec.site} has the router {type(router).__name__}, whose gate has no row for a new "
                "expert: experts are added to the router 'nexus'."
            )
        shape = router.domain_embeddings.shape[1:]
        if domain_embedding.shape != shape:
            raise ValueError(
                f"The domains of layer {block.spec.site} are of shape {tuple(shape)}, and the new one is of shape "
                f"{tuple(domain_embedding.shape)}."
            )
        layer = build_block(config, config.moe_config, replace(block.spec, num_experts=block.spec.num_experts + 1))
        initialize_mechanisms(layer, initializer_std(config))
        (width,) = {*block.experts.widths}
        new = take_neurons(feed_forward_state(expert.get_submodule(path)), width)
        layer.experts.take([*block.experts.states(), new])
        layer.router.start_from(router)
        domains = [router.domain_embeddings, domain_embedding.to(router.domain_embeddings)[None]]
        layer.router.domain_embeddings.copy_(torch.cat(domains))
        weight = next(block.experts.parameters())
        layer.experts.to(weight.device, weight.dtype)
        layer.gate.to(weight.device)
        layer.shared_expert, layer.residual_mix = block.shared_expert, block.residual_mix
        fresh[path] = layer.train(block.training)
    put_modules(model, fresh)
    average_in(model, expert, 1 / max(layer.spec.num_experts for layer in fresh.values()))
    config.moe_config.num_experts = map_layers(config.moe_config.num_experts, lambda number: number + 1)
    set_objectives(model, config.moe_config.objectives)
