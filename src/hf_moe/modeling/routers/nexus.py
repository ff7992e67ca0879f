"""Nexus routing: what an expert is for is read from a vector, and the gate's rows are made of these vectors.

    e_i = W_2 (silu(W_1a D_i) * W_1b D_i)        s = softmax over i of e_i h        the K largest of s, weighted by s

D_i (l,) describes the data of expert i: the mean of sentence embeddings, or of pooled features of an image encoder, of
its domain. It is a buffer, `domain_embeddings` (E, l), and is saved; the projection, W_1a and W_1b (h_r, l) and W_2
(d, h_r), is one for all experts of a layer. So an expert that comes later brings no parameter of the router's, and is
scored at once by what its domain has in common with the others. `construction/domain_experts.py` makes a model of
experts that were trained apart, and adds one to it.

Before domains are set they are random directions. The E rows e_i take `E h_r (2 l + d)` multiply-adds a call; without
gradients, as in generation, they are made once and kept until a tensor that they are made of changes.

Source: Nexus: Specialization meets Adaptability for Efficiently Training Mixture of Experts, arXiv:2408.15901.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import PositiveInt
from ..decisions import ExpertAssignment
from ..gating import assign, check_slots, gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("nexus")
class NexusRouter(Router):
    """Softmax top-k by rows that a projection makes of the experts' domains.

    Args:
        spec (`MoELayerSpec`): facts of the layer.
        domain_embedding_dim (`int`, *optional*): l; d when absent.
        projection_hidden (`int`, *optional*): h_r; d when absent.
        norm_topk_prob (`bool`, *optional*, defaults to `False`): divide the K weights by their sum; without effect
            when K = 1.

    Raises:
        ValueError: if K does not lie in [1, E].
    """

    domain_embeddings: torch.Tensor

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        domain_embedding_dim: PositiveInt | None = None,
        projection_hidden: PositiveInt | None = None,
        norm_topk_prob: bool = False,
    ):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "nexus")
        self.norm_topk_prob = norm_topk_prob and spec.num_experts_per_tok > 1
        width, hidden = domain_embedding_dim or spec.hidden_size, projection_hidden or spec.hidden_size
        self.gate_proj = nn.Parameter(torch.empty(hidden, width))  # W_1a
        self.up_proj = nn.Parameter(torch.empty(hidden, width))  # W_1b
        self.down_proj = nn.Parameter(torch.empty(spec.hidden_size, hidden))  # W_2
        self.register_buffer("domain_embeddings", torch.empty(spec.num_experts, width, dtype=torch.float32))
        # The rows, and by what they were made.
        self._kept: tuple[Any, torch.Tensor] | None = None

    def initialize(self, std: float) -> None:
        for weight in (self.gate_proj, self.up_proj, self.down_proj):
            init.normal_(weight, mean=0.0, std=std)
        init.normal_(self.domain_embeddings, mean=0.0, std=self.domain_embeddings.shape[1] ** -0.5)

    def expert_rows(self) -> torch.Tensor:
        """Return e (E, d), float32."""
        tensors = (self.gate_proj, self.up_proj, self.down_proj, self.domain_embeddings)
        # Inference tensors count no changes; those of FSDP2 hide theirs, which follow a forward with gradients.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(map(torch.is_inference, tensors)):
            self._kept = None
            return self._make_rows()
        made_by = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if self._kept is None or self._kept[0] != made_by:
            self._kept = (made_by, self._make_rows())
        return self._kept[1]

    def _make_rows(self) -> torch.Tensor:
        domains = self.domain_embeddings
        inner = F.silu(gate_logits(domains, self.gate_proj)) * gate_logits(domains, self.up_proj)  # (E, h_r)
        return gate_logits(inner, self.down_proj)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = gate_logits(hidden_states, self.expert_rows())  # (T, E)
        return assign(logits, self.spec, context, norm=self.norm_topk_prob, masked=False)
