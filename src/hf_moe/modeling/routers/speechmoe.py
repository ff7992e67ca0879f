"""SpeechMoE routing: every layer reads, besides its hidden states, an embedding of the token that all layers share.

    e = U_2 silu(U_1 h_1)        logits_l = W_l [h_l ; e]        the K largest of p = softmax(logits), weighted by p

One network (U_1, U_2), a module of the model, makes e (T, de) once per token, from what reaches the first MoE layer:
with a decoder's first layer that is the token and what its attention has read, and it is known in every host. The
paper's network reads the acoustic features. That layer takes d de + de^2 multiply-adds more for a token, and every one
E de more than a plain gate. Training and inference are the same, and a token reads no later one.

The network has a task of its own, so that e stays informative. With `embedding_classes` C, a head (C, de) predicts the
next label's id modulo C, which is the next token where C covers the vocabulary and costs less than a second language
head where it does not. The signal `embedding_loss` is its cross-entropy in nats, such that the mean over a row's real
tokens is the mean over its labels; the objective `signal` makes it a loss. The objectives `sparsity_l1` and
`mean_importance` are the paper's other two.

Source: SpeechMoE: Scaling to Large Acoustic Models with Dynamic Routing Mixture of Experts, arXiv:2105.03036.
"""

from collections.abc import Sequence
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
from ..routing import Router, SharedPart
from ..routing_context import RoutingContext


class EmbeddingNetwork(SharedPart):
    """The network of all layers: `forward(hidden (T, d)) -> e (T, de)`, in float32.

    Args:
        hidden_size (`int`): d.
        width (`int`): de.
        classes (`int`, *optional*): C; without a head when `None`.
    """

    runs_once = True

    def __init__(self, hidden_size: int, width: int, classes: int | None):
        super().__init__()
        self.inner = nn.Parameter(torch.empty(width, hidden_size))  # U_1
        self.outer = nn.Parameter(torch.empty(width, width))  # U_2
        self.head = None if classes is None else nn.Parameter(torch.empty(classes, width))

    def initialize(self, std: float) -> None:
        for parameter in self.parameters():
            init.normal_(parameter, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return gate_logits(F.silu(gate_logits(hidden_states, self.inner)), self.outer)

    def next_label_loss(self, embedding: torch.Tensor, context: RoutingContext) -> torch.Tensor | None:
        """Return the signal `embedding_loss` (T,); `None` without a head, or in a call without labels of tokens."""
        if self.head is None or context.labelled is None:
            return None
        labels = context.inputs["labels"].to(embedding.device)
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)  # (B, S)
        counted = labels != -100
        target = (labels % len(self.head)).masked_fill(~counted, -100)
        loss = F.cross_entropy(gate_logits(embedding, self.head), target.flatten(), reduction="none")  # (T,)
        real = context.token_mask.to(loss.device).sum(-1, keepdim=True)  # (B, 1)
        return (loss.view_as(labels) * real / counted.sum(-1, keepdim=True).clamp(min=1)).flatten()


@register_router("speechmoe")
class SpeechMoERouter(Router):
    """Softmax top-k on hidden states and the shared embedding; the weights are plain probabilities.

    Started from another router, it scores as that one does until it has learnt to read the embedding.

    Args:
        spec (`MoELayerSpec`): facts of the layer; the paper has K = 1.
        route_embedding_dim (`int`, *optional*, defaults to 256): de.
        embedding_classes (`int`, *optional*): C of the head that gives the signal `embedding_loss`; leave it out where
            no objective reads the signal, since the head then never learns.

    Raises:
        ValueError: if K does not lie in [1, E]; when the model is built, if its layers differ in these sizes or in d.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        route_embedding_dim: PositiveInt = 256,
        embedding_classes: PositiveInt | None = None,
    ):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "speechmoe")
        self.network_sizes = (spec.hidden_size, route_embedding_dim, embedding_classes)
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))
        self.embedding_weight = nn.Parameter(torch.empty(spec.num_experts, route_embedding_dim))

    @classmethod
    def shared_part(cls, routers: Sequence[Any]) -> EmbeddingNetwork:
        sizes = {router.network_sizes for router in routers}
        if len(sizes) > 1:
            raise ValueError(
                "The router 'speechmoe' has one embedding network for all MoE layers, which therefore need one "
                f"hidden_size, route_embedding_dim and embedding_classes; got {sorted(sizes, key=str)}."
            )
        return EmbeddingNetwork(*sizes.pop())

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)
        init.normal_(self.embedding_weight, mean=0.0, std=std)

    @torch.no_grad()
    def start_from(self, old: Router) -> None:
        super().start_from(old)
        if not isinstance(old, type(self)) and old.gate_rows() is not None:
            self.embedding_weight.zero_()

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        network = self.shared(context)
        # The first layer makes it, also where it is recomputed in the backward pass; later ones read it.
        site, embedding = context.carry.get("route_embedding", (self.spec.site, None))
        first = site == self.spec.site
        if first:
            embedding = network(hidden_states)  # (T, de)
            context.carry["route_embedding"] = (site, embedding)
        logits = gate_logits(hidden_states, self.weight)  # (T, E)
        logits = logits + gate_logits(embedding.to(logits.device), self.embedding_weight)
        decision = assign(logits, self.spec, context, norm=False, masked=False)
        loss = network.next_label_loss(embedding, context) if first else None
        if loss is not None:
            decision.signals["embedding_loss"] = loss
        return decision
