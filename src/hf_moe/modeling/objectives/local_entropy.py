"""Local entropy: the mean entropy of the tokens' routing distributions, so that every token decides.

    L = mean over tokens of -sum_i p_i log p_i

Alone it lets the router collapse: it goes with a balance loss, or with `global_entropy`.

Sources: Multimodal Contrastive Learning with LIMoE: the Language-Image Mixture of Experts, arXiv:2206.02770 (its local
loss, of text tokens: `modalities: [text]`); Harder Tasks Need More Experts, arXiv:2403.07652 (its dynamic loss).
"""

import torch

from ..decisions import Decision
from ..layer_spec import Site
from ..registry import register_objective
from ..routing import Objective
from ..routing_context import RoutingContext


@register_objective("local_entropy")
class LocalEntropy(Objective):
    """Entropy of `router_probs`, in nats, per token."""

    def forward(self, decisions: dict[Site, Decision], context: RoutingContext) -> torch.Tensor:
        values = []
        for decision in self.assignments(decisions).values():
            probs = decision.router_probs
            entropy = -(probs * probs.clamp(min=1e-20).log()).sum(-1)  # (T,)
            values.append(context.row_mean(entropy))
        return self.reduce_layers(values)
