"""Soft MoE: experts run on slots, each a mixture of the tokens of a sequence.

    L = X Phi (S, N)        D = softmax of L over the tokens        C = softmax of L over the N = E * p slots

Expert e sees its p rows of `D^T X`; a token gets its row of `C` times the slot outputs. Every slot mixes all tokens,
later ones too, so this is for layers with bidirectional attention.

Sources: From Sparse to Soft Mixtures of Experts, arXiv:2308.00951; Efficient Fine-tuning of Audio Spectrogram
Transformers via Soft Mixture of Adapters, arXiv:2402.00828.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import PositiveInt
from ..decisions import SlotMixture
from ..gating import gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext
from ..soft_slots import refuse_documents, slot_combine, slot_dispatch


@register_router("soft_moe")
class SoftMoeRouter(Router):
    """Soft slots.

    Args:
        spec (`MoELayerSpec`): facts of the layer; K does not matter.
        slots_per_expert (`int`, *optional*, defaults to 1): p.
        normalize (`bool`, *optional*, defaults to `False`): l2-normalise hidden states and slot parameters, and
            multiply by one learned scale.
    """

    reads = frozenset({"hidden_states", "sequence"})
    looks_ahead = True
    mixes_slots = True

    def __init__(self, spec: MoELayerSpec, *, slots_per_expert: PositiveInt = 1, normalize: bool = False):
        super().__init__(spec)
        self.weight = nn.Parameter(torch.empty(spec.num_experts * slots_per_expert, spec.hidden_size))
        self.scale = nn.Parameter(torch.empty(())) if normalize else None

    def initialize(self, std: float) -> None:
        init.xavier_normal_(self.weight)
        if self.scale is not None:
            init.ones_(self.scale)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> SlotMixture:
        refuse_documents(context, "soft_moe")
        weight = self.weight
        if self.scale is not None:
            hidden_states = F.normalize(hidden_states.float(), dim=-1)
            weight = self.scale * F.normalize(weight.float(), dim=-1)
        mask = context.token_mask.to(hidden_states.device)  # (B, S)
        logits = gate_logits(hidden_states, weight).view(*mask.shape, -1)  # (B, S, N)
        dispatch, combine = slot_dispatch(logits, mask), slot_combine(logits, mask)
        return SlotMixture(dispatch, combine, self.spec.num_experts, router_logits=logits)
