"""Sequence- and instruction-level routing: one gate for a sample, from the mean of what has been read of it.

    z_t = mean, or sum, over the counted tokens s <= t of W h_s / rms(h_s)        p = softmax(z_t)
    S = the K largest of p        w_i = p_i / sum_{j in S} p_j

Over the instruction alone, with `end_token_id`, the gate is constant while the answer is written. With K = E all
experts are mixed; with K = 1 the weight stays the plain probability.

The division is this library's: in pretrained decoders the hidden state of the first token can be a hundred times as
long as the others. Left as it is, it alone would decide, for every sample alike, and with p at 0 or 1, where no
gradient moves the gate.

Source: Octavius: Mitigating Task Interference in MLLMs via LoRA-MoE, arXiv:2311.02684.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...modeling.gating import apply_overrides, check_slots, gate_logits, renormalise, router_scores, select_experts
from ...modeling.routing import ExpertAssignment, MoELayerSpec, RoutingContext
from .pooled import PooledRouter


class SequenceRouter(PooledRouter):
    """Softmax gate on pooled hidden states, top-k of E; a token before the first counted one gets no expert.

    Args:
        spec: facts of the layer.
        modalities, end_token_id, pooling: what is pooled, and how, see [`PooledRouter`].
        norm_topk_prob: divide the K weights by their sum; without effect when K = 1.
    """

    mechanism_name = "sequence"

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        modalities: list[str] | tuple[str, ...] | None = None,
        end_token_id: int | None = None,
        pooling: str = "mean",
        norm_topk_prob: bool = True,
    ):
        super().__init__(spec, modalities, end_token_id, pooling)
        check_slots(spec, spec.num_experts, "sequence")
        self.norm_topk_prob = norm_topk_prob and spec.num_experts_per_tok > 1
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        directions = F.rms_norm(hidden_states.float(), hidden_states.shape[-1:])  # (T, d)
        logits, known = self.pool(gate_logits(directions, self.weight), context)  # (T, E)
        logits = apply_overrides(logits, self.spec, context)
        scores, probs = router_scores(logits, "softmax")
        index, weight = select_experts(scores, logits, self.spec)  # (T, K) both
        weight = renormalise(weight) if self.norm_topk_prob else weight
        decision = ExpertAssignment(index, weight, self.spec.num_experts, router_logits=logits, router_probs=probs)
        return decision.drop(~known)
