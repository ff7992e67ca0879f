"""Gate arithmetic shared by the routers, in float32 whatever the model's dtype."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ..configuration.configuration_hf_moe import MODALITIES
from .admission import room, take_best
from .decisions import ExpertAssignment
from .layer_spec import MoELayerSpec
from .routing_context import RoutingContext, is_one_of


def gate_logits(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return the router logits (T, C) float32 of hidden states (T, d) and gate rows (C, d).

    Autocast is switched off: bf16 logits flip experts between two runs that should agree.
    """
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):  # to switch off what is off takes longer than the product of a token
        with torch.autocast(device, enabled=False):
            return gate_logits(hidden_states, weight, bias)
    return F.linear(hidden_states.float(), weight.float(), None if bias is None else bias.float())


def per_gate_logits(hidden_states: torch.Tensor, weight: torch.Tensor, gate_index: torch.Tensor) -> torch.Tensor:
    """Return the logits (T, C) of the gate that each token uses, from stacked gates (G, C, d) and `gate_index` (T,).

    All gates are evaluated and one is picked: G is at most the number of modalities, so this costs less than a split
    by modality, and a gate without tokens still receives a gradient of zeros.
    """
    num_gates, candidates, width = weight.shape
    logits = gate_logits(hidden_states, weight.reshape(num_gates * candidates, width))  # (T, G * C)
    index = gate_index[:, None, None].expand(-1, 1, candidates)
    return logits.view(-1, num_gates, candidates).gather(1, index).squeeze(1)  # (T, C)


def per_row_logits(hidden_states: torch.Tensor, weight: torch.Tensor, gate_of_row: torch.Tensor) -> torch.Tensor:
    """Return the logits (T, C) of the gate that each row uses, from stacked gates (G, C, d) and `gate_of_row` (B,).

    Only these gates are evaluated.
    """
    device = hidden_states.device.type
    with torch.autocast(device, enabled=False):
        rows = hidden_states.float().view(len(gate_of_row), -1, hidden_states.shape[-1])  # (B, S, d)
        return torch.bmm(rows, weight.float()[gate_of_row].transpose(1, 2)).flatten(0, 1)


