"""WEMoE: a MoE of a pretrained model and of copies that were fine-tuned apart, each for a task, without any data.

Expert 0 of a layer is the pretrained model's feed-forward and expert i that of copy i, see
`modeling/routers/wemoe.py`. All other weights are theta_0 + lambda * sum_i (theta_i - theta_0), with the `init_lambda`
of the router. Train the gates afterwards: `train_only(model, ["routers"])`, or a stage with `trainable: [routers]`,
and `loss: entropy` there needs no labels.

Source: Merging Multi-Task Models via Weight-Ensembling Mixture of Experts, arXiv:2402.00433.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling.block import Block
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.routers.wemoe import WemoeRouter
from .expert_sources import feed_forward_state, fill_layer
from .in_place import from_host, paths_of
from .sources.copies import Copies


@torch.no_grad()
def from_fine_tuned(
    base: PreTrainedModel, tuned: Sequence[PreTrainedModel], **moe_config: Any
) -> HfMoeForConditionalGeneration:
    """Return the weight ensemble of a pretrained model and of its fine-tuned copies.

    Args:
        base (`PreTrainedModel`): the pretrained model.
        tuned (`Sequence[PreTrainedModel]`): its copies, one for each task.
        moe_config: fields that override those of the system `"wemoe"`; as many experts as models are used unless
            `num_experts_per_tok` says otherwise.

    Raises:
        ValueError: if there is no copy, if a layer has another router, or the model cannot become a MoE.
    """
    if not tuned:
        raise ValueError("A weight ensemble needs the pretrained model and at least one fine-tuned copy of it.")
    number = len(tuned) + 1
    model = from_host(
        base, system="wemoe", moe_config={"num_experts_per_tok": number, **moe_config, "num_experts": number}
    )
    blocks = paths_of(model, Block)
    scales = set()
    for path, block in blocks.items():
        if not isinstance(block.router, WemoeRouter):
            raise ValueError(
                f"Layer {block.spec.site} has the router {type(block.router).__name__}: a weight ensemble needs "
                "'wemoe', whose experts may have weights below 0 and above 1."
            )
        fill_layer(block, [feed_forward_state(one.get_submodule(path)) for one in (base, *tuned)], Copies())
        scales.add(block.router.init_lambda)
    (scale,) = scales
    inside = tuple(f"{path}." for path in blocks)
    theirs = [dict(one.named_parameters(remove_duplicate=False)) for one in tuned]
    for name, weight in model.named_parameters():  # each once, also where it is tied
        if not name.startswith(inside):
            start = weight.float()
            moves = sum(other[name].to(weight.device).float() - start for other in theirs)
            weight.copy_(start + scale * moves)
    return model
