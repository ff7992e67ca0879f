"""Whether a router gives every token the same experts in the same shares: what an exact merge stands on."""

import torch

from ..configuration.configuration_hf_moe import MODALITIES
from ..modeling.decisions import ExpertAssignment
from ..modeling.evaluation_mode import evaluation_mode
from ..modeling.routing import Router
from ..modeling.routing_context import RoutingContext
from .low_rank import SharedAssignment


# What `Router.reads` names, and why no merge can hold what is decided by it.
VARIES = {
    "call": "follows the routing of the model that is adapted",
    "hidden_states": "decides by the hidden state of a token, and one matrix cannot hold that",
    "input_ids": "decides by the word or the position of a token, and one matrix cannot hold that",
}


class RoutingVaries(ValueError):
    """A router that cannot be merged exactly, since not every token has the same gates."""


def constant_gates(
    router: Router, modality: str | None = None, condition_ids: dict[str, int] | None = None
) -> torch.Tensor:
    """Return the gates (E,) that `router` gives to every token of a modality, in rows with these ids, by its `reads`.

    Raises:
        RoutingVaries: if there are no such gates; the message says on what the router's decision depends.
    """
    name, given = type(router).__name__, condition_ids or {}
    for read, reason in VARIES.items():
        if read in router.reads:
            raise RoutingVaries(f"{name} {reason}")
    condition = router.condition
    if router.num_condition_features:
        raise RoutingVaries(f"{name} decides by features of a row, {condition!r}, which have no number to merge for")
    if condition is not None and condition not in given:
        raise RoutingVaries(f"{name} decides by the condition {condition!r} of a row: say which one to merge for")
    known = router.num_conditions
    if known and not 0 <= given[condition] < known:  # type: ignore[index]
        raise ValueError(
            f"condition_ids={condition_ids}: {condition!r} must lie in [0, {known}), of which {name} knows an expert."
        )
    if "modality" in router.reads and modality is None:
        raise RoutingVaries(f"{name} decides by the modality of a token: say which one to merge for")
    device = next((tensor.device for tensor in (*router.parameters(), *router.buffers())), torch.device("cpu"))
    hidden_state = torch.zeros(1, router.spec.hidden_size, device=device)
    context = RoutingContext(
        torch.full((1, 1), MODALITIES.index(modality or "text"), device=device),
        torch.ones(1, 1, dtype=torch.bool, device=device),
        condition_ids={key: torch.full((1,), value, device=device) for key, value in given.items()},
    )
    with evaluation_mode(router), torch.no_grad():
        decision = router(hidden_state, context)
    if not isinstance(decision, ExpertAssignment):
        raise RoutingVaries(f"{name} mixes the tokens of a sequence")
    return SharedAssignment.of(decision).gates[0]