def row_overlap(rows: torch.Tensor) -> torch.Tensor:
    """Return the mean of cos(r_i, r_j)^2 over the pairs i != j of N rows (..., N, d), (...) float32."""
    with torch.autocast(rows.device.type, enabled=False):
        units = F.normalize(rows.float(), dim=-1)  # (..., N, d)
        cosines = (units @ units.mT).square()  # (..., N, N)
        apart = cosines.sum((-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)
        return apart / max(rows.shape[-2] * (rows.shape[-2] - 1), 1)


def apply_overrides(logits: torch.Tensor, spec: MoELayerSpec, context: RoutingContext) -> torch.Tensor:
    """Return `logits` (T, C >= E) of the experts of this layer that may be chosen, the others -inf.

    These are those before `spec.first_expert`, and the context's disabled ones; its test-time offsets are added.
    """
    if spec.first_expert:
        candidates = torch.arange(logits.shape[-1], device=logits.device)  # (C,)
        logits = logits.masked_fill(candidates < spec.first_expert, float("-inf"))
    if context.overrides is None:
        return logits
    context.overrides.check_experts(spec.site, spec.num_experts)
    offset = context.overrides.logit_offset.get(spec.site)
    if offset is not None:
        logits = logits + F.pad(offset.to(logits), (0, logits.shape[-1] - offset.shape[-1]))
    disabled = context.overrides.disabled_experts.get(spec.site)
    if disabled:
        columns = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        columns[disabled] = True
        logits = logits.masked_fill(columns, float("-inf"))
    return logits


def seen_logits(
    logits: torch.Tensor, visible: torch.Tensor, spec: MoELayerSpec, context: RoutingContext
) -> torch.Tensor:
    """Return `logits` (T, E), -inf where an expert is not `visible` (T, E) to a token.

    Where the context disables all that a token sees, it sees the rest.
    """
    if context.overrides is not None:
        left = visible & apply_overrides(logits, spec, context).isfinite()
        visible = visible | ~left.any(-1, keepdim=True)
    return logits.masked_fill(~visible, float("-inf"))


def jitter(hidden_states: torch.Tensor, eps: float, training: bool) -> torch.Tensor:
    """Multiply by uniform(1 - eps, 1 + eps) while training."""
    if not training or eps == 0.0:
        return hidden_states
    return hidden_states * torch.empty_like(hidden_states).uniform_(1.0 - eps, 1.0 + eps)


def gumbel_noise(logits: torch.Tensor) -> torch.Tensor:
    """Return standard Gumbel noise of the shape of logits: the argmax of their sum is a draw from their softmax."""
    return -torch.empty_like(logits).exponential_().log()


def renormalise(weight: torch.Tensor, minimum: float = 1e-20) -> torch.Tensor:
    """Divide the slot weights (T, K) by their sum, at least `minimum`."""
    return weight / weight.sum(-1, keepdim=True).clamp(min=minimum)


def limit_groups(scores: torch.Tensor, n_group: int, topk_group: int, group_score: str = "best_two") -> torch.Tensor:
    """Keep the `topk_group` best of `n_group` expert groups, the rest becomes -inf.

    The score of a group is the sum of its two best experts (DeepSeek-V3, arXiv:2412.19437), or with `"best"` that of
    its best one (DeepSeek-V2, arXiv:2405.04434).
    """
    if n_group <= 1:
        return scores
    grouped = scores.view(scores.shape[0], n_group, -1)  # (T, G, E / G)
    counted = min(2 if group_score == "best_two" else 1, grouped.shape[-1])
    best = grouped.topk(counted, dim=-1).values  # (T, G, 2 or 1)
    # A group of which one expert is left still counts by that one.
    second = best[..., 1:].masked_fill(best[..., 1:] == float("-inf"), 0.0)
    value = best[..., 0] + second.sum(-1)  # (T, G)
    kept = torch.zeros_like(value, dtype=torch.bool).scatter(1, value.topk(topk_group, dim=-1).indices, True)
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


def check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not among the `allowed` ones.

    Raises:
        ValueError: with the allowed values.
    """
    if value not in allowed:
        raise ValueError(f"{option}={value!r}: allowed are {', '.join(repr(item) for item in allowed)}.")


def gates_of(modalities: list[str] | tuple[str, ...]) -> list[int]:
    """Return the gate of every modality, where each of `modalities` has one of its own.

    Video shares the image gate unless it is named; any other modality without a gate shares the text gate.

    Raises:
        ValueError: unless `modalities` begins with text and names each once.
    """
    for name in modalities:
        check_choice("modalities", name, MODALITIES)
    if not modalities or modalities[0] != "text" or len(set(modalities)) != len(modalities):
        raise ValueError(f"modalities={modalities!r} must begin with 'text' and name each modality once.")
    gates = {name: index for index, name in enumerate(modalities)}
    gates.setdefault("video", gates.get("image", 0))
    return [gates.get(name, 0) for name in MODALITIES]


def check_groups(spec: MoELayerSpec, n_group: int, topk_group: int, name: str) -> None:
    """Refuse expert groups that do not divide E, or that leave a token fewer than K experts.

    Raises:
        ValueError: with the three numbers.
    """
    fits = n_group >= 1 and spec.num_experts % n_group == 0 and 1 <= topk_group <= n_group
    if not fits or topk_group * (spec.num_experts // n_group) < spec.num_experts_per_tok:
        raise ValueError(
            f"Router {name!r} of layer {spec.layer_idx}: n_group={n_group} must divide num_experts="
            f"{spec.num_experts}, and topk_group={topk_group} of these groups must hold at least "
            f"num_experts_per_tok={spec.num_experts_per_tok} experts."
        )


def is_vision(context: RoutingContext, device: torch.device) -> torch.Tensor:
    """Return True for image and video tokens, (T,) bool."""
    return is_one_of(context.tokens("modality_ids", device), (1, 2))


def by_modality(values: Sequence[int], context: RoutingContext, device: torch.device) -> torch.Tensor:
    """Return `values[m]` for the modality m of every token, (T,) int64."""
    return looked_up(values, context.tokens("modality_ids", device))


def looked_up(values: Sequence[float], ids: torch.Tensor) -> torch.Tensor:
    """Return `values[i]` for every id i of a few, (T,) of the type of `ids`; the first of the values for other ids.

    A table in a tensor would be copied from the host at every call, which then waits for the device.
    """
    found = torch.full_like(ids, values[0])
    for number, value in enumerate(values):
        if value != values[0]:
            found = found.masked_fill(ids == number, value)
    return found


def bank_sizes(spec: MoELayerSpec, name: str) -> list[int]:
    """Return how many experts the text bank and the vision bank of a layer hold: without banks, half of them each.

    Raises:
        ValueError: if there are not two banks of at least K experts each.
    """
    half = spec.num_experts // 2
    sizes = [size for _, size, _ in spec.banks] or [half, spec.num_experts - half]
    if len(sizes) != 2 or min(sizes) < spec.num_experts_per_tok:
        raise ValueError(
            f"Router {name!r} of layer {spec.layer_idx} needs two banks, text and vision, of at least "
            f"num_experts_per_tok={spec.num_experts_per_tok} experts each; got {sizes}."
        )
    return sizes


def mask_other_bank(logits: torch.Tensor, bank_index: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Make the logits (T, E) of the experts that are not in a token's bank, 0 or 1 in `bank_index` (T,), -inf."""
    bank_of_expert = torch.arange(sum(sizes), device=logits.device) >= sizes[0]  # (E,)
    return logits.masked_fill(bank_index[:, None] != bank_of_expert, float("-inf"))


def router_scores(logits: torch.Tensor, score_function: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores (T, C) of a softmax or sigmoid gate, and the probabilities; a logit of -inf gives 0."""
    if score_function == "softmax":
        scores = logits.softmax(dim=-1)
        return scores, scores
    scores = logits.sigmoid()
    return scores, renormalise(scores)


def select_experts(
    scores: torch.Tensor,
    logits: torch.Tensor | None,
    spec: MoELayerSpec,
    bias: torch.Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "best_two",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the K candidates with the highest `scores + bias`; a chosen expert weighs its unbiased score.

    Args:
        scores (`torch.Tensor` of shape `(T, C)`): non-negative; C >= E, the real experts first.
        logits (`torch.Tensor` of shape `(T, C)`): -inf where a token may not choose; `None` where every token may
            choose all candidates, and C = E.
        bias (`torch.Tensor` broadcast to `(T, C)`, *optional*): moves the choice, not the weight.
        n_group, topk_group, group_score: see [`limit_groups`].

    Returns:
        Index (T, K) and weight (T, K). A slot is empty (index E, weight 0) where it would go to a candidate beyond the
        real experts, or where a token has fewer than K candidates left.
    """
    if logits is None and bias is None and n_group == 1:
        weight, index = scores.topk(spec.num_experts_per_tok, dim=-1)
        return index, weight
    choice = scores.detach() if bias is None else scores.detach() + bias
    if logits is not None:
        choice = choice.masked_fill(logits == float("-inf"), float("-inf"))
    choice = limit_groups(choice, n_group, topk_group, group_score)
    value, index = choice.topk(spec.num_experts_per_tok, dim=-1)
    weight = scores.gather(1, index)
    if logits is None:  # no group that is kept has fewer than K candidates
        return index, weight
    empty = (index >= spec.num_experts) | (value == float("-inf"))
    return index.masked_fill(empty, spec.num_experts), weight.masked_fill(empty, 0.0)


def assign(
    logits: torch.Tensor,
    spec: MoELayerSpec,
    context: RoutingContext,
    *,
    scores: str = "softmax",
    norm: bool = True,
    scale: float = 1.0,
    bias: torch.Tensor | None = None,
    groups: tuple[int, int, str] = (1, 1, "best_two"),
    norm_min: float = 1e-20,
    gate_index: torch.Tensor | None = None,
    masked: bool = True,
) -> ExpertAssignment:
    """Return the top-k assignment of logits: what almost every token-choice router ends with.

    Args:
        logits (`torch.Tensor` of shape `(T, C)`): C >= E candidates, the real experts first; -inf where a token may
            not choose. The test-time overrides of the context are applied here.
        scores: `"softmax"` or `"sigmoid"`, see [`router_scores`].
        norm, norm_min: divide the K weights by their sum, at least `norm_min`.
        scale: multiplies the weights.
        bias, groups: see [`select_experts`]; `groups` are `n_group`, `topk_group` and `group_score`.
        gate_index (`torch.Tensor` of shape `(T,)`, *optional*): which gate decided.
        masked (`bool`, *optional*, defaults to `True`): whether a logit may be -inf, or C > E.
    """
    logits = apply_overrides(logits, spec, context)
    values, probs = router_scores(logits, scores)  # (T, C) both
    limits = logits if masked or spec.first_expert or context.overrides is not None else None
    index, weight = select_experts(values, limits, spec, bias, *groups)  # (T, K) both
    weight = renormalise(weight, norm_min) if norm else weight
    weight = weight * scale if scale != 1.0 else weight
    return ExpertAssignment(
        index, weight, spec.num_experts, router_logits=logits, router_probs=probs, gate_index=gate_index
    )


def from_mask(
    chosen: torch.Tensor, weight: torch.Tensor, most: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return index and weight, (T, K) both, of the experts that each token has in a mask.

    Args:
        chosen (`torch.Tensor` of shape `(T, E)`, bool): any number of experts for a token.
        weight (`torch.Tensor` of shape `(T, E)`): of every expert.
        most (`int`, *optional*): K; of more chosen experts those of the largest weight are kept, the largest first. E
            when `None`: slot i is then that of expert i, or empty.
    """
    num_experts = chosen.shape[1]
    if most is None or most >= num_experts:
        experts = torch.arange(num_experts, device=chosen.device).expand_as(chosen)
        return experts.masked_fill(~chosen, num_experts), weight.masked_fill(~chosen, 0.0)
    value, index = weight.detach().masked_fill(~chosen, float("-inf")).topk(most, dim=-1)  # (T, K) both
    empty = value == float("-inf")
    return index.masked_fill(empty, num_experts), weight.gather(1, index).masked_fill(empty, 0.0)


def limit_capacity(
    assignment: ExpertAssignment,
    capacity_factor: float | None,
    spec: MoELayerSpec,
    context: RoutingContext,
    order: str = "position",
) -> ExpertAssignment:
    """Empty the slots that an expert has no room for.

    An expert takes `ceil(capacity_factor * n * K / E)` slots of a sequence with n real tokens; `None` is dropless. The
    first tokens in `order` go first: by `"position"`, or by the `"score"` of their best expert, highest first. The
    weights that remain keep their size, the signal `dropped` is the share of a token's slots that was emptied.
    """
    if capacity_factor is None:
        return assignment
    mask = context.token_mask.to(assignment.expert_index.device)  # (B, S)
    index = assignment.expert_index.masked_fill(~mask.view(-1, 1), spec.num_experts)  # (T, K)
    row = torch.arange(len(mask), device=mask.device).repeat_interleave(index.numel() // len(mask))  # (T * K,)
    scores = torch.zeros_like(index[:, 0]) if order == "position" else assignment.router_probs.amax(-1)  # (T,)
    share = capacity_factor * spec.num_experts_per_tok / spec.num_experts
    kept = take_best(
        scores.repeat_interleave(index.shape[1]),
        row * (spec.num_experts + 1) + index.flatten(),
        room(mask.sum(-1), share)[row],
    )
    overflow = ~kept.view_as(index) & (index < spec.num_experts)
    assignment.chosen_index = assignment.expert_index
    assignment.expert_index = assignment.expert_index.masked_fill(overflow, spec.num_experts)
    assignment.expert_weight = assignment.expert_weight.masked_fill(overflow, 0.0)
    assignment.signals["dropped"] = overflow.float().mean(-1)
    return assignment
