"""How the attention of a decoder layer of Transformers is read, and how a router decides within it."""

from torch import Tensor, nn

from .block import unwrapped
from .decisions import ExpertAssignment
from .layer_spec import Site
from .replacement import UnsuitedLayer
from .routing_context import active_context


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def find_attention(layer: nn.Module, mechanism: str) -> nn.Module:
    """Return the attention of a layer: what has [`PROJECTIONS`], and heads of one width.

    Raises:
        UnsuitedLayer: if the layer has none, as those of a hybrid that do not attend.
    """
    for module in layer.modules():
        projections = [getattr(module, name, None) for name in PROJECTIONS]
        if all(isinstance(item, nn.Linear) for item in projections) and hasattr(module, "head_dim"):
            return module
    raise UnsuitedLayer(
        f"{type(layer).__name__} has no attention that {mechanism} could take: one with {', '.join(PROJECTIONS)}. "
        "Choose another host, such as Llama, or leave these layers out."
    )


def decide(gate: nn.Module, hidden_states: Tensor) -> ExpertAssignment:
    """Return what a router decides for the tokens (B, S, d) that reach an attention; the context records it.

    Raises:
        ValueError: if it mixes tokens or merges experts.
    """
    context, router = active_context(hidden_states), unwrapped(gate)
    decision = context.drop_padding(gate(hidden_states.reshape(-1, hidden_states.shape[-1]), context))
    if not isinstance(decision, ExpertAssignment):
        raise ValueError(
            f"Attention needs experts that are assigned to tokens, and the router {router.mechanism_name!r} gives a "
            f"{type(decision).__name__}: choose another, such as 'top_k'."
        )
    context.decisions[router.spec.site] = decision
    return decision


def decided(site: Site, hidden_states: Tensor) -> ExpertAssignment:
    """Return what was decided at a site of the layer that is running.

    Raises:
        ValueError: if nothing was, since the layer runs without a context.
    """
    decision = active_context(hidden_states).decisions.get(site)
    if decision is None:
        raise ValueError(f"The attention of layer {site} routes, and has no routing context: call the whole model.")
    assert isinstance(decision, ExpertAssignment)
    return decision
