"""Omni-router: one gate for all MoE layers.

    p_l = softmax(W h_l)        the K largest of p_l        W the same in every layer

Every layer decides anew, by its own hidden states; what is shared is the function, so that expert e stands for the
same direction of the residual stream everywhere, and experts of one number specialise together. With `modalities`
there is one such gate for each of them, an extension of this library's; each is a population of its own in the balance
losses.

Source: Omni-Router: Sharing Routing Decisions in Sparse Mixture-of-Experts for Speech Recognition, arXiv:2507.05724.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from ..decisions import ExpertAssignment
from ..gating import assign, check_slots, gate_logits, gates_of, per_gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router, SharedPart
from ..routing_context import RoutingContext


class SharedGate(SharedPart):
    """The gate `weight` (E, d) of all layers, or its stack (G, E, d)."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor, gate_index: torch.Tensor | None) -> torch.Tensor:
        """Return the logits (T, E) float32 of tokens (T, d), by the gates that they name in `gate_index` (T,)."""
        if gate_index is None:
            return gate_logits(hidden_states, self.weight)
        return per_gate_logits(hidden_states, self.weight, gate_index)


@register_router("omni_router")
class OmniRouter(Router):
    """Softmax top-k by a gate that the model holds.

    Args:
        spec (`MoELayerSpec`): facts of the layer; the paper has K = 1.
        modalities (`list[str]`, *optional*): those with a gate of their own, text first; one gate when absent. Video
            shares that of images unless it is named, and any other modality without one shares that of text.
        norm_topk_prob (`bool`, *optional*, defaults to `True`): divide the K weights by their sum; without effect when
            K = 1.

    Raises:
        ValueError: if K does not lie in [1, E], or `modalities` does not begin with text; when the model is built, if
            its layers differ in E, d or modalities.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        modalities: list[str] | tuple[str, ...] | None = None,
        norm_topk_prob: bool = True,
    ):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "omni_router")
        self.norm_topk_prob = norm_topk_prob and spec.num_experts_per_tok > 1
        self.gate_shape: tuple[int, ...] = (spec.num_experts, spec.hidden_size)
        if modalities is not None:
            self.reads = frozenset({"hidden_states", "modality"})
            self.gate_of_modality = gates_of(modalities)
            self.gate_shape = (len(modalities), *self.gate_shape)

    @classmethod
    def shared_part(cls, routers: Sequence[Any]) -> SharedGate:
        shapes = {router.gate_shape for router in routers}
        if len(shapes) > 1:
            raise ValueError(
                "The router 'omni_router' is one gate for all MoE layers, which therefore need one number of experts, "
                f"one width and one list of modalities; their gates would be of shapes {sorted(shapes)}. Give the "
                "other layers another router."
            )
        return SharedGate(*shapes.pop())

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        gate_index = None
        if len(self.gate_shape) == 3:
            table = torch.tensor(self.gate_of_modality, device=hidden_states.device)
            gate_index = table[context.tokens("modality_ids", hidden_states.device)]  # (T,)
        logits = self.shared(context)(hidden_states, gate_index)  # (T, E)
        return assign(logits, self.spec, context, norm=self.norm_topk_prob, gate_index=gate_index, masked=False)
