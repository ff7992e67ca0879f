"""Hecto: experts that differ in kind; the last ones are recurrent, the others feed-forwards.

    s_t = GRU(W_in x_t, s_{t-1}) at the tokens t of a row that have the expert        E(x_t) = W_out s_t

s has r numbers, and tokens with other experts, or padding, leave it as it is: an expert reads its own tokens in their
order. A router that decides per sequence, as the paper's, hands it the row whole. An output is weighed as those of
feed-forwards are. What is computed follows the rows that have the expert.

Of packed documents each is read by itself. While decoding, the state goes on from that of the cached tokens, which
`context.remember` keeps; the paper's recurrent expert reads a whole text to classify it.

Source: Hecto: Modular Sparse Experts for Adaptive and Interpretable Reasoning, arXiv:2506.22919.
"""

import math
from dataclasses import replace

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import PositiveInt
from ..decisions import Decision, ExpertAssignment
from ..expert_banks import run_assignment
from ..layer_spec import MoELayerSpec
from ..registry import register_experts
from ..routing import Experts
from ..routing_context import ACTIVE_CONTEXT, RoutingContext
from ..stacked_experts import StackedExperts


@register_experts("hecto")
class HectoExperts(Experts):
    """Feed-forward experts, and recurrent ones after them.

    Args:
        num_recurrent (`int`, *optional*, defaults to 1): how many of the experts are recurrent.
        recurrent_size (`int`, *optional*, defaults to what has most of a feed-forward expert's parameters): r.

    Raises:
        ValueError: if no expert would be a feed-forward; for routers that mix or merge experts, and where experts do
            not run once on the tokens of a decoder, see [`Experts`].
    """

    reads_rows = True

    def __init__(
        self,
        config,
        spec: MoELayerSpec,
        *,
        num_recurrent: PositiveInt = 1,
        recurrent_size: PositiveInt | None = None,
    ):
        super().__init__()
        if num_recurrent >= spec.num_experts:
            raise ValueError(
                f"Layer {spec.layer_idx}: num_recurrent={num_recurrent} leaves no feed-forward among num_experts="
                f"{spec.num_experts}."
            )
        self.num_experts = spec.num_experts
        self.site = f"{spec.site}.recurrent"
        size = recurrent_size or _equal_size(spec)
        self.feed_forwards = StackedExperts(config, replace(spec, num_experts=spec.num_experts - num_recurrent))
        self.recurrent = nn.ModuleList(RecurrentExpert(spec.hidden_size, size) for _ in range(num_recurrent))

    def initialize(self, std: float) -> None:
        for expert in self.recurrent:
            expert.initialize(std)

    def parameters_per_run(self) -> list[float]:
        recurrent = [float(sum(p.numel() for p in expert.parameters())) for expert in self.recurrent]
        return self.feed_forwards.parameters_per_run() + recurrent

    def forward(self, hidden_states: torch.Tensor, decision: Decision) -> torch.Tensor:  # type: ignore[override]
        context = ACTIVE_CONTEXT.get()
        if context is None:
            context = RoutingContext.all_text(hidden_states[None])
        if not isinstance(decision, ExpertAssignment):
            raise ValueError(
                f"The experts 'hecto' read tokens in their order, and a {type(decision).__name__} mixes tokens or "
                "experts: choose a router that assigns experts, such as 'sequence'."
            )
        first = self.feed_forwards.num_experts
        index, weight = decision.expert_index, decision.expert_weight  # (T, K) both
        own = index < first
        assignment = ExpertAssignment(index.masked_fill(~own, first), weight.masked_fill(~own, 0.0), first)
        output = run_assignment(self.feed_forwards, hidden_states, assignment)
        sequences = hidden_states.view(*context.token_mask.shape, -1)  # (B, S, d)
        past = context.past(self.site)  # (B, n, R, r)
        states = []
        for number, expert in enumerate(self.recurrent):
            has_it = index == first + number
            used = has_it.any(-1)  # (T,)
            start = sequences.new_zeros(len(sequences), expert.size) if past is None else past[:, -1, number]
            state = expert.read(sequences, used.view(sequences.shape[:2]), start, context.documents)  # (B, S, r)
            token = torch.where(used)[0]
            made = expert.write(state.flatten(0, 1)[token]) * (weight * has_it).sum(-1)[token, None]
            output = output.index_add(0, token, made.to(output.dtype))
            states.append(state)
        context.remember(self.site, torch.stack(states, 2))
        return output


class RecurrentExpert(nn.Module):
    """A GRU between two linear maps.

    Args:
        hidden_size (`int`): d.
        size (`int`): r.
    """

    def __init__(self, hidden_size: int, size: int):
        super().__init__()
        self.size = size
        self.in_proj = nn.Linear(hidden_size, size, bias=False)
        self.cell = nn.GRU(size, size, batch_first=True)
        self.write = nn.Linear(size, hidden_size, bias=False)

    def initialize(self, std: float) -> None:
        for projection in (self.in_proj, self.write):
            init.normal_(projection.weight, mean=0.0, std=std)
        for parameter in self.cell.parameters():
            init.uniform_(parameter, -(self.size**-0.5), self.size**-0.5)

    def read(
        self, sequences: torch.Tensor, used: torch.Tensor, start: torch.Tensor, documents: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the state after every token, (B, S, r).

        Args:
            sequences (`torch.Tensor` of shape `(B, S, d)`): what can be read.
            used (`torch.Tensor` of shape `(B, S)`): the tokens that are read.
            start (`torch.Tensor` of shape `(B, r)`): the state before them.
            documents (`torch.Tensor` of shape `(B, S)`, *optional*): which of several texts in its row, of which each
                is read by itself, a token is in.
        """
        rows, length = used.shape
        count = 1 if documents is None else int(documents.max()) + 1  # D
        documents = torch.zeros_like(used, dtype=torch.long) if documents is None else documents.to(used.device)
        numbers = torch.arange(count, device=used.device)
        used = (used[:, None] & (documents[:, None] == numbers[:, None])).flatten(0, 1)  # (B * D, S)
        row = torch.arange(rows, device=used.device).repeat_interleave(count)
        busy = used.any(1)
        busy[0] |= ~busy.any()  # a GRU takes no batch of none; this text has nothing to read
        chosen = torch.where(busy)[0]  # (N,)
        # Tokens that are read come first, so that the states after them are right, and looked up by their number.
        read = used[chosen].cumsum(1)  # (N, S)
        longest = max(1, int(read[:, -1].max()))
        order = (~used[chosen]).long().argsort(dim=1, stable=True)[:, :longest]
        inputs = self.in_proj(sequences[row[chosen, None], order])  # (N, longest, r)
        before = start[row].to(inputs.dtype)  # (B * D, r)
        after, _ = self.cell(inputs, before[None, chosen].contiguous())
        states = torch.cat([before[chosen, None], after], 1)  # (N, longest + 1, r)
        states = states.gather(1, read[..., None].expand(-1, -1, self.size))  # (N, S, r)
        states = before[:, None].repeat(1, length, 1).index_copy(0, chosen, states).unflatten(0, (rows, count))
        return states.gather(1, documents[:, None, :, None].expand(-1, 1, -1, self.size))[:, 0]


def _equal_size(spec: MoELayerSpec) -> int:
    """Return the largest r at which a recurrent expert, 2 d r + 6 r^2, is no larger than a feed-forward."""
    weights = (3 if spec.gated else 2) * spec.hidden_size * spec.expert_intermediate_size
    return max(1, (math.isqrt(4 * spec.hidden_size**2 + 24 * weights) - 2 * spec.hidden_size) // 12)
