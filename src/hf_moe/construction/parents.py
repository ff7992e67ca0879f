"""One MoE of several models that were trained apart, each on a domain of its own.

Expert i of every kind is that of parent i: the feed-forwards of its MoE layers, and the attentions of
`attention_experts`. All other weights are the mean over the parents; routers are fresh, and learn with the whole.

Sources: Branch-Train-MiX: Mixing Expert LLMs into a Mixture-of-Experts LLM, arXiv:2403.07816; BAM! Just Like That:
Simple and Efficient Parameter Upcycling for Mixture of Experts, arXiv:2408.08274.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling.attention.attention_experts import ExpertCopies
from ..modeling.block import Block
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from .expert_sources import build_source, feed_forward_state, fill_layer
from .in_place import from_host, paths_of


@torch.no_grad()
def from_parents(
    parents: Sequence[PreTrainedModel], *, system: str = "bam", seed: int = 0, **moe_config: Any
) -> HfMoeForConditionalGeneration:
    """Return the MoE of several models of one architecture, in evaluation mode.

    The seed of the parents may be one of them.

    Args:
        parents (`Sequence[PreTrainedModel]`): the models, which are left as they are.
        system (`str`, *optional*, defaults to `"bam"`): a key of `hf_moe.list_systems()`.
        seed (`int`, *optional*, defaults to 0): of the routers.
        moe_config: fields that override those of the system; the numbers of experts are that of the parents.

    Raises:
        ValueError: if there are fewer than two parents, or their weights differ in name or shape.
    """
    if len(parents) < 2:
        raise ValueError(f"{len(parents)} parents: give two or more, or use from_host for one.")
    shapes = [{name: tuple(weight.shape) for name, weight in parent.named_parameters()} for parent in parents]
    for number, other in enumerate(shapes):
        if differing := sorted(name for name, _ in shapes[0].items() ^ other.items()):
            raise ValueError(
                f"Parent {number} is of another architecture than the first: {len(differing)} weights differ in name "
                f"or shape, among them {differing[0]}. Give copies of one model that were trained apart."
            )
    number = len(parents)
    fields = {"num_experts": number, **moe_config}
    if "attention" not in moe_config or moe_config["attention"] is not None:
        fields["attention"] = {"num_experts": number, **moe_config.get("attention", {})}
    model = from_host(parents[0], system=system, moe_config=fields, seed=seed)
    for path, block in paths_of(model, Block).items():
        states = [feed_forward_state(parent.get_submodule(path)) for parent in parents]
        fill_layer(block, states, build_source("copies"))
    for path, part in paths_of(model, ExpertCopies).items():
        for own, parent in zip(part.copies, parents, strict=True):
            own.load_state_dict(parent.get_submodule(path).state_dict())
    for count, parent in enumerate(parents[1:], 2):
        average_in(model, parent, 1 / count)
    return model


@torch.no_grad()
def average_in(model: HfMoeForConditionalGeneration, dense: PreTrainedModel, share: float) -> None:
    """Move all weights that a model has in common with a dense one by a share towards that one's.

    Those of its MoE layers are its own.
    """
    inside = tuple(f"{path}." for path in paths_of(model, Block))
    theirs = dict(dense.named_parameters(remove_duplicate=False))
    for name, weight in model.named_parameters():  # each once, also where it is tied
        if name in theirs and not name.startswith(inside):
            weight.copy_(torch.lerp(weight.float(), theirs[name].to(weight.device).float(), share))
