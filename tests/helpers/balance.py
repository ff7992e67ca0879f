"""The balance loss of tokens that choose one expert each with certainty."""

import torch
from torch.nn import functional as F

from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.registry import build

from .router_cases import make_spec, text_context


def balance(options: dict, index: torch.Tensor, num_experts: int) -> float:
    """Return the mean over the rows of `index` (B, S) after the step that they make has ended."""
    spec = make_spec(num_experts=num_experts, num_experts_per_tok=1)
    objective = build("objective", get_mechanism("objective", "load_balance"), options, [spec])
    logits = 100.0 * F.one_hot(index.flatten(), num_experts).float()  # (T, E)
    chosen = ExpertAssignment(
        index.reshape(-1, 1),
        torch.ones(index.numel(), 1),
        num_experts,
        router_logits=logits,
        router_probs=logits.softmax(-1),
    )
    context = text_context(*index.shape)
    objective.accumulate({spec.site: chosen}, context)
    objective.end_step()
    return objective({spec.site: chosen}, context).mean().item()
