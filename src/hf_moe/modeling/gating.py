"""Gate arithmetic shared by the routers, in float32 whatever the model's dtype."""

import torch
from torch.nn import functional as F

from .routing import MoELayerSpec, RoutingContext


def gate_logits(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return the router logits (T, C) float32 of hidden states (T, d) and gate rows (C, d).

    Autocast is switched off: bf16 logits flip experts between two runs that should agree.
    """
    with torch.autocast(hidden_states.device.type, enabled=False):
        return F.linear(hidden_states.float(), weight.float(), None if bias is None else bias.float())


def per_gate_logits(hidden_states: torch.Tensor, weight: torch.Tensor, gate_index: torch.Tensor) -> torch.Tensor:
    """Return the logits (T, C) of the gate that each token uses, from stacked gates (G, C, d) and `gate_index` (T,).

    All gates are evaluated and one is picked: G is at most the number of modalities, so this costs less than a split by
    modality, and a gate without tokens still receives a gradient of zeros.
    """
    num_gates, candidates, width = weight.shape
    logits = gate_logits(hidden_states, weight.reshape(num_gates * candidates, width))  # (T, G * C)
    index = gate_index[:, None, None].expand(-1, 1, candidates)
    return logits.view(-1, num_gates, candidates).gather(1, index).squeeze(1)  # (T, C)


def apply_overrides(logits: torch.Tensor, spec: MoELayerSpec, context: RoutingContext) -> torch.Tensor:
    """Return `logits` (T, C >= E) after the context's test-time offsets and disabled experts of this layer."""
    if context.overrides is None:
        return logits
    offset = context.overrides.logit_offset.get(spec.layer_idx)
    if offset is not None:
        logits = logits + F.pad(offset.to(logits), (0, logits.shape[-1] - offset.shape[-1]))
    disabled = context.overrides.disabled_experts.get(spec.layer_idx)
    if disabled:
        columns = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        columns[disabled] = True
        logits = logits.masked_fill(columns, float("-inf"))
    return logits


def jitter(hidden_states: torch.Tensor, eps: float, training: bool) -> torch.Tensor:
    """Multiply by uniform(1 - eps, 1 + eps) while training."""
    if not training or eps == 0.0:
        return hidden_states
    return hidden_states * torch.empty_like(hidden_states).uniform_(1.0 - eps, 1.0 + eps)


def renormalise(weight: torch.Tensor, minimum: float = 1e-20) -> torch.Tensor:
    """Divide the slot weights (T, K) by their sum, at least `minimum`."""
    return weight / weight.sum(-1, keepdim=True).clamp(min=minimum)


def limit_groups(scores: torch.Tensor, n_group: int, topk_group: int) -> torch.Tensor:
    """Keep the `topk_group` best of `n_group` expert groups, the rest becomes -inf.

    The score of a group is the sum of its two best experts (DeepSeek-V3, arXiv:2412.19437).
    """
    if n_group <= 1:
        return scores
    grouped = scores.view(scores.shape[0], n_group, -1)  # (T, G, E / G)
    group_score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)  # (T, G)
    kept = torch.zeros_like(group_score, dtype=torch.bool).scatter(
        1, group_score.topk(topk_group, dim=-1).indices, True
    )
    return grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)


def check_slots(spec: MoELayerSpec, candidates: int, name: str) -> None:
    """Refuse more slots than candidates.

    Raises:
        ValueError: if `num_experts_per_tok` does not lie in [1, candidates].
    """
    if not 1 <= spec.num_experts_per_tok <= candidates:
        raise ValueError(
            f"Router {name!r} of layer {spec.layer_idx}: num_experts_per_tok={spec.num_experts_per_tok} must lie in "
            f"[1, {candidates}], the number of experts that a token can choose."
        )
