"""How a target comes to the decision of its router, and which decisions its experts can run."""

from typing import Any

import torch

from ..modeling.routing import Decision, ExpertAssignment, Router, RoutingContext, SlotMixture
from .contexts import AdapterContext, LayerRun, TokenlessContext
from .experts import ExpertKind
from .low_rank import ExpertSlots, MixedSlots
from .routers import PooledRouter


def decide(
    router: Router, hidden_states: torch.Tensor, run: LayerRun | None, adapter_name: str
) -> ExpertSlots | MixedSlots:
    """Return a router's decision for hidden states (..., d), and record it for the objectives."""
    context: RoutingContext
    root: AdapterContext | None = None if run is None else run.context
    if root is not None and not root.tells_of(hidden_states):
        root = None
    if root is not None:
        context = root.of(adapter_name)
    else:
        context = TokenlessContext(hidden_states)
        if run is not None and isinstance(router, PooledRouter):
            run.check_told(f"{type(router).__name__}, which pools the tokens of a sequence,")
        if isinstance(router, PooledRouter) and hidden_states.dim() < 3:
            raise ValueError(
                f"{type(router).__name__} pools the tokens of a sequence, and a target got those of all sequences "
                "in one row: choose a router that decides token by token, or leave this target out."
            )
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, d)
    decision = router(tokens, context)
    if isinstance(decision, ExpertAssignment):
        decision = decision.drop(~context.tokens("token_mask", tokens.device))
    if root is not None:
        context.decisions[router.spec.layer_idx] = decision
    return as_slots(decision)


def as_slots(decision: Decision, device: torch.device | None = None) -> ExpertSlots | MixedSlots:
    """Return a decision in the form that experts take, on `device` if it is given."""
    if isinstance(decision, SlotMixture):
        return MixedSlots(decision)
    return ExpertSlots(decision, device)  # type: ignore[arg-type]


def check_gradient(decision: Decision, router: Router) -> None:
    """Refuse a decision that was made without a gradient where its router learns.

    Raises:
        ValueError: if it was, as reentrant checkpointing makes the decision that other layers share.
    """
    weights = decision.combine if isinstance(decision, SlotMixture) else decision.expert_weight
    learns = any(parameter.requires_grad for parameter in router.parameters())
    if torch.is_grad_enabled() and learns and not weights.requires_grad:
        raise ValueError(
            "Reentrant gradient checkpointing cuts the gradient of a router that all layers share: pass "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or set router_input='decoder_layer'."
        )


def check_decision(decision: Any, experts: ExpertKind) -> None:
    """Refuse what the experts of a target cannot run.

    Raises:
        ValueError: if the router mixes tokens or parameters in place of assigning experts, or uses identity experts.
    """
    if isinstance(decision, SlotMixture) and experts.takes_mixed_slots:
        return
    if not isinstance(decision, ExpertAssignment):
        raise ValueError(
            f"LoRA experts need a router that assigns experts to tokens, this one returns a {type(decision).__name__}."
        )
    if decision.identity_weight is not None:
        raise ValueError(
            "LoRA experts cannot run a router with experts that return their input: the input and the output of a "
            "linear layer differ in width. Choose another router."
        )
