"""How a target comes to the decision of its router, and which decisions its experts can run."""

from typing import Any

import torch
from torch.nn import functional as F

from ..modeling.decisions import Decision, ExpertAssignment, SlotMixture
from ..modeling.layer_spec import Site
from ..modeling.routing import Router
from ..modeling.routing_context import RoutingContext
from .contexts import LayerCall, are_tokens, unknown_tokens
from .low_rank import SharedAssignment


def decide(
    router: Router, hidden_states: torch.Tensor, call: LayerCall | None, adapter_name: str
) -> SharedAssignment | SlotMixture:
    """Return a router's decision for hidden states (..., d), and record it for the objectives."""
    told = call is not None and call.tells_of(hidden_states)
    context = call.of(adapter_name) if told else unknown_tokens(hidden_states)  # type: ignore[union-attr]
    if not told and "sequence" in router.reads:
        if call is not None:
            call.check_told(f"{type(router).__name__}, which pools the tokens of a sequence,")
            if call.context is not None and call.context.memory.cached_tokens:
                raise ValueError(
                    f"{type(router).__name__} pools the tokens of a call, and a target got others, of a cache or an "
                    "encoder: choose router_input='decoder_layer', or a router that decides token by token."
                )
        if hidden_states.dim() < 3:
            raise ValueError(
                f"{type(router).__name__} pools the tokens of a sequence, and a target got those of all sequences "
                "in one row: choose a router that decides token by token, or leave this target out."
            )
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, d)
    decision = context.drop_padding(router(tokens, context))
    if told:
        context.decisions[router.spec.layer_idx] = decision
    return shared(decision)


def decision_of_target(
    call: LayerCall, made: SharedAssignment | SlotMixture, key: tuple[str, Site], x: torch.Tensor, target: str
) -> SharedAssignment | SlotMixture:
    """Return the decision that a layer's targets share, for what one of them reads, `x` (..., in).

    That is the tokens which enter the layer, or, where attention expands what it has cached of every token, the cached
    ones and these. `key` is adapter and site of the router; `target` names the target in an error.
    """
    index = weight = None
    if call.context is not None and isinstance(made, SharedAssignment) and x.dim() > call.hidden_states.dim():
        index, weight = _remembered(call.of(key[0]), key[1], made, len(call.hidden_states))
    if call.is_entered_by(x):
        return made
    places = 0 if index is None else x[..., 0].numel() // len(index)
    if (
        not isinstance(made, SharedAssignment)
        or index is None
        or places < index.shape[1]
        or not are_tokens(x, torch.Size((len(index), places)))
    ):
        raise ValueError(
            f"The router of this layer decided for the {call.hidden_states[..., 0].numel()} tokens that enter the "
            f"layer, and a target, {target}, got others, {tuple(x.shape[:-1])}, as in cross-attention, in windows, or "
            "from a cache that was filled without this adapter: set router_input='target', or leave this target out."
        )
    # A cache of fixed size has free places after the tokens.
    free = places - index.shape[1]
    index = F.pad(index, (0, 0, 0, free), value=made.num_experts)
    weight = F.pad(weight, (0, 0, 0, free))
    return SharedAssignment(index.flatten(0, 1), weight.flatten(0, 1), made.num_experts)


def _remembered(context: RoutingContext, router: Site, made: SharedAssignment, rows: int) -> tuple[Any, Any]:
    """Remember a decision; return index and weight (B, n + S, K) with the cached tokens', `None` where unknown."""
    parts = {"index": made.expert_index, "weight": made.expert_weight}  # (T, K) both
    if not all(context.memory.knows((name, router)) for name in parts):
        return None, None
    found = [context.remember((name, router), part.unflatten(0, (rows, -1))) for name, part in parts.items()]
    return found[0], found[1]


def shared(decision: Decision, device: torch.device | None = None) -> SharedAssignment | SlotMixture:
    """Return a decision in the form that experts take, on `device` if it is given."""
    return decision if isinstance(decision, SlotMixture) else SharedAssignment.of(decision, device)  # type: ignore[arg-type]


def check_gradient(decision: Decision, router: Router) -> None:
    """Refuse a decision without a gradient where its router learns, as reentrant checkpointing makes a shared one."""
    weights = decision.combine if isinstance(decision, SlotMixture) else decision.expert_weight
    learns = any(parameter.requires_grad for parameter in router.parameters())
    if torch.is_grad_enabled() and learns and not weights.requires_grad:
        raise ValueError(
            "Reentrant gradient checkpointing cuts the gradient of a router that all layers share: pass "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or set router_input='decoder_layer'."
        )


@torch.no_grad()
def check_decision_of(router: Router, takes_mixed_slots: bool, tokens_known: str | None) -> None:
    """Refuse a router whose decisions the experts of a target cannot run, or that reads what is not known there."""
    if "call" in router.reads or any(parameter.is_meta for parameter in router.parameters()):
        return
    probe = torch.zeros(1, 1, router.spec.hidden_size)
    context = unknown_tokens(probe)
    if tokens_known == "text" or (tokens_known is not None and router.condition is not None):
        context = RoutingContext.all_text(probe)
        context.input_ids = context.modality_ids
        if router.condition is not None:  # it comes with the call
            ids, features = context.modality_ids[:, 0], probe.new_zeros(1, router.num_condition_features)
            context.condition_ids = {router.condition: ids if router.num_conditions else features}
    decision = router(probe[0], context)
    if router.mixes_slots and takes_mixed_slots:
        return
    if router.mixes_slots or not isinstance(decision, ExpertAssignment):
        kind = SlotMixture if router.mixes_slots else type(decision)
        raise ValueError(
            f"The router {router.mechanism_name!r} returns a {kind.__name__}, and these experts need one "
            "that assigns experts to tokens: choose another, such as 'top_k', or 'sequence' for one gate per sample."
        )
    if decision.latents is not None:
        raise ValueError(
            f"The router {router.mechanism_name!r} begins the work of experts that go on from it, as LoRA experts do "
            "not: choose another, such as 'top_k'."
        )
    if decision.identity_weight is not None:
        raise ValueError(
            "LoRA experts cannot run a router with experts that return their input: the input and the output of a "
            "linear layer differ in width. Choose another router."
        )
