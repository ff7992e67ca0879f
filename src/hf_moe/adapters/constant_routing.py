"""Whether a router gives every token the same experts in the same shares: what an exact merge stands on."""

import torch

from ..configuration.configuration_hf_moe import MODALITIES
from ..evaluation.mode import evaluation_mode
from ..modeling.routing import NUM_MODALITIES, ExpertAssignment, Router, RoutingContext
from .low_rank import ExpertSlots
from .routers import HostRouter


# Rows and tokens of a row that a router is asked about.
PROBE_SHAPE = (6, 16)
# Hidden states of every size: large ones saturate a softmax, small ones do not reach a threshold.
PROBE_SCALES = (0.0, 0.1, 1.0, 10.0)


class RoutingVaries(ValueError):
    """A router that cannot be merged exactly, since not every token has the same gates."""


def constant_gates(
    router: Router, modality: str | None = None, condition_ids: dict[str, int] | None = None
) -> torch.Tensor:
    """Return the gates (E,) that `router` gives to every token, whatever its hidden state and its word.

    Args:
        router: the router.
        modality: `"text"`, `"image"`, `"video"` or `"audio"`: ask only about tokens of this modality.
        condition_ids: ask only about rows with these ids, such as `{"task": 1}`.

    Raises:
        RoutingVaries: if there are no such gates; the message says on what the router's decision depends.
    """
    name = type(router).__name__
    if isinstance(router, HostRouter):
        raise RoutingVaries(f"{name} follows the routing of the model that is adapted")
    condition = getattr(router, "condition", None)
    if condition is not None and condition not in (condition_ids or {}):
        raise RoutingVaries(f"{name} decides by the condition {condition!r} of a row: say which one to merge for")
    known = getattr(router, "num_conditions", 0)
    if known and not 0 <= condition_ids[condition] < known:  # type: ignore[index]
        raise ValueError(
            f"condition_ids={condition_ids}: {condition!r} must lie in [0, {known}), of which {name} knows an expert."
        )
    rows, length = PROBE_SHAPE
    generator = torch.Generator().manual_seed(0)
    device = next((tensor.device for tensor in (*router.parameters(), *router.buffers())), torch.device("cpu"))
    scales = torch.tensor(PROBE_SCALES).repeat(rows * length // len(PROBE_SCALES)).view(rows, length, 1)
    draws = torch.randn(rows, length, router.spec.hidden_size, generator=generator)
    hidden_states = (draws * scales).to(device).flatten(0, 1).requires_grad_()
    if modality is None:
        modality_ids = torch.randint(NUM_MODALITIES, (rows, length), generator=generator)
    else:
        modality_ids = torch.full((rows, length), MODALITIES.index(modality))
    context = RoutingContext(
        modality_ids.to(device),
        torch.ones(rows, length, dtype=torch.bool, device=device),
        torch.arange(rows * length, device=device).view(rows, length),
        {key: torch.full((rows,), value, device=device) for key, value in (condition_ids or {}).items()},
    )
    with evaluation_mode(router), torch.enable_grad():  # without the noise that some routers draw in training
        decision = router(hidden_states, context)
        if not isinstance(decision, ExpertAssignment):
            raise RoutingVaries(f"{name} mixes the tokens of a sequence")
        gates = ExpertSlots(decision).gates  # (T, E)
    if _depends(gates, hidden_states) or _chooses_by(decision, hidden_states):
        raise RoutingVaries(f"{name} decides by the hidden state of a token, and one matrix cannot hold that")
    spread = (gates - gates[0]).abs().amax(-1)  # (T,)
    same_modality = modality_ids.flatten() == modality_ids[0, 0]
    if (spread > 1e-6).any():
        if not (spread[same_modality.to(device)] > 1e-6).any():
            raise RoutingVaries(f"{name} decides by the modality of a token: say which one to merge for")
        raise RoutingVaries(f"{name} decides by the word or the position of a token, and one matrix cannot hold that")
    return gates[0].detach()


def _depends(output: torch.Tensor | None, hidden_states: torch.Tensor) -> bool:
    """Whether `output` changes with the hidden states, by its gradient."""
    if output is None or not output.requires_grad:
        return False
    finite = output.masked_fill(~output.isfinite(), 0.0)
    weights = torch.linspace(0.5, 1.5, finite.numel(), device=finite.device).view_as(finite)
    (gradient,) = torch.autograd.grad((finite * weights).sum(), hidden_states, allow_unused=True, retain_graph=True)
    return gradient is not None and bool((gradient.abs() > 1e-6).any())


def _chooses_by(decision: ExpertAssignment, hidden_states: torch.Tensor) -> bool:
    """Whether there is a choice that the hidden states decide: an index has no gradient, its logits have."""
    index = decision.expert_index.sort(-1).values
    everything = torch.arange(decision.num_experts, device=index.device)
    if index.shape[-1] == len(everything) and torch.equal(index, everything.expand_as(index)):
        return False
    return _depends(decision.router_logits, hidden_states)
