"""BASE layers: in training tokens and experts are matched, so that every expert has equally many tokens.

    S = W x        e_1, ..., e_T = the assignment of the largest sum_t S_{t, e_t}  with at most ceil(T / E) tokens each
    w_t = sigmoid(S_{t, e_t})        one expert for a token, no balance loss

T are the real tokens of the batch in a process; where E divides T, every expert has T / E. The match depends on the
other tokens, so at inference, as in the paper, a token goes to the expert of its largest score, whatever the loads.

The match is found by an auction for the places of the experts, with prices that start from those of the problem with
an entropy term: 30 rounds of 6 T E operations, then 5 to 130 in which tokens without a place bid, for T = 512, and 44
for T = 4096, E = 64. Against any balanced assignment it gains what the best one does, less 0.3% at most and less 0.01%
where tokens are not a few clusters. Every round waits for the device to say how many tokens are left; the benchmark of
the routers has the time.

Source: BASE Layers: Simplifying Training of Large, Sparse Models, arXiv:2103.16716.
"""

import math

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import Positive
from ..admission import take_best
from ..decisions import ExpertAssignment
from ..gating import apply_overrides, gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


# The entropy's weight in the regularised problem, round by round, as a share of the spread of the scores.
ENTROPIES = [0.1 * 0.1 ** (turn / 29) for turn in range(30)]
# How much the least bid grows from round to round: the last tokens would bid against each other for thousands.
BID_GROWTH = 1.1


@register_router("base_layers")
class BaseLayersRouter(Router):
    """Balanced assignment in training, the best expert at inference.

    Args:
        spec (`MoELayerSpec`): facts of the layer.
        bid (`float`, *optional*, defaults to 0.001): the least bid of the auction, as a share of the spread of the
            scores; a smaller one finds a better match in more rounds.
        gate_gain (`float`, *optional*, defaults to 0.1): the rows of the gate start orthogonal, of this norm.

    Raises:
        ValueError: unless K is 1.
    """

    reads = frozenset({"hidden_states", "sequence"})

    def __init__(self, spec: MoELayerSpec, *, bid: Positive = 0.001, gate_gain: Positive = 0.1):
        super().__init__(spec)
        if spec.num_experts_per_tok != 1:
            raise ValueError(
                f"Router 'base_layers' of layer {spec.layer_idx} gives a token one expert: num_experts_per_tok="
                f"{spec.num_experts_per_tok} must be 1."
            )
        self.bid = bid
        self.gate_gain = gate_gain
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        init.orthogonal_(self.weight, gain=self.gate_gain)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = apply_overrides(gate_logits(hidden_states, self.weight), self.spec, context)  # (T, E)
        index = logits.argmax(-1)
        if self.training:
            real = context.tokens("token_mask", logits.device)
            index = index.masked_scatter(real, matched(logits[real], self.bid))
        weight = logits.gather(1, index[:, None]).sigmoid()  # (T, 1)
        return ExpertAssignment(
            index[:, None], weight, self.spec.num_experts, router_logits=logits, router_probs=logits.softmax(-1)
        )


# How many rounds it takes is data, so that a graph would break in each.
@torch.compiler.disable
@torch.no_grad()
def matched(scores: torch.Tensor, bid: float) -> torch.Tensor:
    """Return the expert of every token, (n,), in the best match of scores (n, E) with ceil(n / E) places each.

    Args:
        bid: the least bid, as a share of the spread of the scores.
    """
    tokens, experts = scores.shape
    places = -(-tokens // experts)
    # Tokens that do not care take the places that are too many: prices may start anywhere if all places are taken.
    scores = torch.cat([scores, scores.new_zeros(places * experts - tokens, experts)])  # (N, E)
    scores = scores.masked_fill(~scores.isfinite(), 0.0)  # nobody would ever outbid what is no number
    scores = scores / (scores.max() - scores.min()).clamp(min=1e-20)
    price = scores.new_zeros(experts)
    for entropy in ENTROPIES:
        share = ((scores - price) / entropy).log_softmax(-1)  # (N, E), of a token, as a logarithm
        price = price + entropy * (share.logsumexp(0) - math.log(places))
    expert = torch.full((len(scores),), experts, device=scores.device)  # E where a token has none
    paid = torch.zeros_like(scores[:, 0])
    capacity = torch.full_like(expert, places)
    while len(free := (expert == experts).nonzero().squeeze(1)):
        value, best = (scores[free] - price).topk(min(2, experts), dim=-1)  # (F, 2) both
        expert[free] = best[:, 0]
        # The price at which the second best expert is as good, and a little more.
        paid[free] = price[best[:, 0]] + value[:, 0] - value[:, -1] + bid
        expert = expert.masked_fill(~take_best(paid, expert, capacity), experts)
        # A full expert costs what its cheapest place has cost.
        load = torch.zeros(experts + 1, dtype=torch.long, device=scores.device).index_add(
            0, expert, torch.ones_like(expert)
        )
        lowest = paid.new_full((experts + 1,), float("inf")).scatter_reduce(0, expert, paid, "amin")
        price = torch.where(load[:-1] == places, lowest[:-1], price)
        bid = bid * BID_GROWTH
    return expert[:tokens]
