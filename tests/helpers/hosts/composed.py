"""Decoders that become the MoE of a model that is put together, without a tower."""

import torch

from hf_moe.construction.build import compose
from hf_moe.construction.expert_sources import build_source
from hf_moe.construction.host_plan import plan_host
from hf_moe.construction.in_place import become_moe


def composed_moe(decoder, moe_config=None, noise=0.0, seed=0):
    """Return the MoE of a decoder, which stays as it is; of one that is a MoE the routers are kept."""
    host = compose(decoder)
    plan = plan_host(host, None, moe_config)
    torch.manual_seed(seed)
    return become_moe(host, plan, build_source(plan.source, seed, noise), keep=True, seed=seed, on_check=None)


@torch.no_grad()
def logit_gap(model, other):
    """Return the largest difference between the logits of two models on random tokens."""
    vocabulary = other.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    return (model.eval()(input_ids=ids).logits - other.eval()(input_ids=ids).logits).abs().max().item()
